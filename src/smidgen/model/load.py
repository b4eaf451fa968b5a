"""From what the user calls a model to a base in memory: open it (cheap), then build it."""

import math
import os
import shutil
from collections import Counter
from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from smidgen.checkpoint.base import Checkpoint
from smidgen.checkpoint.hub import BUILTIN_MODELS, cache_folder, resolve_model
from smidgen.checkpoint.open import open_checkpoint
from smidgen.errors import ModelError, RunError
from smidgen.events import Note, Report, Warned, silent
from smidgen.kernels.library import MISSING, native_library, watch_mapped
from smidgen.model.build import Base, build_base
from smidgen.model.calibration import GPTQ_ON_THE_WAY, calibration_on_the_way
from smidgen.model.device import choose_compute_dtype, choose_device
from smidgen.model.gptq import quantise_base
from smidgen.model.inventory import inventory_of
from smidgen.model.stored import stored_weights
from smidgen.model.stream import LayerStream
from smidgen.model.tokenizer import load_tokenizer
from smidgen.units import format_bytes

__all__ = [
    "Decided",
    "Source",
    "choose_storage",
    "decide",
    "load_base",
    "max_positions_of",
    "needs_gptq",
    "open_source",
    "spill_folder",
]

DEFAULT_STORAGE = "nf4-dq"


@dataclass(frozen=True)
class Source:
    """A model that has been found and opened. name: how to find it again (absolute path, hub id or built-in name)."""

    name: str
    checkpoint: Checkpoint
    tokenizer: Any

    @property
    def is_quantised(self) -> bool:
        """Whether the checkpoint has packed weights that can be used as they are."""
        return _stored_as(self.checkpoint) != "none"

    @property
    def max_positions(self) -> int:
        """The longest sequence, in tokens, by config.json."""
        return max_positions_of(self.checkpoint.config)

    @property
    def vocab_size(self) -> int:
        """Rows of the embedding."""
        config = self.checkpoint.config
        return int(config.get("vocab_size") or config.get("text_config", {}).get("vocab_size") or len(self.tokenizer))


def max_positions_of(config: dict[str, Any]) -> int:
    """The longest sequence, in tokens, of a model with this config.json."""
    return int(config.get("max_position_embeddings") or config.get("n_positions") or 1 << 30)


def open_source(spec: str, report: Report = silent, *, tokenizer_from: Path | None = None) -> Source:
    """Find and open a model; headers and tokenizer only. tokenizer_from: a run folder whose tokenizer is to be used."""
    path = resolve_model(spec, report)
    checkpoint = open_checkpoint(path, report)
    local = spec not in BUILTIN_MODELS and Path(spec).exists()
    return Source(str(path.resolve()) if local else spec, checkpoint, load_tokenizer(tokenizer_from or path))


def choose_storage(quantize: str, checkpoint: Checkpoint) -> tuple[str, str]:
    """(how the base will be stored, the sentence that says why).

    Raises ModelError where `keep` has nothing to keep, or where a base that is quantised is to be quantised anew.
    """
    stored = _stored_as(checkpoint)
    if stored == "none":
        if quantize == "keep" and checkpoint.format == "gguf":
            return "none", "quantize keep: the numbers of the file are used as they are"
    elif quantize in ("auto", "keep", stored):
        return stored, f"quantize {quantize}: the base's own {_kinds(stored, checkpoint)} are used as they are"
    elif stored != "gguf":  # a GGUF file may be decoded and quantised anew
        raise ModelError(
            f"{checkpoint.path} is stored as {stored} already", expected=f"--quantize auto or {stored}", found=quantize
        )
    if quantize == "keep":
        raise ModelError(
            f"{checkpoint.path}: there are no blocks to keep that can be trained on in place",
            cure="use --quantize auto, which stores nf4-dq",
        )
    if quantize == "auto":
        return DEFAULT_STORAGE, f"quantize auto: {DEFAULT_STORAGE} (4-bit NormalFloat, double quantisation)"
    return quantize, f"base stored as {quantize}"


