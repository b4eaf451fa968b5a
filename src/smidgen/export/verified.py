"""Exports that are opened again before anyone sees them: what comes out must still be the fine-tuned model.

The run's logits at the labels of held-out rows are compared with those of the re-opened file. Numbers in 16 bits or
more must give the same but for their rounding. A file that is no nearer to the run than the bare base is has lost the
fine-tune (coarse blocks can swallow a small adapter). Neither is kept.
"""

import math
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from smidgen.data.render import Example
from smidgen.errors import ModelError, RunError
from smidgen.events import Report, silent
from smidgen.export.compare import Distance, label_logits, without_adapters
from smidgen.export.files import folder_bytes, new_file, new_folder
from smidgen.export.gguf_lora import read_gguf_lora, save_gguf_lora
from smidgen.export.gguf_model import save_gguf
from smidgen.export.merge import write_merged
from smidgen.export.ollama import modelfile
from smidgen.export.packed import save_packed
from smidgen.export.quantise import plain_dtype
from smidgen.lora.attach import adapters
from smidgen.model.build import Base
from smidgen.model.load import load_base, open_source

__all__ = ["export_verified", "reopened"]

# Mean KL divergence in nats that rounding to a type explains, with room: measured 4e-7 for float16 on SmolLM2-135M. Of
# blocks it depends on the model; a layout written wrongly shows in the finer types.
_MOST_KL = {"F32": 1e-6, "float32": 1e-6, "F16": 1e-4, "float16": 1e-4, "BF16": 1e-2, "bfloat16": 1e-2}
_MODEL_FILE = "model.gguf"
_CONTEXT = 8192  # tokens that Ollama keeps keys and values for; the model's own 128 k would cost gigabytes


def export_verified(
    base: Base,
    tokenizer: Any,
    examples: Sequence[Example],
    to: str,
    out: Path,
    *,
    kind: str,
    system: str = "",
    trust_remote_code: bool = False,
    report: Report = silent,
) -> dict[str, Any]:
    """Write base + adapters as `to`, of forms.EXPORTS, whole or not at all. kind: type of the numbers, where there is
    a choice.

    Returns bytes, compared_tokens, mean_kl, max_logit_difference, same_top_token, and base_kl, the bare base's mean_kl.
    Raises RunError if the fine-tune did not survive.
    """
    reference = label_logits(base, examples)
    with without_adapters(base):
        bare = Distance.between(reference, label_logits(base, examples))
    is_file = to in ("gguf-lora", "gguf")
    with (new_file if is_file else new_folder)(out) as staging:
        if to == "gguf-lora":
            save_gguf_lora(base, staging)
            theirs = _with_adapters_of(base, staging, examples)
        else:
            opened = staging
            if to == "hf":
                write_merged(base, staging, getattr(torch, kind), tokenizer, report)
            elif to == "bnb-4bit":
                save_packed(base, staging, kind, plain_dtype(base), tokenizer, report)
            else:
                opened = staging if is_file else staging / _MODEL_FILE
                save_gguf(base, tokenizer, opened, kind, report)
            if to == "ollama":
                text = modelfile(_MODEL_FILE, tokenizer, system, min(base.max_positions, _CONTEXT), report)
                (staging / "Modelfile").write_text(text, encoding="utf-8")
            written = reopened(opened, kind, "take a wider --type", trust_remote_code=trust_remote_code)
            theirs = label_logits(written, examples)
        found = Distance.between(reference, theirs)
        if not math.isfinite(found.mean_kl):
            raise RunError(f"the export computes nothing finite in {kind}; nothing was kept", cure="take a wider type")
        if not found.mean_kl <= _MOST_KL.get(kind, math.inf):
            raise RunError(
                f"the export computes something else than the run: mean KL {found.mean_kl:.3g}, too much for the"
                f" rounding of {kind}; nothing was kept",
                expected=f"at most {_MOST_KL[kind]:g}",
                cure="this is a fault of smidgen: please report the model's name",
            )
        if not found.mean_kl < bare.mean_kl:
            raise RunError(
                f"the fine-tune is lost in {kind}: the export is no nearer to the run than the bare base is"
                f" (mean KL {found.mean_kl:.3g} and {bare.mean_kl:.3g}); nothing was kept",
                cure="take a finer type, or export the adapter by itself",
            )
    size = out.stat().st_size if is_file else folder_bytes(out)
    return {"bytes": size, "compared_tokens": len(reference), **asdict(found), "base_kl": bare.mean_kl}


def reopened(path: Path, kind: str, cure: str, *, device: str = "auto", trust_remote_code: bool = False) -> Base:
    """What has just been written, in a staging place. Raises RunError where it does not hold what the run computes:
    then numbers were too large for `kind`, which `cure` is about.
    """
    source = open_source(str(path))
    stored = "auto" if source.is_quantised else "none"
    try:
        return load_base(
            source, quantize=stored, compute_dtype="float32", device=device, trust_remote_code=trust_remote_code
        )
    except ModelError as error:
        why = error.what.removeprefix(f"{source.checkpoint.path}: ")
        raise RunError(f"the model cannot be written in {kind}: {why}; nothing was kept", cure=cure) from error


def _with_adapters_of(base: Base, path: Path, examples: Sequence[Example]) -> torch.Tensor:
    """Logits of `base` with the adapters that the file holds in the place of its own."""
    layers = adapters(base.model)
    kept = {name: (layer.lora_A.data, layer.lora_B.data, layer.scaling) for name, layer in layers.items()}
    try:
        for name, (lora_A, lora_B, scaling) in read_gguf_lora(base, path).items():
            layer = layers[name]
            device = layer.lora_A.device
            layer.lora_A.data, layer.lora_B.data = lora_A.to(device), lora_B.to(device)
            layer.scaling = scaling
        return label_logits(base, examples)
    finally:
        for name, layer in layers.items():
            layer.lora_A.data, layer.lora_B.data, layer.scaling = kept[name]
