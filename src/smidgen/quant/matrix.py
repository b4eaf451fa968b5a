"""Frozen matrices: packed weights that multiply without ever being dense as a whole.

A `FrozenMatrix` is W [out_features, in_features] in some stored form. It offers three things, and everything above it
(LoRA, experts, the head, merging) knows only these:

    rows(i, j, dtype)   W[i:j] as a dense panel, in scratch memory
    matmul(x)           x Wᵀ   [..., in_features]  -> [..., out_features]
    matmul_t(g)         g W    [..., out_features] -> [..., in_features]

Both products walk over panels of rows: a panel is de-quantised into scratch memory that fits the cache and goes into
an ordinary matrix product. The same panel serves forward (y[:, i:j] = x Pᵀ) and backward (dx += g[:, i:j] P), so no
second layout and nothing dense is ever kept. In float32 on a CPU the native kernels do so, each thread with panels of
its own (csrc/panels.h), and up to SMALL_ROWS rows of x are multiplied without a panel at all; otherwise it is done
here, and the back end (backend.py) de-quantises.
"""

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from itertools import accumulate
from typing import Protocol

import torch
from torch import nn

from smidgen.kernels.lowrank import LowRank
from smidgen.kernels.packed import SMALL_ROWS, Weights, panel_product, panel_product_t, product
from smidgen.kernels.pages import empty
from smidgen.kernels.scratch import scratch
from smidgen.kernels.sizes import DEVICE_PANEL_WEIGHTS
from smidgen.quant import backend
from smidgen.quant.fourbit import NestedScales, nest_scales

__all__ = [
    "DenseMatrix",
    "FourBitMatrix",
    "FrozenMatrix",
    "Int8Matrix",
    "StackedMatrix",
    "Streamed",
    "dense",
    "quantise",
]

# A panel's height and size where panels are made here, measured best over 192 to 2,048 rows: lower panels make slower
# products, and much larger ones leave the cache. 8 MiB of float32 at most.
PANEL_ROWS = 1024
PANEL_WEIGHTS = 1 << 21
_DENSE_WEIGHTS = 1 << 20  # made at once where a whole matrix is wanted


class Streamed(Protocol):
    """What brings the buffers of a matrix that is not kept in memory (model/stream.py)."""

    def acquire(self) -> None:
        """Until another layer is acquired, the buffers are there."""
        ...


