"""Packed weights: the native kernels' side of de-quantising, quantising and small products.

These functions only hand tensors to the library: they need it (library.native), tensors on the CPU, contiguous. What
they compute, and the twins in plain PyTorch, are in smidgen.quant.
"""

import ctypes
import math
from typing import Any, ClassVar, TypeAlias

import torch

from smidgen.kernels.library import TYPES, native_library
from smidgen.kernels.lowrank import LowRank
from smidgen.kernels.sizes import PANEL_WEIGHTS

__all__ = [
    "SMALL_ROWS",
    "WEIGHT_TYPES",
    "FourBitParts",
    "Weights",
    "dequantise",
    "panel_product",
    "panel_product_t",
    "product",
    "quantise_4bit",
    "quantise_int8",
    "weights_4bit",
    "weights_blocks",
    "weights_dense",
    "weights_groups",
    "weights_int8",
]

_SLICE = 512  # weights of a row that are taken at once
_LONGEST_BLOCK = 256  # of weights that are decoded together, in any form
_TOKENS = 256  # rows of x that a thread takes in the backward direction where each de-quantises all of W
_MOST_TOKENS = 1024  # the same where each has columns of W to itself
SMALL_ROWS = 16  # kSmallRows in csrc/kernels.h: from there on a dense panel and BLAS are as fast
WEIGHT_TYPES = {**TYPES, torch.float16: 2}  # of stored weights

# packed uint8, code float32 [16], then absmax float32 [blocks] and three times None, or nested: absmax as uint8 codes
# [blocks], their map float32 [256], outer scales float32 [ceil(blocks / 256)], offset float32 [].
FourBitParts: TypeAlias = tuple[
    torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor | None, torch.Tensor | None, torch.Tensor | None
]


def _addresses(parts: FourBitParts) -> list[Any]:
    return [None if part is None else part.data_ptr() for part in parts]


def quantise_4bit(
    weight: torch.Tensor,
    midpoints: torch.Tensor,
    codes: torch.Tensor,
    blocksize: int,
    packed: torch.Tensor,
    absmax: torch.Tensor,
) -> None:
    """weight, a type of WEIGHT_TYPES -> packed uint8 [ceil(n / 2)], absmax float32 [ceil(n / blocksize)].

    A scaled weight's code is codes[how many midpoints it is above] (float32 [15], int32 [16]). blocksize: a multiple of
    16.
    """
    native_library().smidgen_quantise_4bit(
        weight.data_ptr(), midpoints.data_ptr(), codes.data_ptr(), packed.data_ptr(), absmax.data_ptr(),
        weight.numel(), blocksize, WEIGHT_TYPES[weight.dtype],
    )  # fmt: skip


def quantise_int8(weight: torch.Tensor, codes: torch.Tensor, scale: torch.Tensor) -> None:
    """weight [N, K], a type of WEIGHT_TYPES -> codes int8 [N, K] and scale float32 [N]."""
    native_library().smidgen_quantise_int8(
        weight.data_ptr(), codes.data_ptr(), scale.data_ptr(), *weight.shape, WEIGHT_TYPES[weight.dtype]
    )


class Weights(ctypes.Structure):
    """struct Weights of csrc/kernels.h: a matrix in its stored form, by the addresses of its tensors."""

    _fields_: ClassVar = [
        ("form", ctypes.c_int64),
        *((name, ctypes.c_void_p) for name in ("packed", "code", "absmax", "map", "outer", "offset")),
        ("blocksize", ctypes.c_int64),
        ("values", ctypes.c_void_p),
        ("scale", ctypes.c_void_p),
        ("type", ctypes.c_int64),
        ("row_bytes", ctypes.c_int64),
        ("half", ctypes.c_int64),
        ("zeros", ctypes.c_void_p),
        ("ends", ctypes.c_void_p),
        ("groups", ctypes.c_int64),
        ("scale_type", ctypes.c_int64),
    ]


def weights_4bit(parts: FourBitParts, blocksize: int) -> Weights:
    return Weights(0, *_addresses(parts), blocksize)


def weights_int8(codes: torch.Tensor, scale: torch.Tensor) -> Weights:
    return Weights(form=1, values=codes.data_ptr(), scale=scale.data_ptr())


def weights_dense(weight: torch.Tensor) -> Weights:
    """weight: contiguous, a type of WEIGHT_TYPES."""
    return Weights(form=2, values=weight.data_ptr(), type=WEIGHT_TYPES[weight.dtype])


def weights_blocks(blocks: torch.Tensor, ggml_type: int, half: int) -> Weights:
    """blocks uint8 [N, bytes of a row], as a GGUF file has them. half: see struct Weights."""
    return Weights(form=3, values=blocks.data_ptr(), type=ggml_type, row_bytes=blocks.shape[1], half=half)


