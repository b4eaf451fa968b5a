"""Integers of 2, 3, 4 or 8 bits with a scale and a zero point for each group of inputs, as GPTQ and AWQ store them.

W[n, k] = scales[n, g] (code[n, k] - zeros[n, g]), where g is the group of input k (GPTQ, arXiv 2210.17323; AWQ,
arXiv 2306.00978). Their files pack along the wrong side for products row by row; `pack` lays the same codes out row
after row, exactly. Where groups are scattered over the inputs (act-order), a row is stored sorted by group, and the
product's other factor is brought into the same order.
"""

from dataclasses import replace

import torch

from smidgen.kernels import packed as kernels
from smidgen.kernels.library import TYPES
from smidgen.kernels.lowrank import LowRank
from smidgen.kernels.scratch import scratch
from smidgen.quant import backend
from smidgen.quant.matrix import FrozenMatrix

__all__ = ["BITS", "GroupedMatrix", "pack", "unpack"]

BITS = (2, 3, 4, 8)


def pack(codes: torch.Tensor, bits: int) -> torch.Tensor:
    """codes uint8 [..., K] below 2^bits -> uint8 [..., ceil(K / 8) * bits]: one stream, lowest bits first."""
    padded = torch.nn.functional.pad(codes, (0, -codes.shape[-1] % 8))
    if 8 % bits:  # three bytes for eight codes
        eights = padded.unflatten(-1, (-1, 8)).int()
        words = (eights << torch.arange(0, 8 * bits, bits, device=codes.device)).sum(-1, keepdim=True)
        return (words >> torch.arange(0, 8 * bits, 8, device=codes.device) & 255).to(torch.uint8).flatten(-2)
    fields = padded.unflatten(-1, (-1, 8 // bits))
    stream = fields[..., 0].clone()
    for index in range(1, 8 // bits):
        stream |= fields[..., index] << (index * bits)
    return stream


def unpack(stream: torch.Tensor, bits: int, count: int) -> torch.Tensor:
    """The reverse: uint8 [..., bytes] -> codes uint8 [..., count]."""
    mask = (1 << bits) - 1
    if 8 % bits:
        groups = torch.nn.functional.pad(stream, (0, -stream.shape[-1] % bits)).unflatten(-1, (-1, bits)).int()
        words = (groups << torch.arange(0, 8 * bits, 8, device=stream.device)).sum(-1, keepdim=True)
        codes = (words >> torch.arange(0, 8 * bits, bits, device=stream.device) & mask).to(torch.uint8)
    else:
        codes = torch.stack([stream >> (index * bits) & mask for index in range(8 // bits)], dim=-1)
    return codes.flatten(-2)[..., :count]


class GroupedMatrix(FrozenMatrix):
    """codes uint8 [N, ceil(K / 8) * bits], scales [N, G] of a float type, zeros uint8 [N, G], ends int32 [G]: group g
    is stored inputs ends[g - 1] .. ends[g]. order int64 [K]: the input at each stored place; None if they are in order.
    """

    codes: torch.Tensor
    scales: torch.Tensor
    zeros: torch.Tensor
    ends: torch.Tensor
    order: torch.Tensor | None
    place: torch.Tensor | None

    def __init__(
        self,
        in_features: int,
        bits: int,
        codes: torch.Tensor,
        scales: torch.Tensor,
        zeros: torch.Tensor,
        ends: torch.Tensor,
        order: torch.Tensor | None = None,
    ) -> None:
        super().__init__(codes.shape[0], in_features)
        assert codes.shape[1] == (in_features + 7) // 8 * bits and bits in BITS
        assert scales.shape == zeros.shape == (codes.shape[0], len(ends))
        self.bits = bits
        self.register_buffer("codes", codes)
        self.register_buffer("scales", scales)
        self.register_buffer("zeros", zeros)
        self.register_buffer("ends", ends)
        self.register_buffer("order", order)
        self.register_buffer("place", None if order is None else torch.argsort(order))  # of each input

    @property
    def storage(self) -> str:
        return f"int{self.bits}-g"

    def _rows(self, start: int, stop: int, dtype: torch.dtype) -> torch.Tensor:
        panel = self._stored_rows(start, stop, dtype)
        return panel if self.place is None else panel[:, self.place]

    def _stored_rows(self, start: int, stop: int, dtype: torch.dtype) -> torch.Tensor:
        shape = (stop - start, self.in_features)
        known = dtype if dtype in TYPES else torch.float32
        panel = scratch("panel", shape, known, self.codes.device)
        if (weights := self._weights()) is not None:
            kernels.dequantise(weights, start, panel)
        else:
            sizes = torch.diff(self.ends.long(), prepend=self.ends.new_zeros(1))
            codes = unpack(self.codes[start:stop], self.bits, self.in_features).float()
            zeros, scales = (
                part[start:stop].float().repeat_interleave(sizes, dim=1, output_size=self.in_features)
                for part in (self.zeros, self.scales)
            )
            panel.copy_(codes.sub_(zeros).mul_(scales))
        return backend.as_asked(panel, dtype)

    def write_product(self, x: torch.Tensor, y: torch.Tensor, adapter: LowRank | None = None) -> None:
        self._come()
        super().write_product(x if self.order is None else x[:, self.order], y, adapter)

    def write_product_t(
        self, g: torch.Tensor, dx: torch.Tensor, adapter: LowRank | None = None, *, accumulate: bool = False
    ) -> torch.Tensor | None:
        self._come()
        if self.order is None or self.place is None:
            return super().write_product_t(g, dx, adapter, accumulate=accumulate)
        if adapter is not None:
            adapter = replace(adapter, A=adapter.A[:, self.order])
        stored = torch.empty_like(dx)
        grad_B = super().write_product_t(g, stored, adapter)
        if accumulate:
            dx += stored[:, self.place]
        else:
            torch.index_select(stored, 1, self.place, out=dx)
        return grad_B

    def _product_rows(self, start: int, stop: int, dtype: torch.dtype) -> torch.Tensor:
        return self._stored_rows(start, stop, dtype)

    def _weights(self) -> kernels.Weights | None:
        if not backend.is_native(self.codes) or self.scales.dtype not in kernels.WEIGHT_TYPES:
            return None
        return kernels.weights_groups(self.codes, self.bits, self.scales, self.zeros, self.ends)
