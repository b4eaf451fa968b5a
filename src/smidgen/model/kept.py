"""What transformers' own layers keep for the backward pass, found by a forward pass on the meta device.

Every architecture keeps something else (a gate more, a norm in float32, probabilities of an attention written out), so
no formula would stay right. On the meta device there are no numbers, only sizes: autograd is asked what it saves.
"""

from typing import Any

import torch
from torch import nn
from transformers import AttentionInterface
from transformers.pytorch_utils import Conv1D

from smidgen.planning.inventory import ModuleKept

__all__ = ["kept_by_modules"]

_SHORT, _LONG = 64, 128  # tokens of two passes: what grows with a token, and what with a pair of tokens
_ATTENTION = "smidgen_kept"


class _Attention(torch.autograd.Function):
    """Keeps what an attention kernel keeps: queries, keys, values and its output."""

    @staticmethod
    def forward(ctx: Any, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        out = q.new_empty(q.shape[0], q.shape[2], q.shape[1], v.shape[3])
        ctx.save_for_backward(q, k, v, out)
        return out

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor, ...]:
        return ctx.saved_tensors[:3]


def _attend(module: nn.Module, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, *_: Any, **__: Any) -> Any:
    return _Attention.apply(q, k, v), None


AttentionInterface.register(_ATTENTION, _attend)


def kept_by_modules(model: Any, dtype: torch.dtype) -> ModuleKept | None:
    """model: on the meta device, changed by this (type, attention, what learns). None where it needs real numbers, as
    experts do that look at which tokens come to them.
    """
    model.to(dtype)
    model.requires_grad_(False)
    if getattr(model.config.get_text_config(), "_attn_implementation", "") != "eager":
        model.set_attn_implementation(_ATTENTION)
    try:
        short, _ = _saved(model, _SHORT, dtype)
        long, inputs = _saved(model, _LONG, dtype)
    except Exception:  # whatever a model's code does that meta tensors cannot
        return None
    per_pair = max(0.0, (long / _LONG - short / _SHORT) / (_LONG - _SHORT))
    return ModuleKept(short / _SHORT - per_pair * _SHORT, per_pair, inputs)


def _saved(model: Any, tokens: int, dtype: torch.dtype) -> tuple[int, tuple[tuple[str, int], ...]]:
    """(bytes that autograd keeps; for each linear layer whose input is not among them, the number of that input)."""
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
    width = model.get_input_embeddings().weight.shape[1]
    x = torch.empty(1, tokens, width, dtype=dtype, device="meta", requires_grad=True)
    mask = torch.empty(1, 1, tokens, tokens, dtype=torch.bool, device="meta")  # made: or values would be looked at
    try:
        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            model.base_model(inputs_embeds=x, attention_mask=mask, use_cache=False)
    finally:
        for hook in hooks:
            hook.remove()
    size = sum(tensor.untyped_storage().nbytes() for key, tensor in saved.items() if key not in parameters)
    numbers: dict[int, int] = {}
    others = [(name, given.untyped_storage()._cdata) for name, given in inputs.items()]
    return size, tuple((name, numbers.setdefault(key, len(numbers))) for name, key in others if key not in saved)
