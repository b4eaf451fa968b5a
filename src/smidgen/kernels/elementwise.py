"""RMSNorm, rotary positions, SwiGLU and cross-entropy, forwards and backwards, each in one pass over memory.

None of them is recorded by autograd: model/fused.py and train/loss.py call them in both directions. Everything is
computed in float32 and rounded once to the tensors' type (float64 stays float64, which only the twins know). The
functions named *_twin say the same in plain PyTorch.
"""

import torch
import torch.nn.functional as F

from smidgen.kernels.library import TYPES, native
from smidgen.kernels.pages import empty
from smidgen.kernels.sizes import TWIN_LOGITS

__all__ = ["cross_entropy_", "rms_norm", "rms_norm_backward", "rotate_", "swiglu", "swiglu_backward"]


def _library(*tensors: torch.Tensor):
    """The native library where it knows the first tensor's type."""
    return native(*tensors) if tensors[0].dtype in TYPES else None


def _wide(x: torch.Tensor) -> torch.Tensor:
    """x in the type that the twins compute in."""
    return x if x.dtype == torch.float64 else x.float()


def rms_norm(x: torch.Tensor, weight: torch.Tensor, eps: float) -> tuple[torch.Tensor, torch.Tensor]:
    """x [..., width], weight float32 [width] -> (x / rms(x) * weight in x's type, 1 / rms(x) as float32 [rows]).

    Root mean square layer normalisation, arXiv 1910.07467. Rows of x are contiguous.
    """
    library = _library(x)
    if library is None:
        return rms_norm_twin(x, weight, eps)
    width = x.shape[-1]
    rows = x.numel() // width
    y = empty(x.shape, x.dtype, x.device)
    rstd = torch.empty(rows, dtype=torch.float32)
    library.smidgen_rms_norm(
        x.data_ptr(), weight.data_ptr(), y.data_ptr(), rstd.data_ptr(), rows, width, eps, TYPES[x.dtype]
    )
    return y, rstd


def rms_norm_twin(x: torch.Tensor, weight: torch.Tensor, eps: float) -> tuple[torch.Tensor, torch.Tensor]:
    wide = _wide(x)
    rstd = torch.rsqrt(wide.square().mean(dim=-1, keepdim=True) + eps)
    return (wide * rstd * weight).to(x.dtype), rstd.reshape(-1)


def rms_norm_backward(
    grad_y: torch.Tensor,
    x: torch.Tensor,
    weight: torch.Tensor,
    rstd: torch.Tensor,
    residual: torch.Tensor | None = None,
) -> torch.Tensor:
    """The gradient of x, plus `residual` [..., width] if given (the gradient that goes around the norm)."""
    library = _library(grad_y)
    if library is None:
        return rms_norm_backward_twin(grad_y, x, weight, rstd, residual)
    width = x.shape[-1]
    rows = x.numel() // width
    grad_x = empty(x.shape, x.dtype, x.device)
    library.smidgen_rms_norm_backward(
        grad_y.data_ptr(), x.data_ptr(), weight.data_ptr(), rstd.data_ptr(),
        None if residual is None else residual.data_ptr(), grad_x.data_ptr(),
        rows, width, TYPES[x.dtype],
    )  # fmt: skip
    return grad_x


def rms_norm_backward_twin(
    grad_y: torch.Tensor,
    x: torch.Tensor,
    weight: torch.Tensor,
    rstd: torch.Tensor,
    residual: torch.Tensor | None = None,
) -> torch.Tensor:
    factor = rstd.view(*x.shape[:-1], 1)
    normed, weighted = _wide(x) * factor, _wide(grad_y) * weight
    grad_x = factor * (weighted - normed * (weighted * normed).mean(dim=-1, keepdim=True))
    return (grad_x if residual is None else grad_x + residual).to(x.dtype)


