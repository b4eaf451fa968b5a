"""Rows as tokens, in one file that is mapped into memory: made once, kept in a cache, taken from there by later runs.

A list of Python numbers takes 8 to 36 bytes a token, a run that tokenises a million rows anew loses minutes. Here a
token takes 4 bytes, and pages of the file that nobody reads take no memory. Small data sets stay in memory, in the
same form, and are not cached. The file, little-endian:

    magic [16], rows u64, tokens u64, bytes of remarks u64, sha256 [32] of all that follows and the three numbers
    tokens int32 [tokens]: the token's id where the loss counts it, else -1 - id; a zero more where their number is odd
    ends int64 [rows]: where each row's tokens end
    trained, cut int32 [rows]: tokens that the loss counts, tokens that were lost; odd uint8 [rows]: 1 with a remark
    remarks: JSON, {"rows": [[number, text]], "warnings": [text]}

It is written beside its final name and renamed, and opened only if its size and its digest are right.
"""

import errno
import hashlib
import json
import mmap
import os
import struct
import tempfile
import time
from array import array
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from io import BytesIO
from itertools import accumulate
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple, overload

import numpy as np
from numpy.typing import NDArray

from smidgen.data.layouts import Row
from smidgen.data.render import IGNORED, Example, Renderer
from smidgen.data.rows import Rows
from smidgen.events import Note, Report, Warned, silent

__all__ = ["Examples", "tokenise"]

_MAGIC = b"smidgen-tokens-1"
_HEAD = struct.Struct("<16sQQQ32s")
_COUNTS = struct.Struct("<QQQ")
_CACHED_FROM_TOKENS = 1 << 20  # less is tokenised anew in seconds
_REMARKS = 50  # are kept word for word
_CHUNK_BYTES, _CHUNK_ROWS = 1 << 20, 1 << 16
_LEFTOVER_S = 86_400
_MAPPED_BYTES = 1 << 24  # of the file are in memory at most, by and large, whatever its size
_MAPPED_AROUND_BYTES = 1 << 16  # what Linux maps around a page that is touched
_NO_ROOM = {errno.ENOSPC, getattr(errno, "EDQUOT", errno.ENOSPC), errno.EACCES, errno.EPERM, errno.EROFS, errno.EFBIG,
            errno.ENOTDIR, errno.EEXIST}  # fmt: skip


class _Store(NamedTuple):
    """The parts of the file, see above. digest: its sha256."""

    tokens: NDArray[np.int32]
    ends: NDArray[np.int64]
    trained: NDArray[np.int32]
    cut: NDArray[np.int32]
    odd: NDArray[np.uint8]
    remarks: dict[str, Any]
    digest: bytes
    mapped: mmap.mmap | None


