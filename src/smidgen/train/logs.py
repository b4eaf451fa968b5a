"""Where a run's figures go besides metrics.jsonl: TensorBoard, Weights & Biases.

    RUN/tensorboard/    tensorboard --logdir RUN
    RUN/wandb/          what W&B writes, its run's id among it: a resumed run goes on in the same place

The figures have the names that they have in metrics.jsonl, and `step` is the axis. Steps that are done again after a
crash are logged again: TensorBoard is told to forget the first ones, W&B shows both, which are equal.
WANDB_MODE=offline, WANDB_PROJECT and the like are W&B's own to read.
"""

import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from smidgen.errors import RunError, SettingsError, first_line
from smidgen.events import Note, Report

__all__ = ["check_logs", "open_logs"]

Log = Callable[[Mapping[str, Any]], None]


def check_logs(names: tuple[str, ...]) -> None:
    """Raise SettingsError where a package is missing, or W&B would have nobody to write for."""
    problems = [
        f"log_to: {name} is not installed; pip install 'smidgen[{name}]'"
        for name in names
        if name != "file" and find_spec(name) is None
    ]
    online = "wandb" in names and os.environ.get("WANDB_MODE", "online") == "online"
    if online and not problems and not import_module("wandb").login(prompt=False):
        problems.append("log_to: wandb knows no API key; type `wandb login`, or set WANDB_MODE=offline")
    if problems:
        raise SettingsError(problems)


@contextmanager
def open_logs(
    names: tuple[str, ...], run: Path, settings: Mapping[str, Any], step: int, report: Report
) -> Iterator[Log]:
    """Yields a function of one line of metrics.jsonl. step: the last one that has been done. Closed at the end, also by
    an error. Raises RunError if W&B cannot be reached.
    """
    openers = {"tensorboard": _tensorboard, "wandb": _wandb}
    with ExitStack() as stack:
        logs = [stack.enter_context(openers[name](run, settings, step, report)) for name in names if name in openers]

        def log(line: Mapping[str, Any]) -> None:
            for each in logs:
                each({key: value for key, value in line.items() if isinstance(value, (int, float))})

        yield log


@contextmanager
def _tensorboard(run: Path, settings: Mapping[str, Any], step: int, report: Report) -> Iterator[Log]:
    from torch.utils.tensorboard import SummaryWriter

    folder = run / "tensorboard"
    goes_on = folder.exists() and step > 0
    report(Note(f"figures go to TensorBoard: tensorboard --logdir {folder}"))
    with SummaryWriter(str(folder), purge_step=step + 1 if folder.exists() else None) as writer:
        if not goes_on:
            writer.add_text("settings", "\n".join(f"    {name}: {value}" for name, value in settings.items()))

        def log(line: Mapping[str, Any]) -> None:
            for name, value in line.items():
                if name != "step":
                    writer.add_scalar(name, value, line["step"])

        yield log


@contextmanager
def _wandb(run: Path, settings: Mapping[str, Any], step: int, report: Report) -> Iterator[Log]:
    wandb = import_module("wandb")
    known = run / "wandb" / "run-id"
    try:
        there = wandb.init(
            project=os.environ.get("WANDB_PROJECT", "smidgen"),
            name=run.name,
            dir=run,
            id=known.read_text(encoding="utf-8").strip() if known.exists() else None,
            resume="allow",
            config=dict(settings),
            settings=wandb.Settings(silent=True, console="off"),  # only our own console prints
        )
    except wandb.Error as error:
        reason = first_line(error)
        cure = f"set WANDB_MODE=offline to keep the log in {run}/wandb, and go on: smidgen finetune --resume {run}"
        raise RunError(f"W&B cannot be reached: {reason}", cure=cure) from error
    known.parent.mkdir(exist_ok=True)
    known.write_text(there.id + "\n", encoding="utf-8")
    offline = there.settings.mode != "online"
    report(Note(f"figures go to W&B: {f'wandb sync {there.settings.sync_dir}' if offline else there.url}"))
    there.define_metric("*", step_metric="step")
    try:
        yield there.log
    except BaseException:
        there.finish(exit_code=1)
        raise
    there.finish()
