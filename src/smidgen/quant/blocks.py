"""The blocks of a GGUF file as a frozen matrix, used as they lie in the mapped file; in plain PyTorch and native.

Layouts are ggml's (ggml-common.h; ggml/docs/gguf.md): blocks of 32 or 256 weights along a row, with float16 scales. The
values are those of the gguf package's reference, bit for bit, in float32. The native twin is csrc/blocks.h.
"""

from collections.abc import Callable

import torch

from smidgen.checkpoint.gguf_header import BLOCK_TYPES
from smidgen.kernels import packed as kernels
from smidgen.kernels.library import TYPES
from smidgen.kernels.scratch import scratch
from smidgen.quant import backend
from smidgen.quant.matrix import FrozenMatrix

__all__ = ["SCALE_PLACES", "BlockMatrix", "dequantise_blocks"]

_IDS = {name: number for number, (name, _, _) in BLOCK_TYPES.items()}
_SIZES = {name: (elements, size) for name, elements, size in BLOCK_TYPES.values()}


class BlockMatrix(FrozenMatrix):
    """blocks uint8 [N, bytes of a row] of a ggml type ('Q4_K', 'F16', ...).

    pair_width: 0, or half the head width where the file keeps the rows of q or k in rotating pairs (2i, 2i + 1) and the
    model wants halves (i, i + pair_width): rows are found at their place in the file, never moved.
    """

    blocks: torch.Tensor

    def __init__(self, blocks: torch.Tensor, ggml_type: str, pair_width: int = 0) -> None:
        elements, size = _SIZES[ggml_type]
        super().__init__(blocks.shape[0], blocks.shape[1] // size * elements)
        self.ggml_type, self.pair_width = ggml_type, pair_width
        self.register_buffer("blocks", blocks)

    @property
    def storage(self) -> str:
        return self.ggml_type

    def _rows(self, start: int, stop: int, dtype: torch.dtype) -> torch.Tensor:
        if (weights := self._weights()) is not None:
            known = dtype if dtype in TYPES else torch.float32
            panel = scratch("panel", (stop - start, self.in_features), known, self.blocks.device)
            kernels.dequantise(weights, start, panel)
            return backend.as_asked(panel, dtype)
        if not self.pair_width:
            return dequantise_blocks(self.blocks[start:stop], self.ggml_type).to(dtype)
        return self.take(torch.arange(start, stop, device=self.blocks.device), dtype)

    def take(self, rows: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
        """rows int64 [n] -> those rows of W [n, in_features] of `dtype`, in memory of their own."""
        if self.pair_width:
            inside = rows % (2 * self.pair_width)
            rows = rows - inside + inside % self.pair_width * 2 + inside // self.pair_width
        some = self.blocks[rows]
        if not backend.is_native(some) or dtype not in TYPES:
            return dequantise_blocks(some, self.ggml_type).to(dtype)
        values = torch.empty(len(some), self.in_features, dtype=dtype)
        kernels.dequantise(kernels.weights_blocks(some, _IDS[self.ggml_type], 0), 0, values)
        return values

    def has_finite_scales(self) -> bool:
        """Looks at two bytes, or four, of each block, where all its weights take their scale from."""
        blocks = self.blocks.view(-1, _SIZES[self.ggml_type][1])
        return all(bool(_half(blocks, at).isfinite().all()) for at in SCALE_PLACES.get(self.ggml_type, ()))

    def _weights(self) -> kernels.Weights | None:
        if not backend.is_native(self.blocks):
            return None
        return kernels.weights_blocks(self.blocks, _IDS[self.ggml_type], self.pair_width)


def dequantise_blocks(rows: torch.Tensor, ggml_type: str) -> torch.Tensor:
    """uint8 [N, bytes of a row] of a ggml type -> float32 [N, K], in plain PyTorch."""
    elements, size = _SIZES[ggml_type]
    count = rows.shape[0]
    if ggml_type in _NUMBERS:
        return rows.contiguous().view(_NUMBERS[ggml_type]).float().view(count, -1)
    blocks = rows.reshape(-1, size)
    return _DECODERS[ggml_type](blocks).reshape(count, rows.shape[1] // size * elements)


def _half(blocks: torch.Tensor, at: int) -> torch.Tensor:
    """The float16 at byte `at` of each block [n, bytes] -> float32 [n, 1]."""
    return blocks[:, at : at + 2].clone(memory_format=torch.contiguous_format).view(torch.float16).float()


def _fields(codes: torch.Tensor, shifts: range, mask: int) -> torch.Tensor:
    """codes uint8 [n, groups, width] -> [n, groups, shifts, width]: the field of `mask` at each shift."""
    each = torch.tensor(list(shifts), dtype=torch.uint8, device=codes.device)
    return (codes.unsqueeze(-2) >> each[:, None]) & mask


def _nibbles(blocks: torch.Tensor, at: int) -> torch.Tensor:
    """16 bytes from `at` on -> uint8 [n, 32]: all low halves, then all high ones."""
    return _fields(blocks[:, None, at : at + 16], range(0, 8, 4), 15).reshape(-1, 32)


def _fifth_bits(blocks: torch.Tensor, at: int) -> torch.Tensor:
    """4 bytes from `at` on -> uint8 [n, 32]: bit j of them, worth 16."""
    bits = _fields(blocks[:, at : at + 4, None], range(8), 1)
    return bits.reshape(-1, 32) << 4


def _q4_0(b: torch.Tensor) -> torch.Tensor:
    return (_nibbles(b, 2).float() - 8) * _half(b, 0)


def _q4_1(b: torch.Tensor) -> torch.Tensor:
    return _nibbles(b, 4).float() * _half(b, 0) + _half(b, 2)


def _q5_0(b: torch.Tensor) -> torch.Tensor:
    return ((_nibbles(b, 6) | _fifth_bits(b, 2)).float() - 16) * _half(b, 0)


def _q5_1(b: torch.Tensor) -> torch.Tensor:
    return (_nibbles(b, 8) | _fifth_bits(b, 4)).float() * _half(b, 0) + _half(b, 2)


def _q8_0(b: torch.Tensor) -> torch.Tensor:
    return b[:, 2:].contiguous().view(torch.int8).float() * _half(b, 0)


def _two_bits(blocks: torch.Tensor, at: int) -> torch.Tensor:
    """64 bytes from `at` on -> uint8 [n, 16, 16]: codes of Q2_K and Q3_K in sub-blocks."""
    return _fields(blocks[:, at : at + 64].view(-1, 2, 32), range(0, 8, 2), 3).reshape(-1, 16, 16)


def _q2_k(b: torch.Tensor) -> torch.Tensor:
    scale = _half(b, 80) * (b[:, :16] & 15).float()
    least = _half(b, 82) * (b[:, :16] >> 4).float()
    return _two_bits(b, 16).float() * scale[:, :, None] - least[:, :, None]


def _q3_k(b: torch.Tensor) -> torch.Tensor:
    low = _fields(b[:, None, 96:104], range(0, 8, 4), 15).reshape(-1, 16)
    high = _fields(b[:, None, 104:108], range(0, 8, 2), 3).reshape(-1, 16)
    scale = _half(b, 108) * ((low | high << 4).float() - 32)
    missing = 4 - 4 * _fields(b[:, None, :32], range(8), 1).reshape(-1, 16, 16).float()
    return (_two_bits(b, 32).float() - missing) * scale[:, :, None]


def _scales_and_leasts(b: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The 12 bytes of 6-bit scales and minima of Q4_K and Q5_K -> float32 [n, 8, 1] each, times d and dmin."""
    first, second, third = b[:, 4:8], b[:, 8:12], b[:, 12:16]
    scale = torch.cat([first & 63, (third & 15) | (first >> 6) << 4], dim=1).float() * _half(b, 0)
    least = torch.cat([second & 63, (third >> 4) | (second >> 6) << 4], dim=1).float() * _half(b, 2)
    return scale[:, :, None], least[:, :, None]


def _q4_k(b: torch.Tensor) -> torch.Tensor:
    scale, least = _scales_and_leasts(b)
    codes = _fields(b[:, 16:144].view(-1, 4, 32), range(0, 8, 4), 15).reshape(-1, 8, 32)
    return codes.float() * scale - least


def _q5_k(b: torch.Tensor) -> torch.Tensor:
    scale, least = _scales_and_leasts(b)
    codes = _fields(b[:, 48:176].view(-1, 4, 32), range(0, 8, 4), 15).reshape(-1, 8, 32)
    high = _fields(b[:, None, 16:48], range(8), 1).reshape(-1, 8, 32) << 4
    return (codes | high).float() * scale - least


def _q6_k(b: torch.Tensor) -> torch.Tensor:
    low = _fields(b[:, :128].view(-1, 2, 64), range(0, 8, 4), 15).reshape(-1, 2, 4, 32)
    high = _fields(b[:, 128:192].view(-1, 2, 32), range(0, 8, 2), 3) << 4
    scale = _half(b, 208) * b[:, 192:208].contiguous().view(torch.int8).float()
    return ((low | high).reshape(-1, 16, 16).float() - 32) * scale[:, :, None]


_NUMBERS = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
SCALE_PLACES = {  # where in a block its float16 scales lie
    "Q4_0": (0,), "Q4_1": (0, 2), "Q5_0": (0,), "Q5_1": (0, 2), "Q8_0": (0,),
    "Q2_K": (80, 82), "Q3_K": (108,), "Q4_K": (0, 2), "Q5_K": (0, 2), "Q6_K": (208,),
}  # fmt: skip
_DECODERS: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "Q4_0": _q4_0, "Q4_1": _q4_1, "Q5_0": _q5_0, "Q5_1": _q5_1, "Q8_0": _q8_0,
    "Q2_K": _q2_k, "Q3_K": _q3_k, "Q4_K": _q4_k, "Q5_K": _q5_k, "Q6_K": _q6_k,
}  # fmt: skip
