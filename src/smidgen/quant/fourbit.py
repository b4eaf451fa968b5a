"""4-bit blocks with a scale each, as bitsandbytes lays them out: numbers <-> packed bytes, in plain PyTorch.

Layout (row-major, flat): weight i of a matrix [N, K] has the 4-bit code in byte i // 2, high nibble first; block
i // blocksize has one scale `absmax`, float32. Where K is not a multiple of the blocksize, blocks cross rows.
value = code[nibble] * absmax[block].

Double quantisation stores absmax in 8 bits: absmax = map[q] * nested_absmax[block // 256] + offset, with the offset the
mean of all scales. 4.5 bits a weight become 4.127 (QLoRA, arXiv 2305.14314, section 3).

Every function here gives bitsandbytes' own bytes and values, bit for bit; tests compare them. That includes its 8-bit
quantiser, which looks the nearest code up on a grid of 65,536 points rather than by exact midpoints.
"""

import math
from dataclasses import dataclass
from functools import cache

import torch

from smidgen.kernels.scratch import scratch
from smidgen.quant.codebooks import dynamic_map, four_bit_code

__all__ = ["NESTED_BLOCKSIZE", "NestedScales", "dequantise_4bit", "midpoints_and_codes", "nest_scales", "quantise_4bit"]

NESTED_BLOCKSIZE = 256
_TINY = 1e-38
# Weights quantised at once: on a CPU the temporaries stay in the cache; elsewhere fewer, longer operations are faster.
_CHUNK, _DEVICE_CHUNK = 1 << 18, 1 << 22
_CELLS = 512  # per unit; no two midpoints of a codebook fall into one cell


@dataclass(frozen=True)
class NestedScales:
    """Scales of blocks in 8 bits: codes uint8 [blocks], absmax float32 [ceil(blocks / 256)], offset float32 []."""

    codes: torch.Tensor
    absmax: torch.Tensor
    offset: torch.Tensor

    def scales(self, start: int, stop: int) -> torch.Tensor:
        """float32 [stop - start]: the scales of blocks start..stop."""
        values = dynamic_map(self.codes.device)[self.codes[start:stop].long()]
        first = start // NESTED_BLOCKSIZE
        outer = self.absmax[first : math.ceil(stop / NESTED_BLOCKSIZE)].repeat_interleave(NESTED_BLOCKSIZE)
        skip = start - first * NESTED_BLOCKSIZE
        return values.mul_(outer[skip : skip + stop - start]).add_(self.offset)


