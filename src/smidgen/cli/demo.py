"""`smidgen demo`: the whole way on a small real model."""

from collections.abc import Mapping
from itertools import count
from pathlib import Path
from typing import Any

from smidgen.cli.console import Console
from smidgen.cli.finetune import resumable
from smidgen.cli.options import Flag, verb
from smidgen.cli.values import Given

__all__ = ["DEMO_SETTINGS", "demo"]

MODEL, DATA = "smollm2-135m", "toolcalls"
# Requests of the shipped data set are short; 100 held-out rows are answered before and after.
DEMO_SETTINGS: dict[str, Any] = {
    "seq_len": 256,
    "micro_batch": 8,
    "learning_rate": 2e-3,
    "max_steps": 60,
    "compare": 100,
}
_FLAGS = (Flag("out", str, None, "Folder for the run.  [default: runs/demo, or the next free name]", metavar="RUN"),)
_PLAN = f"""\
smidgen demo: a language model learns to call tools, in 4 bits, on this machine.

  model     SmolLM2-135M-Instruct ({MODEL}), kept frozen in the 4-bit blocks of its own file
  data      {DATA}: requests like "wake me at seven", answered with a line of JSON
  training  LoRA adapters on every linear layer, a few minutes

You will see a row as the model sees it, held-out loss and answers before and
after training, and what was written.
"""


@verb("demo", flags=_FLAGS)
def demo(console: Console, given: Given) -> Mapping[str, Any]:
    """Fine-tune SmolLM2-135M in 4 bits on a small set of tool calls, and show that it learned.

    It takes a few minutes on two cores and about 100 MB of download the first time.

    \b
    Examples:
      smidgen demo
    """
    from smidgen import api

    out = Path(given["out"]) if given["out"] else _free_folder()
    console.plan(_PLAN)
    try:
        run = api.finetune(MODEL, DATA, out, report=console.report, **DEMO_SETTINGS)
    except KeyboardInterrupt:
        resumable(console, out)
        raise
    console.finished(run.summary, Path(run.path))
    return run.summary


def _free_folder() -> Path:
    """runs/demo, runs/demo-2, ...: a demo is run again and again, and no run is ever overwritten."""
    names = (Path("runs") / ("demo" if number == 1 else f"demo-{number}") for number in count(1))
    return next(path for path in names if not path.exists())
