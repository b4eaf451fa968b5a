"""Where training data comes from: a file, a folder, the shipped data set, or the hub, read into rows.

    read_data("rows.jsonl"), read_data("folder/"), read_data("toolcalls"), read_data("owner/name")

Without a validation file, some rows are held out: those with the smallest hash of their content, so that the choice
does not depend on the order of the file and stays the same when the file is read again.
"""

import hashlib
import json
import re
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from itertools import chain
from pathlib import Path
from typing import Any

from smidgen.data.files import SUFFIXES, Record, read_records
from smidgen.data.layouts import Layout, Row, detect_layout
from smidgen.errors import DataError
from smidgen.events import Note, Report, silent

__all__ = ["BUILTIN_DATA", "DataSet", "Row", "read_data"]

BUILTIN_DATA = {"toolcalls": Path(__file__).parent / "toolcalls"}

_SPLITS = {"train": ("train",), "validation": ("valid", "val", "dev"), "test": ("test",)}
_HUB_ID = re.compile(r"[\w.-]+/[\w.-]+")
_HELD_OUT_SHARE, _HELD_OUT_MAX, _HELD_OUT_FROM_ROWS = 0.05, 100, 10


@dataclass(frozen=True)
class DataSet:
    """Rows by split. layout: the name of their layout. notes: what was chosen automatically, as reported."""

    train: list[Row]
    validation: list[Row]
    test: list[Row]
    layout: str
    name: str
    notes: tuple[str, ...] = ()


def read_data(spec: str, *, hold_out: bool = True, report: Report = silent) -> DataSet:
    """Read a file (.json, .jsonl, .csv, .parquet), a folder of train / validation / test files, a built-in name
    ("toolcalls") or a hub id ("owner/name").

    hold_out: where there is no validation split, take 5 % of the training rows for it (at least 1 of 10, at most 100).
    Raises DataError with file and line for anything that cannot be used.
    """
    path = Path(spec).expanduser()
    if path.is_file():
        sources = {"train": read_records(path)}
    elif path.is_dir() or (not path.exists() and spec in BUILTIN_DATA):
        sources = _open_folder(path if path.is_dir() else BUILTIN_DATA[spec])
    elif path.exists():
        raise DataError(f"{path} is neither a file nor a folder")
    elif _HUB_ID.fullmatch(spec) and path.suffix.lower() not in SUFFIXES and not path.parent.is_dir():
        sources = _open_hub(spec)
    else:
        names = ", ".join(BUILTIN_DATA)
        raise DataError(
            f"no data at {spec}",
            expected=f"a file ({', '.join(SUFFIXES)}), a folder, a built-in name ({names}) or a hub id (owner/name)",
            cure="check the path",
        )
    return _build(spec, sources, hold_out, report)


def _build(spec: str, sources: dict[str, Iterator[Record]], hold_out: bool, report: Report) -> DataSet:
    reader = _RowReader()
    rows = {split: list(reader.rows(records)) for split, records in sources.items()}
    for split, found in rows.items():
        if not found:
            raise DataError(f"{spec}: no rows in {split}", expected="one row or more", cure="check how it was written")
    assert reader.layout
    name = Path(spec).name
    data = DataSet(rows.get("train", []), rows.get("validation", []), rows.get("test", []), reader.layout.name, name)
    counts = ", ".join(f"{len(found)} {split}" for split, found in rows.items())
    columns = " + ".join(reader.layout.needs)
    notes = [f"{name}: {counts} rows, layout {data.layout} (columns {columns})"]
    if reader.left_out:
        notes.append(f"{name}: columns left out: {', '.join(sorted(reader.left_out))}")
    if hold_out and not data.validation and len(data.train) >= _HELD_OUT_FROM_ROWS:
        train, validation = _hold_out(data.train)
        data = replace(data, train=train, validation=validation)
        notes.append(f"{name}: no validation file, so {len(validation)} rows are held out (picked by their content)")
    for note in notes:
        report(Note(note))
    return replace(data, notes=tuple(notes))


class _RowReader:
    """Turns records into rows; the first record of all decides the layout."""

    def __init__(self) -> None:
        self.layout: Layout | None = None
        self.left_out: set[str] = set()
        self._first = ""

    def rows(self, records: Iterable[Record]) -> Iterator[Row]:
        for where, record in records:
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
            yield layout.row(record, where)


def _open_folder(folder: Path) -> dict[str, Iterator[Record]]:
    files = sorted(path for path in folder.iterdir() if path.suffix.lower() in SUFFIXES and path.is_file())
    sources: dict[str, Iterator[Record]] = {}
    for split, prefixes in _SPLITS.items():
        if chosen := [path for path in files if path.stem.lower().startswith(prefixes)]:
            sources[split] = chain.from_iterable(map(read_records, chosen))
    if "train" not in sources:
        raise DataError(
            f"{folder} has no training file",
            expected=f"train*, and valid*, val*, dev* or test* if there are any ({', '.join(SUFFIXES)})",
            found=", ".join(path.name for path in files[:8]) or "no data files",
            cure="rename the file, or give the file itself",
        )
    return sources


def _open_hub(spec: str) -> dict[str, Iterator[Record]]:
    try:
        import datasets
    except ImportError:
        raise DataError(
            f"the hub data set {spec} needs the package datasets", cure="pip install 'smidgen[data]'"
        ) from None
    try:
        loaded = datasets.load_dataset(spec)
    except Exception as error:  # the hub, the network and the data set's files each fail with their own kinds
        lines = str(error).splitlines() or [type(error).__name__]
        raise DataError(
            f"the data set {spec} could not be had from the hub",
            found=lines[0][:200],
            cure="check the name and the network, or give a file; nothing of that name is on this disk either",
        ) from None
    sources: dict[str, Iterator[Record]] = {}
    for split, prefixes in _SPLITS.items():
        for name in loaded:
            if str(name).startswith(prefixes) and split not in sources:
                sources[split] = _number_rows(loaded[name], f"{spec} {name}")
    if "train" not in sources:
        raise DataError(f"the data set {spec} has no split named train", found=", ".join(map(str, loaded)))
    return sources


def _number_rows(rows: Iterable[Any], place: str) -> Iterator[Record]:
    for number, row in enumerate(rows, 1):
        yield f"{place}:{number}", dict(row)


def _hold_out(rows: list[Row]) -> tuple[list[Row], list[Row]]:
    """(train, held out). Rows that occur once go first: a held-out row should not be trained on elsewhere."""
    hashes = [_content_hash(row) for row in rows]
    count = Counter(hashes)
    wanted = max(1, min(_HELD_OUT_MAX, round(_HELD_OUT_SHARE * len(rows))))
    ranked = sorted(range(len(rows)), key=lambda index: (count[hashes[index]] > 1, hashes[index], index))
    chosen = set(ranked[:wanted])
    train = [row for index, row in enumerate(rows) if index not in chosen]
    return train, [rows[index] for index in sorted(chosen)]


def _content_hash(row: Row) -> str:
    content = json.dumps([row.messages, row.text, row.tools], sort_keys=True, ensure_ascii=False, default=str)
    return hashlib.sha256(content.encode()).hexdigest()
