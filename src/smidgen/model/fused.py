"""A decoder layer of the Llama family as one autograd function, with its gradient written out.

transformers' layer runs some forty operations, and autograd keeps the input of each. Here a layer is four products with
packed weights (q/k/v and gate/up are stacked), causal attention that skips what is masked, and one pass over memory for
each norm, rotation and gate. What is kept for the backward pass is a choice of the layer:

    none    all that a gradient needs                  the gated product comes once more with its gradient, for nothing
    cheap   all but the inputs after their norms       those are computed again, no matrix product twice
    full    the layer's input                          the layer is computed again

It may wait rounded to bfloat16 (`kept_dtype`), for half of float32's memory; what is computed with it is float32 again.

The layer keeps transformers' submodules and their names, so adapters attach as ever, and falls back on transformers'
own forward for what is not known here: padding masks, key caches, LoRA dropout, norms that learn. Packed rows it takes
either way.
"""

from collections.abc import Sequence
from dataclasses import dataclass, fields
from functools import cached_property, partial
from itertools import islice
from typing import Any

import torch
from torch import nn
from torch.autograd.function import once_differentiable
from torch.utils.checkpoint import checkpoint
from transformers.models.llama.modeling_llama import LlamaDecoderLayer, LlamaModel
from transformers.models.mistral.modeling_mistral import MistralDecoderLayer, MistralModel
from transformers.models.qwen2.modeling_qwen2 import Qwen2DecoderLayer, Qwen2Model
from transformers.models.qwen3.modeling_qwen3 import Qwen3DecoderLayer, Qwen3Model

from smidgen.kernels.attention import Heads, Segments, attention, attention_backward
from smidgen.kernels.elementwise import rms_norm, rms_norm_backward, rotate_, swiglu, swiglu_backward
from smidgen.kernels.pages import converted, empty
from smidgen.kernels.scratch import scratch
from smidgen.kernels.sizes import PROMPT_TOKENS
from smidgen.lora.linear import LoraLinear
from smidgen.lora.stack import LoraStack
from smidgen.model.packing import PackedRows
from smidgen.model.segments import as_before, packed_rows
from smidgen.quant.matrix import StackedMatrix

__all__ = ["FusedLayer", "Rows", "fuse_layers", "hidden_rows", "is_fused", "is_known", "learns_norms", "rows_of"]

# Known by their exact type: a subclass may compute something else.
_KNOWN_LAYERS = (LlamaDecoderLayer, MistralDecoderLayer, Qwen2DecoderLayer, Qwen3DecoderLayer)
_KNOWN_BACKBONES = (LlamaModel, MistralModel, Qwen2Model, Qwen3Model)


@dataclass(frozen=True)
class Rows:
    """What all layers need to know of a batch: its rows, and float32 cos, sin [tokens, head_dim / 2] of positions.

    A layer takes `tiles` one after the other, so that its working set is that of one of them.
    """

    segments: Segments
    cosine: torch.Tensor
    sine: torch.Tensor

    @cached_property
    def tiles(self) -> list[tuple[slice, "Rows"]]:
        """The tokens of each tile, and the same for it alone."""
        found = self.segments.tiles
        if len(found) == 1:
            return [(found[0][0], self)]
        return [(part, Rows(segments, self.cosine[part], self.sine[part])) for part, segments in found]


class _LastRows:
    """The Rows of the last batch that transformers' model brought, made once for all layers."""

    def __init__(self) -> None:
        self._last: tuple[torch.Tensor, int, Rows] | None = None

    def of(self, given: tuple[torch.Tensor, torch.Tensor], batch: int) -> Rows:
        """cos, sin [1 or batch, length, head_dim], as transformers hands them to a layer -> Rows."""
        last = self._last
        if last is None or last[0] is not given[0] or last[1] != batch:
            packed = packed_rows()
            segments = packed.segments if packed else Segments([given[0].shape[1]] * batch)
            rows = rows_of(segments, *(part.expand(batch, -1, -1) for part in given))
            self._last = last = given[0], batch, rows
        return last[2]


