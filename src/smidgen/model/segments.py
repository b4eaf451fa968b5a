"""Attention of transformers' own layers over packed rows (model/packing.py): no row sees another.

transformers lets a model's attention be exchanged by name. For the time of a packed forward pass, and of computing its
layers again, that name is ours. Which rows are packed stands in a variable of that time: not every model hands
arguments on to its attention. Each segment meets only itself and the prefix it goes on after, so nothing is computed
that a mask would take away; autograd sums a prefix's gradient over the segments behind it. Sliding windows, soft-caps
and sinks are done as the layers ask for them. What a layer might do besides is not guessed: train/sharing.py tries
each model once.
"""

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from contextvars import ContextVar
from typing import Any

import torch
import torch.nn.functional as F
from transformers import AttentionInterface, PretrainedConfig

from smidgen.kernels.attention import Segments

__all__ = ["SegmentMasks", "as_before", "attend_in_segments", "packed_rows", "segment_attention"]

_NAME = "smidgen_segments"  # transformers makes no mask for a name that it does not know
# Up to so many, one masked square on a GPU should cost less than starting kernels for each segment: by arithmetic (some
# ten kernels of 5 us a segment against 0.3 ms), not yet measured.
_BLOCK_TOKENS = 2048


class SegmentMasks:
    """Which tokens of packed rows see which, as additive masks [queries, keys] that all layers of a pass share."""

    def __init__(self, segments: Segments) -> None:
        self.segments = segments
        self._masks: dict[Any, torch.Tensor] = {}

    def causal(self, queries: int, keys: int, window: int, like: torch.Tensor) -> torch.Tensor:
        """Of a segment's queries, which are the last of its keys. window: tokens a query sees, itself included."""

        def seen() -> torch.Tensor:
            causal = torch.ones(queries, keys, dtype=torch.bool, device=like.device).tril(keys - queries)
            return causal.triu(keys - queries + 1 - window) if window else causal

        return self._kept((queries, keys, window), seen, like)

    def block(self, window: int, like: torch.Tensor) -> torch.Tensor:
        """[tokens, tokens], of all segments at once."""

        def seen() -> torch.Tensor:
            lengths, prefixes = torch.tensor(self.segments.lengths), self.segments.prefixes
            segment = torch.arange(len(lengths)).repeat_interleave(lengths).to(like.device)
            before = torch.where(prefixes < 0, 0, lengths[prefixes])  # tokens of the prefix
            starts = self.segments.starts[:-1] - before
            place = torch.arange(len(segment), device=like.device)
            position = place - starts.to(like.device)[segment]
            own = (segment[:, None] == segment) & (place[:, None] >= place)
            found = own | (prefixes.to(like.device)[segment][:, None] == segment)
            return found & (position[:, None] - position < window) if window else found

        return self._kept((window,), seen, like)

    def _kept(self, key: tuple[int, ...], seen: Callable[[], torch.Tensor], like: torch.Tensor) -> torch.Tensor:
        """Additive and kept: autograd saves one for all layers, where of a boolean one each layer saves a copy."""
        if (key, like.dtype) not in self._masks:
            mask = torch.zeros((), dtype=like.dtype, device=like.device)
            self._masks[key, like.dtype] = mask.where(seen(), -torch.inf)
        return self._masks[key, like.dtype]


