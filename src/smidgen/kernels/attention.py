"""Causal self-attention with grouped key heads, forwards and backwards, without the half that the mask takes away.

PyTorch's CPU kernel computes the whole square whatever the mask. Here blocks of 64 queries meet only the keys before
them. Rows of tokens lie one behind the other, without padding, and queries, keys and values are read where the
projection wrote them: one matrix [tokens, (heads + 2 kv_heads) * head_dim], queries first. Rows that begin alike may
have that beginning in common, as a row of its own that they go on after. Not recorded by autograd.
The native kernel needs PyTorch's BLAS and float32; other types are converted. PyTorch's own attention is the twin.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate, pairwise
from typing import Any

import torch
import torch.nn.functional as F

from smidgen.kernels.library import TYPES, native
from smidgen.kernels.pages import converted, empty
from smidgen.kernels.scratch import scratch
from smidgen.kernels.sizes import ATTENTION_MOST_PARTS, ATTENTION_PART

__all__ = ["Heads", "Segments", "attention", "attention_backward", "attention_decode"]

_QUERIES = 64  # kQueries of csrc/kernels.h


@dataclass(frozen=True)
class Heads:
    """Shape of an attention. window: tokens a query sees, itself included; 0: all before it. scale: of the scores."""

    heads: int
    kv_heads: int
    head_dim: int
    scale: float
    window: int = 0

    @property
    def width(self) -> int:
        """Columns of queries, keys and values together."""
        return (self.heads + 2 * self.kv_heads) * self.head_dim

    @property
    def q_width(self) -> int:
        return self.heads * self.head_dim

    @property
    def kv_width(self) -> int:
        return self.kv_heads * self.head_dim


class Segments:
    """Rows of a batch, one behind the other: their lengths, and the tables of work that the kernels walk through.

    prefixes[i]: the row that row i goes on after, seeing all of it, or -1. That row goes on after none itself, and all
    that go on after it follow it directly: a group. The longest work comes first, so that no thread is left with it at
    the end. tile_ends: numbers of rows, ascending, after each of which a tile ends; no group lies in two. `tiles` has
    each one's tokens and its rows as Segments of their own.
    """

    def __init__(
        self, lengths: Sequence[int], prefixes: Sequence[int] | None = None, tile_ends: Sequence[int] = ()
    ) -> None:
        self.lengths = list(lengths)
        self.tokens = sum(self.lengths)
        prefix_of = [-1] * len(self.lengths) if prefixes is None else list(prefixes)
        self.prefixes = torch.tensor(prefix_of)
        ends = [0, *accumulate(self.lengths)]
        self.starts = torch.tensor(ends)
        before = [0 if prefix < 0 else self.lengths[prefix] for prefix in prefix_of]
        blocks = [(row, block) for row, length in enumerate(self.lengths) for block in range(-(-length // _QUERIES))]
        self.blocks = torch.tensor(sorted(blocks, key=lambda at: -(before[at[0]] // _QUERIES + at[1]))).view(-1, 2)

        first_rows = [row for row, prefix in enumerate(prefix_of) if prefix < 0]
        self.groups = torch.tensor([*first_rows, len(self.lengths)])
        self.group_starts = self.starts[self.groups]
        tokens = self.group_starts.diff().tolist()
        parts_of_group = [max(1, min(ATTENTION_MOST_PARTS, count // ATTENTION_PART)) for count in tokens]
        parts = [(group, part, parts) for group, parts in enumerate(parts_of_group) for part in range(parts)]
        self.parts = torch.tensor(sorted(parts, key=lambda part: -tokens[part[0]])).view(-1, 3)
        self.parts_of_group = torch.tensor(parts_of_group)
        self.most_parts = max(parts_of_group, default=1)

        self.tiles: list[tuple[slice, Segments]] = [(slice(0, self.tokens), self)]
        if len(tile_ends) > 1:
            self.tiles = [
                (
                    slice(ends[first], ends[last]),
                    Segments(self.lengths[first:last], [p - first if p >= 0 else p for p in prefix_of[first:last]]),
                )
                for first, last in pairwise([0, *tile_ends])
            ]


def _library(*tensors: torch.Tensor) -> Any:
    library = native(*tensors)
    return library if library is not None and library.smidgen_has_sgemm() else None


def attention(qkv: torch.Tensor, segments: Segments, shape: Heads) -> tuple[torch.Tensor, torch.Tensor]:
    """qkv [tokens, width], positions applied -> (output [tokens, q_width], lse float32 [heads, tokens]).

    lse: log of the sum of exponentials of each query's scores; empty from the twin.
    """
    library = _library(qkv)
    if library is None:
        return attention_twin(qkv, segments, shape), torch.empty(0)
    wide = qkv if qkv.dtype == torch.float32 else scratch("qkv", qkv.shape, torch.float32, qkv.device).copy_(qkv)
    out = empty((segments.tokens, shape.q_width), torch.float32, qkv.device)
    lse = torch.empty(shape.heads, segments.tokens)
    q = wide.data_ptr()
    library.smidgen_attention(
        q, q + 4 * shape.q_width, q + 4 * (shape.q_width + shape.kv_width), out.data_ptr(), lse.data_ptr(),
        segments.starts.data_ptr(), segments.prefixes.data_ptr(), segments.blocks.data_ptr(), len(segments.blocks),
        segments.tokens, shape.heads, shape.kv_heads, shape.head_dim, shape.width, shape.q_width, shape.window,
        shape.scale,
    )  # fmt: skip
    return converted(out, qkv.dtype), lse


def attention_backward(
    grad_out: torch.Tensor, qkv: torch.Tensor, out: torch.Tensor, lse: torch.Tensor, segments: Segments, shape: Heads
) -> torch.Tensor:
    """The gradient of qkv [tokens, width], in its type. out, lse: what `attention` gave."""
    library = _library(qkv)
    if library is None or lse.numel() == 0:
        with torch.enable_grad():
            leaf = qkv.detach().requires_grad_()
            return torch.autograd.grad(attention_twin(leaf, segments, shape), leaf, grad_out)[0]
    dtype = qkv.dtype
    narrow = dtype != torch.float32
    if narrow:
        qkv, grad_out, out = (
            scratch(name, tensor.shape, torch.float32, tensor.device).copy_(tensor)
            for name, tensor in (("qkv", qkv), ("grad_out", grad_out), ("out", out))
        )
    size = segments.most_parts * shape.kv_heads * segments.tokens * shape.head_dim
    partial = scratch("partial", (2, size), torch.float32, qkv.device)
    wide = (qkv.shape, torch.float32, qkv.device)
    grad = scratch("grad_qkv", *wide) if narrow else empty(*wide)
    q, g = qkv.data_ptr(), grad.data_ptr()
    to_k, to_v = 4 * shape.q_width, 4 * (shape.q_width + shape.kv_width)
    library.smidgen_attention_backward(
        q, q + to_k, q + to_v, out.data_ptr(), grad_out.data_ptr(), lse.data_ptr(), g, g + to_k, g + to_v,
        partial[0].data_ptr(), partial[1].data_ptr(), segments.starts.data_ptr(), segments.prefixes.data_ptr(),
        segments.groups.data_ptr(), segments.group_starts.data_ptr(), segments.parts.data_ptr(),
        segments.parts_of_group.data_ptr(), len(segments.parts_of_group), len(segments.parts), segments.tokens,
        shape.heads, shape.kv_heads, shape.head_dim, shape.width, shape.q_width, shape.window, shape.scale,
    )  # fmt: skip
    return converted(grad, dtype)


def attention_twin(qkv: torch.Tensor, segments: Segments, shape: Heads) -> torch.Tensor:
    """The same by PyTorch, row by row, differentiable."""
    rows, computed = qkv.split(segments.lengths), []
    for row, prefix in zip(rows, segments.prefixes.tolist(), strict=True):
        seen = row if prefix < 0 else torch.cat([rows[prefix], row])
        parts = seen.split([shape.q_width, shape.kv_width, shape.kv_width], dim=1)
        q, k, v = (part.unflatten(1, (-1, shape.head_dim)).transpose(0, 1)[None] for part in parts)
        mask, length, before = None, len(row), len(seen) - len(row)
        if before or 0 < shape.window < length:
            mask = torch.ones(length, len(seen), dtype=torch.bool, device=qkv.device).tril(before)
            mask = mask.triu(before + 1 - shape.window) if shape.window else mask
        grouped = shape.heads != shape.kv_heads
        out = F.scaled_dot_product_attention(
            q[:, :, before:], k, v, mask, is_causal=mask is None, scale=shape.scale, enable_gqa=grouped
        )
        computed.append(out[0].transpose(0, 1).reshape(length, shape.q_width))
    return torch.cat(computed)


def attention_decode(
    qkv: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, lengths: torch.Tensor, shape: Heads
) -> torch.Tensor:
    """One new token a row against its cache: qkv float32 [rows, width] -> output float32 [rows, q_width].

    keys, values: float32 or bfloat16 [rows, kv_heads, capacity, head_dim], of which lengths int64 [rows] tokens are
    filled; the new token's are added behind them. Computed in float32 either way.
    """
    library = native(qkv)
    rows, capacity = len(qkv), keys.shape[2]
    if library is None:
        parts = qkv.split([shape.q_width, shape.kv_width, shape.kv_width], 1)
        q, k, v = (part.view(rows, -1, shape.head_dim) for part in parts)
        index, positions = torch.arange(rows, device=qkv.device), torch.arange(capacity, device=qkv.device)
        keys[index, :, lengths], values[index, :, lengths] = k.to(keys.dtype), v.to(values.dtype)
        seen = positions <= lengths[:, None]
        if shape.window:
            seen &= positions > lengths[:, None] - shape.window
        grouped = shape.heads != shape.kv_heads
        return F.scaled_dot_product_attention(
            q[:, :, None], keys.float(), values.float(), seen[:, None, None], scale=shape.scale, enable_gqa=grouped
        ).reshape(rows, shape.q_width)
    out = torch.empty(rows, shape.q_width)
    q = qkv.data_ptr()
    library.smidgen_attention_decode(
        q, q + 4 * shape.q_width, q + 4 * (shape.q_width + shape.kv_width), keys.data_ptr(), values.data_ptr(),
        lengths.data_ptr(), out.data_ptr(), rows, shape.heads, shape.kv_heads, shape.head_dim, capacity, shape.width,
        shape.q_width, shape.window, shape.scale, TYPES[keys.dtype],
    )  # fmt: skip
    return out
