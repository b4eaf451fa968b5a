"""Where training data comes from: files, folders, the shipped data set, or the hub, read into rows.

    read_data("rows.jsonl"), read_data("folder/"), read_data("toolcalls"), read_data("owner/name"), read_data([a, b])

Without a validation file, some rows are held out: those with the smallest hash of their content, so that the choice
does not depend on the order of the file and stays the same when the file is read again.
"""

import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import chain, islice
from pathlib import Path
from typing import Any

import numpy as np

from smidgen.data.edits import PLACEHOLDERS_SHOWN, Edits, placeholders_in
from smidgen.data.files import SUFFIXES, Record, read_records, whole_in_memory
from smidgen.data.hub import HUB_DATA, open_hub
from smidgen.data.layouts import Layout, Row, detect_layout
from smidgen.data.rows import HASH_BYTES, Hashed, Rows, concatenate, content_hash, first_alike, scan
from smidgen.errors import DataError
from smidgen.events import Note, Report, Warned, silent

__all__ = ["BUILTIN_DATA", "DataSet", "Row", "as_specs", "read_data", "warn_of_copies"]

BUILTIN_DATA = {"toolcalls": Path(__file__).parent / "toolcalls"}

_SPLITS = {"train": ("train",), "validation": ("valid", "val", "dev"), "test": ("test",)}
_HUB_ID = re.compile(r"[\w.-]+/[\w.-]+(:[\w.-]*){0,2}")
_HELD_OUT_SHARE, _HELD_OUT_MAX, _HELD_OUT_FROM_ROWS = 0.05, 100, 10
_CHUNK_ROWS = 1 << 16  # looked up at once: np.isin takes several times its rows' memory
_Readers = dict[str, Callable[[], Iterator[Record]]]  # by split


@dataclass(frozen=True)
class DataSet:
    """Rows by split. layout: the names of their layouts. notes: what was chosen automatically, as reported.
    placeholders: names that the rows' texts had in {{ }}, see data.edits.

    names, parts: of each data set that was given, and its number of training rows; they follow one another.
    """

    train: Rows
    validation: Rows
    test: Rows
    layout: str
    names: tuple[str, ...]
    parts: tuple[int, ...]
    notes: tuple[str, ...] = ()
    placeholders: frozenset[str] = frozenset()


def as_specs(data: str | Path | Sequence[str | Path]) -> list[str]:
    """One data set or several, as a list."""
    return [str(data)] if isinstance(data, (str, Path)) else [str(spec) for spec in data]


def read_data(
    data: str | Sequence[str],
    *,
    hold_out: bool = True,
    limit: int | None = None,
    edits: Edits = Edits(),  # noqa: B008, it cannot be changed
    report: Report = silent,
) -> DataSet:
    """Read files (.json, .jsonl, .csv, .parquet), folders of train / validation / test files, built-in names
    ("toolcalls", "alpaca", ...) or hub ids ("owner/name", "owner/name:subset:split"), one or several.

    hold_out: where a data set has no validation split, take 5 % of its training rows for it (at least 1 of 10, at most
    100). limit: only the first training rows of each. Every row is checked and none is kept (data.rows). Raises
    DataError with file and line for anything that cannot be used.
    """
    sets = [_read_one(spec, hold_out, limit, edits, report) for spec in as_specs(data)]
    layouts = dict.fromkeys(one.layout for one in sets)
    found = DataSet(
        concatenate([one.train for one in sets]),
        concatenate([one.validation for one in sets]),
        concatenate([one.test for one in sets]),
        ", ".join(layouts),
        tuple(one.names[0] for one in sets),
        tuple(len(one.train) for one in sets),
        tuple(chain.from_iterable(one.notes for one in sets)),
        frozenset().union(*(one.placeholders for one in sets)),
    )
    for what, rows in (("held-out", found.validation), ("test", found.test)):
        warn_of_copies(rows, what, found.train, report)
    return found


def _read_one(spec: str, hold_out: bool, limit: int | None, edits: Edits, report: Report) -> DataSet:
    readers, name = _open(spec, report), Path(spec).name
    reader = _RowReader(edits)
    counts = {"train": limit}
    rows = {split: scan(partial(reader.rows, read, counts.get(split))) for split, read in readers.items()}
    for split, found in rows.items():
        if not found:
            raise DataError(f"{spec}: no rows in {split}", expected="one row or more", cure="check how it was written")
    assert reader.layout
    said = ", ".join(f"{len(found)} {split}" for split, found in rows.items())
    columns = " + ".join(reader.layout.needs)
    notes = [f"{name}: {said} rows, layout {reader.layout.name} (columns {columns})"]
    if reader.left_out:
        notes.append(f"{name}: columns left out: {', '.join(sorted(reader.left_out))}")
    train = rows["train"]
    nothing = train.select(np.zeros(len(train), bool))
    validation = rows.get("validation", nothing)
    copies = _copies(train)
    if copied := int(copies.sum()):
        notes.append(f"{name}: {copied} training rows are copies of another one")
    if hold_out and not validation and len(train) >= _HELD_OUT_FROM_ROWS:
        chosen = _held_out(train, copies)
        validation, train = train.select(chosen), train.select(~chosen)
        notes.append(f"{name}: no validation file, so {len(validation)} rows are held out (picked by their content)")
    if edits.system is not None and reader.layout.name == "text":
        notes.append(f"{name}: rows of plain text have no system message, so the one that is given changes nothing")
    if reader.unfilled:
        names = ", ".join("{{" + each + "}}" for each in sorted(reader.unfilled)[:PLACEHOLDERS_SHOWN])
        notes.append(f"{name}: placeholders are trained on as they stand ({names}); --fill NAME=TEXT fills them")
    for note in notes:
        report(Note(note))
    test = rows.get("test", nothing)
    return DataSet(
        train, validation, test, reader.layout.name, (name,), (len(train),), tuple(notes),
        frozenset(reader.placeholders),
    )  # fmt: skip


