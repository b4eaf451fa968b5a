"""A run that is killed again and again, each time in a new process, ends with the bytes of one that never was.

    python benchmarks/kills.py [--kills 100] [--seed 0] [--fresh]

A tiny random model with dropout, noise, a checkpoint at each step, and keep_best. SIGKILL comes at a random moment
after the first new line of metrics.jsonl: in a step, a save, an evaluation, or while older checkpoints go. The
processes are forked from one that has imported everything and computed nothing: importing would take most of their
time. With --fresh each is a `python -m smidgen finetune` of its own, from its first instruction on. Writes JSON.
"""

import argparse
import json
import os
import random
import signal
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from pathlib import Path

from common import SMIDGEN, write_result

import smidgen.api  # noqa: F401  before any fork
from smidgen.cli.main import main

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))  # its tiny model

STEPS_PER_KILL = 4  # a process comes two steps further before it is killed
_FLAGS = ["--rank", "2", "--micro-batch", "3", "--dropout", "0.2", "--neftune-alpha", "5", "--targets", "q,v"]
_FLAGS += ["--save-interval", "1", "--eval-interval", "4", "--keep-best", "--compute-dtype", "float32"]


def killed_and_whole(folder: Path, kills: int, seed: int, *, fresh: bool) -> dict[str, object]:
    """Make the model, the uninterrupted run and the killed one in `folder`; returns what was found. fresh: by commands
    in processes of their own, instead of forks.
    """
    from tiny import tiny_folder, write_rows

    run, log = _command if fresh else main, folder / "log"
    _finish(_forked(lambda: (tiny_folder(folder / "base"), write_rows(folder / "rows.jsonl")), folder, log), log)
    steps = ["--max-steps", str(STEPS_PER_KILL * (kills + 1)), "--epochs", "10000"]
    start = ["finetune", "base", "rows.jsonl", *_FLAGS, *steps, "--out"]
    _finish(_forked(lambda: run([*start, "whole"]), folder, log), log)
    summary = json.loads((folder / "whole" / "summary.json").read_text(encoding="utf-8"))
    two_steps_s = 2 * summary["wall_s"] / summary["steps"]  # saves and evaluations included
    moments, words, at = random.Random(seed), [*start, "killed"], []
    metrics = folder / "killed" / "metrics.jsonl"
    for _ in range(kills):
        before = _lines(metrics)
        child = _forked(lambda words=words: run(words), folder, log)
        while (now := _lines(metrics)) <= before:
            before = min(before, now)  # the resumed run has dropped what it does again
            assert os.waitpid(child, os.WNOHANG) == (0, 0), f"ended by itself: {log.read_text(encoding='utf-8')}"
            time.sleep(0.001)
        time.sleep(moments.uniform(0, two_steps_s))
        os.kill(child, signal.SIGKILL)
        status = os.waitpid(child, 0)[1]
        assert os.WIFSIGNALED(status), f"ended by itself: {log.read_text(encoding='utf-8')}"
        at.append(_lines(metrics))
        words = ["finetune", "--resume", "killed"]
    _finish(_forked(lambda: run(words), folder, log), log)
    files = ("adapter_model.safetensors", "adapter_config.json")
    logs = [_without_clock(folder / run / "metrics.jsonl") for run in ("whole", "killed")]
    return {
        "kills": kills,
        "processes": "fresh" if fresh else "forked",
        "lines_of_the_log_at_each_kill": at,
        "same_bytes": all((folder / "whole" / f).read_bytes() == (folder / "killed" / f).read_bytes() for f in files),
        "same_log": logs[0] == logs[1],
        "remains": [path.name for path in (folder / "killed").rglob(".tmp-*")],
    }


def _command(words: list[str]) -> None:
    """Become the command."""
    os.execv(SMIDGEN[0], [*SMIDGEN, *words])


def _forked(work: Callable[[], object], folder: Path, log: Path) -> int:
    """Start `work` in a child process, in `folder`, with what it prints in `log`; returns its id."""
    if child := os.fork():
        return child
    code: object = 1
    try:
        os.chdir(folder)
        with log.open("w") as file:
            os.dup2(file.fileno(), 1)
            os.dup2(file.fileno(), 2)
        work()
        code = 0
    except SystemExit as leaving:
        code = leaving.code or 0
    except BaseException:
        traceback.print_exc()
    sys.stderr.flush()
    os._exit(code if isinstance(code, int) else 1)


def _finish(child: int, log: Path) -> None:
    status = os.waitpid(child, 0)[1]
    assert status == 0, log.read_text(encoding="utf-8")


def _lines(file: Path) -> int:
    return file.read_bytes().count(b"\n") if file.exists() else 0


def _without_clock(file: Path) -> list[dict[str, object]]:
    lines = [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()]
    return [{key: value for key, value in line.items() if key not in ("train_s", "rss_bytes")} for line in lines]


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=100)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--fresh", action="store_true", help="a new process for each kill, instead of a fork")
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        found = killed_and_whole(Path(temporary), given.kills, given.seed, fresh=given.fresh)
        write_result("kills", found | {"seed": given.seed}, Path(temporary))
    sys.exit(not (found["same_bytes"] and found["same_log"] and not found["remains"]))
