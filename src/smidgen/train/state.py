"""Checkpoints of a run: a PEFT folder each, with what is needed to go on as if nothing had happened.

    RUN/checkpoints/step-120/
        adapter_config.json, adapter_model.safetensors, tokenizer files, smidgen.json   what every verb takes
        state.safetensors    optimizer moments of every parameter, state of the random generator
        state.json           step, counters
        manifest.json        size and sha256 of every file; written last

The order of rows is a function of seed and epoch, so step and seed are the whole data cursor.
"""

import hashlib
import json
import re
import shutil
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from smidgen.errors import RunError, first_line
from smidgen.export.files import read_object
from smidgen.model.trained import Adapters

__all__ = ["Cursor", "is_whole", "latest_checkpoint", "load_state", "prune_checkpoints", "save_state", "write_manifest"]

_MANIFEST = "manifest.json"


@dataclass
class Cursor:
    """Where a run stands: optimizer steps done, tokens seen, seconds trained, and those of all that was done."""

    step: int = 0
    tokens: int = 0
    train_s: float = 0.0
    wall_s: float = 0.0


def save_state(folder: Path, cursor: Cursor, adapters: Adapters, optimizer: torch.optim.Optimizer) -> None:
    """Write state.safetensors and state.json into an existing folder. Raises RunError rather than write a number that
    is not finite.
    """
    tensors = {"rng": torch.get_rng_state()}
    for name, parameter in _named(adapters):
        for key, value in optimizer.state[parameter].items():
            tensor = torch.as_tensor(value).detach().cpu().contiguous()
            # bitsandbytes' tables are one tensor that all parameters share, which safetensors does not store
            tensors[f"{name}.{key}"] = tensor.clone() if key.startswith("qmap") else tensor
    broken = [name for name, tensor in tensors.items() if tensor.is_floating_point() and not tensor.isfinite().all()]
    if broken:
        raise RunError(f"{broken[0]} holds numbers that are not finite: not saved", cure="lower --learning-rate")
    save_file(tensors, folder / "state.safetensors")
    (folder / "state.json").write_text(json.dumps(asdict(cursor)) + "\n", encoding="utf-8")


def load_state(folder: Path, adapters: Adapters, optimizer: torch.optim.Optimizer) -> Cursor:
    """Put optimizer moments and the random generator back; returns the cursor. Raises RunError if it does not fit."""
    try:
        tensors = load_file(folder / "state.safetensors")
        cursor = Cursor(**read_object(folder / "state.json"))
        if not all(type(number) in (int, float) and 0 <= number < 1e18 for number in asdict(cursor).values()):
            raise ValueError("state.json holds what is no count")
        content = optimizer.state_dict()
        names = {parameter: name for name, parameter in _named(adapters)}
        trained = [parameter for group in optimizer.param_groups for parameter in group["params"]]
        content["state"] = {
            number: _state_of(names[parameter], parameter, tensors) for number, parameter in enumerate(trained)
        }
        optimizer.load_state_dict(content)
        torch.set_rng_state(tensors["rng"])
    except (KeyError, TypeError, ValueError, RuntimeError, OSError, SafetensorError) as error:
        reason = first_line(error)
        raise RunError(f"{folder}: the training state cannot be read ({reason})") from error
    return cursor


def _state_of(name: str, parameter: torch.nn.Parameter, tensors: dict[str, torch.Tensor]) -> dict[str, Any]:
    """An optimizer's state of one parameter. bitsandbytes counts steps with an int, PyTorch with a float tensor."""
    state: dict[str, Any] = {key[len(name) + 1 :]: tensors[key] for key in tensors if key.startswith(name + ".")}
    if not state:
        raise ValueError(f"nothing of {name} is there")
    for key in state.keys() & {"exp_avg", "exp_avg_sq", "momentum_buffer", "state1", "state2"}:
        if state[key].shape != parameter.shape:
            raise ValueError(f"{key} of {name} has another shape than the adapter")
    return {key: int(value) if value.dtype == torch.int64 else value for key, value in state.items()}


def _named(adapters: Adapters) -> list[tuple[str, torch.nn.Parameter]]:
    return [
        (f"{name}.{part}", parameter) for name, layer in adapters.items() for part, parameter in layer.trainable.items()
    ]


def write_manifest(folder: Path) -> None:
    """Size and sha256 of every file of the folder."""
    files = {
        file.name: {"bytes": file.stat().st_size, "sha256": _sha256(file)}
        for file in sorted(folder.iterdir())
        if file.is_file() and file.name != _MANIFEST
    }
    (folder / _MANIFEST).write_text(json.dumps({"files": files}, indent=2) + "\n", encoding="utf-8")


def latest_checkpoint(run: Path) -> Path | None:
    """The checkpoint with the highest step whose every file is as its manifest says; None if there is none."""
    return next((path for path in _newest_first(run) if is_whole(path)), None)


def prune_checkpoints(run: Path, keep: int, best: int | None = None) -> None:
    """Remove all checkpoints but the `keep` of the highest steps, 0: none is removed, and the one of step `best`.

    To be called when the newest one has been verified. One that is removed loses its name first, so that it is whole as
    long as it has one. Remains of saves that were interrupted go too.
    """
    older = _newest_first(run)[keep:] if keep else []
    for folder in older:
        if folder.name == f"step-{best}":
            continue
        folder.rename(folder.with_name(f".tmp-{folder.name}"))
    for remains in (run / "checkpoints").glob(".tmp-*"):
        shutil.rmtree(remains, ignore_errors=True)


def _newest_first(run: Path) -> list[Path]:
    """The checkpoints by their step, never by their time."""
    found = [
        (int(m.group(1)), path)
        for path in (run / "checkpoints").glob("step-*")
        if (m := re.fullmatch(r"step-(\d+)", path.name))
    ]
    return [path for _, path in sorted(found, reverse=True)]


def is_whole(folder: Path) -> bool:
    """Whether every file is as the manifest says."""
    try:
        files = read_object(folder / _MANIFEST)["files"]
        return len(files) > 0 and all(
            (folder / name).stat().st_size == entry["bytes"] and _sha256(folder / name) == entry["sha256"]
            for name, entry in files.items()
        )
    except (RunError, OSError, ValueError, KeyError, TypeError, AttributeError):
        return False


def _sha256(file: Path) -> str:
    digest = hashlib.sha256()
    with open(file, "rb") as stream:
        while block := stream.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()
