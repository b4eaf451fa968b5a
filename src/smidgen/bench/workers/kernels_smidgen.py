"""Our kernels as a benchmark's worker, and plain torch.mm of the same sizes.

Weights are random normal; those in a GGUF file's blocks are blocks of random bits with scales of a like size.
"""

from collections.abc import Callable
from typing import Any

import torch

from smidgen.bench.workers.kernels_common import Kernels, extra_memory
from smidgen.bench.workers.serving import serve, versions
from smidgen.checkpoint.gguf_header import BLOCK_TYPES
from smidgen.kernels.packed import dequantise
from smidgen.kernels.sizes import PANEL_WEIGHTS
from smidgen.quant.blocks import SCALE_PLACES, BlockMatrix
from smidgen.quant.gptq import GptqSettings, round_to_nearest
from smidgen.quant.matrix import FrozenMatrix, quantise

__all__ = ["KernelWorker"]

_BLOCKS = ("Q4_0", "Q4_1", "Q8_0", "Q2_K", "Q3_K", "Q4_K", "Q5_K", "Q6_K")


class KernelWorker:
    """load makes the cases, run times one of them."""

    def load(self, size: int, rows: list[int]) -> dict[str, Any]:
        generator = torch.Generator().manual_seed(0)
        weight = torch.randn(size, size, generator=generator).mul_(0.02)
        half = weight.bfloat16()
        packed = quantise(weight, "nf4-dq")
        functions: dict[str, Callable[[], Any]] = {
            "dequantise nf4-dq float32": lambda: _all_panels(packed, torch.float32),
            "dequantise nf4-dq bfloat16": lambda: _all_panels(packed, torch.bfloat16),
            "quantise nf4 float32": lambda: quantise(weight, "nf4"),
            "quantise nf4-dq float32": lambda: quantise(weight, "nf4-dq"),
            "quantise nf4-dq bfloat16": lambda: quantise(half, "nf4-dq"),
            "quantise int8 float32": lambda: quantise(weight, "int8"),
        }
        for count in rows:
            x = torch.randn(count, size, generator=generator)
            functions[f"product M={count}"] = lambda x=x: packed.matmul(x)
            functions[f"dense product M={count}"] = lambda x=x: torch.mm(x, weight.t())
        functions[f"gradient M={rows[-1]}"] = lambda x=x: packed.matmul_t(x)
        functions[f"dense gradient M={rows[-1]}"] = lambda x=x: torch.mm(x, weight)
        one = torch.randn(1, size, generator=generator)
        for name, matrix in _other_forms(weight, generator).items():
            functions[f"dequantise {name} float32"] = lambda matrix=matrix: _all_panels(matrix, torch.float32)
            functions[f"product {name} M=1"] = lambda matrix=matrix: matrix.matmul(one)
        self.kernels = Kernels(functions)
        return {"cases": list(functions), "threads": torch.get_num_threads(), "versions": versions("smidgen", "torch")}

    @torch.inference_mode()
    def run(self, case: str) -> dict[str, float]:
        return self.kernels.run(case)

    def memory(self, size: int, storage: str) -> dict[str, int]:
        """In a fresh process: what quantising a float32 tensor [2 size, size] takes beside it."""
        quantise(torch.randn(256, 256), storage)  # code, tables and threads are there before
        weight = torch.randn(2 * size, size)
        return {"extra_bytes": extra_memory(lambda: quantise(weight, storage)), "tensor_bytes": weight.nbytes}


def _other_forms(weight: torch.Tensor, generator: torch.Generator) -> dict[str, FrozenMatrix]:
    """The other stored forms, by the names that the cases have."""
    forms: dict[str, FrozenMatrix] = {
        "int8": quantise(weight, "int8"),
        "gptq-4 g128": round_to_nearest(weight, GptqSettings()),
    }
    sizes = {name: (elements, nbytes) for name, elements, nbytes in BLOCK_TYPES.values()}
    for name in _BLOCKS:
        elements, nbytes = sizes[name]
        shape = (weight.shape[0], weight.shape[1] // elements, nbytes)
        blocks = torch.randint(0, 256, shape, dtype=torch.uint8, generator=generator)
        for place in SCALE_PLACES[name]:
            scales = torch.rand(*shape[:2], 1, generator=generator).mul_(1e-3).half()
            blocks[..., place : place + 2] = scales.view(torch.uint8)
        forms[name] = BlockMatrix(blocks.flatten(1), name)
    return forms


def _all_panels(matrix: FrozenMatrix, dtype: torch.dtype) -> None:
    """Every row once, in panels of the size that products use, one for each thread."""
    height = max(1, torch.get_num_threads() * PANEL_WEIGHTS // matrix.in_features)
    weights = matrix._weights()
    assert weights is not None, "the native kernels are installed"
    panel = torch.empty(height, matrix.in_features, dtype=dtype)
    for start in range(0, matrix.out_features, height):
        dequantise(weights, start, panel[: matrix.out_features - start])


if __name__ == "__main__":
    worker = KernelWorker()
    serve({"load": worker.load, "run": worker.run, "memory": worker.memory})