def rows_of(segments: Segments, cosine: torch.Tensor, sine: torch.Tensor) -> Rows:
    """cosine, sine [..., head_dim] as transformers' rotary embedding gives them, a vector for each token -> Rows."""
    half = cosine.shape[-1] // 2
    tables = (part[..., :half].float().reshape(-1, half).contiguous() for part in (cosine, sine))
    return Rows(segments, *tables)


@dataclass(frozen=True)
class _Parts:
    """The layer's weights in the order of computation."""

    qkv: LoraStack
    out: LoraStack
    gate_up: LoraStack
    down: LoraStack

    @property
    def adapters(self) -> list[LoraLinear]:
        return [*self.qkv.adapters, *self.out.adapters, *self.gate_up.adapters, *self.down.adapters]

    @property
    def parameters(self) -> list[nn.Parameter]:
        """lora_A, lora_B and, with DoRA, the magnitude of each adapter in turn."""
        return [parameter for adapter in self.adapters for parameter in adapter.trainable.values()]


@dataclass
class _Kept:
    """What a forward pass leaves for the backward pass: tensors [tokens, ...]; `low` are the products x Aᵀ.

    q_input ... k_rstd: of the norms over heads that Qwen 3 has, [tokens * heads, head_dim]; else empty.
    """

    x: torch.Tensor
    normed: torch.Tensor
    rstd: torch.Tensor
    qkv: torch.Tensor
    q_input: torch.Tensor
    q_rstd: torch.Tensor
    k_input: torch.Tensor
    k_rstd: torch.Tensor
    lse: torch.Tensor
    attended: torch.Tensor
    middle: torch.Tensor
    middle_normed: torch.Tensor
    middle_rstd: torch.Tensor
    gate_up: torch.Tensor
    qkv_low: torch.Tensor
    out_low: torch.Tensor
    gate_up_low: torch.Tensor
    down_low: torch.Tensor


_CHEAP = ("normed", "middle_normed")  # computed again by `cheap`
# What may be rounded: the large ones.
_ROUNDED = ("x", "normed", "qkv", "q_input", "k_input", "attended", "middle", "middle_normed", "gate_up")


