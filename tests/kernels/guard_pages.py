"""Runs the kernels of packed weights over memory that ends, or begins, at a page that nobody may touch.

python guard_pages.py ISA: every stored form, with hostile shapes, each kernel that reads it. Every tensor lies between
two such pages, once against the one behind it and once against the one before it, so that a read or write of one byte
beside it ends the process by SIGSEGV. What was being done then is the last line of the output.

python guard_pages.py ISA behind|before: reads a row that is not there, which has to end so.
"""

import ctypes
import faulthandler
import math
import mmap
import sys
from collections.abc import Iterator

import torch

from smidgen.checkpoint.gguf_header import BLOCK_TYPES
from smidgen.kernels import packed as kernels
from smidgen.kernels.library import native_library
from smidgen.kernels.lowrank import LowRank
from smidgen.quant.blocks import BlockMatrix
from smidgen.quant.fourbit import nest_scales, quantise_4bit
from smidgen.quant.grouped import BITS, GroupedMatrix, pack
from smidgen.quant.matrix import DenseMatrix, FourBitMatrix, FrozenMatrix, quantise

_PAGE = mmap.PAGESIZE
_NONE = 0  # PROT_NONE
_C = ctypes.CDLL(None, use_errno=True)
_C.mprotect.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]
_ROWS = (1, 2, 5)  # of W
_FEW = tuple(range(1, kernels.SMALL_ROWS + 1))  # rows of x without a panel
_MANY = (1, 17, 40)  # and with panels


def fenced(tensor: torch.Tensor, place: str) -> torch.Tensor:
    """A copy against the forbidden page 'behind' or 'before' it."""
    if not tensor.numel():
        return tensor
    nbytes = tensor.numel() * tensor.element_size()
    pages = math.ceil(nbytes / _PAGE)
    memory = mmap.mmap(-1, (pages + 2) * _PAGE)
    start = ctypes.addressof(ctypes.c_char.from_buffer(memory))
    for page in (0, pages + 1):
        if _C.mprotect(start + page * _PAGE, _PAGE, _NONE):
            raise OSError(ctypes.get_errno(), "mprotect")
    offset = _PAGE + (pages * _PAGE - nbytes if place == "behind" else 0)
    copy = torch.frombuffer(memory, dtype=tensor.dtype, count=tensor.numel(), offset=offset).view(tensor.shape)
    return copy.copy_(tensor)


def matrices() -> Iterator[tuple[str, FrozenMatrix]]:
    """Every form that a file may store weights in, with row lengths that it allows and kernels may stumble over."""
    for n in _ROWS:
        for k, blocksize in ((1, 32), (31, 64), (64, 64), (96, 64), (129, 32), (192, 64), (1090, 64), (4096, 4096)):
            for quant_type in ("nf4", "fp4"):
                packed, absmax = quantise_4bit(torch.randn(n, k), quant_type, blocksize)
                for scales in (absmax, nest_scales(absmax)):
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
            kernels.dequantise(weights, start, fenced(torch.empty(stop - start, k, dtype=dtype), place))
    few = matrix._small_weights()
    for rows in _FEW:
        if few is None:
            break
        kernels.product(few, fenced(torch.randn(rows, k), place), fenced(torch.empty(rows, n), place))
    for rows in _MANY:
        A, B, low = (fenced(torch.randn(shape), place) for shape in ((3, k), (n, 3), (rows, 3)))
        adapter = LowRank(A, B, 0.5, low, fenced(torch.empty(rows, 3), place))
        x, g = fenced(torch.randn(rows, k), place), fenced(torch.randn(rows, n), place)
        kernels.panel_product(weights, x, fenced(torch.empty(rows, n), place), adapter)
        kernels.panel_product_t(weights, g, fenced(torch.empty(rows, k), place), adapter, accumulate=False)


def main(isa: str, beside: str = "") -> None:
    faulthandler.enable()
    torch.manual_seed(0)
    assert native_library().smidgen_use_isa(isa.encode()), f"this machine has no {isa}"
    if beside:
        codes, scale = fenced(torch.ones(3, 64, dtype=torch.int8), beside), torch.ones(5)[1:]
        weights = kernels.weights_int8(codes, scale)
        kernels.dequantise(weights, 3 if beside == "behind" else -1, torch.empty(1, 64))
        return
    done = 0
    for what, matrix in matrices():
        for place in ("behind", "before"):
            print(f"{matrix.storage} [{matrix.out_features}, {matrix.in_features}] {what} {place}", flush=True)
            _run(matrix, place)
            done += 1
    print(f"{done} matrices")


if __name__ == "__main__":
    main(*sys.argv[1:])
