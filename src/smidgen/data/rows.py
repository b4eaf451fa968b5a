"""Rows that stay in their files: what is kept of each is a hash of its content and its place, 28 bytes.

A data set of a million rows as Python objects takes gigabytes. So files are read once to check and hash every row,
which tells copies apart and which rows are held out, and again by everyone who needs the rows themselves.
"""

import hashlib
import json
from array import array
from collections.abc import Callable, Iterator, Sequence
from itertools import chain, islice
from typing import NamedTuple, overload

import numpy as np
from numpy.typing import NDArray

from smidgen.data.layouts import Row
from smidgen.errors import DataError

__all__ = ["HASH_BYTES", "Hashed", "Rows", "concatenate", "content_hash", "scan"]

HASH_BYTES = 16
Hashed = tuple[bytes, Row]  # (content_hash of the row as its file has it, the row)


class _Places(NamedTuple):
    """names: of files. files int32 [N]: which of them; lines int64 [N]."""

    names: tuple[str, ...]
    files: NDArray[np.int32]
    lines: NDArray[np.int64]


class Rows(Sequence[Row]):
    """The rows that `read` yields, or some of them, in its order; each iteration reads them again.

    Iterating raises DataError where a row is another one than at first. An index costs reading up to there.
    """

    def __init__(
        self,
        read: Callable[[], Iterator[Hashed]],
        hashes: NDArray[np.uint8],
        places: _Places,
        taken: NDArray[np.bool_] | None = None,
    ) -> None:
        """hashes uint8 [N, 16], places: of all that `read` yields. taken, bool [N]: which of it; None: all."""
        self._read, self._all_hashes, self._places = read, hashes, places
        self._taken = np.ones(len(hashes), bool) if taken is None else taken
        self._index = np.flatnonzero(self._taken)

    @property
    def hashes(self) -> NDArray[np.uint8]:
        """uint8 [len(self), 16]: of each row's content as its file has it."""
        return self._all_hashes[self._index]

    def where(self, index: int) -> str:
        """The place of a row, "train.jsonl:12", without reading it."""
        names, files, lines = self._places
        place = self._index[index]
        return f"{names[files[place]]}:{lines[place]}"

    def select(self, chosen: NDArray[np.bool_]) -> "Rows":
        """The rows where `chosen`, bool [len(self)], is true."""
        taken = np.zeros_like(self._taken)
        taken[self._index[chosen]] = True
        return Rows(self._read, self._all_hashes, self._places, taken)

    def hashed(self) -> Iterator[Hashed]:
        """The rows, each with its hash."""
        number, rows = 0, self._read()
        for number, (taken, (digest, row)) in enumerate(zip(self._taken, rows, strict=False), 1):
            if digest != self._all_hashes[number - 1].tobytes():
                raise _changed(row.where)
            if taken:
                yield digest, row
        if number < len(self._taken) or next(rows, None) is not None:
            raise _changed(", ".join(self._places.names))

    def __len__(self) -> int:
        return len(self._index)

    def __iter__(self) -> Iterator[Row]:
        return (row for _, row in self.hashed())

    @overload
    def __getitem__(self, index: int) -> Row: ...
    @overload
    def __getitem__(self, index: slice) -> list[Row]: ...
    def __getitem__(self, index: int | slice) -> Row | list[Row]:
        if isinstance(index, slice):
            return list(islice(self, *index.indices(len(self))))
        return next(islice(self, range(len(self))[index], None))


def scan(read: Callable[[], Iterator[Hashed]]) -> Rows:
    """Read all rows once, so that every one has been checked, and keep their hashes and places."""
    hashes, files, lines = bytearray(), array("i"), array("q")
    names: dict[str, int] = {}
    for digest, row in read():
        name, _, line = row.where.rpartition(":")
        hashes += digest
        files.append(names.setdefault(name, len(names)))
        lines.append(int(line))
    table = np.frombuffer(hashes, np.uint8).reshape(-1, HASH_BYTES)
    return Rows(read, table, _Places(tuple(names), np.array(files, np.int32), np.array(lines, np.int64)))


def concatenate(parts: Sequence[Rows]) -> Rows:
    """The rows of all parts, one part after the other."""
    if len(parts) == 1:
        return parts[0]
    names = tuple(chain.from_iterable(part._places.names for part in parts))
    first = np.cumsum([0, *(len(part._places.names) for part in parts)])
    files = [part._places.files[part._index] + offset for part, offset in zip(parts, first, strict=False)]
    lines = [part._places.lines[part._index] for part in parts]
    places = _Places(names, np.concatenate(files).astype(np.int32), np.concatenate(lines))
    hashes = np.concatenate([part.hashes for part in parts])
    return Rows(lambda: chain.from_iterable(part.hashed() for part in parts), hashes, places)


def content_hash(row: Row) -> bytes:
    """16 bytes that rows share where they have the same messages, text and tools."""
    content = json.dumps([row.messages, row.text, row.tools], sort_keys=True, ensure_ascii=False, default=str)
    return hashlib.sha256(content.encode()).digest()[:HASH_BYTES]


def _changed(where: str) -> DataError:
    return DataError(f"{where} has changed while it was read", cure="start again when nothing writes to it")
