"""Runs kernels, of packed weights and attention, over memory that ends or begins at a page that nobody may touch.

python guard_pages.py ISA: every stored form, with hostile shapes, each kernel that reads or writes it; attention with
rows of many lengths. Every tensor lies between two such pages: once against the one behind it, once against the one
before it, so that a read or write of one byte beside it ends the process by SIGSEGV, and once an element off the one
behind it, where no vector is aligned. What was being done then is the last line of the output.

python guard_pages.py ISA behind|before|attention: reads a row or token that is not there, which has to end so.
"""

import ctypes
import faulthandler
import math
import mmap
import sys
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
from torch.overrides import TorchFunctionMode

from smidgen.checkpoint.gguf_header import BLOCK_TYPES
from smidgen.kernels import packed as kernels
from smidgen.kernels import scratch
from smidgen.kernels.attention import Heads, Segments, attention, attention_backward, attention_decode
from smidgen.kernels.library import native_library
from smidgen.kernels.lowrank import LowRank
from smidgen.quant import fourbit
from smidgen.quant.backend import quantise_4bit, quantise_int8
from smidgen.quant.blocks import BlockMatrix
from smidgen.quant.grouped import BITS, GroupedMatrix, pack
from smidgen.quant.matrix import DenseMatrix, FourBitMatrix, FrozenMatrix, quantise

_PAGE = mmap.PAGESIZE
_NONE = 0  # PROT_NONE
_C = ctypes.CDLL(None, use_errno=True)
_C.mprotect.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]
_ROWS = (1, 2, 5)  # of W
_FEW = tuple(range(1, kernels.SMALL_ROWS + 1))  # rows of x without a panel
_MANY = (1, 17, 40)  # and with panels
_PLACES = ("behind", "before", "off")
_MAKERS = (torch.empty, torch.empty_like, torch.randn, torch.tensor, torch.Tensor.new_empty, torch.Tensor.contiguous)
_ATTENTION = [  # lengths of rows, which row each goes on after, shape
    ([1], None, Heads(1, 1, 1, 1.0)),
    ([1, 63, 2], None, Heads(2, 1, 8, 0.3)),
    ([64, 65, 130], None, Heads(3, 3, 20, 0.2)),
    ([130, 9], None, Heads(4, 2, 33, 0.2, window=7)),
    ([300, 1], None, Heads(2, 1, 64, 0.1, window=100)),
    ([70, 5, 64, 1], [-1, 0, 0, 0], Heads(4, 2, 16, 0.25)),
    ([30, 9, 100, 20, 7], [-1, -1, 1, 1, -1], Heads(9, 3, 12, 0.1)),
    ([50, 270, 20], [-1, 0, 0], Heads(2, 1, 64, 0.1, window=60)),
]


def fenced(tensor: torch.Tensor, place: str) -> torch.Tensor:
    """A copy against the forbidden page 'behind' or 'before' it, or one element 'off' the one behind it."""
    if not tensor.numel():
        return tensor
    nbytes = tensor.numel() * tensor.element_size()
    left = tensor.element_size() if place == "off" else 0
    pages = math.ceil((nbytes + left) / _PAGE)
    memory = mmap.mmap(-1, (pages + 2) * _PAGE)
    start = ctypes.addressof(ctypes.c_char.from_buffer(memory))
    for page in (0, pages + 1):
        if _C.mprotect(start + page * _PAGE, _PAGE, _NONE):
            raise OSError(ctypes.get_errno(), "mprotect")
    offset = _PAGE + (0 if place == "before" else pages * _PAGE - left - nbytes)
    copy = torch.frombuffer(memory, dtype=tensor.dtype, count=tensor.numel(), offset=offset).view(tensor.shape)
    return copy.copy_(tensor)


class Fenced(TorchFunctionMode):
    """Every tensor that is made within, or looked up by an index, is fenced: results and scratch memory too."""

    def __init__(self, place: str) -> None:
        super().__init__()
        self._place = place

    def __enter__(self) -> "Fenced":
        scratch._local.__dict__.clear()  # or there would be more of it than is asked for
        return super().__enter__()

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        made = func(*args, **(kwargs or {}))
        looked_up = func is torch.Tensor.__getitem__ and isinstance(args[1], torch.Tensor)
        return fenced(made, self._place) if func in _MAKERS or looked_up else made