class FusedLayer(nn.Module):
    """Stands where `layer` stood.

    recompute, kept_dtype (None: the compute type): see the module's docstring; anyone may set them, layer by layer.
    """

    def __init__(self, layer: nn.Module, last_rows: _LastRows) -> None:
        super().__init__()
        for name, child in layer.named_children():
            self.add_module(name, child)
        self._original = [layer]  # in a list, so that its parameters are not counted twice
        self._last_rows = last_rows
        self.recompute = "none"
        self.kept_dtype: torch.dtype | None = None
        attention: Any = layer.self_attn
        config: Any = attention.config
        self.shape = Heads(
            heads=config.num_attention_heads,
            kv_heads=config.num_key_value_heads,
            head_dim=attention.head_dim,
            scale=attention.scaling,
            window=_window(layer),
        )
        if hasattr(layer, "attention_type"):  # transformers' models pick a mask by it
            self.attention_type = layer.attention_type
        self._stacked: tuple[list[nn.Module], _Parts] | None = None

    @property
    def original(self) -> nn.Module:
        """transformers' own layer over the same submodules, each of which it calls."""
        return self._original[0]

    def parts(self) -> _Parts:
        """The stacked weights; made anew when a layer has been exchanged, for instance by an adapter over it."""
        attention: Any = self.self_attn
        mlp: Any = self.mlp
        groups: list[list[Any]] = [
            [attention.q_proj, attention.k_proj, attention.v_proj],
            [attention.o_proj],
            [mlp.gate_proj, mlp.up_proj],
            [mlp.down_proj],
        ]
        layers = [layer for group in groups for layer in group]
        if self._stacked is None or any(a is not b for a, b in zip(layers, self._stacked[0], strict=True)):
            self._stacked = layers, _Parts(*(_stack(group) for group in groups))
        return self._stacked[1]

    def forward(self, hidden_states: torch.Tensor, **arguments: Any) -> torch.Tensor:
        """hidden_states [batch, length, hidden_size] -> the same shape. arguments: transformers' own."""
        if self._is_known(hidden_states, arguments):
            rows = self._last_rows.of(arguments["position_embeddings"], hidden_states.shape[0])
            return self.forward_rows(hidden_states.flatten(0, 1), rows).view_as(hidden_states)
        for name, child in self.named_children():  # one may have been exchanged
            setattr(self._original[0], name, child)
        if self.recompute == "full" and torch.is_grad_enabled():
            attends = partial(as_before, self.self_attn.config)  # type: ignore[union-attr, arg-type]
            return checkpoint(  # type: ignore[return-value]
                self._original[0], hidden_states, use_reentrant=False, context_fn=attends, **arguments
            )
        return self._original[0](hidden_states, **arguments)

    def forward_rows(self, x: torch.Tensor, rows: Rows) -> torch.Tensor:
        """x [tokens, hidden_size] -> the same shape, with a gradient for x and the adapters."""
        parts = self.parts()
        return _LayerFunction.apply(x.contiguous(), self, parts, rows, *parts.parameters)  # type: ignore[return-value]

    def _is_known(self, hidden: torch.Tensor, arguments: dict[str, Any]) -> bool:
        mask, positions = arguments.get("attention_mask"), arguments.get("position_embeddings")
        # no mask: transformers found that plain causal attention is meant
        plain = mask is None and arguments.get("past_key_values") is None
        return plain and positions is not None and hidden.dim() == 3 and not self.needs_modules

    @property
    def needs_modules(self) -> bool:
        """Whether something is at work that only the modules know: LoRA dropout, norms that learn."""
        drops = self.training and any(adapter.dropout for adapter in self.parts().adapters)
        return drops or (torch.is_grad_enabled() and self.learns_norms)

    @property
    def learns_norms(self) -> bool:
        norms = [self.input_layernorm, self.post_attention_layernorm, *(norm for norm, _ in self._head_norms)]
        return any(parameter.requires_grad for norm in norms for parameter in norm.parameters())

    def run(self, x: torch.Tensor, parts: _Parts, rows: Rows) -> tuple[torch.Tensor, _Kept]:
        """x [tokens, hidden_size] -> (the layer's output, all that its gradient needs)."""
        shape = self.shape
        normed, rstd = rms_norm(x, *_norm(self.input_layernorm))
        qkv, qkv_low, head_norms = self.project(normed, parts, rows.cosine, rows.sine)
        attended, lse = attention(qkv, rows.segments, shape)
        middle, out_low = parts.out.forward(attended)
        middle += x
        middle_normed, middle_rstd = rms_norm(middle, *_norm(self.post_attention_layernorm))
        gate_up, gate_up_low = parts.gate_up.forward(middle_normed)
        product = swiglu(gate_up)
        out, down_low = parts.down.forward(product)
        out += middle
        return out, _Kept(
            x, normed, rstd, qkv, *head_norms, lse, attended, middle, middle_normed, middle_rstd, gate_up,
            qkv_low, out_low, gate_up_low, down_low,
        )  # fmt: skip

    def run_in_place(self, x: torch.Tensor, parts: _Parts, rows: Rows) -> torch.Tensor:
        """x [tokens, hidden_size] becomes the layer's output; returns qkv, whose keys and values a cache wants.

        No gradient can follow. All but attention takes a tile of tokens at once, so that no more than x, qkv and what
        attention gives grows with their number.
        """
        shape = self.shape
        tiles = [slice(start, start + PROMPT_TOKENS) for start in range(0, len(x), PROMPT_TOKENS)]
        qkv = x.new_empty(len(x), shape.width)
        for tile in tiles:
            normed = rms_norm(x[tile], *_norm(self.input_layernorm))[0]
            qkv[tile] = self.project(normed, parts, rows.cosine[tile], rows.sine[tile])[0]
        attended = attention(qkv, rows.segments, shape)[0]
        for tile in tiles:
            part = x[tile]
            part += parts.out.forward(attended[tile])[0]
            normed = rms_norm(part, *_norm(self.post_attention_layernorm))[0]
            product = swiglu(parts.gate_up.forward(normed)[0])
            part += parts.down.forward(product)[0]
        return qkv

    def project(
        self, normed: torch.Tensor, parts: _Parts, cosine: torch.Tensor, sine: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor, tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]]:
        """Queries, keys and values with their positions: (qkv [tokens, width], x Aᵀ, inputs and rstd of head norms)."""
        shape = self.shape
        qkv, low = parts.qkv.forward(normed)
        kept: list[torch.Tensor] = []
        for norm, columns in self._head_norms:
            states = qkv[:, columns].clone(memory_format=torch.contiguous_format).view(-1, shape.head_dim)
            values, rstd = rms_norm(states, *_norm(norm))
            qkv[:, columns] = values.view(len(qkv), -1)
            kept += [states, rstd]
        rotate_(qkv, cosine, sine, shape.heads + shape.kv_heads, shape.head_dim)
        q_input, q_rstd, k_input, k_rstd = kept or [qkv.new_empty(0)] * 4
        return qkv, low, (q_input, q_rstd, k_input, k_rstd)

    @property
    def _head_norms(self) -> list[tuple[nn.Module, slice]]:
        """Norms over the heads of q and k, and their columns of qkv."""
        if not hasattr(self.self_attn, "q_norm"):
            return []
        end = self.shape.q_width
        return [(self.self_attn.q_norm, slice(0, end)), (self.self_attn.k_norm, slice(end, end + self.shape.kv_width))]  # type: ignore[list-item]

    def run_back(
        self,
        grad: torch.Tensor,
        kept: _Kept,
        parts: _Parts,
        rows: Rows,
        *,
        wants_x: bool,
    ) -> tuple[torch.Tensor | None, list[torch.Tensor]]:
        """grad [tokens, hidden_size] -> (gradient of x or None, gradients of parts.parameters in order)."""
        shape, dtype = self.shape, grad.dtype
        grad_product, grad_low, down_B = parts.down.backward_input(grad, kept.down_low, wants_x=True)
        assert grad_product is not None
        grad_gate_up = scratch("grad_gate_up", kept.gate_up.shape, dtype, grad.device)
        product = scratch("product", grad_product.shape, dtype, grad.device)
        swiglu_backward(grad_product, converted(kept.gate_up, dtype), grad_gate_up, product)
        del grad_product  # here and below: what is of all tokens' size leaves as soon as nothing needs it
        down_A = parts.down.backward_A(grad_low, product)
        down_m = parts.down.backward_magnitude(grad, product, kept.down_low)

        grad_normed, grad_low, gate_up_B = parts.gate_up.backward_input(grad_gate_up, kept.gate_up_low, wants_x=True)
        assert grad_normed is not None
        norm = _norm(self.post_attention_layernorm)
        middle = converted(kept.middle, dtype)
        normed = converted(kept.middle_normed, dtype) if kept.middle_normed.numel() else rms_norm(middle, *norm)[0]
        gate_up_A = parts.gate_up.backward_A(grad_low, normed)
        gate_up_m = parts.gate_up.backward_magnitude(grad_gate_up, normed, kept.gate_up_low)
        grad_middle = rms_norm_backward(grad_normed, middle, norm[0], kept.middle_rstd, residual=grad)
        del normed, grad_normed, middle

        grad_attended, grad_low, out_B = parts.out.backward_input(grad_middle, kept.out_low, wants_x=True)
        assert grad_attended is not None
        attended = converted(kept.attended, dtype)
        out_A = parts.out.backward_A(grad_low, attended)
        out_m = parts.out.backward_magnitude(grad_middle, attended, kept.out_low)
        grad_qkv = attention_backward(
            grad_attended, converted(kept.qkv, dtype), attended, kept.lse, rows.segments, shape
        )
        del grad_attended, attended
        rotate_(grad_qkv, rows.cosine, rows.sine, shape.heads + shape.kv_heads, shape.head_dim, back=True)
        inputs = ((kept.q_input, kept.q_rstd), (kept.k_input, kept.k_rstd))
        for (head_norm, columns), (states, rstd) in zip(self._head_norms, inputs, strict=False):
            part = grad_qkv[:, columns].contiguous().view(-1, shape.head_dim)
            part = rms_norm_backward(part, converted(states, dtype), _norm(head_norm)[0], rstd)
            grad_qkv[:, columns] = part.view(len(grad_qkv), -1)

        grad_normed, grad_low, qkv_B = parts.qkv.backward_input(grad_qkv, kept.qkv_low, wants_x=wants_x)
        norm = _norm(self.input_layernorm)
        x = converted(kept.x, dtype)
        normed = converted(kept.normed, dtype) if kept.normed.numel() else rms_norm(x, *norm)[0]
        qkv_A = parts.qkv.backward_A(grad_low, normed)
        qkv_m = parts.qkv.backward_magnitude(grad_qkv, normed, kept.qkv_low)
        grad_x = None
        if grad_normed is not None:
            grad_x = rms_norm_backward(grad_normed, x, norm[0], kept.rstd, residual=grad_middle)
        of_adapters = zip(
            [*qkv_A, *out_A, *gate_up_A, *down_A],
            [*qkv_B, *out_B, *gate_up_B, *down_B],
            [*qkv_m, *out_m, *gate_up_m, *down_m],
            strict=True,
        )
        return grad_x, [gradient for parts_of in of_adapters for gradient in parts_of if gradient is not None]

    def waiting(self, kept: _Kept) -> list[torch.Tensor]:
        """What waits for the backward pass, as `recompute` and `kept_dtype` say."""
        parts = {"x": kept.x} if self.recompute == "full" else vars(kept)
        if self.recompute == "cheap":
            parts = parts | dict.fromkeys(_CHEAP, kept.x.new_empty(0))
        to = self.kept_dtype
        return [converted(part, to) if to and name in _ROUNDED else part for name, part in parts.items()]


