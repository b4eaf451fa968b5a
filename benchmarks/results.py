"""What fine-tuning SmolLM2-135M gives on three real data sets, with what it takes; about ten minutes each on one core.

    python benchmarks/results.py [snips] [wikisql] [oasst]

Each is a `smidgen finetune` in a process of its own, then `smidgen evaluate --against base` on test rows that neither
saw. SNIPS is the recipe of that name. Data: $SMIDGEN_TEST_DATA/sft/{snips,wikisql}_{train,valid,test}.jsonl (chat rows
made from sonos/nlu-benchmark, CC0-1.0, and from WikiSQL, BSD-3) and chat/oasst_en_100_tree.jsonl (message trees of
Open Assistant, Apache-2.0; the best ranked path of each is a row). A run is kept as soon as it is done, and those that
are not named keep the figures that they have.
"""

import argparse
import json
import os
import tempfile
from pathlib import Path
from typing import Any

from common import RESULTS, run_json, skip, write_result

ROOT = Path(__file__).parents[1]
TEST_ROWS, HELD_OUT_ROWS = 50, 32
OASST_TRAINED = 80  # of 100 trees; the other 20 are the test
_WIKISQL = ["--micro-batch", "4", "--learning-rate", "1e-3", "--warmup", "0.05", "--seq-len", "256"]
_OASST = ["--micro-batch", "4", "--warmup", "0.1", "--seq-len", "512", "--max-steps", "20"]
COMMANDS = {
    "snips": ["finetune", "--config", "recipes/smollm2-snips.yaml"],
    "wikisql": ["finetune", "smollm2-135m", "wikisql", "--out", "runs/wikisql", *_WIKISQL, "--max-steps", "100"],
    "oasst": ["finetune", "smollm2-135m", "oasst", "--out", "runs/oasst", *_OASST],
}
# The longest expected answer of SNIPS and of WikiSQL has no more tokens than this.
# An open answer has no end in sight: its beginning is compared.
EVALUATED = {
    "snips": ["--max-new-tokens", "80"],
    "wikisql": ["--max-new-tokens", "64"],
    "oasst": ["--seq-len", "512", "--max-new-tokens", "64"],
}


def write_data(source: Path, folder: Path) -> None:
    """Folders snips, wikisql and oasst with train, valid and test rows in `folder`; a test has at most TEST_ROWS."""
    for name in ("snips", "wikisql"):
        (folder / name).mkdir()
        for part in ("train", "valid", "test"):
            rows = _lines(source / "sft" / f"{name}_{part}.jsonl")
            most = {"train": len(rows), "valid": HELD_OUT_ROWS, "test": TEST_ROWS}[part]
            rows = rows[:: len(rows) // most][:most]
            _write(folder / name / f"{part}.jsonl", rows)
    trees = _lines(source / "chat" / "oasst_en_100_tree.jsonl")
    (folder / "oasst").mkdir()
    for part, rows in (("train", trees[:OASST_TRAINED]), ("test", trees[OASST_TRAINED:])):
        _write(folder / "oasst" / f"{part}.jsonl", rows)


def _lines(file: Path) -> list[str]:
    return file.read_text(encoding="utf-8").splitlines()


def _write(file: Path, rows: list[str]) -> None:
    file.write_text("\n".join(rows) + "\n", encoding="utf-8")


def measured(name: str, folder: Path) -> dict[str, Any]:
    """Train and evaluate one of COMMANDS in `folder`."""
    summary = run_json(COMMANDS[name], folder)
    words = ["evaluate", summary["run"], f"{name}/test.jsonl", "--against", "base", *EVALUATED[name]]
    found = run_json(words, folder)["data"][0]
    return {
        "command": "smidgen " + " ".join(COMMANDS[name]),
        "evaluated": "smidgen " + " ".join(words),
        "summary": summary,
        "test_rows": found["rows"],
        "figures": found["figures"],
    }


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", choices=[*COMMANDS, []], default=[])
    names = parser.parse_args().names or list(COMMANDS)
    if "SMIDGEN_TEST_DATA" not in os.environ:
        skip("SMIDGEN_TEST_DATA does not say where sft/snips_train.jsonl lies")
    earlier = RESULTS / "results.json"
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        write_data(Path(os.environ["SMIDGEN_TEST_DATA"]), folder)
        (folder / "recipes").symlink_to(ROOT / "recipes")
        for name in names:
            run = measured(name, folder)
            kept = json.loads(earlier.read_text(encoding="utf-8"))["runs"] if earlier.exists() else {}
            runs = kept | {name: run}
            write_result("results", {"runs": {key: runs[key] for key in COMMANDS if key in runs}}, folder, run)
