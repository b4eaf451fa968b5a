"""Packed weights: the native kernels' side of de-quantising, quantising and small products.

These functions only hand tensors to the library: they need it (library.native), tensors on the CPU, contiguous. What
they compute, and the twins in plain PyTorch, are in smidgen.quant.
"""

from typing import Any, TypeAlias

import torch

from smidgen.kernels.library import TYPES, native_library

__all__ = [
    "SMALL_ROWS",
    "WEIGHT_TYPES",
    "FourBitParts",
    "dequantise_4bit",
    "dequantise_int8",
    "product_4bit",
    "product_dense",
    "product_int8",
    "quantise_4bit",
    "quantise_int8",
]

SMALL_ROWS = 16  # kSmallRows in csrc/kernels.h: from there on a dense panel and BLAS are as fast
WEIGHT_TYPES = {**TYPES, torch.float16: 2}  # of stored weights

# packed uint8, code float32 [16], then absmax float32 [blocks] and three times None, or nested: absmax as uint8 codes
# [blocks], their map float32 [256], outer scales float32 [ceil(blocks / 256)], offset float32 [].
FourBitParts: TypeAlias = tuple[
    torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor | None, torch.Tensor | None, torch.Tensor | None
]


def _addresses(parts: FourBitParts) -> list[Any]:
    return [None if part is None else part.data_ptr() for part in parts]


def dequantise_4bit(parts: FourBitParts, blocksize: int, first: int, out: torch.Tensor) -> None:
    """Weights first .. first + n of the flat matrix into out [n], float32 or bfloat16. blocksize: a power of two."""
    native_library().smidgen_dequantise_4bit(
        *_addresses(parts), blocksize, first, first + out.numel(), out.data_ptr(), TYPES[out.dtype]
    )


def dequantise_int8(codes: torch.Tensor, scale: torch.Tensor, out: torch.Tensor) -> None:
    """codes int8 [N, K] * (scale float32 [N] / 127) into out [N, K], float32 or bfloat16."""
    native_library().smidgen_dequantise_int8(
        codes.data_ptr(), scale.data_ptr(), codes.shape[0], codes.shape[1], out.data_ptr(), TYPES[out.dtype]
    )


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


def product_4bit(parts: FourBitParts, blocksize: int, x: torch.Tensor, y: torch.Tensor) -> None:
    """x [M, K] W [N, K]ᵀ into y [M, N], float32, for M <= SMALL_ROWS; K a multiple of the blocksize, that of 32.

    Rows of x and y may lie apart; the numbers of a row are neighbours.
    """
    native_library().smidgen_product_4bit(*_addresses(parts), blocksize, *_operands(x, y))


def product_int8(codes: torch.Tensor, scale: torch.Tensor, x: torch.Tensor, y: torch.Tensor) -> None:
    """As product_4bit, for int8 rows."""
    native_library().smidgen_product_int8(codes.data_ptr(), scale.data_ptr(), *_operands(x, y))


def product_dense(weight: torch.Tensor, x: torch.Tensor, y: torch.Tensor) -> None:
    """As product_4bit, for a weight [N, K] of a type of WEIGHT_TYPES."""
    native_library().smidgen_product_dense(weight.data_ptr(), WEIGHT_TYPES[weight.dtype], *_operands(x, y))


def _operands(x: torch.Tensor, y: torch.Tensor) -> tuple[int, ...]:
    assert 0 < x.shape[0] <= SMALL_ROWS and x.dtype == y.dtype == torch.float32
    return x.data_ptr(), y.data_ptr(), x.shape[0], y.shape[1], x.shape[1], x.stride(0), y.stride(0)
