"""A process in which each change of a file that a save makes fails once: `LD_PRELOAD=faults.so python faults.py ...`.

    faults.py MODEL ROWS FOLDER

Everything is loaded once; each case is a forked child, since a fault may kill it. Prints one JSON line for each case:
kind, nth, how the child ended, what was the newest whole checkpoint then, and whether `resume` came to the bytes of the
uninterrupted run. Every change has one kind of fault; with SMIDGEN_ALL_FAULTS in the environment each of them.
"""

import ctypes
import errno
import json
import os
import shutil
import sys
import traceback
from pathlib import Path
from typing import Any

import smidgen.api as smidgen  # before any fork
from smidgen.errors import RunError
from smidgen.events import Event, Step
from smidgen.train.state import latest_checkpoint

HOW: dict[str, Any] = {"rank": 2, "compute_dtype": "float32", "dropout": 0.2, "micro_batch": 3, "max_steps": 5}
HOW |= {"save_interval": 1, "keep_checkpoints": 1, "targets": "q,v"}
KINDS = {"ENOSPC": errno.ENOSPC, "EIO": errno.EIO, "kill": 0}
FAULTY_STEP = 3  # there is an older checkpoint to be removed then


def faulty(model: str, rows: str, run: Path, nth: int, error: int) -> int:
    """In this process: a run whose save after FAULTY_STEP has a fault. Returns how many changes that save made."""
    shim, count = ctypes.CDLL(None), 0

    def report(event: Event) -> None:
        nonlocal count
        if isinstance(event, Step) and event.step == FAULTY_STEP:
            shim.faults_arm(str(run).encode(), nth, error)
        elif isinstance(event, Step) and event.step == FAULTY_STEP + 1:
            count = shim.faults_count()
            shim.faults_disarm()

    smidgen.finetune(model, rows, run, report=report, **HOW)
    return count


def in_child(work: Any) -> str:
    """'done', 'RunError', 'kill', or another exception's name, which is a fault of ours."""
    child = os.fork()
    if not child:
        code = 0
        try:
            work()
        except RunError:
            code = 3
        except BaseException:
            traceback.print_exc()
            code = 4
        os._exit(code)
    status = os.waitpid(child, 0)[1]
    if os.WIFSIGNALED(status):
        return "kill"
    return {0: "done", 3: "RunError"}.get(os.WEXITSTATUS(status), "a fault of ours")


def main(model: str, rows: str, folder: str) -> None:
    place = Path(folder)
    changes = faulty(model, rows, place / "whole", 0, 0)
    expected = (place / "whole" / "adapter_model.safetensors").read_bytes()
    each_kind = bool(os.environ.get("SMIDGEN_ALL_FAULTS"))
    for number, (kind, error) in enumerate(KINDS.items()):
        for nth in range(1, changes + 1) if each_kind else range(1 + number, changes + 1, len(KINDS)):
            run = place / "run"
            ended = in_child(lambda run=run, nth=nth, error=error: faulty(model, rows, run, nth, error))
            newest = latest_checkpoint(run)
            resumed = in_child(lambda run=run: smidgen.resume(run))
            same = resumed == "done" and (run / "adapter_model.safetensors").read_bytes() == expected
            left = [path.name for path in run.rglob(".tmp-*")]
            print(json.dumps({"kind": kind, "nth": nth, "changes": changes, "ended": ended, "same": same, "left": left,
                              "newest": newest.name if newest else None}), flush=True)  # fmt: skip
            shutil.rmtree(run)


if __name__ == "__main__":
    main(*sys.argv[1:])
