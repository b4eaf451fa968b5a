"""Data files to records: .json, .jsonl, .csv and .parquet, each record with the place it came from.

A record is a plain dict as the file has it; what its columns mean is decided in layouts.py. JSON is read with limits
(16 MB a row, 64 levels deep) because data files come from strangers, and row by row, so that an error can name a line.
Rows are yielded as they are read; only a list in .json must be in memory whole.
"""

import codecs
import csv
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from smidgen.errors import DataError, first_line

__all__ = [
    "MAX_DEPTH",
    "MAX_ROW_BYTES",
    "SUFFIXES",
    "TEXT_SUFFIXES",
    "Record",
    "describe",
    "read_records",
    "read_text",
    "whole_in_memory",
]

Record = tuple[str, dict[str, Any]]  # where ("train.jsonl:12"), columns

MAX_ROW_BYTES = 16_000_000
MAX_DEPTH = 64
_LARGE_BYTES = 100_000_000
SUFFIXES = (".json", ".jsonl", ".csv", ".parquet")
TEXT_SUFFIXES = (".txt", ".raw", ".md")  # plain text, which has no rows
_TYPE_NAMES = {
    dict: "an object",
    list: "a list",
    str: "text",
    bool: "true/false",
    int: "a number",
    float: "a number",
    type(None): "null",
}


def read_records(path: Path) -> Iterator[Record]:
    """The records of one file in order. Raises DataError naming file and line (for parquet: file and row)."""
    readers = {".json": _read_json, ".jsonl": _read_jsonl, ".csv": _read_csv, ".parquet": _read_parquet}
    reader = readers.get(path.suffix.lower())
    if reader is None:
        raise DataError(f"{path}: unknown kind of data file", expected=", ".join(SUFFIXES), found=repr(path.suffix))
    try:
        if path.stat().st_size == 0:
            raise DataError(f"{path} is empty", expected="one row of data or more", cure="check how it was written")
        yield from reader(path)
    except OSError as error:
        raise DataError(
            f"{path} cannot be read: {error.strerror or error}", cure="check the path and its rights"
        ) from None


def whole_in_memory(path: Path) -> int:
    """How many bytes of a file are in memory at once to read its rows, where that is many (100 MB); else 0."""
    if path.suffix.lower() != ".json" or path.stat().st_size < _LARGE_BYTES:
        return 0
    with path.open("rb") as file:
        return path.stat().st_size if file.read(1024).removeprefix(codecs.BOM_UTF8).lstrip().startswith(b"[") else 0


def read_text(path: Path) -> str:
    """A plain text file, whole. Raises DataError where it cannot be read or is not UTF-8."""
    try:
        return path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise DataError(f"{path}: byte {error.start}", expected="UTF-8 text") from None
    except OSError as error:
        raise DataError(f"{path} cannot be read: {error.strerror}", expected="a plain text file") from None


def describe(value: object) -> str:
    """What a value is, in a user's words: 'a list', 'a number', 'empty text'."""
    if value == "" and isinstance(value, str):
        return "empty text"
    return _TYPE_NAMES.get(type(value), type(value).__name__)


def _read_jsonl(path: Path) -> Iterator[Record]:
    with path.open("rb") as file:
        number = 0
        while line := file.readline(MAX_ROW_BYTES + 1):
            number += 1
            where = f"{path.name}:{number}"
            if len(line) > MAX_ROW_BYTES:
                raise _too_long(where)
            text = _decode(line, where)
            if text.strip():
                yield where, _as_record(_parse(text, where), where)


def _read_json(path: Path) -> Iterator[Record]:
    """A list of objects; a file that starts with an object holds one object a line."""
    with path.open("rb") as file:
        first = file.read(1024).removeprefix(codecs.BOM_UTF8).lstrip()
    if first.startswith(b"{"):
        yield from _read_jsonl(path)
        return
    text = _decode_file(path)
    body = text.lstrip()
    if body[1:].lstrip().startswith("]"):
        raise DataError(f"{path} is an empty list", expected="one row of data or more", cure="check how it was written")
    if not body.startswith("["):
        yield from _read_jsonl(path)
        return
    decoder, position = json.JSONDecoder(), text.index("[") + 1
    line, counted_to = 1, 0
    while True:
        position = _skip_space(text, position)
        line, counted_to = line + text.count("\n", counted_to, position), position
        where = f"{path.name}:{line}"
        start = position
        try:
            value, position = decoder.raw_decode(text, start)
        except RecursionError:
            raise _too_deep(where) from None
        except json.JSONDecodeError as error:
            found = "the end of the file" if error.pos >= len(text) else error.msg
            raise _malformed(f"{path.name}:{error.lineno}", f"{found} (column {error.colno})") from None
        except ValueError as error:
            raise _malformed(where, str(error)) from None
        if position - start > MAX_ROW_BYTES:
            raise _too_long(where)
        _check_depth(text[start:position], value, where)
        yield where, _as_record(value, where)
        position = _skip_space(text, position)
        if text[position : position + 1] == "]" and not text[position + 1 :].strip():
            return
        if text[position : position + 1] != ",":
            found = repr(text[position : position + 10]) if position < len(text) else "the end of the file"
            raise _malformed(f"{path.name}:{text.count(chr(10), 0, position) + 1}", f"{found} after a row")
        position += 1


