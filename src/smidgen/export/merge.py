"""Base + adapter -> a full Hugging Face folder that needs neither smidgen nor PEFT.

The base that is merged into is the de-quantised one by default, since that is what the adapter was trained against; a
16-bit base gives other weights and is used when asked for. Parameters are made dense one at a time and written shard by
shard under the names that transformers expects in a checkpoint.
"""

import json
import shutil
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import nn
from transformers.core_model_loading import revert_weight_conversion

from smidgen.events import Progress, Report, silent
from smidgen.lora.linear import LoraLinear
from smidgen.model.build import Base
from smidgen.model.experts import PackedExperts
from smidgen.model.trained import TokenRows, is_tied
from smidgen.planning.conversion import LARGEST_SHARD
from smidgen.quant.linear import FrozenEmbedding, FrozenLinear
from smidgen.quant.matrix import FrozenMatrix, dense

__all__ = ["MergedParameter", "dense_parameters", "merged_parameters", "write_merged", "write_model"]

_CPU = torch.device("cpu")  # where files are written from


@dataclass(frozen=True)
class MergedParameter:
    """A parameter of the merged model, by transformers' own name; `make` computes it, and nothing keeps it."""

    name: str
    shape: tuple[int, ...]
    make: Callable[[torch.dtype], torch.Tensor]


def dense_parameters(base: Base, dtype: torch.dtype) -> Iterator[tuple[str, torch.Tensor]]:
    """(name, tensor) of every parameter of the merged model, one at a time; see merged_parameters."""
    for parameter in merged_parameters(base):
        yield parameter.name, parameter.make(dtype)


def merged_parameters(base: Base) -> Iterator[MergedParameter]:
    """Every parameter of base + adapters.

    A tied head is left out unless training has parted it from the embedding: then they are two matrices from now on.
    """
    head_name = base.head_name
    for name, module in base.model.named_modules():
        # what learns stands for its base; a tied head is written with the embedding
        if not name.endswith(".base") and not (name == head_name and is_tied(base)):
            yield from _of_module(name, module)


def _of_module(name: str, module: nn.Module) -> Iterator[MergedParameter]:
    lora = module if isinstance(module, LoraLinear) else None
    linear = lora.base if lora else module
    if isinstance(linear, FrozenLinear):
        shape = (linear.in_features, linear.out_features)
        shape = shape if linear.transposed else shape[::-1]
        yield MergedParameter(f"{name}.weight", shape, partial(_linear, linear, lora))
        if linear.bias is not None:
            yield MergedParameter(f"{name}.bias", tuple(linear.bias.shape), linear.bias.to)
    elif isinstance(module, TokenRows):
        (weight,) = _of_module(name, module.base)
        rows = max(weight.shape[0], int(module.token_ids.max()) + 1)
        yield MergedParameter(weight.name, (rows, *weight.shape[1:]), partial(_with_tokens, weight, module))
    elif isinstance(module, FrozenEmbedding):
        matrix = module.weight
        shape = (matrix.out_features, matrix.in_features)
        yield MergedParameter(f"{name}.weight", shape, partial(dense, matrix, device=_CPU))
    elif isinstance(module, PackedExperts):
        stacks: Any = (("gate_up_proj", module.gate_up), ("down_proj", [[matrix] for matrix in module.down]))
        for key, experts in stacks:
            shape = (len(experts), sum(part.out_features for part in experts[0]), experts[0][0].in_features)
            yield MergedParameter(f"{name}.{key}", shape, partial(_experts, experts, shape))
    elif not isinstance(module, FrozenMatrix):
        for key, parameter in module.named_parameters(recurse=False):
            full = f"{name}.{key}" if name else key
            yield MergedParameter(full, tuple(parameter.shape), parameter.detach().to)


@torch.no_grad()
def _linear(linear: FrozenLinear, lora: LoraLinear | None, dtype: torch.dtype) -> torch.Tensor:
    weight = dense(linear.weight, dtype, _CPU, lora.merge if lora else None)
    return weight.t().contiguous() if linear.transposed else weight


def _with_tokens(weight: MergedParameter, tokens: TokenRows, dtype: torch.dtype) -> torch.Tensor:
    return tokens.merge(weight.make(dtype))