def _norm(module: Any) -> tuple[torch.Tensor, float]:
    """(weight in float32, epsilon)"""
    return module.weight if module.weight.dtype == torch.float32 else module.weight.float(), module.variance_epsilon


def _window(layer: Any) -> int:
    """How many tokens back a layer's queries see; 0: all. Each family keeps it in its own place, and Llama has none."""
    if isinstance(layer, MistralDecoderLayer):
        return layer.self_attn.config.sliding_window or 0
    return getattr(layer.self_attn, "sliding_window", None) or 0


def _stack(layers: Sequence[Any]) -> LoraStack:
    weights: list[Any] = [layer.base.weight if isinstance(layer, LoraLinear) else layer.weight for layer in layers]
    return LoraStack(layers, StackedMatrix(weights))


class _LayerFunction(torch.autograd.Function):
    """x [tokens, hidden_size] and the adapters' parameters -> the layer's output."""

    @staticmethod
    def forward(
        ctx: Any, x: torch.Tensor, layer: FusedLayer, parts: _Parts, rows: Rows, *parameters: torch.Tensor
    ) -> torch.Tensor | None:
        ctx.layer, ctx.parts, ctx.rows, ctx.recompute = layer, parts, rows, layer.recompute
        out, saved = None, []
        for tile, rows_of_tile in rows.tiles:
            part, kept = layer.run(x[tile], parts, rows_of_tile)
            out = _put(out, tile, part, len(x))
            saved += layer.waiting(kept)
            del kept  # before the next tile's
        ctx.save_for_backward(*saved)
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[Any, ...]:
        grad, layer, saved = grads[0].contiguous(), ctx.layer, iter(ctx.saved_tensors)
        grad_x, of_parameters = None, []
        for tile, rows in ctx.rows.tiles:
            if ctx.recompute == "full":
                kept = layer.run(converted(next(saved), grad.dtype), ctx.parts, rows)[1]
            else:
                kept = _Kept(*islice(saved, len(fields(_Kept))))
            part, gradients = layer.run_back(grad[tile], kept, ctx.parts, rows, wants_x=ctx.needs_input_grad[0])
            del kept
            grad_x = part if part is None else _put(grad_x, tile, part, len(grad))
            for total, more in zip(of_parameters, gradients, strict=False):
                total += more
            of_parameters = of_parameters or gradients
        return grad_x, None, None, None, *of_parameters