class Examples(Sequence[Example]):
    """Tokenised rows, or some of them in their order; each is made when it is asked for."""

    def __init__(self, store: _Store, rows: Rows, index: NDArray[np.int32] | None = None) -> None:
        self._store, self._rows = store, rows
        self._index = np.arange(len(rows), dtype=np.int32) if index is None else index
        self._touched_bytes = 0

    @property
    def lengths(self) -> NDArray[np.int32]:
        """int32 [N]: tokens of each row."""
        ends = self._store.ends
        lengths = np.empty(len(ends), np.int32)
        lengths[:1] = ends[:1]
        np.subtract(ends[1:], ends[:-1], out=lengths[1:], casting="same_kind")
        return lengths[self._index]

    @property
    def cut_tokens(self) -> NDArray[np.int32]:
        """int32 [N]: tokens that each row lost."""
        return self._store.cut[self._index]

    @property
    def trained_tokens(self) -> NDArray[np.int32]:
        """int32 [N]: tokens of each row that the loss counts."""
        return self._store.trained[self._index]

    @property
    def odd(self) -> NDArray[np.bool_]:
        """bool [N]: rows with a remark."""
        return self._store.odd[self._index] != 0

    def remarks(self) -> Iterator[tuple[int, str]]:
        """(number of the row here, remark): those of the first 50 rows that were remarked on."""
        numbers = {int(row): number for number, row in enumerate(self._index)} if self._store.remarks["rows"] else {}
        for row, text in self._store.remarks["rows"]:
            if row in numbers:
                yield numbers[row], text

    def where(self, number: int) -> str:
        return self._rows.where(int(self._index[number]))

    def hashes(self) -> NDArray[np.uint8]:
        """uint8 [N, 16]: see Rows.hashes."""
        return self._rows.hashes[self._index]

    def select(self, chosen: NDArray[np.bool_]) -> "Examples":
        """The rows where `chosen`, bool [N], is true."""
        return self if chosen.all() else Examples(self._store, self._rows, self._index[chosen])

    def counts_in(self, parts: Sequence[int]) -> tuple[int, ...]:
        """How many of these rows come from each of the stretches of `parts` rows that all rows consist of."""
        edges = np.searchsorted(self._index, np.cumsum([0, *parts]))
        return tuple(int(count) for count in np.diff(edges))

    def digest(self) -> bytes:
        """Changes with every token and label of these rows, not with where they come from."""
        digest = hashlib.sha256(self._store.digest)
        for start in range(0, len(self), _CHUNK_ROWS):
            digest.update(self._index[start : start + _CHUNK_ROWS].astype("<i8").data)
        return digest.digest()

    def _coded(self, number: int) -> NDArray[np.int32]:
        """Of the row with this number in the store."""
        tokens, ends, mapped = self._store.tokens, self._store.ends, self._store.mapped
        coded = tokens[ends[number - 1] if number else 0 : ends[number]]
        self._touched_bytes += _MAPPED_AROUND_BYTES + coded.nbytes
        if mapped is not None and self._touched_bytes > _MAPPED_BYTES and hasattr(mmap, "MADV_DONTNEED"):
            mapped.madvise(mmap.MADV_DONTNEED)
            self._touched_bytes = 0
        return coded

    def __len__(self) -> int:
        return len(self._index)

    @overload
    def __getitem__(self, index: int) -> Example: ...
    @overload
    def __getitem__(self, index: slice) -> list[Example]: ...
    def __getitem__(self, index: int | slice) -> Example | list[Example]:
        if isinstance(index, slice):
            return [self[number] for number in range(len(self))[index]]
        number = int(self._index[index])
        coded = self._coded(number)
        trained = coded >= 0
        ids = np.where(trained, coded, -1 - coded).tolist()
        labels = np.where(trained, coded, IGNORED).tolist()
        cut = int(self._store.cut[number])
        return Example(ids, labels, cut > 0, self.where(index), cut)


def tokenise(
    rows: Rows,
    renderer: Renderer,
    *,
    chat: bool = True,
    edits: str = "",
    odd: Callable[[Row], str] = lambda row: "",
    cache: Path | None = None,
    report: Report = silent,
) -> Examples:
    """The rows as the renderer has them, from the folder `cache` if they are there, else they are put there.

    chat: whether some rows have turns. edits: what was done to the rows after they were hashed. odd: what is remarkable
    about a row, "" if nothing is. Where the cache cannot be written that is said, and the rows are kept in memory.
    Raises DataError as the renderer.
    """
    if cache is None or not len(rows):
        return Examples(_write(rows, renderer, odd, None, report), rows)
    key = hashlib.sha256(f"{edits}{renderer.fingerprint(chat=chat)}".encode())
    key.update(rows.hashes.data)
    target = cache / f"{key.hexdigest()}.tokens"
    store = _open(target, report)
    if store is not None:
        renderer.warn_again(store.remarks["warnings"])
        report(Note(f"the tokens of {len(rows):,} rows are taken from the cache ({target})"))
        return Examples(store, rows)
    try:
        store = _write(rows, renderer, odd, target, report)
    except OSError as error:
        if error.errno not in _NO_ROOM:
            raise  # of the data files
        report(Warned(f"tokens cannot be cached in {cache} ({error.strerror}): this run keeps them in memory"))
        store = _write(rows, renderer, odd, None, report)
    return Examples(store, rows)


def _write(rows: Rows, renderer: Renderer, odd: Callable[[Row], str], target: Path | None, report: Report) -> _Store:
    """The rows' tokens, in memory; of a large data set in the file `target`, if there is one."""
    ends, trained, cut, marks = array("q"), array("i"), array("i"), bytearray()
    remarks: list[tuple[int, str]] = []

    def noticed() -> Iterator[Row]:
        for number, row in enumerate(rows):
            remark = odd(row)
            marks.append(bool(remark))
            if remark and len(remarks) < _REMARKS:
                remarks.append((number, remark))
            yield row

    with _Sink(target) as sink:
        total = 0
        for example in renderer.render_each(noticed(), len(rows), report):
            ids, labels = np.array(example.input_ids, np.int32), np.array(example.labels, np.int32)
            counted = labels != IGNORED
            sink.write(np.where(counted, ids, -1 - ids).astype("<i4").tobytes())
            total += len(ids)
            ends.append(total)
            trained.append(int(np.count_nonzero(counted)))
            cut.append(example.cut_tokens)
        said = json.dumps({"rows": remarks, "warnings": renderer.warnings}).encode()
        sink.write(bytes(4 * (total % 2)))
        for values, kind in ((ends, "<i8"), (trained, "<i4"), (cut, "<i4")):
            sink.write(np.asarray(values).astype(kind, copy=False).data)
        sink.write(bytes(marks) + said)
        buffer = sink.finish(len(rows), total, len(said))
    if target is not None and sink.path is not None:
        report(Note(f"tokens are kept for later runs in {target} ({len(buffer) / 1e6:,.0f} MB)"))
    return _parse(buffer)