def matrices() -> Iterator[tuple[str, FrozenMatrix]]:
    """Every form that a file may store weights in, with row lengths that it allows and kernels may stumble over."""
    for n in _ROWS:
        for k, blocksize in ((1, 32), (31, 64), (64, 64), (96, 64), (129, 32), (192, 64), (1090, 64), (4096, 4096)):
            for quant_type in ("nf4", "fp4"):
                packed, absmax = fourbit.quantise_4bit(torch.randn(n, k), quant_type, blocksize)
                for scales in (absmax, fourbit.nest_scales(absmax)):
                    yield f"blocksize {blocksize}", FourBitMatrix((n, k), packed, scales, quant_type, blocksize)
        for k in (1, 3, 15, 17, 33, 64, 1030):
            yield "", quantise(torch.randn(n, k), "int8")
            yield "", DenseMatrix(torch.randn(n, k).bfloat16())
            yield "", DenseMatrix(torch.randn(n, k).half())
        for k, size in ((1, 32), (7, 3), (9, 8), (24, 8), (33, 32), (64, 32), (128, 128), (1100, 64), (1300, 1300)):
            for bits in BITS:  # GPTQ's; AWQ's are the 4-bit ones
                yield f"groups of {size}", _grouped(n, k, bits, size)
        for name, elements, nbytes in BLOCK_TYPES.values():
            for blocks in (1, 2, 5, 1300 // elements) if elements > 1 else (1, 7, 33, 1300):
                yield f"{blocks} blocks", BlockMatrix(_bytes(n, blocks * nbytes), name)
    for name, elements, nbytes in BLOCK_TYPES.values():  # rows of heads of width 4, in rotating pairs
        yield "pairs", BlockMatrix(_bytes(8, nbytes if elements > 1 else 9 * nbytes), name, 2)


def _bytes(rows: int, columns: int) -> torch.Tensor:
    return torch.randint(0, 256, (rows, columns), dtype=torch.uint8)


def _grouped(n: int, k: int, bits: int, size: int) -> GroupedMatrix:
    groups = math.ceil(k / size)
    ends = (torch.arange(1, groups + 1, dtype=torch.int32) * size).clamp_(max=k)
    codes = pack(torch.randint(0, 1 << bits, (n, k), dtype=torch.uint8), bits)
    dtype = (torch.float16, torch.bfloat16, torch.float32)[(n + k) % 3]
    zeros = torch.randint(0, 1 << bits, (n, groups), dtype=torch.uint8)
    return GroupedMatrix(k, bits, codes, torch.rand(n, groups).to(dtype), zeros, ends)


def _run(matrix: FrozenMatrix, place: str) -> None:
    """Every kernel that reads W."""
    for name, buffer in list(matrix.named_buffers()):
        matrix._buffers[name] = fenced(buffer, place)
    n, k = matrix.out_features, matrix.in_features
    weights = matrix._weights()
    assert weights is not None
    for dtype in (torch.float32, torch.bfloat16):
        for start, stop in ((0, n), (n - 1, n)):
            kernels.dequantise(weights, start, torch.empty(stop - start, k, dtype=dtype))
        if isinstance(matrix, BlockMatrix):
            matrix.take(torch.tensor([n - 1, 0, n - 1]), dtype)
    few = matrix._small_weights()
    for rows in _FEW:
        if few is None:
            break
        kernels.product(few, torch.randn(rows, k), torch.empty(rows, n))
    for rows in _MANY:
        x, g = torch.randn(rows, k), torch.randn(rows, n)
        A, B, low = torch.randn(3, k), torch.randn(n, 3), torch.randn(rows, 3)
        lora = LowRank(A, B, 0.5, low, torch.empty(rows, 3))
        for adapter, accumulate in ((lora, False), (lora, True), (None, True)):
            kernels.panel_product(weights, x, torch.empty(rows, n), adapter)
            kernels.panel_product_t(weights, g, torch.randn(rows, k), adapter, accumulate=accumulate)


def _quantise(n: int, k: int, _: str) -> None:
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        weight = torch.randn(n, k, dtype=dtype)
        quantise_int8(weight)
        for blocksize in (16, 64, 4096):
            quantise_4bit(weight, "nf4", blocksize)
            quantise_4bit(weight.t(), "fp4", blocksize)


def _attend(lengths: list[int], prefixes: list[int] | None, shape: Heads, _: str) -> None:
    segments = Segments(lengths, prefixes)
    for dtype in (torch.float32, torch.bfloat16):
        qkv = torch.randn(segments.tokens, shape.width, dtype=dtype)
        out, lse = attention(qkv, segments, shape)
        assert lse.numel(), "the native kernel has to have run"
        attention_backward(torch.randn(segments.tokens, shape.q_width, dtype=dtype), qkv, out, lse, segments, shape)
    keys, values = torch.randn(2, len(lengths), shape.kv_heads, max(lengths), shape.head_dim)
    keys, values = (torch.empty_like(part).copy_(part) for part in (keys, values))
    attention_decode(
        torch.randn(len(lengths), shape.width), keys, values, torch.tensor([length - 1 for length in lengths]), shape
    )


def main(isa: str, beside: str = "") -> None:
    faulthandler.enable()
    torch.manual_seed(0)
    assert native_library().smidgen_use_isa(isa.encode()), f"this machine has no {isa}"
    if beside == "attention":
        with Fenced("behind"):
            attention(torch.randn(2, 24), Segments([3]), Heads(1, 1, 8, 1.0))
        return
    if beside:
        codes, scale = fenced(torch.ones(3, 64, dtype=torch.int8), beside), torch.ones(5)[1:]
        weights = kernels.weights_int8(codes, scale)
        kernels.dequantise(weights, 3 if beside == "behind" else -1, torch.empty(1, 64))
        return
    done = 0
    for what, work in _works():
        for place in _PLACES:
            print(f"{what} {place}", flush=True)
            with Fenced(place):
                work(place)
            done += 1
    print(f"{done} passed")


def _works() -> Iterator[tuple[str, Callable[[str], None]]]:
    """(what it is, work for tensors at a place)."""
    for case in _ATTENTION:
        yield f"attention {case}", partial(_attend, *case)
    for n in _ROWS:
        for k in (1, 15, 17, 64, 1030):
            yield f"quantise [{n}, {k}]", partial(_quantise, n, k)
    for what, matrix in matrices():
        yield f"{matrix.storage} [{matrix.out_features}, {matrix.in_features}] {what}", partial(_run, matrix)


if __name__ == "__main__":
    main(*sys.argv[1:])
