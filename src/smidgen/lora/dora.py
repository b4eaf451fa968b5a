"""DoRA (arXiv 2402.09353): each row of W + s B A is brought to a length that is learnt, the magnitude m.

    y = f (x (W + s B A)ᵀ) + b,   f = m / ||W + s B A|| of each row

The gradient takes the norms for constants, as the paper proposes. They need no dense W:
||W + s B A||² = ||W||² + 2 s <W, B A> + s² ||B A||², where ||W||² never changes and is computed once, panel by panel,
<W, B A> of row n is B[n] . (A Wᵀ)[:, n], a product of the packed matrix with the few rows of A, and ||B A||² is
B[n] (A Aᵀ) B[n]ᵀ.
"""

from typing import Protocol

import torch

__all__ = ["row_norms", "squared_row_norms"]

_PANEL_WEIGHTS = 1 << 20  # that are dense at once


class _Matrix(Protocol):
    in_features: int
    out_features: int

    def matmul(self, x: torch.Tensor) -> torch.Tensor: ...
    def rows(self, start: int, stop: int, dtype: torch.dtype) -> torch.Tensor: ...


def squared_row_norms(matrix: _Matrix) -> torch.Tensor:
    """||W||² of each row, float64 [out_features]."""
    height = max(1, _PANEL_WEIGHTS // matrix.in_features)
    starts = range(0, matrix.out_features, height)
    panels = (matrix.rows(start, min(start + height, matrix.out_features), torch.float32) for start in starts)
    return torch.cat([panel.double().square().sum(1) for panel in panels])


def row_norms(
    squares: torch.Tensor, matrix: _Matrix, lora_A: torch.Tensor, lora_B: torch.Tensor, scaling: float
) -> torch.Tensor:
    """||W + scaling B A|| of each row, float32 [out_features]. squares: what squared_row_norms gives.

    float64, since the terms may nearly cancel. A row of zeros has the smallest normal length instead of none, so that
    its f is 0 rather than not a number.
    """
    A, B = lora_A.double(), lora_B.double()
    crossed = (B * matrix.matmul(lora_A).t()).sum(1)
    squares = squares + 2 * scaling * crossed + scaling**2 * (B @ (A @ A.t()) * B).sum(1)
    return squares.clamp_(min=torch.finfo(torch.float32).tiny).sqrt_().float()
