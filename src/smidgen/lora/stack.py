"""Linear layers that share their input, as one: y = x [W1; W2; ...]ᵀ + each one's adapter.

q, k and v of an attention, or gate and up of an MLP: one product with the stacked lora_A, and each product with a
weight takes its lora_B along while the result is in the cache. Not recorded by autograd: model/fused.py calls both
directions. The gradient comes in two parts, because the input may have to be computed again in between.
"""

from collections.abc import Sequence
from typing import Protocol

import torch
from torch import nn

from smidgen.kernels.lowrank import LowRank
from smidgen.lora.linear import LoraLinear

__all__ = ["LoraStack"]


class _Matrix(Protocol):
    def matmul(self, x: torch.Tensor, adapters: Sequence[LowRank | None]) -> torch.Tensor: ...
    def matmul_t(
        self, g: torch.Tensor, adapters: Sequence[LowRank | None]
    ) -> tuple[torch.Tensor, list[torch.Tensor | None]]: ...


class LoraStack:
    """layers: frozen linear layers or LoraLinears of one in_features. matrix: their weights on top of one another."""

    def __init__(self, layers: Sequence[nn.Module], matrix: _Matrix) -> None:
        self.matrix = matrix
        bases = [layer.base if isinstance(layer, LoraLinear) else layer for layer in layers]
        self.adapters = [layer for layer in layers if isinstance(layer, LoraLinear)]
        self._places: list[tuple[LoraLinear, slice, slice] | None] = []  # adapter, columns of y, of low; for each layer
        start = rank = 0
        for layer in layers:
            stop = start + int(layer.out_features)  # type: ignore[arg-type]
            is_adapted = isinstance(layer, LoraLinear)
            self._places.append((layer, slice(start, stop), slice(rank, rank + layer.rank)) if is_adapted else None)
            rank += layer.rank if is_adapted else 0
            start = stop
        self.bias: torch.Tensor | None = None
        if any(base.bias is not None for base in bases):
            self.bias = torch.cat(
                [torch.zeros(base.out_features) if base.bias is None else base.bias for base in bases]  # type: ignore[arg-type,misc]
            )

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """x [tokens, in_features] -> (y [tokens, all out_features], low = x Aᵀ [tokens, all ranks])."""
        low = x.new_empty(0)
        A = self._stacked_A(x.dtype)
        if A is not None:
            low = x @ A.t()
        y = self.matrix.matmul(x, self._low_ranks(A, low))
        self._rescale(y, [layer.row_norms() if layer.use_dora else None for layer in self.adapters])
        if self.bias is not None:
            y += self.bias
        return y, low

    def backward_input(
        self, g: torch.Tensor, low: torch.Tensor, *, wants_x: bool
    ) -> tuple[torch.Tensor | None, torch.Tensor, list[torch.Tensor]]:
        """g [tokens, all out_features] -> (gradient of x, or None if unwanted; gradient of low; of each lora_B)."""
        if any(layer.use_dora for layer in self.adapters):
            g = self._rescale(g.clone(), [layer.last_row_norms for layer in self.adapters])
        grad_low = torch.empty_like(low)
        adapters = self._low_ranks(self._stacked_A(g.dtype), low, grad_low)
        if wants_x:
            grad_x, grads_B = self.matrix.matmul_t(g, adapters)
        else:
            grad_x = None
            grads_B = [
                adapter.backward(g[:, place[1]], None)
                for adapter, place in zip(adapters, self._places, strict=True)
                if adapter is not None and place is not None
            ]
        found = [grad for grad in grads_B if grad is not None]
        return grad_x, grad_low, [grad.to(layer.lora_B.dtype) for grad, layer in zip(found, self.adapters, strict=True)]

    def backward_A(self, grad_low: torch.Tensor, x: torch.Tensor) -> list[torch.Tensor]:
        """The gradient of each lora_A, from the gradient of low and the input."""
        if not self.adapters:
            return []
        stacked = grad_low.t() @ x
        return [stacked[place[2]].to(place[0].lora_A.dtype) for place in self._places if place is not None]

    def backward_magnitude(self, g: torch.Tensor, x: torch.Tensor, low: torch.Tensor) -> list[torch.Tensor | None]:
        """The gradient of each adapter's magnitude, from g as in backward_input and the input; None without DoRA.

        It takes the product before rescaling, which is computed once more: to keep it would double what a layer keeps.
        """
        if not any(layer.use_dora for layer in self.adapters):
            return [None] * len(self.adapters)
        y = self.matrix.matmul(x, self._low_ranks(self._stacked_A(x.dtype), low))
        grads: list[torch.Tensor | None] = []
        for layer, columns, _ in filter(None, self._places):
            total = (g[:, columns] * y[:, columns]).sum(0, dtype=torch.float32)
            grads.append(None if layer.last_row_norms is None else total / layer.last_row_norms)
        return grads

    def _rescale(self, y: torch.Tensor, norms: Sequence[torch.Tensor | None]) -> torch.Tensor:
        """y [tokens, all out_features] *= m / norm in the columns of DoRA's layers. norms: of each adapter's rows."""
        for (layer, columns, _), norm in zip(filter(None, self._places), norms, strict=True):
            if norm is not None and layer.lora_magnitude_vector is not None:
                y[:, columns] *= layer.lora_magnitude_vector.detach() / norm
        return y

    def _stacked_A(self, dtype: torch.dtype) -> torch.Tensor | None:
        return torch.cat([adapter.lora_A for adapter in self.adapters]).to(dtype) if self.adapters else None

    def _low_ranks(
        self, A: torch.Tensor | None, low: torch.Tensor, grad_low: torch.Tensor | None = None
    ) -> list[LowRank | None]:
        """The adapter of each layer for one product. A [all ranks, in_features]; low, grad_low [tokens, all ranks]."""
        low_ranks: list[LowRank | None] = []
        for place in self._places:
            if place is None or A is None:
                low_ranks.append(None)
                continue
            layer, _, ranks = place
            B = layer.lora_B.to(low.dtype).contiguous()
            low_ranks.append(
                LowRank(A[ranks], B, layer.scaling, low[:, ranks], None if grad_low is None else grad_low[:, ranks])
            )
        return low_ranks