class _Sink:
    """Where the file grows: in memory, and on disk from _CACHED_FROM_TOKENS tokens on where there is a `target`."""

    def __init__(self, target: Path | None) -> None:
        self._target, self._file, self._digest = target, BytesIO(), hashlib.sha256()
        self.path: Path | None = None  # of the file that is not finished
        self._file.write(bytes(_HEAD.size))

    def __enter__(self) -> "_Sink":
        return self

    def __exit__(self, *error: object) -> None:
        self._file.close()
        if self.path is not None:
            self.path.unlink(missing_ok=True)

    def write(self, content: bytes | memoryview) -> None:
        self._digest.update(content)
        self._file.write(content)
        if self.path is None and self._target is not None and self._file.tell() > 4 * _CACHED_FROM_TOKENS:
            self._move_to_disk(self._target.parent)

    def finish(self, *counts: int) -> memoryview | mmap.mmap:
        """Write the head; returns the whole file, mapped from its place if it is on disk."""
        self._digest.update(_COUNTS.pack(*counts))
        self._file.seek(0)
        self._file.write(_HEAD.pack(_MAGIC, *counts, self._digest.digest()))
        if self.path is None or self._target is None:
            return memoryview(self._file.getvalue())
        self._file.flush()
        os.fsync(self._file.fileno())
        self.path.replace(self._target)
        return mmap.mmap(self._file.fileno(), 0, access=mmap.ACCESS_READ)

    def _move_to_disk(self, folder: Path) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        for left in folder.glob("*.part"):  # by a process that was killed
            with suppress(OSError):
                if time.time() - left.stat().st_mtime > _LEFTOVER_S:
                    left.unlink()
        content = self._file.getvalue()
        file = tempfile.NamedTemporaryFile(dir=folder, suffix=".part", delete=False)  # noqa: SIM115, closed in __exit__
        self.path, self._file = Path(file.name), file
        file.write(content)


def _open(path: Path, report: Report) -> _Store | None:
    """The file, mapped; None where it is not there, or is damaged, which is said."""
    try:
        with path.open("rb") as file:
            if _is_whole(file):
                return _parse(mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ))
    except OSError:
        return None
    report(Warned(f"{path} is damaged and is made anew"))
    return None


def _is_whole(file: BinaryIO) -> bool:
    head = file.read(_HEAD.size)
    if len(head) < _HEAD.size:
        return False
    magic, *counts, expected = _HEAD.unpack(head)
    if magic != _MAGIC or _layout(*counts)[-1] != os.fstat(file.fileno()).st_size:
        return False
    digest = hashlib.sha256()
    while chunk := file.read(_CHUNK_BYTES):
        digest.update(chunk)
    digest.update(_COUNTS.pack(*counts))
    return digest.digest() == expected


def _layout(rows: int, tokens: int, remarks: int) -> list[int]:
    """Where tokens, ends, trained, cut, odd and remarks begin, and where the file ends, in bytes."""
    sizes = (_HEAD.size, 4 * (tokens + tokens % 2), 8 * rows, 4 * rows, 4 * rows, rows, remarks)
    return list(accumulate(sizes))


def _parse(buffer: memoryview | mmap.mmap) -> _Store:
    _, rows, tokens, remarks, digest = _HEAD.unpack(buffer[: _HEAD.size])
    places = _layout(rows, tokens, remarks)

    def part(number: int, kind: str, count: int) -> np.ndarray:
        return np.frombuffer(buffer, kind, count, places[number])

    return _Store(
        tokens=part(0, "<i4", tokens),
        ends=part(1, "<i8", rows),
        trained=part(2, "<i4", rows),
        cut=part(3, "<i4", rows),
        odd=part(4, "u1", rows),
        remarks=json.loads(bytes(buffer[places[5] : places[6]])),
        digest=digest,
        mapped=buffer if isinstance(buffer, mmap.mmap) else None,
    )
