"""A checkpoint, or a configuration alone -> the numbers that planning/ computes with. No weights are read, but
for a head in the file that config.json ties to the embedding.
"""

from collections import Counter
from dataclasses import replace
from typing import Any

import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

from smidgen.checkpoint.base import Checkpoint
from smidgen.model.build import heads_of_keys, open_skeleton, read_config, skeleton
from smidgen.model.experts import is_experts
from smidgen.model.fused import is_known
from smidgen.model.kept import kept_by_modules
from smidgen.model.stored import stored_weights
from smidgen.model.stored_groups import AwqWeights, GptqWeights
from smidgen.model.stream import layer_of
from smidgen.model.trained import trainable_names
from smidgen.model.weights import Weights
from smidgen.planning.inventory import Inventory, Linear, packed_bytes

__all__ = ["inventory_of"]


def inventory_of(
    checkpoint: Checkpoint | None,
    config: dict[str, Any],
    storage: str,
    *,
    name: str = "",
    itemsize: int = 4,
    fuses: bool = True,
    trust_remote_code: bool = False,
) -> Inventory:
    """The model as it will be once `build_base` has filled it with `storage`. checkpoint None: 16-bit weights.

    itemsize: of the compute type. fuses: whether smidgen's own layers may take the place of those they know.
    Raises ModelError for a configuration that is no causal LM.
    """
    stored = stored_weights(checkpoint) if checkpoint is not None else None
    kept = stored is not None and stored.storage == storage
    weights = None
    if checkpoint is None:
        model = skeleton(read_config(config, name or "config.json"), torch.float32)
    else:
        model, weights = open_skeleton(checkpoint, torch.float32, stored, trust_remote_code)
    text: Any = model.config.get_text_config()
    stored_item = _itemsize(checkpoint, config)
    head, embedding = model.get_output_embeddings(), model.get_input_embeddings()
    in_file = _bytes_in_file(checkpoint) if kept and checkpoint is not None else Counter[int | None]()
    linears, others = [], 0
    for path, module in model.named_modules():
        if module is head or module is embedding or not list(module.parameters(recurse=False)):
            continue
        layer = layer_of(f"{path}.")
        if isinstance(module, nn.Linear | Conv1D):
            n, k = module.weight.shape if isinstance(module, nn.Linear) else module.weight.shape[::-1]
            linears.append(Linear(path, layer or 0, n, k, packed_bytes(n, k, storage, stored_item)))
            others += 0 if module.bias is None else module.bias.numel()
        elif is_experts(module):
            for key in ("gate_up_proj", "down_proj"):
                count, n, k = getattr(module, key).shape
                size = packed_bytes(n, k, storage, stored_item)
                linears += [Linear(f"{path}.{key}.{i}", layer or 0, n, k, size, is_expert=True) for i in range(count)]
        else:
            others += sum(parameter.numel() for parameter in module.parameters(recurse=False))
    ordered = storage == "gptq" and not kept
    if kept:
        linears = _as_in_file(linears, in_file)
    if kept and weights is not None and isinstance(stored, GptqWeights | AwqWeights):
        linears, ordered = _repacked(linears, stored, weights)
    embedding_bytes, head_bytes = _head_and_embedding(checkpoint, model, kept=kept, itemsize=stored_item)
    fused = fuses and is_known(model)
    head_name = next(path for path, module in model.named_modules() if module is head)
    kv_heads, head_dim = heads_of_keys(text)
    return Inventory(
        name=name,
        storage=storage,
        hidden_size=text.hidden_size,
        intermediate_size=getattr(text, "intermediate_size", None) or 4 * text.hidden_size,
        num_layers=text.num_hidden_layers,
        num_heads=text.num_attention_heads,
        num_kv_heads=kv_heads,
        head_dim=head_dim,
        vocab_size=text.vocab_size,
        linears=tuple(linears),
        embedding_bytes=embedding_bytes,
        head_bytes=head_bytes,
        norm_bytes=others * itemsize,
        mapped=storage == "none" or (kept and storage not in ("gptq", "awq")),
        fused=fused,
        head_name=head_name,
        kept=None if fused else kept_by_modules(model, torch.bfloat16 if itemsize == 2 else torch.float32),
        modules=tuple(
            (path, sum(parameter.numel() for parameter in model.get_submodule(path).parameters(recurse=False)))
            for path in trainable_names(model)
        ),
        embedding_name=next(path for path, module in model.named_modules() if module is embedding),
        ordered=ordered,
        head_norms=any(path.endswith("self_attn.q_norm") for path, _ in model.named_modules()),
    )


def _itemsize(checkpoint: Checkpoint | None, config: dict[str, Any]) -> int:
    """Of the stored 16- or 32-bit type: that of most tensors."""
    if checkpoint is None:
        return 4 if config.get("dtype", config.get("torch_dtype")) == "float32" else 2  # from transformers 5, before it
    types = Counter(info.dtype for info in checkpoint.tensors.values() if len(info.shape) == 2)
    return 4 if types and types.most_common(1)[0][0] == "F32" else 2


def _bytes_in_file(checkpoint: Checkpoint) -> Counter[int | None]:
    """Decoder layer -> bytes of its packed tensors."""
    sizes: Counter[int | None] = Counter()
    for name, info in checkpoint.tensors.items():
        sizes[layer_of(name)] += info.nbytes
    return sizes


def _as_in_file(linears: list[Linear], in_file: "Counter[int | None]") -> list[Linear]:
    """Each layer's bytes in the file, shared out by the number of weights."""
    weights: Counter[int] = Counter()
    for linear in linears:
        weights[linear.layer] += linear.weights
    return [
        replace(linear, nbytes=round(in_file[linear.layer] * linear.weights / weights[linear.layer]))
        for linear in linears
    ]


def _repacked(linears: list[Linear], stored: GptqWeights | AwqWeights, weights: Weights) -> tuple[list[Linear], bool]:
    """(each layer with its bytes in memory, which are not those of the file; whether there are any with act-order)."""
    found: list[Linear] = []
    ordered = False
    for linear in linears:
        parameter, _, index = linear.name.rpartition(".")
        experts = weights.experts(parameter) if linear.is_expert else None
        parts = experts[int(index)] if experts else [f"{linear.name}.weight"]
        shape = (linear.out_features // len(parts), linear.in_features)
        sizes = [size for part in parts if (size := stored.size_of(part, shape))]
        if len(sizes) == len(parts):
            linear = replace(linear, nbytes=sum(nbytes for nbytes, _ in sizes))
        ordered |= any(is_ordered for _, is_ordered in sizes)
        found.append(linear)
    return found, ordered


def _head_and_embedding(checkpoint: Checkpoint | None, model: Any, *, kept: bool, itemsize: int) -> tuple[int, int]:
    """(bytes of the embedding, of the head; 0 for a tied one)."""
    head, embedding = model.get_output_embeddings(), model.get_input_embeddings()
    tied = bool(model.config.get_text_config().tie_word_embeddings)
    names = {id(module): name for name, module in model.named_modules()}

    def size(module: Any) -> int:
        info = checkpoint.tensors.get(f"{names[id(module)]}.weight") if checkpoint is not None else None
        if info is None:
            return module.weight.numel() * itemsize
        is_blocks = checkpoint is not None and checkpoint.format == "gguf" and not kept
        return module.weight.numel() * 4 if is_blocks and info.dtype not in ("F16", "BF16") else info.nbytes

    return size(embedding), 0 if tied else size(head)
