"""Adapters as GGUF files for llama.cpp (`--lora`) and Ollama (`ADAPTER`).

Format: general.architecture is the base's, general.type "adapter", adapter.type "lora", adapter.lora.alpha one number
for the whole file; for each layer X.weight the tensors X.weight.lora_a [r, in_features] and X.weight.lora_b
[out_features, r]. llama.cpp applies alpha / r with the layer's own r, so alpha is written as scaling r of the first
layer whose scaling is not 0, and where another layer's differs (rsLoRA with ranks of their own, an alpha of a layer's
own) the rest goes into lora_b.
"""

from pathlib import Path

import torch

from smidgen.checkpoint.base import MappedFile
from smidgen.checkpoint.gguf import unpermute
from smidgen.checkpoint.gguf_header import read_header
from smidgen.errors import RunError
from smidgen.export.gguf_layout import GgufLayout, finish, write_metadata
from smidgen.lora.attach import adapters
from smidgen.lora.linear import LoraLinear
from smidgen.model.build import Base
from smidgen.model.trained import learning_parts

__all__ = ["read_gguf_lora", "save_gguf_lora"]


def save_gguf_lora(base: Base, path: Path) -> None:
    """Write the adapters that are on `base`, in float32. Raises RunError where llama.cpp could not apply one."""
    import gguf

    layout = GgufLayout.of(base)
    layers = adapters(base.model)
    if base.head_name in layers and base.model.config.get_text_config().tie_word_embeddings:
        raise RunError(
            "the head has an adapter, but shares its weight with the embedding: llama.cpp cannot apply that",
            cure="use --to gguf, which merges it",
        )
    others = [name for name, part in learning_parts(base.model).items() if not isinstance(part, LoraLinear)]
    if others:
        raise RunError(
            f"{', '.join(others)}: trained whole or with new tokens, which llama.cpp's adapters cannot hold",
            cure="use --to gguf, which merges them",
        )
    if any(layer.use_dora for layer in layers.values()):
        raise RunError("llama.cpp has no DoRA", expected="plain LoRA", cure="use --to gguf, which merges it")
    # llama.cpp takes an alpha of 0 for one that is not said, and multiplies by 1.
    alpha = next((layer.scaling * layer.rank for layer in layers.values() if layer.scaling), 1.0)
    writer = gguf.GGUFWriter(None, layout.architecture)
    write_metadata(writer, {"general.type": "adapter", "adapter.type": "lora", "adapter.lora.alpha": alpha})
    for name, layer in layers.items():
        theirs = layout.name(f"{name}.weight")
        lora_B = layer.lora_B.detach().float().cpu() * (layer.scaling * layer.rank / alpha)
        writer.add_tensor(f"{theirs}.lora_a", layer.lora_A.detach().float().cpu().contiguous().numpy())
        writer.add_tensor(f"{theirs}.lora_b", layout.stored(f"{name}.weight", lora_B).contiguous().numpy())
    finish(writer, path)


def read_gguf_lora(base: Base, path: Path) -> dict[str, tuple[torch.Tensor, torch.Tensor, float]]:
    """Layer name -> (lora_A [r, in_features], lora_B [out_features, r], scaling), read back from a file for `base`."""
    layout, mapped = GgufLayout.of(base), MappedFile(path)
    header = read_header(path, mapped.data)
    alpha = header.metadata.number("adapter.lora.alpha")
    found: dict[str, tuple[torch.Tensor, torch.Tensor, float]] = {}
    for name in adapters(base.model):
        theirs = layout.name(f"{name}.weight")
        pair = []
        for suffix in ("lora_a", "lora_b"):
            info = header.tensors.get(f"{theirs}.{suffix}")
            if info is None:
                raise RunError(f"{path} has no tensor {theirs}.{suffix}")
            pair.append(mapped.tensor(info.dtype, info.shape, info.offset).float())
        part = theirs.split(".")[-2]
        if part in layout.row.permuted:
            pair[1] = unpermute(pair[1], getattr(layout.config, layout.row.permuted[part]))
        found[name] = pair[0], pair[1], alpha / pair[0].shape[0]
    return found
