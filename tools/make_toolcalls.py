"""Write the demo data set `toolcalls`: a request in plain English -> one tool call as one line of JSON.

Every row is a phrasing (tools/toolcalls_phrasings.txt) filled with slot values (tools/toolcalls_values.txt). Each value
belongs to one split: an argument value of a validation or test row occurs in no training row, not even under another
tool. Phrasings are shared, so the test rows ask whether the model copies unseen values into the form it learned.

    python tools/make_toolcalls.py            # writes src/smidgen/data/toolcalls/{train,validation,test}.jsonl

The same files come out every time: one fixed seed, and decks that are dealt to the end before they are shuffled again.
"""

import argparse
import json
import random
import string
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

SEED = 20
ROWS = {"train": 640, "validation": 100, "test": 100}
SYSTEM = "Reply with one tool call in JSON."
HERE = Path(__file__).parent
FOLDER = HERE.parent / "src" / "smidgen" / "data" / "toolcalls"

# tool -> its arguments in the order they are written, each with the pool its values come from
TOOLS: dict[str, dict[str, str]] = {
    "set_timer": {"minutes": "minutes", "label": "label"},
    "set_alarm": {"time": "morning", "event": "event"},
    "get_weather": {"city": "city"},
    "send_message": {"to": "name", "text": "text"},
    "call": {"name": "name"},
    "add_item": {"item": "item", "list": "list"},
    "play_music": {"song": "song", "artist": "artist"},
    "book_table": {"place": "place", "people": "people", "time": "evening"},
    "set_light": {"room": "room", "level": "level"},
}


def split_of(index: int) -> str:
    """Which split the index-th value of a pool belongs to: 5 of 7 to train, 1 to validation, 1 to test."""
    return {5: "test", 0: "validation"}.get(index % 7, "train")


def read_sections(path: Path) -> dict[str, list[str]]:
    """'[name]' lines, each followed by its entries, one a line -> {name: entries}."""
    sections: dict[str, list[str]] = {}
    entries: list[str] = []
    for line in path.read_text(encoding="utf-8").splitlines():
        if line.startswith("["):
            entries = sections.setdefault(line.strip("[]"), [])
        elif line and not line.startswith("#"):
            entries.append(line)
    return sections


def read_pools() -> dict[str, dict[str, list[Any]]]:
    """pool -> split -> values. A number goes to a split by its own size, so 12 is a test value whatever it counts."""
    values: dict[str, list[tuple[int, Any]]] = {
        name: list(enumerate(entries, 1)) for name, entries in read_sections(HERE / "toolcalls_values.txt").items()
    }
    values["minutes"] = [(n, n) for n in range(2, 91)]
    values["people"] = [(n, n) for n in range(2, 15)]
    values["level"] = [(n, n) for n in range(5, 100)]
    values["morning"] = list(enumerate(f"{hour}:{minute:02d}" for hour in range(4, 10) for minute in range(0, 60, 5)))
    values["evening"] = list(enumerate(f"{hour}:{minute:02d}" for hour in range(12, 22) for minute in range(0, 60, 15)))
    return {
        pool: {split: [value for index, value in pairs if split_of(index) == split] for split in ROWS}
        for pool, pairs in values.items()
    }


def deal(cards: Sequence[Any], rng: random.Random) -> Iterator[Any]:
    """Cards without end: the whole deck in random order, then again in another order."""
    while True:
        yield from rng.sample(cards, len(cards))


def slots_of(phrasing: str) -> set[str]:
    return {field for _, field, _, _ in string.Formatter().parse(phrasing) if field}


def make_split(split: str) -> list[dict[str, Any]]:
    """The rows of one split: tools in turn, phrasings and values dealt from decks, no request twice."""
    rng = random.Random(f"{SEED} {split}")
    pools = {pool: deal(values[split], rng) for pool, values in read_pools().items()}
    phrasings = {tool: deal(lines, rng) for tool, lines in read_sections(HERE / "toolcalls_phrasings.txt").items()}
    rows: list[dict[str, Any]] = []
    seen: set[str] = set()
    while len(rows) < ROWS[split]:
        tool = list(TOOLS)[len(rows) % len(TOOLS)]
        phrasing = next(phrasings[tool])
        slots = slots_of(phrasing)
        arguments = {name: next(pools[pool]) for name, pool in TOOLS[tool].items() if name in slots}
        request = phrasing.format(**arguments)
        if request not in seen:
            seen.add(request)
            rows.append(as_row(request, {"tool": tool, "arguments": arguments}))
    rng.shuffle(rows)
    return rows


def as_row(request: str, call: dict[str, Any]) -> dict[str, Any]:
    return {
        "messages": [
            {"role": "system", "content": SYSTEM},
            {"role": "user", "content": request},
            {"role": "assistant", "content": json.dumps(call, ensure_ascii=False)},
        ]
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=FOLDER, help="folder to write the three files to")
    folder = parser.parse_args().out
    folder.mkdir(parents=True, exist_ok=True)
    for split in ROWS:
        lines = [json.dumps(row, ensure_ascii=False) + "\n" for row in make_split(split)]
        (folder / f"{split}.jsonl").write_text("".join(lines), encoding="utf-8")


if __name__ == "__main__":
    main()