class FrozenMatrix(nn.Module, ABC):
    """W [out_features, in_features], stored in some form; see the module's docstring."""

    def __init__(self, out_features: int, in_features: int) -> None:
        super().__init__()
        self.out_features = out_features
        self.in_features = in_features
        self.streamed: Streamed | None = None

    def rows(self, start: int, stop: int, dtype: torch.dtype) -> torch.Tensor:
        """W[start:stop] as [stop - start, in_features] of `dtype`; valid until the next call in this thread."""
        self._come()
        return self._rows(start, stop, dtype)

    def _come(self) -> None:
        """Buffers that are not kept in memory are there from now on."""
        if self.streamed is not None:
            self.streamed.acquire()

    @abstractmethod
    def _rows(self, start: int, stop: int, dtype: torch.dtype) -> torch.Tensor:
        """rows, from buffers that are there."""

    def matmul(self, x: torch.Tensor) -> torch.Tensor:
        """x [..., in_features] -> x Wᵀ [..., out_features], in x's type. Not recorded by autograd."""
        y = empty((*x.shape[:-1], self.out_features), x.dtype, x.device)
        # y itself is returned: models may change it in place, but no view of it
        self.write_product(x.reshape(-1, self.in_features), y.view(-1, self.out_features))
        return y

    def write_product(self, x: torch.Tensor, y: torch.Tensor, adapter: LowRank | None = None) -> None:
        """x [M, in_features] -> x Wᵀ into y [M, out_features], of x's type; its rows may lie apart (stride(1) is 1).

        adapter: what is added to W.
        """
        self._come()
        small = 0 < x.shape[0] <= SMALL_ROWS and x.device.type == "cpu" and self._small_product(x, y)
        if not small:
            if (weights := self._native(x)) is not None:
                panel_product(weights, x, y, adapter)
                return
            for start, stop in self._panels(x):
                torch.mm(x, self._product_rows(start, stop, x.dtype).t(), out=y[:, start:stop])
        if adapter is not None:
            adapter.add_to(y)

    def _small_product(self, x: torch.Tensor, y: torch.Tensor) -> bool:
        """write_product without a panel, where a native kernel does it; False where none does."""
        weights = self._small_weights()
        if weights is None:
            return False
        if x.dtype == torch.float32:
            product(weights, x if x.stride(1) == 1 else x.contiguous(), y)
        else:
            wide = torch.empty(y.shape, dtype=torch.float32)
            product(weights, x.float().contiguous(), wide)
            y.copy_(wide)
        return True

    def matmul_t(self, g: torch.Tensor) -> torch.Tensor:
        """g [..., out_features] -> g W [..., in_features], in g's type. Not recorded by autograd."""
        flat = g.reshape(-1, self.out_features)
        dx = empty((*g.shape[:-1], self.in_features), g.dtype, g.device)
        self.write_product_t(flat, dx.view(-1, self.in_features))
        return dx

    def write_product_t(
        self, g: torch.Tensor, dx: torch.Tensor, adapter: LowRank | None = None, *, accumulate: bool = False
    ) -> torch.Tensor | None:
        """g [M, out_features] W into dx [M, in_features], of g's type, or added to it. Rows of g may lie apart.

        adapter: what is added to W; its grad_low is filled, and the gradient of its B comes back.
        """
        self._come()
        if (weights := self._native(g)) is not None:
            return panel_product_t(weights, g, dx, adapter, accumulate=accumulate)
        for start, stop in self._panels(g):
            panel = self._product_rows(start, stop, g.dtype)
            dx.addmm_(g[:, start:stop], panel, beta=1.0 if accumulate or start else 0.0)
        return None if adapter is None else adapter.backward(g, dx)

    def _native(self, x: torch.Tensor) -> Weights | None:
        """The stored form as the native products take it, where they can multiply it with x."""
        apart = x.stride(1) == 1 and x.stride(0) >= x.shape[1]  # expanded rows overlap, which BLAS refuses
        plain = apart and x.dtype == torch.float32 and x.device.type == "cpu" and len(x) > 0
        weights = self._weights() if plain else None
        return weights if weights is not None and backend.has_blas() else None

    def _weights(self) -> Weights | None:
        """The stored form as the native kernels take it; None where they do not."""
        return None

    def _small_weights(self) -> Weights | None:
        """The same for a product with few rows."""
        return self._weights()

    def _product_rows(self, start: int, stop: int, dtype: torch.dtype) -> torch.Tensor:
        """rows, with the columns in the order in which they are stored."""
        return self._rows(start, stop, dtype)

    def _panels(self, x: torch.Tensor) -> list[tuple[int, int]]:
        """Which rows are taken at once, for a product with x."""
        if x.device.type == "cpu":
            highest = max(1, min(PANEL_ROWS, PANEL_WEIGHTS // self.in_features))
        else:
            highest = max(1, DEVICE_PANEL_WEIGHTS // self.in_features)
        count = math.ceil(self.out_features / highest)
        height = math.ceil(self.out_features / max(1, count))  # all of about the same height
        return [(i, min(i + height, self.out_features)) for i in range(0, self.out_features, max(1, height))]

    @property
    def nbytes(self) -> int:
        """Bytes of the stored form."""
        return sum(buffer.numel() * buffer.element_size() for buffer in self.buffers())

    @property
    @abstractmethod
    def storage(self) -> str:
        """The name of the stored form, as `--quantize` spells it; for a dense matrix its type."""

    def extra_repr(self) -> str:
        return f"{self.out_features}, {self.in_features}, {self.storage}"


class FourBitMatrix(FrozenMatrix):
    """NF4 or FP4 blocks in bitsandbytes' layout; scales in float32, or nested in 8 bits (`-dq`)."""

    packed: torch.Tensor
    absmax: torch.Tensor
    nested_absmax: torch.Tensor
    nested_offset: torch.Tensor

    def __init__(
        self,
        shape: tuple[int, int],
        packed: torch.Tensor,
        absmax: torch.Tensor | NestedScales,
        quant_type: str,
        blocksize: int = 64,
    ) -> None:
        super().__init__(*shape)
        self.quant_type, self.blocksize = quant_type, blocksize
        self.nested = isinstance(absmax, NestedScales)
        self.register_buffer("packed", packed.view(-1))
        if isinstance(absmax, NestedScales):
            self.register_buffer("absmax", absmax.codes.view(-1))
            self.register_buffer("nested_absmax", absmax.absmax)
            self.register_buffer("nested_offset", absmax.offset)
        else:
            self.register_buffer("absmax", absmax)

    @property
    def storage(self) -> str:
        return self.quant_type + ("-dq" if self.nested else "")

    @property
    def scales(self) -> torch.Tensor | NestedScales:
        """As they are stored."""
        return NestedScales(self.absmax, self.nested_absmax, self.nested_offset) if self.nested else self.absmax

    def _rows(self, start: int, stop: int, dtype: torch.dtype) -> torch.Tensor:
        k = self.in_features
        return backend.dequantise_4bit(
            self.packed, self.scales, self.quant_type, self.blocksize, start * k, (stop - start) * k, dtype
        ).view(stop - start, k)

    def _small_weights(self) -> Weights | None:
        return None if self.in_features % self.blocksize or self.blocksize % 32 else self._weights()

    def _weights(self) -> Weights | None:
        return backend.weights_4bit(self.packed, self.scales, self.quant_type, self.blocksize)


class Int8Matrix(FrozenMatrix):
    """8-bit rows with one scale each, as LLM.int8() stores them: W = codes * scale / 127 (arXiv 2208.07339)."""

    codes: torch.Tensor
    scale: torch.Tensor

    def __init__(self, codes: torch.Tensor, scale: torch.Tensor) -> None:
        super().__init__(*codes.shape)
        self.register_buffer("codes", codes)
        self.register_buffer("scale", scale)

    @property
    def storage(self) -> str:
        return "int8"

    def _rows(self, start: int, stop: int, dtype: torch.dtype) -> torch.Tensor:
        panel = scratch("panel", (stop - start, self.in_features), dtype, self.codes.device)
        return backend.dequantise_int8(self.codes[start:stop], self.scale[start:stop], panel)

    def _weights(self) -> Weights | None:
        return backend.weights_int8(self.codes, self.scale)


class DenseMatrix(FrozenMatrix):
    """A weight in its stored type, mapped from its file; a panel at a time is converted to the compute type."""

    weight: torch.Tensor

    def __init__(self, weight: torch.Tensor) -> None:
        super().__init__(*weight.shape)
        self.register_buffer("weight", weight)

    @property
    def storage(self) -> str:
        return str(self.weight.dtype).removeprefix("torch.")

    def _rows(self, start: int, stop: int, dtype: torch.dtype) -> torch.Tensor:
        panel = self.weight[start:stop]
        return panel if panel.dtype == dtype else scratch("panel", panel.shape, dtype, panel.device).copy_(panel)

    def _weights(self) -> Weights | None:
        return backend.weights_dense(self.weight)

    def _panels(self, x: torch.Tensor) -> list[tuple[int, int]]:
        return [(0, self.out_features)] if self.weight.dtype == x.dtype else super()._panels(x)


class StackedMatrix:
    """Matrices of the same in_features on top of one another, which multiply as one (q, k, v; gate, up).

    The parts stay what they are and may have different forms; nothing is copied.
    """

    def __init__(self, parts: Sequence[FrozenMatrix]) -> None:
        widths = {part.in_features for part in parts}
        assert len(widths) == 1, f"parts of one width expected, found {sorted(widths)}"
        self.in_features = widths.pop()
        ends = list(accumulate(part.out_features for part in parts))
        self.out_features = ends[-1]
        self._placed = [(slice(end - part.out_features, end), part) for end, part in zip(ends, parts, strict=True)]

    def matmul(self, x: torch.Tensor, adapters: Sequence[LowRank | None]) -> torch.Tensor:
        """x [M, in_features] -> x Wᵀ [M, out_features], in x's type; each part with what its adapter adds to it.

        Not recorded by autograd.
        """
        y = empty((len(x), self.out_features), x.dtype, x.device)
        for (rows, part), adapter in zip(self._placed, adapters, strict=True):
            part.write_product(x, y[:, rows], adapter)
        return y

    def matmul_t(
        self, g: torch.Tensor, adapters: Sequence[LowRank | None]
    ) -> tuple[torch.Tensor, list[torch.Tensor | None]]:
        """g [M, out_features] -> (g W [M, in_features], in g's type; the gradient of each adapter's B).

        Fills grad_low of the adapters. Not recorded by autograd.
        """
        dx = empty((len(g), self.in_features), g.dtype, g.device)
        grads_B = [
            part.write_product_t(g[:, rows], dx, adapter, accumulate=rows.start > 0)
            for (rows, part), adapter in zip(self._placed, adapters, strict=True)
        ]
        return dx, grads_B


def dense(
    matrix: FrozenMatrix,
    dtype: torch.dtype,
    device: torch.device,
    changed: Callable[[int, torch.Tensor], torch.Tensor] | None = None,
) -> torch.Tensor:
    """W [out_features, in_features] of `dtype`, made panel by panel in float32 and rounded once, in its own memory.

    changed: (start, rows of W from there on, float32 [rows, in_features]) -> what is to stand there.
    """
    weight = torch.empty(matrix.out_features, matrix.in_features, dtype=dtype, device=device)
    height = max(1, _DENSE_WEIGHTS // matrix.in_features)
    for start in range(0, matrix.out_features, height):
        stop = min(start + height, matrix.out_features)
        panel = matrix.rows(start, stop, torch.float32)
        weight[start:stop] = panel if changed is None else changed(start, panel)
    return weight


def quantise(weight: torch.Tensor, storage: str) -> FrozenMatrix:
    """weight [N, K] of a float type -> the matrix in the form that `--quantize` names.

    storage: 'nf4-dq', 'nf4', 'fp4-dq', 'fp4', 'int8' or 'none'. Nothing of the size of a float32 copy is made.
    """
    if storage == "none":
        return DenseMatrix(weight)
    if storage == "int8":
        return Int8Matrix(*backend.quantise_int8(weight))
    quant_type, _, nested = storage.partition("-")
    packed, absmax = backend.quantise_4bit(weight, quant_type)
    return FourBitMatrix(
        (weight.shape[0], weight.shape[1]), packed, nest_scales(absmax) if nested else absmax, quant_type
    )