class _Norm(torch.autograd.Function):
    """rms_norm with a gradient for x [tokens, width] alone: of a token's size it keeps nothing but x."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
        y, rstd = rms_norm(x, weight, eps)
        ctx.save_for_backward(x, weight, rstd)
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[Any, ...]:
        x, weight, rstd = ctx.saved_tensors
        return rms_norm_backward(grads[0].contiguous(), x, weight, rstd), None, None


def _put(whole: torch.Tensor | None, tile: slice, part: torch.Tensor, tokens: int) -> torch.Tensor:
    """`part` in its place of a matrix of all tokens, which the first one makes; or itself where it has them all."""
    if len(part) == tokens:
        return part
    whole = empty((tokens, part.shape[1]), part.dtype, part.device) if whole is None else whole
    whole[tile] = part
    return whole


def is_known(model: nn.Module) -> bool:
    """Whether `fuse_layers` will exchange the layers of a model just made."""
    known = [type(module) in _KNOWN_BACKBONES for module in model.modules()]
    return any(known) and getattr(model.config.get_text_config(), "hidden_act", "") in ("silu", "swish")  # type: ignore[union-attr, operator]


def fuse_layers(model: nn.Module) -> int:
    """Exchange the layers that are known here; returns how many. Others stay transformers' own."""
    last_rows, count = _LastRows(), 0
    for name, module in list(model.named_modules()):
        if type(module) in _KNOWN_LAYERS and module.self_attn.config.hidden_act in ("silu", "swish"):  # type: ignore[union-attr]
            model.set_submodule(name, FusedLayer(module, last_rows))
            count += 1
    return count


def is_fused(backbone: nn.Module) -> bool:
    """Whether a backbone is embedding, fused layers, norm, and nothing else: then `hidden_rows` can stand for it."""
    if type(backbone) not in _KNOWN_BACKBONES:
        return False
    layers: Any = backbone.layers
    return all(isinstance(layer, FusedLayer) for layer in layers)


def learns_norms(backbone: Any) -> bool:
    """Whether a fused layer's norms are trained: then its gradients are transformers' modules' to compute."""
    return any(layer.learns_norms for layer in backbone.layers)


def hidden_rows(backbone: Any, packed: PackedRows) -> torch.Tensor:
    """Last hidden states [tokens, hidden_size] of the tokens that are computed."""
    x = backbone.embed_tokens(packed.ids)
    rows = rows_of(packed.segments, *backbone.rotary_emb(x, packed.positions[None]))
    for layer in backbone.layers:
        x = layer.forward_rows(x, rows)
    norm = backbone.norm
    learns = any(parameter.requires_grad for parameter in norm.parameters())
    return norm(x) if learns else _Norm.apply(x, *_norm(norm))  # type: ignore[return-value]
