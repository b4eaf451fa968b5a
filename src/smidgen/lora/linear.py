"""LoRA over a frozen linear layer: y = x Wᵀ + b + s (dropout(x) Aᵀ) Bᵀ   (arXiv 2106.09685).

The scaling s is alpha / r, or alpha / sqrt r with rsLoRA (arXiv 2312.03732), under which large ranks
learn as fast as small ones.

Base and adapter are one autograd function. It saves x and x Aᵀ, never a dense W, never a gradient of W, and no dropout
mask: the mask is drawn again from its seed in the backward pass. A and B are float32 whatever the compute type.

With DoRA (dora.py) a length of each row of W + s B A is learnt too.

The base is anything with `weight.matmul(x)` (x Wᵀ), `weight.matmul_t(g)` (g W), `weight.rows(i, j, dtype)` and `bias`;
how W is stored is not known here.
"""

import math
from typing import Any, Protocol

import torch
from torch import nn

from smidgen.lora.dora import row_norms, squared_row_norms

__all__ = ["LoraLinear", "scaling_of"]


class _Matrix(Protocol):
    def matmul(self, x: torch.Tensor) -> torch.Tensor: ...
    def matmul_t(self, g: torch.Tensor) -> torch.Tensor: ...


class _LoraMatmul(torch.autograd.Function):
    """x [..., K], A [r, K], B [N, r] -> x Wᵀ + scaling (dropout(x) Aᵀ) Bᵀ  [..., N]."""

    @staticmethod
    def forward(
        ctx: Any,
        x: torch.Tensor,
        lora_A: torch.Tensor,
        lora_B: torch.Tensor,
        matrix: _Matrix,
        scaling: float,
        dropout: float,
        dropout_seed: int,
    ) -> torch.Tensor:
        y = matrix.matmul(x)
        dropped = _dropout(x, dropout, dropout_seed)
        low = dropped.reshape(-1, x.shape[-1]) @ lora_A.to(x.dtype).t()  # [tokens, r]
        y.view(-1, y.shape[-1]).addmm_(low, lora_B.to(x.dtype).t(), alpha=scaling)
        ctx.save_for_backward(x, low, lora_A, lora_B)
        ctx.matrix, ctx.scaling, ctx.dropout, ctx.dropout_seed = matrix, scaling, dropout, dropout_seed
        return y

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        x, low, lora_A, lora_B = ctx.saved_tensors
        g = grads[0].reshape(-1, grads[0].shape[-1])
        grad_low = (g @ lora_B.to(g.dtype)).mul_(ctx.scaling)  # [tokens, r]
        grad_B = (g.t() @ low).to(lora_B.dtype).mul_(ctx.scaling)
        dropped = _dropout(x, ctx.dropout, ctx.dropout_seed).reshape(-1, x.shape[-1])
        grad_A = (grad_low.t() @ dropped).to(lora_A.dtype)
        grad_x = None
        if ctx.needs_input_grad[0]:
            grad_x = ctx.matrix.matmul_t(g)
            if ctx.dropout:
                grad_x += _dropout((grad_low @ lora_A.to(g.dtype)).view_as(x), ctx.dropout, ctx.dropout_seed).view_as(
                    grad_x
                )
            else:
                grad_x.addmm_(grad_low, lora_A.to(g.dtype))
            grad_x = grad_x.view_as(x)
        return grad_x, grad_A, grad_B, None, None, None, None


def _dropout(x: torch.Tensor, probability: float, seed: int) -> torch.Tensor:
    """Inverted dropout whose mask is a function of the seed and x's shape."""
    if not probability:
        return x
    generator = torch.Generator(device=x.device).manual_seed(seed)
    keep = torch.rand(x.shape, generator=generator, device=x.device) >= probability
    return x * keep.to(x.dtype).mul_(1 / (1 - probability))


def scaling_of(rank: int, alpha: float, *, use_rslora: bool) -> float:
    """alpha / r (LoRA, arXiv 2106.09685), or alpha / sqrt r (rsLoRA, arXiv 2312.03732)."""
    return alpha / (math.sqrt(rank) if use_rslora else rank)