def attend_in_segments(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    *,
    dropout: float = 0.0,
    scaling: float | None = None,
    softcap: float | None = None,
    sliding_window: int | None = None,
    s_aux: torch.Tensor | None = None,
    **_: Any,
) -> tuple[torch.Tensor, None]:
    """query [1, heads, tokens, head_dim], key and value [1, kv_heads, tokens, ...], positions applied ->
    (output [1, tokens, heads, ...], no weights). The arguments are transformers'; it brings no mask here.
    s_aux [heads]: scores of a key without value (attention sinks).
    """
    rows = packed_rows()
    assert attention_mask is None and rows is not None
    window, plain = sliding_window or 0, softcap is None and s_aux is None
    how = (scaling, softcap, s_aux, dropout)
    if _are_one_block(rows.segments, query.device):
        return _attend(query, key, value, rows.block(window, query), *how).transpose(1, 2).contiguous(), None
    # split, not slices: the gradient of each slice would be a tensor of all tokens
    parts = (states.split(rows.segments.lengths, dim=2) for states in (query, key, value))
    (q_parts, k_parts, v_parts), computed = parts, []
    for own, prefix in enumerate(rows.segments.prefixes.tolist()):
        q, k, v = q_parts[own], k_parts[own], v_parts[own]
        if prefix >= 0:
            k, v = torch.cat([k_parts[prefix], k], dim=2), torch.cat([v_parts[prefix], v], dim=2)
        queries, keys, mask = q.shape[2], k.shape[2], None
        if not plain or keys > queries or 0 < window < keys:
            mask = rows.causal(queries, keys, window, q)
        computed.append(_attend(q, k, v, mask, *how))
    return torch.cat(computed, dim=2).transpose(1, 2).contiguous(), None


def _are_one_block(segments: Segments, device: torch.device) -> bool:
    return device.type == "cuda" and len(segments.lengths) > 2 and segments.tokens <= _BLOCK_TOKENS


def _attend(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    mask: torch.Tensor | None,
    scale: float | None,
    softcap: float | None,
    sinks: torch.Tensor | None,
    dropout: float,
) -> torch.Tensor:
    """[1, heads, tokens, ...], mask additive, or None: causal -> [1, heads, queries, ...]."""
    grouped = q.shape[1] // k.shape[1]
    if mask is None:
        how: dict[str, Any] = {"is_causal": True, "enable_gqa": grouped > 1}
        return F.scaled_dot_product_attention(q, k, v, dropout_p=dropout, scale=scale, **how)
    if grouped > 1:  # with a mask, CUDA's fast kernels take no groups
        k, v = k.repeat_interleave(grouped, dim=1), v.repeat_interleave(grouped, dim=1)
    if softcap is None and sinks is None:
        return F.scaled_dot_product_attention(q, k, v, mask, dropout_p=dropout, scale=scale)
    scores = q @ k.mT * (q.shape[-1] ** -0.5 if scale is None else scale)
    if softcap:
        scores = torch.tanh(scores / softcap) * softcap
    scores = scores + mask
    if sinks is not None:
        scores = torch.cat([scores, sinks.view(1, -1, 1, 1).expand(*scores.shape[:3], 1).to(scores)], dim=-1)
    weights = scores.softmax(dim=-1, dtype=torch.promote_types(q.dtype, torch.float32)).to(q.dtype)
    return F.dropout(weights, dropout)[..., : k.shape[2]] @ v


AttentionInterface.register(_NAME, attend_in_segments)


_packed_rows: ContextVar[SegmentMasks | None] = ContextVar("packed_rows", default=None)


def packed_rows() -> SegmentMasks | None:
    """What the one row of tokens is that is being computed; None outside `segment_attention`."""
    return _packed_rows.get()


@contextmanager
def segment_attention(config: PretrainedConfig, rows: SegmentMasks) -> Iterator[None]:
    """The model of this (text) configuration is given `rows` as one row, and attends within their segments."""
    before, token = config._attn_implementation, _packed_rows.set(rows)
    config._attn_implementation = _NAME
    try:
        yield
    finally:
        config._attn_implementation = before
        _packed_rows.reset(token)


def as_before(config: PretrainedConfig) -> tuple[AbstractContextManager[None], AbstractContextManager[None]]:
    """context_fn of torch's checkpoint: what is computed again in the backward pass attends as it did the first time,
    where `segment_attention` has ended since."""
    rows = packed_rows()
    return nullcontext(), nullcontext() if rows is None else segment_attention(config, rows)
