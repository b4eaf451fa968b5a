"""The header of a GGUF file: metadata and the table of tensors, read with every length checked first.

Layout (version 2 and 3, little-endian):
    "GGUF", u32 version, u64 number of tensors, u64 number of metadata entries;
    each entry: key (string), u32 type, value;     string: u64 length, UTF-8;     array: u32 type, u64 count, values;
    each tensor: name (string), u32 number of dimensions, u64 sizes (fastest first), u32 type, u64 offset;
    then, at the next multiple of `general.alignment` (32), the data that the offsets count from.

Written here and not taken from the gguf package, whose reader believes every count in the file: 43 bytes make it
run for ever. Here a count is compared with the bytes that are left before anything is allocated for it.
"""

import math
import struct
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from smidgen.errors import ModelError

__all__ = ["BLOCK_TYPES", "GgufHeader", "GgufTensor", "Metadata", "is_gguf", "read_header"]

# ggml type id -> (name, elements of a block, bytes of a block); these can be decoded.
BLOCK_TYPES: dict[int, tuple[str, int, int]] = {
    0: ("F32", 1, 4),
    1: ("F16", 1, 2),
    2: ("Q4_0", 32, 18),
    3: ("Q4_1", 32, 20),
    6: ("Q5_0", 32, 22),
    7: ("Q5_1", 32, 24),
    8: ("Q8_0", 32, 34),
    10: ("Q2_K", 256, 84),
    11: ("Q3_K", 256, 110),
    12: ("Q4_K", 256, 144),
    13: ("Q5_K", 256, 176),
    14: ("Q6_K", 256, 210),
    30: ("BF16", 1, 2),
}
_OTHER_TYPES = {
    4: "Q4_2", 5: "Q4_3", 9: "Q8_1", 15: "Q8_K", 16: "IQ2_XXS", 17: "IQ2_XS", 18: "IQ3_XXS", 19: "IQ1_S", 20: "IQ4_NL",
    21: "IQ3_S", 22: "IQ2_S", 23: "IQ4_XS", 24: "I8", 25: "I16", 26: "I32", 27: "I64", 28: "F64", 29: "IQ1_M",
    34: "TQ1_0", 35: "TQ2_0", 39: "MXFP4", 40: "NVFP4", 41: "Q1_0",
}  # fmt: skip

_MAGIC = b"GGUF"
_SCALARS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
_STRING, _ARRAY = 8, 9
_MAX_TENSORS = 1_000_000
_MAX_ENTRIES = 100_000
_MAX_STRINGS = 4_000_000  # of one array; the largest vocabularies have 0.3 M tokens and 0.6 M merges
_MAX_STRING_BYTES = 16 << 20
_MAX_NAME_BYTES = 64  # ggml's own limit
_MAX_ALIGNMENT = 1 << 20
_MAX_DIMENSIONS = 4


@dataclass(frozen=True)
class GgufTensor:
    """A tensor by its GGUF name; shape row-major (the file has the fastest first), offset from the file's start."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    offset: int
    nbytes: int


@dataclass(frozen=True)
class GgufHeader:
    version: int
    metadata: "Metadata"
    tensors: dict[str, GgufTensor]


class Metadata:
    """Typed look-ups in the metadata; a value of the wrong type or out of range is a ModelError with the key's name."""

    def __init__(self, path: Path, values: dict[str, Any]) -> None:
        self.path, self.values = path, values

    def __contains__(self, key: str) -> bool:
        return key in self.values

    def _get(self, key: str, default: Any, fits: bool, wanted: str) -> Any:
        if key in self.values:
            if not fits:
                found = repr(self.values[key])
                raise ModelError(f"{self.path}: wrong value of {key}", expected=wanted, found=found[:60])
            return self.values[key]
        if default is ...:
            raise ModelError(f"{self.path} has no {key} in its metadata", expected=wanted)
        return default

    def text(self, key: str, default: Any = ...) -> Any:
        return self._get(key, default, isinstance(self.values.get(key), str), "a string")

    def flag(self, key: str, default: Any = ...) -> Any:
        return self._get(key, default, isinstance(self.values.get(key), bool), "true or false")

    def integer(self, key: str, default: Any = ..., *, low: int = 0, high: int = 2**31 - 1) -> Any:
        value = self.values.get(key)
        fits = isinstance(value, int) and not isinstance(value, bool) and low <= value <= high
        return self._get(key, default, fits, f"an integer from {low} to {high}")

    def number(self, key: str, default: Any = ...) -> Any:
        """A positive, finite number."""
        value = self.values.get(key)
        fits = isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value) and value > 0
        return self._get(key, default, fits, "a positive number")

    def strings(self, key: str, default: Any = ...) -> Any:
        value = self.values.get(key)
        fits = isinstance(value, list) and all(isinstance(item, str) for item in value)
        return self._get(key, default, fits, "an array of strings")

    def numbers(self, key: str, default: Any = ...) -> Any:
        value = self.values.get(key)
        fits = isinstance(value, tuple)
        return self._get(key, default, fits, "an array of numbers")


