"""Linear layers that share their input, as one: y = x [W1; W2; ...]ᵀ + each one's adapter.

q, k and v of an attention, or gate and up of an MLP: one product with the stacked weights, one with the stacked lora_A,
one pass over x. Not recorded by autograd: model/fused.py calls both directions. The gradient comes in two parts,
because the input may have to be computed again in between.
"""

from collections.abc import Sequence
from typing import Protocol

import torch
from torch import nn

from smidgen.lora.linear import LoraLinear

__all__ = ["LoraStack"]


class _Matrix(Protocol):
    def matmul(self, x: torch.Tensor) -> torch.Tensor: ...
    def matmul_t(self, g: torch.Tensor) -> torch.Tensor: ...


class LoraStack:
    """layers: frozen linear layers or LoraLinears of one in_features. matrix: their weights on top of one another."""

    def __init__(self, layers: Sequence[nn.Module], matrix: _Matrix) -> None:
        self.matrix = matrix
        self.adapters: list[LoraLinear] = []
        self._columns: list[slice] = []  # of y, for each adapter
        self._ranks: list[slice] = []  # of low, for each adapter
        start = rank = 0
        for layer in layers:
            stop = start + int(layer.out_features)  # type: ignore[arg-type]
            if isinstance(layer, LoraLinear):
                self.adapters.append(layer)
                self._columns.append(slice(start, stop))
                self._ranks.append(slice(rank, rank + layer.rank))
                rank += layer.rank
            start = stop
        biases = [layer.base.bias if isinstance(layer, LoraLinear) else layer.bias for layer in layers]
        self.bias: torch.Tensor | None = None
        if any(bias is not None for bias in biases):
            self.bias = torch.cat(
                [
                    torch.zeros(layer.out_features) if bias is None else bias  # type: ignore[arg-type]
                    for layer, bias in zip(layers, biases, strict=True)
                ]
            )

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """x [tokens, in_features] -> (y [tokens, all out_features], low = x Aᵀ [tokens, all ranks])."""
        y = self.matrix.matmul(x)
        if self.bias is not None:
            y += self.bias
        if not self.adapters:
            return y, x.new_empty(0)
        low = x @ self._stacked_A(x.dtype).t()
        for adapter, columns, ranks in zip(self.adapters, self._columns, self._ranks, strict=True):
            y[:, columns].addmm_(low[:, ranks], adapter.lora_B.to(x.dtype).t(), alpha=adapter.scaling)
        return y, low

    def backward_input(
        self, g: torch.Tensor, low: torch.Tensor, *, wants_x: bool
    ) -> tuple[torch.Tensor | None, torch.Tensor, list[torch.Tensor]]:
        """g [tokens, all out_features] -> (gradient of x, or None if unwanted; gradient of low; of each lora_B)."""
        grad_low = torch.empty_like(low)
        grads_B = []
        for adapter, columns, ranks in zip(self.adapters, self._columns, self._ranks, strict=True):
            part = g[:, columns]
            torch.mm(part, adapter.lora_B.to(g.dtype), out=grad_low[:, ranks]).mul_(adapter.scaling)
            # transposed: BLAS is twice as fast with the long side last
            grads_B.append((low[:, ranks].t() @ part).to(adapter.lora_B.dtype).mul_(adapter.scaling).t())
        if not wants_x:
            return None, grad_low, grads_B
        grad_x = self.matrix.matmul_t(g)
        if self.adapters:
            grad_x.addmm_(grad_low, self._stacked_A(g.dtype))
        return grad_x, grad_low, grads_B

    def backward_A(self, grad_low: torch.Tensor, x: torch.Tensor) -> list[torch.Tensor]:
        """The gradient of each lora_A, from the gradient of low and the input."""
        if not self.adapters:
            return []
        stacked = (grad_low.t() @ x).float()
        return [stacked[ranks] for ranks in self._ranks]

    def _stacked_A(self, dtype: torch.dtype) -> torch.Tensor:
        return torch.cat([adapter.lora_A for adapter in self.adapters]).to(dtype)