def _open(spec: str, report: Report) -> _Readers:
    path = Path(spec).expanduser()
    if path.is_file():
        if nbytes := whole_in_memory(path):
            report(Note(f"{path.name} is one JSON list, {nbytes / 1e6:,.0f} MB, and is read whole; .jsonl is not"))
        return {"train": partial(read_records, path)}
    if path.is_dir() or (not path.exists() and spec in BUILTIN_DATA):
        return _open_folder(path if path.is_dir() else BUILTIN_DATA[spec])
    if path.exists():
        raise DataError(f"{path} is neither a file nor a folder")
    is_hub_id = _HUB_ID.fullmatch(spec) and path.suffix.lower() not in SUFFIXES and not path.parent.is_dir()
    if is_hub_id or spec in HUB_DATA:
        return open_hub(spec, _SPLITS, report)
    names = ", ".join((*BUILTIN_DATA, *HUB_DATA))
    raise DataError(
        f"no data at {spec}",
        expected=f"a file ({', '.join(SUFFIXES)}), a folder, a built-in name ({names}) or a hub id (owner/name)",
        cure="check the path",
    )


class _RowReader:
    """Turns records into rows; the first record of all decides the layout. placeholders: names of them before they are
    filled; unfilled: those that are left then.
    """

    def __init__(self, edits: Edits) -> None:
        self.layout: Layout | None = None
        self.left_out: set[str] = set()
        self.placeholders: set[str] = set()
        self.unfilled: set[str] = set()
        self._edits = edits
        self._first = ""

    def rows(self, read: Callable[[], Iterator[Record]], limit: int | None) -> Iterator[Hashed]:
        """The rows as they are to be trained on, each with the hash of what its file has."""
        for where, record in islice(read(), limit):
            row = self._row(where, record)
            edited = self._edits.apply(row)
            self.placeholders |= placeholders_in(self._edits.with_system(row))
            self.unfilled |= placeholders_in(edited)
            yield content_hash(row), edited

    def _row(self, where: str, record: Mapping[str, Any]) -> Row:
        if self.layout is None:
            self.layout, self._first = detect_layout(record, where), where
        layout = self.layout
        if not layout.matches(record):
            raise DataError(
                f"{where} has another layout than {self._first}",
                expected=f"columns {' + '.join(layout.needs)} ({layout.name})",
                found=", ".join(map(str, record)) or "no columns",
                cure="keep rows of one layout in a data set",
            )
        self.left_out.update(str(key) for key in record.keys() - {*layout.needs, *layout.may_have})
        return layout.row(record, where)


def _open_folder(folder: Path) -> _Readers:
    files = sorted(path for path in folder.iterdir() if path.suffix.lower() in SUFFIXES and path.is_file())
    sources: _Readers = {}
    for split, prefixes in _SPLITS.items():
        if chosen := [path for path in files if path.stem.lower().startswith(prefixes)]:
            sources[split] = partial(_read_files, chosen)
    if "train" not in sources:
        raise DataError(
            f"{folder} has no training file",
            expected=f"train*, and valid*, val*, dev* or test* if there are any ({', '.join(SUFFIXES)})",
            found=", ".join(path.name for path in files[:8]) or "no data files",
            cure="rename the file, or give the file itself",
        )
    return sources


def _read_files(paths: Iterable[Path]) -> Iterator[Record]:
    return chain.from_iterable(map(read_records, paths))


def _copies(rows: Rows) -> np.ndarray:
    """bool [N]: the rows whose content another row has too."""
    first = first_alike(rows.hashes)
    copies = first != np.arange(len(first), dtype=np.int32)
    copies[first[copies]] = True
    return copies


def warn_of_copies(rows: Rows, what: str, train: Rows, report: Report) -> None:
    """Rows that are trained on say little of new ones. They stay where they were put: there may be no others."""
    measured, trained = _as_keys(rows), _as_keys(train)
    if not len(measured):
        return
    parts = [trained[start : start + _CHUNK_ROWS] for start in range(0, len(trained), _CHUNK_ROWS)]
    copied = np.flatnonzero(np.isin(measured, np.concatenate([part[np.isin(part, measured)] for part in parts])))
    if not len(copied):
        return
    first = copied[0]
    other = np.flatnonzero(trained == measured[first])[0]
    report(
        Warned(
            f"{len(copied):,} of {len(rows):,} {what} rows are training rows too, so their figures flatter"
            f" (first: {rows.where(first)}, the same as {train.where(other)})"
        )
    )


def _held_out(rows: Rows, copies: np.ndarray) -> np.ndarray:
    """bool [N]. Rows that occur once go first: a held-out row should not be trained on elsewhere."""
    wanted = max(1, min(_HELD_OUT_MAX, round(_HELD_OUT_SHARE * len(rows))))
    high, low = np.ascontiguousarray(rows.hashes).view(">u8").T
    chosen = np.zeros(len(rows), bool)
    chosen[np.lexsort((low, high, copies))[:wanted]] = True
    return chosen


def _as_keys(rows: Rows) -> np.ndarray:
    """One number of 16 bytes a row."""
    return np.ascontiguousarray(rows.hashes).view(f"V{HASH_BYTES}").ravel()