def _kinds(stored: str, checkpoint: Checkpoint) -> str:
    """'nf4-dq blocks', or the types of a GGUF file, those with most weights first: 'Q4_K, Q6_K and F32 blocks'."""
    if stored in ("gptq", "awq"):
        return f"{stored} integers"
    if stored != "gguf":
        return f"{stored} blocks"
    counts: Counter[str] = Counter()
    for info in checkpoint.tensors.values():
        if len(info.shape) > 1:
            counts[info.dtype] += math.prod(info.shape)
    return f"{' and '.join(name for name, _ in counts.most_common())} blocks"


@dataclass(frozen=True)
class Decided:
    """How a base will be stored, computed with, and where."""

    storage: str
    dtype: torch.dtype
    device: torch.device


def decide(source: Source, quantize: str, compute_dtype: str, device: str, report: Report = silent) -> Decided:
    """What 'auto' means here, each choice reported with its reason."""
    place = choose_device(device)
    storage, why = choose_storage(quantize, source.checkpoint)
    report(Note(why))
    if place.type == "cpu" and not os.environ.get("SMIDGEN_BACKEND") and native_library() is None:
        report(Warned(MISSING))
    dtype, why = choose_compute_dtype(compute_dtype, place)
    report(Note(why))
    return Decided(storage, dtype, place)


def load_base(
    source: Source,
    *,
    quantize: str = "auto",
    compute_dtype: str = "auto",
    device: str = "auto",
    decided: Decided | None = None,
    streamed: Collection[int] = (),
    trust_remote_code: bool = False,
    report: Report = silent,
) -> Base:
    """Build and fill the model; each automatic choice is reported with its reason.

    decided: the choice, where it has been made already. streamed: decoder layers that are read from disk for each use
    instead of kept in memory (model/stream.py). Raises RunError where the disk has no room for them.
    """
    chosen = decided or decide(source, quantize, compute_dtype, device, report)
    watch_mapped(source.checkpoint.files)
    is_new = needs_gptq(chosen.storage, source.checkpoint)
    storage = _stored_as(source.checkpoint) if is_new else chosen.storage
    stream = _stream(source.checkpoint, storage, streamed, trust_remote_code=trust_remote_code) if streamed else None
    base = build_base(
        source.checkpoint,
        storage=storage,
        compute_dtype=chosen.dtype,
        device=chosen.device,
        stream=stream,
        trust_remote_code=trust_remote_code,
        report=report,
    )
    if is_new:
        text = calibration_on_the_way([], "", source.tokenizer, source.max_positions, report)
        quantise_base(base, text.rows, GPTQ_ON_THE_WAY, report)
    return base


def spill_folder() -> Path:
    """Where streamed layers are put that the model file does not hold as they are used."""
    return cache_folder() / "streamed"


def _stream(checkpoint: Checkpoint, storage: str, streamed: Collection[int], *, trust_remote_code: bool) -> LayerStream:
    """Raises RunError where the disk has no room for what the model file does not hold as it is used."""
    folder = spill_folder()
    model = inventory_of(checkpoint, checkpoint.config, storage, trust_remote_code=trust_remote_code)
    needed = 0 if model.mapped else sum(model.layer_bytes[layer] for layer in streamed)
    free = shutil.disk_usage(next(place for place in (folder, *folder.parents) if place.exists())).free
    if free < needed:
        raise RunError(
            f"{folder}: too little room for the {len(streamed)} layers that do not stay in memory",
            expected=format_bytes(needed),
            found=format_bytes(free),
            cure="make room there, set SMIDGEN_CACHE to a folder on another disk, or allow more memory",
        )
    return LayerStream(streamed, checkpoint, folder)


def needs_gptq(quantize: str, checkpoint: Checkpoint) -> bool:
    """Whether 'gptq' means work to do: the base is not in that form, nor in one that choose_storage refuses."""
    return quantize == "gptq" and _stored_as(checkpoint) in ("none", "gguf")


def _stored_as(checkpoint: Checkpoint) -> str:
    """How a checkpoint is stored as it is; 'none' for plain numbers."""
    stored = stored_weights(checkpoint)
    return "none" if stored is None else stored.storage
