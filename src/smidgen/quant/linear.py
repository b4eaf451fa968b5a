"""Modules over frozen matrices: FrozenLinear, y = x Wᵀ + b with a gradient for x and none for W; FrozenEmbedding."""

from typing import Any

import torch
from torch import nn

from smidgen.quant.blocks import BlockMatrix
from smidgen.quant.matrix import FrozenMatrix

__all__ = ["FrozenEmbedding", "FrozenLinear", "frozen_matmul"]


class _FrozenMatmul(torch.autograd.Function):
    """x Wᵀ; saves nothing for the backward pass but a reference to the packed matrix."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, matrix: FrozenMatrix) -> torch.Tensor:
        ctx.matrix = matrix
        return matrix.matmul(x)

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor, None]:
        return ctx.matrix.matmul_t(grads[0]), None


def frozen_matmul(x: torch.Tensor, matrix: FrozenMatrix) -> torch.Tensor:
    """x [..., in_features] -> x Wᵀ [..., out_features], differentiable in x."""
    return _FrozenMatmul.apply(x, matrix)  # type: ignore[return-value]


class FrozenLinear(nn.Module):
    """Stands where a linear layer stood. weight: W [out_features, in_features]; bias: [out_features] or None.

    transposed: the layer stored W as [in_features, out_features] (GPT-2's Conv1D); only merging and the adapter's
    configuration need to know.
    """

    bias: torch.Tensor | None

    def __init__(self, weight: FrozenMatrix, bias: torch.Tensor | None = None, *, transposed: bool = False) -> None:
        super().__init__()
        self.weight = weight
        self.register_buffer("bias", bias)
        self.transposed = transposed
        self.in_features, self.out_features = weight.in_features, weight.out_features

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = frozen_matmul(x, self.weight)
        return y if self.bias is None else y + self.bias


class FrozenEmbedding(nn.Module):
    """Stands where an embedding stood: rows of a packed matrix are decoded when they are looked up, and scaled."""

    def __init__(self, weight: BlockMatrix, dtype: torch.dtype, scale: float = 1.0) -> None:
        super().__init__()
        self.weight, self.dtype, self.scale = weight, dtype, scale

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        """ids, integers [...] -> rows [..., hidden_size] of the compute type."""
        rows = self.weight.take(ids.reshape(-1), self.dtype).view(*ids.shape, -1)
        return rows if self.scale == 1.0 else rows * torch.tensor(self.scale, dtype=self.dtype)
