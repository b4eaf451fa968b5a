"""An adapter beside a frozen matrix in one product: W + scaling B A (LoRA, arXiv 2106.09685).

The native products with packed weights (packed.py) take its part along while the result is in the cache; the methods
here are the same in plain PyTorch.
"""

from dataclasses import dataclass

import torch

__all__ = ["LowRank"]


@dataclass(frozen=True)
class LowRank:
    """A [R, K] and B [N, R], contiguous, in the product's type; low = x Aᵀ [M, R], whose rows may lie apart.

    grad_low: laid out like low; the backward direction fills it.
    """

    A: torch.Tensor
    B: torch.Tensor
    scaling: float
    low: torch.Tensor
    grad_low: torch.Tensor | None = None

    def add_to(self, y: torch.Tensor) -> None:
        """y [M, N] += scaling low Bᵀ."""
        y.addmm_(self.low, self.B.t(), alpha=self.scaling)

    def backward(self, g: torch.Tensor, dx: torch.Tensor | None) -> torch.Tensor:
        """g [M, N], the gradient of y -> that of B [N, R]; fills grad_low and adds to dx [M, K] where it is wanted."""
        assert self.grad_low is not None
        torch.mm(g, self.B, out=self.grad_low).mul_(self.scaling)
        if dx is not None:
            dx.addmm_(self.grad_low, self.A)
        # transposed: BLAS is twice as fast with the long side last
        return (self.low.t() @ g).mul_(self.scaling).t()
