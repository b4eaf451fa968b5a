"""Do the native kernels of a layer agree with their twins in PyTorch on this machine? For `smidgen doctor`."""

import os
from collections.abc import Callable

import torch

from smidgen.errors import first_line
from smidgen.kernels.attention import Heads, Segments, attention
from smidgen.kernels.elementwise import cross_entropy_, rms_norm, rms_norm_backward, rotate_, swiglu
from smidgen.kernels.library import native_library

__all__ = ["check_kernels"]

# Of the twin's norm: the tests of tests/kernels hold them to 1e-6, and sums may be taken in another order.
_TOLERANCE = 1e-5


def check_kernels() -> dict[str, str]:
    """Kernel -> 'ok', or what is wrong; empty where there is no native library."""
    if native_library() is None:
        return {}
    generator = torch.Generator().manual_seed(0)
    x, g = torch.randn(37, 96, generator=generator), torch.randn(37, 96, generator=generator)
    weight, angles = torch.rand(96, generator=generator), torch.rand(37, 8, generator=generator)
    targets = torch.randint(96, (37,), generator=generator)
    rows, heads = Segments([20, 1, 16]), Heads(4, 1, 16, scale=0.25)
    qkv = torch.randn(37, heads.width, generator=generator)

    def loss() -> torch.Tensor:
        logits = x.clone()
        return torch.cat([cross_entropy_(logits, targets, backward=True), logits.flatten()])

    cases: dict[str, Callable[[], torch.Tensor]] = {
        "rms_norm": lambda: rms_norm(x, weight, 1e-5)[0],
        "rms_norm_backward": lambda: rms_norm_backward(g, x, weight, torch.ones(37)),
        "rotate": lambda: rotate_(x.clone(), angles.cos(), angles.sin(), 6, 16),
        "swiglu": lambda: swiglu(x),
        "cross_entropy": loss,
        "attention": lambda: attention(qkv, rows, heads)[0],
    }
    return {name: _compared(run) for name, run in cases.items()}


def _compared(run: Callable[[], torch.Tensor]) -> str:
    chosen = os.environ.get("SMIDGEN_BACKEND")
    try:
        os.environ["SMIDGEN_BACKEND"] = "native"
        ours = run()
        os.environ["SMIDGEN_BACKEND"] = "torch"
        twin = run()
    except Exception as error:  # a broken installation is what a doctor is to find, whatever it raises
        return f"fails: {first_line(error)}"
    finally:
        os.environ.pop("SMIDGEN_BACKEND", None)
        if chosen is not None:
            os.environ["SMIDGEN_BACKEND"] = chosen
    apart = float((ours - twin).norm() / twin.norm())
    return "ok" if apart < _TOLERANCE else f"wrong: relative error {apart:.1e}"
