"""A process in which each change of a file that a checkpoint or the result makes fails once:
`LD_PRELOAD=faults.so python faults.py ...`.

    faults.py MODEL ROWS FOLDER

Everything is loaded once; each case is a forked child, since a fault may kill it. Prints one JSON line for each case:
what was saved, kind, nth, how the child ended, what was the newest whole checkpoint then, whether `resume` came to the
bytes of the uninterrupted run, and what is left that that has not. Every change has one kind of fault; with
SMIDGEN_ALL_FAULTS in the environment each of them.
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
FAULTY_STEPS = {"checkpoint": 3, "result": 5}  # after which each is saved; there is an older checkpoint to be removed


def faulty(model: str, rows: str, run: Path, step: int, nth: int, error: int) -> int:
    """In this process: a run with a fault in what is saved after `step`. Returns how many changes that made."""
    shim = ctypes.CDLL(None)

    def report(event: Event) -> None:
        if isinstance(event, Step) and event.step == step:
            shim.faults_arm(str(run).encode(), nth, error)
        elif isinstance(event, Step) and event.step == step + 1:
            shim.faults_disarm()

    smidgen.finetune(model, rows, run, report=report, **HOW)
    shim.faults_disarm()
    return shim.faults_count()


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
    each_kind = bool(os.environ.get("SMIDGEN_ALL_FAULTS"))
    for saved, step in FAULTY_STEPS.items():
        whole, run = place / f"whole-{saved}", place / "run"
        changes = faulty(model, rows, whole, step, 0, 0)
        expected, names = (whole / "adapter_model.safetensors").read_bytes(), _names(whole)
        for number, (kind, error) in enumerate(KINDS.items()):
            for nth in range(1, changes + 1) if each_kind else range(1 + number, changes + 1, len(KINDS)):
                ended = in_child(lambda run=run, of=(step, nth, error): faulty(model, rows, run, *of))
                case = {"saved": saved, "kind": kind, "nth": nth, "changes": changes, "ended": ended}
                newest = latest_checkpoint(run)
                case["newest"] = newest.name if newest else None
                resumed = in_child(lambda run=run: smidgen.resume(run))
                case["same"] = resumed == "done" and (run / "adapter_model.safetensors").read_bytes() == expected
                case["left"] = sorted(_names(run) - names)
                print(json.dumps(case), flush=True)
                shutil.rmtree(run)


def _names(folder: Path) -> set[str]:
    return {str(path.relative_to(folder)) for path in folder.rglob("*")}


if __name__ == "__main__":
    main(*sys.argv[1:])
