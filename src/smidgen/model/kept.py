"""What transformers' own layers keep for the backward pass, found by a forward pass on the meta device.

Every architecture keeps something else (a gate more, a norm in float32, probabilities of an attention written out), so
no formula would stay right. On the meta device there are no numbers, only sizes: autograd is asked what it saves.
"""

from inspect import signature
from typing import Any

import torch
from torch import nn
from transformers import AttentionInterface
from transformers.pytorch_utils import Conv1D

from smidgen.lora.targets import fields_of
from smidgen.model.stream import layer_of
from smidgen.planning.inventory import ModuleKept

__all__ = ["kept_by_modules"]

_SHORT, _LONG = 64, 128  # tokens of two passes: what grows with a token, and what with a pair of tokens
_ATTENTION, _WINDOWED = "smidgen_kept", "smidgen_kept_windowed"


class _Attention(torch.autograd.Function):
    """Keeps what an attention kernel keeps: queries, keys, values, its output, which goes on in another order, and in
    float32 the log-sums.
    """

    @staticmethod
    def forward(ctx: Any, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, mask: torch.Tensor | None) -> torch.Tensor:
        out = q.new_empty(*q.shape[:3], v.shape[3])
        ctx.save_for_backward(q, k, v, mask, out, q.new_empty(q.shape[:3], dtype=torch.float32))
        return out.transpose(1, 2).clone(memory_format=torch.contiguous_format)

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        return *ctx.saved_tensors[:3], None


def _attend(module: nn.Module, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, *_: Any, **__: Any) -> Any:
    return _Attention.apply(q, k, v, None), None


def _attend_windowed(
    module: nn.Module, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, mask: torch.Tensor | None, **how: Any
) -> Any:
    """A window takes a mask, of each layer its own, and then keys and values of each head (model/segments.py)."""
    if not how.get("sliding_window") or mask is None:
        return _attend(module, q, k, v)
    groups = q.shape[1] // k.shape[1]
    k, v = k.repeat_interleave(groups, dim=1), v.repeat_interleave(groups, dim=1)
    return _Attention.apply(q, k, v, mask.clone()), None


AttentionInterface.register(_ATTENTION, _attend)
AttentionInterface.register(_WINDOWED, _attend_windowed)


def kept_by_modules(model: Any, dtype: torch.dtype) -> ModuleKept | None:
    """model: on the meta device, changed by this (type, attention, what learns). None where it needs real numbers, as
    experts do that look at which tokens come to them.
    """
    model.to(dtype)
    model.requires_grad_(False)
    config, window = model.config.get_text_config(), 0
    if getattr(config, "_attn_implementation", "") != "eager":
        window = getattr(config, "sliding_window", None) or 0
        model.set_attn_implementation(_ATTENTION)
    try:
        plain, long, inputs = _slopes(model, dtype)
        begun, _ = _saved(model, _LONG, dtype, begins=True)
        if window:
            model.set_attn_implementation(_WINDOWED)
        windowed = _slopes(model, dtype)[0] if window else plain
    except Exception:  # whatever a model's code does that meta tensors cannot
        return None
    idle = (long - begun) / _LONG if begun else 0.0
    return ModuleKept(*plain, idle, inputs, window, windowed)


def _slopes(model: Any, dtype: torch.dtype) -> tuple[tuple[float, float], int, tuple[tuple[str, int], ...]]:
    """((bytes for each token, for each pair), all bytes of _LONG tokens, inputs: see _saved)."""
    short, _ = _saved(model, _SHORT, dtype)
    long, inputs = _saved(model, _LONG, dtype)
    per_pair = max(0.0, (long / _LONG - short / _SHORT) / (_LONG - _SHORT))
    return (short / _SHORT - per_pair * _SHORT, per_pair), long, inputs


def _saved(
    model: Any, tokens: int, dtype: torch.dtype, *, begins: bool = False
) -> tuple[int, tuple[tuple[str, int], ...]]:
    """(bytes that autograd keeps; for each linear layer whose input is not among them, the number of that input).

    begins: gradients end at the first layer's queries, keys and values, as where adapters in attention are the first
    that learn; else they go through all of it.
    """
    parameters = {parameter.untyped_storage()._cdata for parameter in model.parameters()}
    saved: dict[int, torch.Tensor] = {}
    inputs: dict[str, torch.Tensor] = {}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        saved[tensor.untyped_storage()._cdata] = tensor
        return tensor

    def note(name: str) -> Any:
        return lambda module, given: inputs.update({name: given[0]})

    linears = [(name, module) for name, module in model.named_modules() if isinstance(module, nn.Linear | Conv1D)]
    hooks = [module.register_forward_pre_hook(note(name)) for name, module in linears]
    if begins:
        first = [module for name, module in linears if layer_of(name) == 0 and {*fields_of(name, "")} & {*"qkv"}]
        hooks += [module.register_forward_hook(lambda _m, _x, out: out.requires_grad_().clone()) for module in first]
    width = model.get_input_embeddings().weight.shape[1]
    x = torch.empty(1, tokens, width, dtype=dtype, device="meta", requires_grad=not begins)
    mask = torch.empty(1, 1, tokens, tokens, dtype=dtype, device="meta")  # made: or values would be looked at
    given = {"inputs_embeds": x, "attention_mask": mask, "use_cache": False}
    if "position_ids" in signature(model.base_model.forward).parameters:  # which some would take from a 2D mask
        given["position_ids"] = torch.empty(1, tokens, dtype=torch.int64, device="meta")
    try:
        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            model.base_model(**given)
    finally:
        for hook in hooks:
            hook.remove()
    size = sum(tensor.untyped_storage().nbytes() for key, tensor in saved.items() if key not in parameters)
    numbers: dict[int, int] = {}
    others = [(name, given.untyped_storage()._cdata) for name, given in inputs.items()]
    return size, tuple((name, numbers.setdefault(key, len(numbers))) for name, key in others if key not in saved)