def rotate_(
    x: torch.Tensor, cosine: torch.Tensor, sine: torch.Tensor, heads: int, head_dim: int, *, back: bool = False
) -> torch.Tensor:
    """Rotate the first `heads` heads of x [rows, >= heads * head_dim] in place; rows may be strided.

    cosine, sine: float32 [rows, rotary_dim / 2]; value i of a head is paired with value i + rotary_dim / 2 (rotary
    position embedding, arXiv 2104.09864, in the half-split order of GPT-NeoX). back: by the opposite angle, which is
    the gradient.
    """
    library = _library(x)
    if library is None:
        return rotate_twin_(x, cosine, sine, heads, head_dim, back=back)
    library.smidgen_rotate(
        x.data_ptr(), cosine.data_ptr(), sine.data_ptr(), x.shape[0], heads, head_dim, 2 * cosine.shape[1],
        x.stride(0), -1.0 if back else 1.0, TYPES[x.dtype],
    )  # fmt: skip
    return x


def rotate_twin_(
    x: torch.Tensor, cosine: torch.Tensor, sine: torch.Tensor, heads: int, head_dim: int, *, back: bool = False
) -> torch.Tensor:
    half = cosine.shape[1]
    states = x[:, : heads * head_dim].view(x.shape[0], heads, head_dim)
    low, high = _wide(states[..., :half]), _wide(states[..., half : 2 * half])
    c, s = cosine[:, None], (-sine if back else sine)[:, None]
    rotated = low * c - high * s, high * c + low * s  # both before either is written: low and high may be views
    states[..., :half], states[..., half : 2 * half] = rotated
    return x


def swiglu(gate_up: torch.Tensor) -> torch.Tensor:
    """gate_up [rows, 2 * width], gate first -> silu(gate) * up [rows, width] (arXiv 2002.05202)."""
    library = _library(gate_up)
    rows, width = gate_up.shape[0], gate_up.shape[1] // 2
    if library is None:
        gate, up = _wide(gate_up).split(width, dim=1)
        return (F.silu(gate) * up).to(gate_up.dtype)
    y = empty((rows, width), gate_up.dtype, gate_up.device)
    library.smidgen_swiglu(gate_up.data_ptr(), y.data_ptr(), rows, width, TYPES[y.dtype])
    return y


def swiglu_backward(grad_y: torch.Tensor, gate_up: torch.Tensor, grad_gate_up: torch.Tensor, y: torch.Tensor) -> None:
    """Fills grad_gate_up [rows, 2 * width] from grad_y [rows, width], and y with silu(gate) * up once more."""
    library = _library(grad_y)
    rows, width = grad_y.shape
    if library is None:
        gate, up = _wide(gate_up).split(width, dim=1)
        grad, gate_sigmoid = _wide(grad_y), torch.sigmoid(gate)
        silu = gate * gate_sigmoid
        grad_gate_up[:, :width] = grad * up * (gate_sigmoid + silu * (1 - gate_sigmoid))
        grad_gate_up[:, width:] = grad * silu
        y.copy_(silu * up)
        return
    library.smidgen_swiglu_backward(
        grad_y.data_ptr(), gate_up.data_ptr(), grad_gate_up.data_ptr(), y.data_ptr(), rows, width, TYPES[grad_y.dtype]
    )


def cross_entropy_(logits: torch.Tensor, targets: torch.Tensor, *, backward: bool) -> torch.Tensor:
    """logits [rows, classes], targets int64 [rows] -> the loss of each row, float32 [rows].

    backward: the logits are overwritten with their gradient for a loss gradient of 1: softmax minus one-hot.
    """
    library = _library(logits, targets)
    if library is None:
        rows = max(1, TWIN_LOGITS // logits.shape[1])
        parts = zip(logits.split(rows), targets.split(rows), strict=True)
        return torch.cat([_cross_entropy_twin_(*part, backward=backward) for part in parts])
    losses = torch.empty(logits.shape[0], dtype=torch.float32)
    library.smidgen_cross_entropy(
        logits.data_ptr(), targets.data_ptr(), losses.data_ptr(), logits.shape[0], logits.shape[1], backward,
        TYPES[logits.dtype],
    )  # fmt: skip
    return losses


def _cross_entropy_twin_(logits: torch.Tensor, targets: torch.Tensor, *, backward: bool) -> torch.Tensor:
    wide = _wide(logits)
    lse = wide.logsumexp(dim=1)
    losses = lse - wide.gather(1, targets[:, None]).squeeze(1)
    if backward:
        gradient = (wide - lse[:, None]).exp_()
        gradient.scatter_add_(1, targets[:, None], gradient.new_full((len(targets), 1), -1.0))
        logits.copy_(gradient)
    return losses
