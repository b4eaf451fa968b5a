"""bitsandbytes' kernels on the CPU as a benchmark's worker: the same cases under the same names.

It has no panels and, on the CPU, no way to say where the result goes: a matrix is de-quantised whole into new memory.
"""

from collections.abc import Callable
from typing import Any

import torch

if __package__:
    from smidgen.bench.workers.bitsandbytes_isa import kept_to_isa
    from smidgen.bench.workers.kernels_common import Kernels, extra_memory
    from smidgen.bench.workers.serving import serve, versions
else:
    from bitsandbytes_isa import kept_to_isa  # pyright: ignore[reportMissingImports]
    from kernels_common import Kernels, extra_memory  # pyright: ignore[reportMissingImports]
    from serving import serve, versions  # pyright: ignore[reportMissingImports]

__all__ = ["KernelWorker"]


class KernelWorker:
    """load makes the cases, run times one of them."""

    def load(self, size: int, rows: list[int]) -> dict[str, Any]:
        kept = kept_to_isa()
        from bitsandbytes import functional
        from bitsandbytes.autograd._functions import matmul_4bit

        generator = torch.Generator().manual_seed(0)
        weight = torch.randn(size, size, generator=generator).mul_(0.02)
        half = weight.bfloat16()
        packed, state = functional.quantize_4bit(weight, quant_type="nf4", compress_statistics=True)
        packed_half, state_half = functional.quantize_4bit(half, quant_type="nf4", compress_statistics=True)

        def quantise(tensor: torch.Tensor, nested: bool) -> Any:
            return functional.quantize_4bit(tensor, quant_type="nf4", compress_statistics=nested)

        functions: dict[str, Callable[[], Any]] = {
            "dequantise nf4-dq float32": lambda: functional.dequantize_4bit(packed, state),
            "dequantise nf4-dq bfloat16": lambda: functional.dequantize_4bit(packed_half, state_half),
            "quantise nf4 float32": lambda: quantise(weight, False),
            "quantise nf4-dq float32": lambda: quantise(weight, True),
            "quantise nf4-dq bfloat16": lambda: quantise(half, True),
            "quantise int8 float32": lambda: functional.int8_vectorwise_quant(weight),
        }
        for count in rows:
            x = torch.randn(count, size, generator=generator)
            functions[f"product M={count}"] = lambda x=x: matmul_4bit(x, packed.t(), quant_state=state)
        # Its backward pass of a product: the matrix is de-quantised once more, then multiplied.
        functions[f"gradient M={rows[-1]}"] = lambda x=x: torch.mm(x, functional.dequantize_4bit(packed, state))
        self.kernels = Kernels(functions)
        return {
            "cases": list(functions),
            "kept_to_isa": kept,
            "threads": torch.get_num_threads(),
            "versions": versions("torch", "bitsandbytes"),
        }

    @torch.inference_mode()
    def run(self, case: str) -> dict[str, float]:
        return self.kernels.run(case)

    def memory(self, size: int, storage: str) -> dict[str, int]:
        """In a fresh process: what quantising a float32 tensor [2 size, size] takes beside it."""
        kept_to_isa()
        from bitsandbytes import functional

        def quantise(tensor: torch.Tensor) -> Any:
            if storage == "int8":
                return functional.int8_vectorwise_quant(tensor)
            return functional.quantize_4bit(tensor, quant_type="nf4", compress_statistics=storage == "nf4-dq")

        quantise(torch.randn(256, 256))
        weight = torch.randn(2 * size, size)
        return {"extra_bytes": extra_memory(lambda: quantise(weight)), "tensor_bytes": weight.nbytes}


if __name__ == "__main__":
    worker = KernelWorker()
    serve({"load": worker.load, "run": worker.run, "memory": worker.memory})
