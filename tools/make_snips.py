"""Write the data of recipes/smollm2-snips.yaml: a request -> its intent and slots as one line of JSON, as chat rows.

    git clone --depth 1 https://github.com/sonos/nlu-benchmark
    python tools/make_snips.py nlu-benchmark snips        # writes snips/{train,valid,test}.jsonl

The source (CC0-1.0) has seven intents, each with about 2,000 requests to train on and 100 to test on. Of each the first
300 are train rows, the next 30 valid rows; all that are meant for testing are test rows. Intents take turns, so that
the first rows of a file have all of them. A request is there in pieces, {"text": ..., "entity": SLOT}; a slot that has
several becomes a list.
"""

import argparse
import json
import sys
from collections.abc import Iterator
from itertools import zip_longest
from pathlib import Path
from typing import Any

SYSTEM = "Extract the intent and slots of the request as one line of JSON."
TRAIN_ROWS, VALID_ROWS = 300, 30  # of each intent


def read_requests(file: Path) -> list[list[dict[str, str]]]:
    """The pieces of each request of a file. Some files are not UTF-8, and Latin-1 then."""
    content = file.read_bytes()
    try:
        text = content.decode("utf-8-sig")
    except UnicodeDecodeError:
        text = content.decode("latin-1")
    (requests,) = json.loads(text).values()
    return [request["data"] for request in requests]


def row_of(intent: str, pieces: list[dict[str, str]]) -> dict[str, Any]:
    """One request as a chat row; runs of blanks become one."""
    values: dict[str, list[str]] = {}
    for piece in pieces:
        if "entity" in piece:
            values.setdefault(piece["entity"], []).append(" ".join(piece["text"].split()))
    slots = {name: found if len(found) > 1 else found[0] for name, found in sorted(values.items())}
    turns = {
        "system": SYSTEM,
        "user": " ".join("".join(piece["text"] for piece in pieces).split()),
        "assistant": json.dumps({"intent": intent, "slots": slots}, ensure_ascii=False),
    }
    return {"messages": [{"role": role, "content": content} for role, content in turns.items()]}


def in_turns(parts: list[list[dict[str, Any]]]) -> Iterator[dict[str, Any]]:
    """The first row of each part, then the second of each, and so on."""
    return (row for rows in zip_longest(*parts) for row in rows if row is not None)


def make(source: Path) -> dict[str, list[dict[str, Any]]]:
    """split -> its rows. source: the clone, or the folder in it that has a folder for each intent."""
    found = {file.parent.name: file for file in sorted(source.rglob("train_*_full.json"))}
    if not found:
        sys.exit(f"{source}: no train_INTENT_full.json in it; give a clone of github.com/sonos/nlu-benchmark")
    splits: dict[str, list[list[dict[str, Any]]]] = {"train": [], "valid": [], "test": []}
    for intent, file in found.items():
        rows = [row_of(intent, pieces) for pieces in read_requests(file)]
        tests = [row_of(intent, pieces) for pieces in read_requests(file.with_name(f"validate_{intent}.json"))]
        splits["train"].append(rows[:TRAIN_ROWS])
        splits["valid"].append(rows[TRAIN_ROWS : TRAIN_ROWS + VALID_ROWS])
        splits["test"].append(tests)
    return {name: list(in_turns(parts)) for name, parts in splits.items()}


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("source", type=Path, help="a clone of github.com/sonos/nlu-benchmark")
    parser.add_argument("folder", type=Path, help="where the files go; made if it is not there")
    given = parser.parse_args()
    splits = make(given.source)
    given.folder.mkdir(parents=True, exist_ok=True)
    for split, rows in splits.items():
        lines = (json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
        (given.folder / f"{split}.jsonl").write_text("".join(lines), encoding="utf-8")
        print(f"{given.folder / split}.jsonl: {len(rows):,} rows")
