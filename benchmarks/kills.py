"""A run that is killed again and again, each time in a new process, ends with the bytes of one that never was.

    python benchmarks/kills.py [--kills 100] [--seed 0]

A tiny random model with dropout, noise, a checkpoint at each step, and keep_best. SIGKILL comes at a random moment
after the first new line of metrics.jsonl: in a step, a save, an evaluation, or while older checkpoints go. Each process
is a `smidgen finetune` of its own, from its first instruction on. Writes JSON. A quarter of an hour on a core.
"""

import argparse
import json
import random
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from common import SMIDGEN, write_result

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))  # its tiny model
from tiny import tiny_folder, write_rows

STEPS_PER_KILL = 4  # a process comes two steps further before it is killed
_FLAGS = ["--rank", "2", "--micro-batch", "3", "--dropout", "0.2", "--neftune-alpha", "5", "--targets", "q,v"]
_FLAGS += ["--save-interval", "1", "--eval-interval", "4", "--keep-best", "--compute-dtype", "float32"]


def killed_and_whole(folder: Path, kills: int, seed: int) -> dict[str, object]:
    """Make the model, the uninterrupted run and the killed one in `folder`; returns what was found."""
    tiny_folder(folder / "base")
    write_rows(folder / "rows.jsonl")
    steps = ["--max-steps", str(STEPS_PER_KILL * (kills + 1)), "--epochs", "10000"]
    start = ["finetune", "base", "rows.jsonl", *_FLAGS, *steps, "--out"]
    _finish(_start([*start, "whole"], folder), folder)
    summary = json.loads((folder / "whole" / "summary.json").read_text(encoding="utf-8"))
    two_steps_s = 2 * summary["wall_s"] / summary["steps"]  # saves and evaluations included
    moments, words, at = random.Random(seed), [*start, "killed"], []
    metrics = folder / "killed" / "metrics.jsonl"
    for _ in range(kills):
        before = _lines(metrics)
        process = _start(words, folder)
        while (now := _lines(metrics)) <= before:
            before = min(before, now)  # the resumed run has dropped what it does again
            assert process.poll() is None, f"ended by itself: {_said(folder)}"
            time.sleep(0.001)
        time.sleep(moments.uniform(0, two_steps_s))
        process.kill()
        assert process.wait() < 0, f"ended by itself: {_said(folder)}"
        at.append(_lines(metrics))
        words = ["finetune", "--resume", "killed"]
    _finish(_start(words, folder), folder)
    files = ("adapter_model.safetensors", "adapter_config.json")
    logs = [_without_clock(folder / run / "metrics.jsonl") for run in ("whole", "killed")]
    return {
        "kills": kills,
        "lines_of_the_log_at_each_kill": at,
        "same_bytes": all((folder / "whole" / f).read_bytes() == (folder / "killed" / f).read_bytes() for f in files),
        "same_log": logs[0] == logs[1],
        "remains": [path.name for path in (folder / "killed").rglob(".tmp-*")],
    }


def _start(words: list[str], folder: Path) -> subprocess.Popen[bytes]:
    """Start a command in `folder`, with what it prints in a file there."""
    with (folder / "log").open("w") as log:
        return subprocess.Popen([*SMIDGEN, *words], cwd=folder, stdout=log, stderr=log)


def _finish(process: subprocess.Popen[bytes], folder: Path) -> None:
    assert process.wait() == 0, _said(folder)


def _said(folder: Path) -> str:
    return (folder / "log").read_text(encoding="utf-8")


def _lines(file: Path) -> int:
    return file.read_bytes().count(b"\n") if file.exists() else 0


def _without_clock(file: Path) -> list[dict[str, object]]:
    lines = [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()]
    return [{key: value for key, value in line.items() if key not in ("train_s", "rss_bytes")} for line in lines]


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=100)
    parser.add_argument("--seed", type=int, default=0)
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        found = killed_and_whole(Path(temporary), given.kills, given.seed)
        write_result("kills", found | {"seed": given.seed}, Path(temporary))
    sys.exit(not (found["same_bytes"] and found["same_log"] and not found["remains"]))