def _experts(experts: Any, shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
    return torch.cat([dense(part, dtype, _CPU) for parts in experts for part in parts]).view(shape)


def write_merged(
    base: Base,
    folder: Path,
    dtype: torch.dtype,
    tokenizer: Any,
    report: Report = silent,
    shard_bytes: int = LARGEST_SHARD,
) -> None:
    """Write the merged model as the files of a Hugging Face folder, which is made if need be, of about shard_bytes."""
    folder.mkdir(exist_ok=True)
    write_model(base, folder, _merged_tensors(base, dtype, report), dtype, tokenizer, shard_bytes=shard_bytes)


def _merged_tensors(base: Base, dtype: torch.dtype, report: Report) -> Iterator[tuple[str, torch.Tensor]]:
    total = sum(p.numel() for p in base.model.parameters()) + sum(
        m.out_features * m.in_features for m in base.model.modules() if isinstance(m, FrozenMatrix)
    )
    done = 0
    for name, tensor in dense_parameters(base, dtype):
        done += tensor.numel()
        yield name, tensor
        del tensor  # it is written, or waits for it: nothing else keeps it while the next one is made
        base.checkpoint.release()
        report(Progress("merging", min(done, total), total))
    report(Progress("merging", total, total))


def write_model(
    base: Base,
    folder: Path,
    tensors: Iterable[tuple[str, torch.Tensor]],
    dtype: torch.dtype,
    tokenizer: Any,
    quantization: dict[str, Any] | None = None,
    shard_bytes: int = LARGEST_SHARD,
) -> None:
    """A model's files into a folder that is there; what has come of `tensors` is written shard by shard.

    tensors: by transformers' own names, one at a time. dtype: of those that are not packed. quantization: what
    config.json is to say of the packed ones. shard_bytes: a file is written when it would be so large.
    """
    _write_index(folder, _write_shards(base, folder, tensors, shard_bytes))
    config = base.model.config.to_dict()
    config.pop("quantization_config", None)
    config.update(architectures=[type(base.model).__name__], dtype=str(dtype).removeprefix("torch."))
    if quantization is not None:
        config["quantization_config"] = quantization
    if base.model.config.get_text_config().tie_word_embeddings and not is_tied(base):
        config["tie_word_embeddings"] = False
    (folder / "config.json").write_text(
        json.dumps(config, indent=2, sort_keys=True, default=str) + "\n", encoding="utf-8"
    )
    if config.get("auto_map"):  # the model's own code; copying does not run it
        for file in base.checkpoint.path.glob("*.py"):
            shutil.copyfile(file, folder / file.name)
    if base.model.generation_config is not None:
        (folder / "generation_config.json").write_text(base.model.generation_config.to_json_string(), encoding="utf-8")
    tokenizer.save_pretrained(folder)


def _write_shards(
    base: Base, folder: Path, tensors: Iterable[tuple[str, torch.Tensor]], shard_bytes: int
) -> list[dict[str, torch.Size]]:
    """part-1.safetensors, part-2 ...; returns the names (and shapes) in each."""
    shards: list[dict[str, torch.Size]] = []
    pending: dict[str, torch.Tensor] = {}

    def flush() -> None:
        if pending:
            save_file(pending, folder / f"part-{len(shards) + 1}.safetensors", metadata={"format": "pt"})
            shards.append({name: tensor.shape for name, tensor in pending.items()})
            pending.clear()
            base.checkpoint.release()

    for name, tensor in tensors:
        for saved_name, saved in revert_weight_conversion(base.model, {name: tensor}).items():
            pending[saved_name] = saved.contiguous()
        del tensor, saved
        if sum(t.numel() * t.element_size() for t in pending.values()) >= shard_bytes:
            flush()
    flush()
    return shards


def _write_index(folder: Path, shards: list[dict[str, torch.Size]]) -> None:
    if len(shards) == 1:
        (folder / "part-1.safetensors").rename(folder / "model.safetensors")
        return
    weight_map = {}
    for index, names in enumerate(shards, start=1):
        file = f"model-{index:05d}-of-{len(shards):05d}.safetensors"
        (folder / f"part-{index}.safetensors").rename(folder / file)
        weight_map |= dict.fromkeys(names, file)
    size = sum((folder / file).stat().st_size for file in set(weight_map.values()))
    index_json = {"metadata": {"total_size": size}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index_json, indent=2) + "\n", encoding="utf-8")