def weights_groups(
    codes: torch.Tensor, bits: int, scales: torch.Tensor, zeros: torch.Tensor, ends: torch.Tensor
) -> Weights:
    """codes uint8 [N, bytes of a row]; scales [N, G], a type of WEIGHT_TYPES; zeros uint8 [N, G]; ends int32 [G]."""
    return Weights(
        form=4, values=codes.data_ptr(), type=bits, row_bytes=codes.shape[1], scale=scales.data_ptr(),
        scale_type=WEIGHT_TYPES[scales.dtype], zeros=zeros.data_ptr(), ends=ends.data_ptr(), groups=len(ends),
    )  # fmt: skip


def dequantise(weights: Weights, start: int, out: torch.Tensor) -> None:
    """Rows start .. start + len(out) of W [N, K] into out [rows, K], float32 or bfloat16.

    A 4-bit W is flat, so that rows of any length may be asked for.
    """
    native_library().smidgen_dequantise(
        ctypes.byref(weights), out.shape[1], start, start + out.shape[0], out.data_ptr(), TYPES[out.dtype]
    )


def product(weights: Weights, x: torch.Tensor, y: torch.Tensor) -> None:
    """x [M, K] W [N, K]ᵀ into y [M, N], float32, for M <= SMALL_ROWS. Rows of x and y may lie apart.

    A 4-bit W needs whole blocks in each row, of a multiple of 32.
    """
    assert 0 < x.shape[0] <= SMALL_ROWS and x.dtype == y.dtype == torch.float32
    native_library().smidgen_product(
        ctypes.byref(weights), x.data_ptr(), y.data_ptr(), x.shape[0], y.shape[1], x.shape[1], x.stride(0), y.stride(0)
    )


class _LowRank(ctypes.Structure):
    """struct LowRank of csrc/kernels.h."""

    _fields_: ClassVar = [
        *((name, ctypes.c_void_p) for name in ("a", "b", "low", "grad_low", "grad_b")),
        ("rank", ctypes.c_int64),
        ("low_stride", ctypes.c_int64),
        ("scaling", ctypes.c_float),
    ]


def panel_product(weights: Weights, x: torch.Tensor, y: torch.Tensor, adapter: LowRank | None = None) -> None:
    """x [M, K] (W + scaling B A)ᵀ into y [M, N], float32, any M. Rows of x and y may lie apart. Needs sgemm."""
    m, n, k = x.shape[0], y.shape[1], x.shape[1]
    step = _share(n, PANEL_WEIGHTS // _slice(k))
    native_library().smidgen_panel_product(
        ctypes.byref(weights), adapter and _addresses_of(adapter), x.data_ptr(), y.data_ptr(), m, n, k, x.stride(0),
        y.stride(0), step, step, _slice(k), k, 0, 0,
    )  # fmt: skip


def panel_product_t(
    weights: Weights, g: torch.Tensor, dx: torch.Tensor, adapter: LowRank | None = None, *, accumulate: bool
) -> torch.Tensor | None:
    """g [M, N] (W + scaling B A) into dx [M, K], or added to it; writes adapter.grad_low and gives B's gradient.

    As panel_product.
    """
    m, n, k = g.shape[0], g.shape[1], dx.shape[1]
    columns = _columns(k)
    apart = columns < k  # then no thread has all that an adapter needs
    step = min(m, _MOST_TOKENS) if apart else _share(m, _TOKENS)
    fused = None if apart else adapter
    parts = None if fused is None else g.new_empty(math.ceil(m / step), fused.B.shape[1], n)
    native_library().smidgen_panel_product(
        ctypes.byref(weights), fused and _addresses_of(fused, parts), g.data_ptr(), dx.data_ptr(), m, n, k,
        g.stride(0), dx.stride(0), step, PANEL_WEIGHTS // _slice(k), _slice(k), columns, 1, accumulate,
    )  # fmt: skip
    if parts is not None:
        return parts.sum(0).t()
    return adapter.backward(g, dx) if adapter is not None else None


def _addresses_of(adapter: LowRank, grad_b: torch.Tensor | None = None) -> Any:
    grad_low = None if adapter.grad_low is None else adapter.grad_low.data_ptr()
    return ctypes.byref(
        _LowRank(
            adapter.A.data_ptr(), adapter.B.data_ptr(), adapter.low.data_ptr(), grad_low,
            None if grad_b is None else grad_b.data_ptr(), adapter.B.shape[1], adapter.low.stride(0), adapter.scaling,
        )
    )  # fmt: skip


def _slice(width: int) -> int:
    """How much of a row of W is taken at once: BLAS copies x once for each panel, so panels should have many rows."""
    return width if width < 2 * _SLICE else _SLICE


def _columns(width: int) -> int:
    """How many columns of W a thread takes in the backward direction: all, where equal shares would be too narrow."""
    threads, blocks = torch.get_num_threads(), math.ceil(width / _LONGEST_BLOCK)
    share = math.ceil(blocks / threads)
    if threads == 1 or width < 2 * _SLICE * threads or share * threads > 1.05 * blocks:
        return width
    return share * _LONGEST_BLOCK


def _share(count: int, most: int) -> int:
    """The size of equal shares of `count`, about `most` each, as many as keep all threads equally busy."""
    threads = torch.get_num_threads()
    return max(1, math.ceil(count / (threads * math.ceil(count / (threads * most)))))