def quantise_4bit(weight: torch.Tensor, quant_type: str, blocksize: int = 64) -> tuple[torch.Tensor, torch.Tensor]:
    """weight [N, K] of any float type -> (packed uint8 [ceil(N K / 2)], absmax float32 [ceil(N K / blocksize)]).

    An odd number of weights is padded by one zero. quant_type: 'nf4' or 'fp4'.
    """
    flat = weight.reshape(-1)
    below, midpoint, rank_to_code = (table.to(weight.device) for table in _nearest_table(quant_type))
    packed = torch.empty((flat.numel() + 1) // 2, dtype=torch.uint8, device=weight.device)
    absmax = torch.empty(math.ceil(flat.numel() / blocksize), dtype=torch.float32, device=weight.device)
    chunk = _CHUNK if weight.device.type == "cpu" else _DEVICE_CHUNK
    for start in range(0, flat.numel(), chunk):
        part = flat[start : start + chunk].float()
        scaled, scales = _scale_blocks(part, blocksize)
        absmax[start // blocksize : start // blocksize + scales.numel()] = scales
        if scaled.numel() % 2:
            scaled = torch.nn.functional.pad(scaled, (0, 1))
        cell = ((scaled + 1) * _CELLS).nan_to_num_(nan=2 * _CELLS).long()  # a NaN is above all, as in the reference
        rank = torch.gather(below, 0, cell) + (scaled > torch.gather(midpoint, 0, cell))
        codes = rank if quant_type == "nf4" else rank_to_code[rank.long()]
        packed[start // 2 : start // 2 + codes.numel() // 2] = (codes[::2] << 4) | codes[1::2]
    return packed, absmax


@cache
def _nearest_table(quant_type: str) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Look-up of the nearest value: x in [-1, 1] lies in cell int((x + 1) * 512); its rank among the sorted values is
    below[cell] + (x > midpoint[cell]). The cell index never decreases with x, so this equals a search over midpoints.
    """
    midpoints, codes = midpoints_and_codes(quant_type)
    below = torch.zeros(2 * _CELLS + 1, dtype=torch.uint8)
    midpoint = torch.full((2 * _CELLS + 1,), 2.0)
    for cell, value in zip(((midpoints + 1) * _CELLS).long().tolist(), midpoints.tolist(), strict=True):
        assert midpoint[cell] == 2.0, "two midpoints in one cell"
        below[cell + 1 :] += 1
        midpoint[cell] = value
    return below, midpoint, codes.to(torch.uint8)


@cache
def midpoints_and_codes(quant_type: str) -> tuple[torch.Tensor, torch.Tensor]:
    """The same look-up for the native kernel: (midpoints float32 [15], rising; codes int32 [16]).

    The code of x is codes[how many midpoints x is above].
    """
    code = four_bit_code(quant_type)
    order = torch.argsort(code)
    return (code[order[:-1]] + code[order[1:]]) / 2, order.to(torch.int32)


def _scale_blocks(flat: torch.Tensor, blocksize: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Each block divided by its largest magnitude: (values in [-1, 1] as float32 [n], scales [ceil(n / blocksize)])."""
    whole = flat.numel() - flat.numel() % blocksize
    blocks = flat[:whole].view(-1, blocksize)
    absmax = blocks.abs().amax(dim=1) if whole else flat.new_empty(0)
    scaled = (blocks * (1.0 / absmax.clamp(min=_TINY)).unsqueeze(1)).clamp_(-1, 1).view(-1)
    if whole < flat.numel():
        tail = flat[whole:]
        tail_max = tail.abs().max().clamp(min=_TINY)  # the reference stores the clamped scale for the tail block only
        absmax = torch.cat([absmax, tail_max.unsqueeze(0)])
        scaled = torch.cat([scaled, (tail / tail_max).clamp(-1, 1)])
    return scaled, absmax


def dequantise_4bit(packed: torch.Tensor, absmax: torch.Tensor, quant_type: str, blocksize: int) -> torch.Tensor:
    """packed uint8 [n / 2] starting at a block's first weight, absmax float32 [ceil(n / blocksize)] -> float32 [n].

    The result lies in scratch memory and is valid until the next call in this thread.
    A byte is looked up once for both of its weights: a table of 256 pairs, each moved as one 8-byte element.
    """
    index = scratch("index", packed.shape, torch.int64, packed.device).copy_(packed)
    pairs = scratch("pairs", packed.shape, torch.int64, packed.device)
    torch.gather(_pair_table(quant_type, packed.device), 0, index, out=pairs)
    values = pairs.view(torch.float32)
    whole = values.numel() - values.numel() % blocksize
    blocks = whole // blocksize
    values[:whole].view(blocks, blocksize).mul_(absmax[:blocks].unsqueeze(1))
    if whole < values.numel():
        values[whole:].mul_(absmax[blocks])
    return values


@cache
def _pair_table(quant_type: str, device: torch.device) -> torch.Tensor:
    """int64 [256]: the two float32 values of each byte, high nibble first in memory."""
    code = four_bit_code(quant_type)
    table = torch.stack([code.repeat_interleave(16), code.repeat(16)], dim=1).contiguous()
    return table.view(torch.int64).view(-1).to(device)


def nest_scales(absmax: torch.Tensor) -> NestedScales:
    """Double quantisation of absmax float32 [blocks]."""
    offset = absmax.mean()
    centred = absmax - offset
    pad = -centred.numel() % NESTED_BLOCKSIZE
    blocks = torch.nn.functional.pad(centred, (0, pad)).view(-1, NESTED_BLOCKSIZE)
    outer = blocks.abs().amax(dim=1)
    scaled = blocks * torch.where(outer > 0, 1.0 / outer, 0.0).unsqueeze(1)
    grid = ((scaled.nan_to_num(0).clamp(-1, 1) + 1) * 0.5 * 65535 + 0.5).long()
    codes = _nearest_on_grid().to(absmax.device)[grid]
    codes[outer == 0] = 0  # what the reference stores for a block without spread; it decodes to exactly the offset
    return NestedScales(codes.view(-1)[: centred.numel()].contiguous(), outer, offset)


@cache
def _nearest_on_grid() -> torch.Tensor:
    """uint8 [65536]: the nearest code of the dynamic map for each point of an even grid over [-1, 1]."""
    table = dynamic_map()
    grid = torch.arange(65536, dtype=torch.float32) / 65535 * 2 - 1
    return torch.bucketize(grid, (table[:-1] + table[1:]) / 2).to(torch.uint8)
