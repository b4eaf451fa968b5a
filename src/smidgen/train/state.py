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

import torch
from safetensors.torch import load_file, save_file

from smidgen.errors import RunError
from smidgen.lora.linear import LoraLinear

__all__ = ["Cursor", "is_whole", "latest_checkpoint", "load_state", "prune_checkpoints", "save_state", "write_manifest"]

_MANIFEST = "manifest.json"


@dataclass
class Cursor:
    """Where a run stands: optimizer steps done, tokens seen, seconds trained."""

    step: int = 0
    tokens: int = 0
    train_s: float = 0.0


def save_state(folder: Path, cursor: Cursor, adapters: dict[str, LoraLinear], optimizer: torch.optim.Optimizer) -> None:
    """Write state.safetensors and state.json into an existing folder."""
    tensors = {"rng": torch.get_rng_state()}
    for name, parameter in _named(adapters):
        for key, value in optimizer.state[parameter].items():
            tensors[f"{name}.{key}"] = value.detach().cpu().contiguous()
    save_file(tensors, folder / "state.safetensors")
    (folder / "state.json").write_text(json.dumps(asdict(cursor)) + "\n", encoding="utf-8")


def load_state(folder: Path, adapters: dict[str, LoraLinear], optimizer: torch.optim.Optimizer) -> Cursor:
    """Put optimizer moments and the random generator back; returns the cursor. Raises RunError if it does not fit."""
    try:
        tensors = load_file(folder / "state.safetensors")
        cursor = Cursor(**json.loads((folder / "state.json").read_text(encoding="utf-8")))
        for name, parameter in _named(adapters):
            keys = [key for key in tensors if key.startswith(name + ".")]
            optimizer.state[parameter] = {
                key[len(name) + 1 :]: tensors[key].to(_state_device(key, parameter)) for key in keys
            }
            if tuple(optimizer.state[parameter]["exp_avg"].shape) != tuple(parameter.shape):
                raise RunError(f"{folder}: the optimizer's state of {name} has another shape than the adapter")
    except (KeyError, TypeError, ValueError, OSError) as error:
        raise RunError(f"{folder}: the training state cannot be read ({error})") from error
    torch.set_rng_state(tensors["rng"])
    return cursor


def _state_device(key: str, parameter: torch.nn.Parameter) -> torch.device:
    return parameter.device if not key.endswith(".step") or parameter.device.type == "cuda" else torch.device("cpu")


def _named(adapters: dict[str, LoraLinear]) -> list[tuple[str, torch.nn.Parameter]]:
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


def prune_checkpoints(run: Path, keep: int) -> None:
    """Remove all checkpoints but the `keep` of the highest steps; 0: none is removed.

    To be called when the newest one has been verified. One that is removed loses its name first, so that it is whole as
    long as it has one. Remains of saves that were interrupted go too.
    """
    for folder in _newest_first(run)[keep:] if keep else []:
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
        files = json.loads((folder / _MANIFEST).read_text(encoding="utf-8"))["files"]
        return all(
            (folder / name).stat().st_size == entry["bytes"] and _sha256(folder / name) == entry["sha256"]
            for name, entry in files.items()
        )
    except (OSError, ValueError, KeyError, TypeError):
        return False


def _sha256(file: Path) -> str:
    digest = hashlib.sha256()
    with open(file, "rb") as stream:
        while block := stream.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()
