"""Frozen matrices: packed weights that multiply without ever being dense as a whole.

A `FrozenMatrix` is W [out_features, in_features] in some stored form. It offers three things, and everything above it
(LoRA, experts, the head, merging) knows only these:

    rows(i, j, dtype)   W[i:j] as a dense panel, in scratch memory
    matmul(x)           x Wᵀ   [..., in_features]  -> [..., out_features]
    matmul_t(g)         g W    [..., out_features] -> [..., in_features]

Both products walk over panels of rows: a panel is de-quantised into scratch memory that fits the cache and goes into
an ordinary matrix product. The same panel serves forward (y[:, i:j] = x Pᵀ) and backward (dx += g[:, i:j] P), so no
second layout and nothing dense is ever kept. The back end (plain PyTorch, or bitsandbytes' kernels on the same bytes)
is chosen in backend.py.
"""

import math
from abc import ABC, abstractmethod

import torch
from torch import nn

from smidgen.quant import backend
from smidgen.quant.fourbit import NestedScales, nest_scales, quantise_4bit
from smidgen.quant.scratch import scratch

__all__ = ["DenseMatrix", "FourBitMatrix", "FrozenMatrix", "Int8Matrix", "quantise"]

PANEL_WEIGHTS = 1 << 20  # 4 MiB of float32 and as much for the look-up: measured best between 2**18 and 2**22


class FrozenMatrix(nn.Module, ABC):
    """W [out_features, in_features], stored in some form; see the module's docstring."""

    def __init__(self, out_features: int, in_features: int) -> None:
        super().__init__()
        self.out_features = out_features
        self.in_features = in_features

    @abstractmethod
    def rows(self, start: int, stop: int, dtype: torch.dtype) -> torch.Tensor:
        """W[start:stop] as [stop - start, in_features] of `dtype`; valid until the next call in this thread."""

    def matmul(self, x: torch.Tensor) -> torch.Tensor:
        """x [..., in_features] -> x Wᵀ [..., out_features], in x's type. Not recorded by autograd."""
        flat = x.reshape(-1, self.in_features)
        y = torch.empty(*x.shape[:-1], self.out_features, dtype=x.dtype, device=x.device)
        flat_y = y.view(-1, self.out_features)  # y itself is returned: models may change it in place, but no view of it
        for start, stop in self._panels():
            torch.mm(flat, self.rows(start, stop, x.dtype).t(), out=flat_y[:, start:stop])
        return y

    def matmul_t(self, g: torch.Tensor) -> torch.Tensor:
        """g [..., out_features] -> g W [..., in_features], in g's type. Not recorded by autograd."""
        flat = g.reshape(-1, self.out_features)
        dx = torch.empty(*g.shape[:-1], self.in_features, dtype=g.dtype, device=g.device)
        flat_dx = dx.view(-1, self.in_features)
        for start, stop in self._panels():
            flat_dx.addmm_(flat[:, start:stop], self.rows(start, stop, g.dtype), beta=0.0 if start == 0 else 1.0)
        return dx

    def _panels(self) -> list[tuple[int, int]]:
        height = max(1, PANEL_WEIGHTS // self.in_features)
        return [(i, min(i + height, self.out_features)) for i in range(0, self.out_features, height)]

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

    def scales(self, start: int, stop: int) -> torch.Tensor:
        """float32 [stop - start]: absmax of blocks start..stop."""
        if not self.nested:
            return self.absmax[start:stop]
        return NestedScales(self.absmax, self.nested_absmax, self.nested_offset).scales(start, stop)

    def rows(self, start: int, stop: int, dtype: torch.dtype) -> torch.Tensor:
        # Where K is no multiple of the blocksize, rows begin within a block: decode from the block's start and cut.
        total = self.out_features * self.in_features
        first, last = start * self.in_features, stop * self.in_features
        first_block, last_block = first // self.blocksize, math.ceil(last / self.blocksize)
        begin, end = first_block * self.blocksize, min(last_block * self.blocksize, total)
        values = backend.dequantise_4bit(
            self.packed[begin // 2 : (end + 1) // 2],
            self.scales(first_block, last_block),
            self.quant_type,
            self.blocksize,
            dtype,
        )
        return values[first - begin : last - begin].view(stop - start, self.in_features)


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

    def rows(self, start: int, stop: int, dtype: torch.dtype) -> torch.Tensor:
        panel = scratch("int8", (stop - start, self.in_features), torch.float32, self.codes.device)
        panel.copy_(self.codes[start:stop]).mul_(self.scale[start:stop, None] / 127)
        return panel if dtype == torch.float32 else _converted(panel, dtype)


class DenseMatrix(FrozenMatrix):
    """A weight in its stored type, mapped from its file; a panel at a time is converted to the compute type."""

    weight: torch.Tensor

    def __init__(self, weight: torch.Tensor) -> None:
        super().__init__(*weight.shape)
        self.register_buffer("weight", weight)

    @property
    def storage(self) -> str:
        return str(self.weight.dtype).removeprefix("torch.")

    def rows(self, start: int, stop: int, dtype: torch.dtype) -> torch.Tensor:
        panel = self.weight[start:stop]
        return panel if panel.dtype == dtype else _converted(panel, dtype)

    def _panels(self) -> list[tuple[int, int]]:
        return super()._panels() if self.weight.device.type == "cpu" else [(0, self.out_features)]


def _converted(panel: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    return scratch("panel", tuple(panel.shape), dtype, panel.device).copy_(panel)


def quantise(weight: torch.Tensor, storage: str) -> FrozenMatrix:
    """weight [N, K] of a float type -> the matrix in the form that `--quantize` names.

    storage: 'nf4-dq', 'nf4', 'fp4-dq', 'fp4', 'int8' or 'none'. Nothing of the size of a float32 copy is made.
    """
    if storage == "none":
        return DenseMatrix(weight)
    if storage == "int8":
        return _quantise_int8(weight)
    quant_type, _, nested = storage.partition("-")
    packed, absmax = quantise_4bit(weight, quant_type)
    return FourBitMatrix(
        (weight.shape[0], weight.shape[1]), packed, nest_scales(absmax) if nested else absmax, quant_type
    )


def _quantise_int8(weight: torch.Tensor) -> Int8Matrix:
    """Row-wise: scale = max |row|, codes = round(127 row / scale), in float32."""
    codes = torch.empty(weight.shape, dtype=torch.int8, device=weight.device)
    scale = torch.empty(weight.shape[0], dtype=torch.float32, device=weight.device)
    height = max(1, PANEL_WEIGHTS // weight.shape[1])
    for i in range(0, weight.shape[0], height):
        panel = weight[i : i + height].float()
        scale[i : i + height] = row_max = panel.abs().amax(dim=1)
        factor = torch.where(row_max > 0, 127.0 / row_max, 0.0)
        codes[i : i + height] = (panel * factor[:, None]).round().to(torch.int8)
    return Int8Matrix(codes, scale)