class LoraLinear(nn.Module):
    """A frozen linear layer with an adapter. lora_A: [rank, in_features], lora_B: [out_features, rank], float32.

    lora_magnitude_vector: DoRA's m, float32 [out_features], else None.
    scaling: what B A is multiplied by, which follows from rank, alpha and use_rslora.
    """

    def __init__(
        self,
        base: nn.Module,
        rank: int,
        alpha: float,
        dropout: float = 0.0,
        *,
        device: torch.device | None = None,
        use_rslora: bool = False,
        use_dora: bool = False,
    ) -> None:
        super().__init__()
        self.base = base
        self.rank, self.alpha, self.dropout, self.use_rslora = rank, alpha, dropout, use_rslora
        self.scaling = scaling_of(rank, alpha, use_rslora=use_rslora)
        self.in_features: int = base.in_features  # type: ignore[assignment]
        self.out_features: int = base.out_features  # type: ignore[assignment]
        self.lora_A = nn.Parameter(torch.empty(rank, self.in_features, dtype=torch.float32, device=device))
        self.lora_B = nn.Parameter(torch.zeros(self.out_features, rank, dtype=torch.float32, device=device))
        self.use_dora = use_dora
        self._norms: tuple[Any, torch.Tensor] | None = None
        self.lora_magnitude_vector: nn.Parameter | None = None
        if use_dora:
            self._squares = squared_row_norms(base.weight)  # type: ignore[arg-type]
            self.lora_magnitude_vector = nn.Parameter(torch.empty_like(self._squares, dtype=torch.float32))
        self.train(base.training)

    @property
    def trainable(self) -> dict[str, nn.Parameter]:
        """What is learnt, saved and resumed, by PEFT's names."""
        parts = {"lora_A": self.lora_A, "lora_B": self.lora_B}
        if self.lora_magnitude_vector is not None:
            parts["lora_magnitude_vector"] = self.lora_magnitude_vector
        return parts

    @torch.no_grad()
    def initialise(self, generator: torch.Generator) -> None:
        """A uniform in +-1 / sqrt(in_features) (Kaiming, a = sqrt 5, as PEFT), B zero, m the length of each row of W:
        the model starts unchanged.
        """
        bound = 1 / math.sqrt(self.in_features)
        self.lora_A.copy_(torch.rand(self.lora_A.shape, generator=generator) * (2 * bound) - bound)
        self.lora_B.zero_()
        if self.lora_magnitude_vector is not None:
            self.lora_magnitude_vector.copy_(self._squares.sqrt())

    @torch.no_grad()
    def changes_nothing(self) -> bool:
        """Whether the base alone computes the same: A, B or the scaling is all zero, and m the length of each row."""
        if self.scaling and bool(self.lora_A.any()) and bool(self.lora_B.any()):
            return False
        m = self.lora_magnitude_vector
        return m is None or torch.equal(m, self._squares.sqrt().to(m.dtype))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        active = self.dropout if self.training else 0.0
        # The seed comes from the global generator, so that recomputation (which restores it) draws the same mask.
        seed = int(torch.randint(0, 2**62, ()).item()) if active else 0
        y = _LoraMatmul.apply(x, self.lora_A, self.lora_B, self.base.weight, self.scaling, active, seed)
        if self.lora_magnitude_vector is not None:
            y = (y * (self.lora_magnitude_vector / self.row_norms())).to(x.dtype)  # type: ignore[operator]
        return y if self.base.bias is None else y + self.base.bias  # type: ignore[return-value, operator]

    @torch.inference_mode(False)  # they may be kept until a gradient is wanted
    @torch.no_grad()
    def row_norms(self) -> torch.Tensor:
        """DoRA's ||W + scaling B A|| of each row, float32 [out_features].

        Kept while nothing changes; computed at each call in training, where optimizers change A and B without a sign.
        """
        state = self.lora_A._version, self.lora_B._version, self.scaling
        if self.training or self._norms is None or self._norms[0] != state:
            found = row_norms(self._squares, self.base.weight, self.lora_A, self.lora_B, self.scaling)  # type: ignore[arg-type]
            self._norms = state, found
        return self._norms[1]

    @property
    def last_row_norms(self) -> torch.Tensor | None:
        """What row_norms gave last, for the backward pass; None without DoRA."""
        return None if self._norms is None else self._norms[1]

    def train(self, mode: bool = True) -> "LoraLinear":
        self._norms = None
        return super().train(mode)

    @torch.no_grad()
    def delta(self, start: int, stop: int) -> torch.Tensor:
        """Rows start..stop of scaling B A, float32 [stop - start, in_features]: what LoRA adds to W."""
        return (self.lora_B[start:stop] @ self.lora_A).mul_(self.scaling)

    @torch.no_grad()
    def merge(self, start: int, rows: torch.Tensor) -> torch.Tensor:
        """Rows of W from `start` on -> of what base and adapter multiply with; float32 [rows, in_features]."""
        stop = start + len(rows)
        merged = rows + self.delta(start, stop)
        if self.lora_magnitude_vector is not None:
            merged *= (self.lora_magnitude_vector / self.row_norms())[start:stop, None]
        return merged

    def extra_repr(self) -> str:
        return f"rank={self.rank}, scaling={self.scaling:g}, dropout={self.dropout}"