def _read_csv(path: Path) -> Iterator[Record]:
    csv.field_size_limit(MAX_ROW_BYTES)
    try:
        with path.open(encoding="utf-8-sig", newline="") as file:
            yield from _csv_records(path, csv.reader(file, strict=True))
    except UnicodeDecodeError:
        _decode_file(path)  # raises the same with its line
        raise


def _csv_records(path: Path, reader: Any) -> Iterator[Record]:
    header: list[str] | None = None
    while True:
        where = f"{path.name}:{reader.line_num + 1}"
        try:
            cells = next(reader, None)
        except csv.Error as error:
            raise DataError(
                f"{where} is not CSV", expected='comma-separated cells, quoted with "', found=str(error)
            ) from None
        if cells is None:
            return
        if not cells:
            continue
        if header is None:
            header = [cell.strip() for cell in cells]
            if len(set(header)) < len(header):
                raise DataError(f"{where} names a column twice", found=", ".join(header), cure="rename one of them")
            continue
        if len(cells) != len(header):
            raise DataError(
                f"{where} does not fit the header",
                expected=f"{len(header)} cells",
                found=str(len(cells)),
                cure='put cells that hold commas or line breaks between double quotes (")',
            )
        yield where, dict(zip(header, cells, strict=True))


def _read_parquet(path: Path) -> Iterator[Record]:
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError:
        raise DataError(f"{path} needs the package pyarrow", cure="pip install 'smidgen[data]'") from None
    number = 0
    try:
        for batch in pyarrow.parquet.ParquetFile(path).iter_batches():
            for record in batch.to_pylist():
                number += 1
                yield f"{path.name}:{number}", record
    except (pyarrow.ArrowException, UnicodeDecodeError) as error:
        first = first_line(error)
        raise DataError(f"{path}, after row {number}: not a readable parquet file", found=first) from None


def _decode(line: bytes, where: str) -> str:
    try:
        return line.decode("utf-8-sig" if where.endswith(":1") else "utf-8")
    except UnicodeDecodeError as error:
        found = "UTF-16" if line[:2] in (b"\xff\xfe", b"\xfe\xff") else f"byte 0x{line[error.start]:02x}"
        raise DataError(f"{where} is not UTF-8", expected="UTF-8", found=found, cure="save the file as UTF-8") from None


def _decode_file(path: Path) -> str:
    content = path.read_bytes()
    try:
        return content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        number = content.count(b"\n", 0, error.start) + 1
        line = content[content.rfind(b"\n", 0, error.start) + 1 :]
        _decode(line, f"{path.name}:{number}")
        raise


def _parse(text: str, where: str) -> object:
    try:
        value = json.loads(text)
    except RecursionError:
        raise _too_deep(where) from None
    except json.JSONDecodeError as error:
        raise _malformed(where, f"{error.msg} (column {error.colno})") from None
    except ValueError as error:  # a whole number of thousands of digits
        raise _malformed(where, str(error)) from None
    _check_depth(text, value, where)
    return value


def _check_depth(text: str, value: object, where: str) -> None:
    # counting brackets is much cheaper than walking the value, and rows with this many are rare
    if text.count("[") + text.count("{") <= MAX_DEPTH:
        return
    level: list[object] = [value]
    for _ in range(MAX_DEPTH):
        level = [child for node in level for child in _children(node)]
        if not level:
            return
    raise _too_deep(where)


def _children(node: object) -> list[object]:
    if isinstance(node, dict):
        return list(node.values())
    return node if isinstance(node, list) else []


def _as_record(value: object, where: str) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise DataError(
            f"{where} is not a row", expected='an object such as {"messages": [...]}', found=describe(value)
        )
    return value


def _skip_space(text: str, position: int) -> int:
    while position < len(text) and text[position] in " \t\r\n":
        position += 1
    return position


def _malformed(where: str, found: str) -> DataError:
    return DataError(
        f"{where} is not valid JSON",
        expected="one object a line (.jsonl) or a list of objects (.json)",
        found=found,
        cure="mend this line",
    )


def _too_long(where: str) -> DataError:
    return DataError(
        f"{where} is too long", expected="at most 16 MB a row", cure="split the row, or put one row on a line"
    )


def _too_deep(where: str) -> DataError:
    return DataError(f"{where} is nested too deep", expected=f"at most {MAX_DEPTH} levels", cure="flatten the row")
