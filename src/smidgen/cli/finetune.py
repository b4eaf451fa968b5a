"""`smidgen finetune MODEL DATA --out RUN`."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from smidgen.cli.console import Console, command
from smidgen.cli.options import Flag, settings_flags, verb
from smidgen.cli.values import Given
from smidgen.errors import SettingsError
from smidgen.train.config import Settings

__all__ = ["finetune", "resumable"]

_SETTINGS = settings_flags()
_RUN = (
    Flag("out", str, None, "Folder for the run: a new or empty one.", "Run", metavar="RUN"),
    Flag("resume", str, None, "Go on with an interrupted run, with its own settings.", "Run", metavar="RUN"),
)


def _check(given: Given) -> list[str]:
    if given["resume"] is not None:
        others = sorted(given.named - {"resume"})
        return [f"{name}: a resumed run keeps its own, leave it out" for name in others]
    problems = [f"{name}: missing" for name in ("model", "data", "out") if not given[name]]
    try:
        Settings(**given.pick(_SETTINGS))
    except SettingsError as error:
        problems += error.problems
    return problems


@verb(
    "finetune",
    arguments=("model", "data"),
    optional=("model", "data"),
    several=("data",),
    flags=(*_RUN, *_SETTINGS),
    check=_check,
)
def finetune(console: Console, given: Given) -> Mapping[str, Any]:
    """Train LoRA adapters on DATA over the frozen, quantised MODEL.

    MODEL is a Hugging Face folder, a .gguf file, a built-in name (smollm2-135m) or a hub id. DATA is a .json, .jsonl,
    .csv or .parquet file, a folder with train and validation files, a built-in name (toolcalls, alpaca, dolly, ...) or
    a hub id; several are trained on together, by the weights of --mix.

    \b
    Examples:
      smidgen finetune smollm2-135m toolcalls --out runs/tools
      smidgen finetune ./Qwen3-0.6B chats.jsonl --out runs/chats --epochs 3 --rank 32
      smidgen finetune ./Qwen3-0.6B chats.jsonl alpaca --mix 2,1 --out runs/both
      smidgen finetune --resume runs/chats
    """
    from smidgen import api

    run_folder = Path(given["resume"] or given["out"])
    try:
        if given["resume"]:
            run = api.resume(run_folder, report=console.report)
        else:
            run = api.finetune(
                given["model"], given["data"], run_folder, report=console.report, **given.pick(_SETTINGS)
            )
    except KeyboardInterrupt:
        resumable(console, run_folder)
        raise
    console.finished(run.summary, Path(run.path), given.own_code)
    return run.summary


def resumable(console: Console, run_folder: Path) -> None:
    """After Ctrl-C: how to go on, if there is something to go on from."""
    console.close()
    if any(run_folder.glob("checkpoints/step-*")):
        console.warn(f"Stopped. Go on with: {command('finetune', '--resume', run_folder)}")
    else:
        console.warn("Stopped before the first checkpoint.")
        if (run_folder / "settings.yaml").exists():
            console.warn(f"Start anew with: {command('finetune', '--resume', run_folder)}")