class _Cursor:
    """Reads forward through a buffer; whatever would pass the end is a ModelError that says what was being read."""

    def __init__(self, path: Path, data: Any) -> None:
        self.path, self.data, self.at = path, memoryview(data), 0

    def bad(self, what: str, **parts: str) -> ModelError:
        return ModelError(f"{self.path}: {what} (byte {self.at})", **parts)

    def need(self, nbytes: int, what: str) -> None:
        left = len(self.data) - self.at
        if nbytes > left:
            raise self.bad(
                f"the file ends in the middle of {what}",
                expected=f"{nbytes} more bytes",
                found=f"{left}",
                cure="it is cut off or damaged: download or copy it again",
            )

    def scalar(self, code: str, what: str) -> Any:
        size = struct.calcsize("<" + code)
        self.need(size, what)
        (value,) = struct.unpack_from("<" + code, self.data, self.at)
        self.at += size
        return value

    def string(self, what: str, limit: int = _MAX_STRING_BYTES) -> str:
        length = self.scalar("Q", what)
        if length > limit:
            raise self.bad(f"{what} is too long", expected=f"at most {limit} bytes", found=str(length))
        self.need(length, what)
        raw = bytes(self.data[self.at : self.at + length])
        self.at += length
        try:
            return raw.decode()
        except UnicodeDecodeError as error:
            raise self.bad(f"{what} is not UTF-8") from error

    def strings(self, count: int, what: str) -> list[str]:
        """The vocabulary: tens of thousands of strings, so one plain loop without a call for each field."""
        data, at, end, result = self.data, self.at, len(self.data), []
        try:
            for _ in range(count):
                start = at + 8
                stop = start + int.from_bytes(data[at:start], "little")
                if start > end or stop > end:
                    self.at = min(at, end)
                    self.need(stop - at, what)
                result.append(str(data[start:stop], "utf-8"))
                at = stop
        except UnicodeDecodeError as error:
            self.at = at
            raise self.bad(f"{what} holds a string that is not UTF-8") from error
        self.at = at
        return result

    def value(self, key: str) -> Any:
        what = f"the value of {key}"
        kind = self.scalar("I", what)
        if kind == _STRING:
            return self.string(what)
        if kind == _ARRAY:
            return self.array(what)
        if kind not in _SCALARS:
            raise self.bad(f"{what} has an unknown type", expected="0 to 12", found=str(kind))
        return self.scalar(_SCALARS[kind], what)

    def array(self, what: str) -> Sequence[Any]:
        """Strings come as a list, numbers as a tuple."""
        kind, count = self.scalar("I", what), self.scalar("Q", what)
        if kind == _STRING:
            if count > _MAX_STRINGS:
                raise self.bad(f"{what} is too long", expected=f"at most {_MAX_STRINGS} strings", found=str(count))
            self.need(8 * count, what)
            return self.strings(count, what)
        if kind not in _SCALARS:
            raise self.bad(f"{what} is an array of an unknown type", expected="numbers or strings", found=str(kind))
        size = struct.calcsize("<" + _SCALARS[kind])
        if count > _MAX_STRINGS:
            raise self.bad(f"{what} is too long", expected=f"at most {_MAX_STRINGS} numbers", found=str(count))
        self.need(count * size, what)
        result = struct.unpack_from(f"<{count}{_SCALARS[kind]}", self.data, self.at)
        self.at += count * size
        return result


def is_gguf(path: Path) -> bool:
    """By what it begins with, whatever its name: Ollama's files have none that tells."""
    try:
        with open(path, "rb") as file:
            return file.read(len(_MAGIC)) == _MAGIC
    except OSError:
        return False


