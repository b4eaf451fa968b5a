"""Rows that stay in their files: what is kept of each is a hash of its content and its place, 24 bytes.

A data set of a million rows as Python objects takes gigabytes. So files are read once to check and hash every row,
which tells copies apart and which rows are held out, and again by everyone who needs the rows themselves.
"""

import hashlib
import json
from array import array
from bisect import bisect_right
from collections.abc import Callable, Iterator, Sequence
from itertools import accumulate, chain, islice
from typing import NamedTuple, overload

import numpy as np
from numpy.typing import NDArray

from smidgen.data.layouts import Row
from smidgen.errors import DataError

__all__ = ["HASH_BYTES", "Hashed", "Rows", "concatenate", "content_hash", "first_alike", "scan"]

HASH_BYTES = 16
Hashed = tuple[bytes, Row]  # (content_hash of the row as its file has it, the row)


class _Places(NamedTuple):
    """names: of the files, one after the other. starts: the first row of each. lines uint32 [N]."""

    names: tuple[str, ...]
    starts: tuple[int, ...]
    lines: NDArray[np.uint32]


class Rows(Sequence[Row]):
    """The rows that `read` yields, or some of them, in its order; each iteration reads them again.

    Iterating raises DataError where a row is another one than at first. An index costs reading up to there.
    """

    def __init__(
        self,
        read: Callable[[], Iterator[Hashed]],
        hashes: NDArray[np.uint8],
        places: _Places,
        index: NDArray[np.int32] | None = None,
    ) -> None:
        """hashes uint8 [N, 16], places: of all that `read` yields. index: which of it, ascending; None: all."""
        self._read, self._all_hashes, self._places = read, hashes, places
        self._index = np.arange(len(hashes), dtype=np.int32) if index is None else index

    @property
    def hashes(self) -> NDArray[np.uint8]:
        """uint8 [len(self), 16]: of each row's content as its file has it."""
        return self._all_hashes if len(self) == len(self._all_hashes) else self._all_hashes[self._index]

    def where(self, index: int) -> str:
        """The place of a row, "train.jsonl:12", without reading it."""
        names, starts, lines = self._places
        row = self._index[index]
        return f"{names[bisect_right(starts, row) - 1]}:{lines[row]}"

    def select(self, chosen: NDArray[np.bool_]) -> "Rows":
        """The rows where `chosen`, bool [len(self)], is true."""
        return Rows(self._read, self._all_hashes, self._places, self._index[chosen])

    def hashed(self) -> Iterator[Hashed]:
        """The rows, each with its hash."""
        number, rows = 0, self._read()
        chosen = np.zeros(len(self._all_hashes), bool)
        chosen[self._index] = True
        for number, (taken, (digest, row)) in enumerate(zip(chosen, rows, strict=False), 1):
            if digest != self._all_hashes[number - 1].tobytes():
                raise _changed(row.where)
            if taken:
                yield digest, row
        if number < len(chosen) or next(rows, None) is not None:
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
    hashes, lines = bytearray(), array("I")
    names: list[str] = []
    starts: list[int] = []
    for digest, row in read():
        name, _, line = row.where.rpartition(":")
        if not names or name != names[-1]:
            names.append(name)
            starts.append(len(lines))
        hashes += digest
        lines.append(int(line))
    table = np.frombuffer(hashes, np.uint8).reshape(-1, HASH_BYTES)
    return Rows(read, table, _Places(tuple(names), tuple(starts), np.frombuffer(lines, np.uint32)))


def concatenate(parts: Sequence[Rows]) -> Rows:
    """The rows of all parts, one part after the other."""
    if len(parts) == 1:
        return parts[0]
    names = tuple(chain.from_iterable(part._places.names for part in parts))
    offsets = accumulate((0, *map(len, parts)))
    within = (np.searchsorted(part._index, part._places.starts) for part in parts)
    starts = np.concatenate([first + offset for first, offset in zip(within, offsets, strict=False)])
    lines = np.concatenate([part._places.lines[part._index] for part in parts])
    places = _Places(names, tuple(starts.tolist()), lines)
    hashes = np.concatenate([part.hashes for part in parts])
    return Rows(lambda: chain.from_iterable(part.hashed() for part in parts), hashes, places)


def first_alike(hashes: NDArray[np.uint8]) -> NDArray[np.int32]:
    """hashes uint8 [N, 16] -> int32 [N]: for each row the first one with the same hash, itself where it is that."""
    halves = np.ascontiguousarray(hashes).view(np.uint64)
    order = np.lexsort((halves[:, 1], halves[:, 0])).astype(np.int32)  # rows that are alike stay in their order
    begins = np.arange(len(order)) == 0
    for half in halves.T:
        ordered = half[order]
        begins[1:] |= ordered[1:] != ordered[:-1]
    first = np.empty_like(order)
    first[order] = order[begins][np.cumsum(begins, dtype=np.int32) - 1]
    return first


def content_hash(row: Row) -> bytes:
    """16 bytes that rows share where they have the same messages, text and tools."""
    content = json.dumps([row.messages, row.text, row.tools], sort_keys=True, ensure_ascii=False, default=str)
    return hashlib.sha256(content.encode()).digest()[:HASH_BYTES]


def _changed(where: str) -> DataError:
    return DataError(f"{where} has changed while it was read", cure="start again when nothing writes to it")