def read_header(path: Path, data: Any) -> GgufHeader:
    """Metadata and tensors of a GGUF file whose bytes are `data`. Raises ModelError for anything that is not right."""
    cursor = _Cursor(path, data)
    if bytes(cursor.data[:4]) != _MAGIC:
        found = repr(bytes(cursor.data[:4]))
        raise ModelError(f"{path} is not a GGUF file", expected="'GGUF' at its start", found=found)
    cursor.at = 4
    version = cursor.scalar("I", "the version")
    if version in (0x02000000, 0x03000000):
        raise ModelError(f"{path} is a big-endian GGUF file", cure="get the usual little-endian file")
    if version not in (2, 3):
        raise ModelError(f"{path}: unknown GGUF version", expected="2 or 3", found=str(version))
    n_tensors, n_entries = cursor.scalar("Q", "the tensor count"), cursor.scalar("Q", "the metadata count")
    # The least an entry can take: empty key, type, one byte; a tensor: name, dimensions, one size, type, offset.
    for count, least, limit, what in (
        (n_entries, 8 + 4 + 1, _MAX_ENTRIES, "metadata entries"),
        (n_tensors, 8 + 4 + 8 + 4 + 8, _MAX_TENSORS, "tensors"),
    ):
        if count > min(limit, (len(cursor.data) - cursor.at) // least):
            raise cursor.bad(f"the file claims {count} {what}, more than can be in it", cure="it is damaged")
    metadata = Metadata(path, _read_metadata(cursor, n_entries))
    alignment = metadata.integer("general.alignment", 32, low=1, high=_MAX_ALIGNMENT)
    if alignment & (alignment - 1):
        raise ModelError(f"{path}: wrong general.alignment", expected="a power of two", found=str(alignment))
    return GgufHeader(version, metadata, _read_tensors(cursor, n_tensors, alignment))


def _read_metadata(cursor: _Cursor, count: int) -> dict[str, Any]:
    values: dict[str, Any] = {}
    for _ in range(count):
        key = cursor.string("a metadata key", limit=65535)
        if key in values:
            raise cursor.bad(f"metadata key {key} comes twice")
        values[key] = cursor.value(key)
    return values


def _read_tensors(cursor: _Cursor, count: int, alignment: int) -> dict[str, GgufTensor]:
    rows = [_read_tensor(cursor) for _ in range(count)]
    start = -(-cursor.at // alignment) * alignment
    tensors: dict[str, GgufTensor] = {}
    end_before, name_before = start, "the header"
    for name, dtype, shape, offset, nbytes in sorted(rows, key=lambda row: row[3]):
        if name in tensors:
            raise ModelError(f"{cursor.path}: tensor {name} comes twice")
        if offset % alignment:
            raise ModelError(f"{cursor.path}: tensor {name} is not aligned", expected=f"{alignment}", found=str(offset))
        at = start + offset
        if at + nbytes > len(cursor.data):
            raise ModelError(
                f"{cursor.path}: tensor {name} ends beyond the file",
                expected=f"{at + nbytes} bytes",
                found=f"{len(cursor.data)}",
                cure="the file is cut off: download or copy it again",
            )
        if at < end_before:
            raise ModelError(f"{cursor.path}: tensor {name} overlaps {name_before}")
        end_before, name_before = at + nbytes, name
        tensors[name] = GgufTensor(name, dtype, shape, at, nbytes)
    return tensors


def _read_tensor(cursor: _Cursor) -> tuple[str, str, tuple[int, ...], int, int]:
    name = cursor.string("a tensor name", limit=_MAX_NAME_BYTES)
    dimensions = cursor.scalar("I", f"tensor {name}")
    if not 1 <= dimensions <= _MAX_DIMENSIONS:
        raise cursor.bad(f"tensor {name} has {dimensions} dimensions", expected=f"1 to {_MAX_DIMENSIONS}")
    sizes = [cursor.scalar("Q", f"tensor {name}") for _ in range(dimensions)]
    kind, offset = cursor.scalar("I", f"tensor {name}"), cursor.scalar("Q", f"tensor {name}")
    if kind not in BLOCK_TYPES:
        known = ", ".join(name for name, _, _ in BLOCK_TYPES.values())
        found = _OTHER_TYPES.get(kind, f"type {kind}")
        raise ModelError(f"{cursor.path}: tensor {name} has a type that is not read", expected=known, found=found)
    dtype, block, block_bytes = BLOCK_TYPES[kind]
    if min(sizes) < 1 or sizes[0] % block:
        raise cursor.bad(f"tensor {name} has a wrong shape {sizes[::-1]}", expected=f"rows of whole blocks of {block}")
    return name, dtype, tuple(sizes[::-1]), offset, math.prod(sizes) // block * block_bytes
