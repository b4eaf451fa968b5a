"""Who de-quantises: plain PyTorch everywhere, or bitsandbytes' kernels on the same packed bytes.

bitsandbytes is taken on CUDA when it is installed; it also runs on CPU, where the tests send the same cases through
both. The environment variable SMIDGEN_BACKEND=torch|bitsandbytes decides otherwise.
"""

import os
from functools import cache
from importlib.util import find_spec

import torch

from smidgen.errors import SettingsError
from smidgen.quant import fourbit

__all__ = ["BACKENDS", "backend_name", "dequantise_4bit"]

BACKENDS = ("torch", "bitsandbytes")


def backend_name(device: torch.device) -> str:
    """'torch' or 'bitsandbytes' for tensors on this device. Raises SettingsError for a wrong SMIDGEN_BACKEND."""
    wanted = os.environ.get("SMIDGEN_BACKEND", "")
    if wanted:
        if wanted not in BACKENDS:
            raise SettingsError([f"SMIDGEN_BACKEND: expected one of {', '.join(BACKENDS)}, found {wanted!r}"])
        if wanted == "bitsandbytes" and not _bitsandbytes_installed():
            raise SettingsError(["SMIDGEN_BACKEND: bitsandbytes is not installed. Run pip install 'smidgen[bnb]'"])
        return wanted
    return "bitsandbytes" if device.type == "cuda" and _bitsandbytes_installed() else "torch"


@cache
def _bitsandbytes_installed() -> bool:
    return find_spec("bitsandbytes") is not None


def dequantise_4bit(
    packed: torch.Tensor, absmax: torch.Tensor, quant_type: str, blocksize: int, dtype: torch.dtype
) -> torch.Tensor:
    """packed uint8 [n / 2] from a block's first weight on, absmax float32 [ceil(n / blocksize)] -> dtype [n].

    Computed in float32 and rounded once. The result may lie in scratch memory: use it before the next call.
    """
    if backend_name(packed.device) == "bitsandbytes":
        import bitsandbytes  # noqa: F401  (registers torch.ops.bitsandbytes)

        return torch.ops.bitsandbytes.dequantize_4bit.default(
            packed.view(-1, 1), absmax, blocksize, quant_type, [packed.numel() * 2], dtype
        ).view(-1)
    values = fourbit.dequantise_4bit(packed, absmax, quant_type, blocksize)
    return (
        values if dtype == torch.float32 else fourbit.scratch("cast", values.shape, dtype, values.device).copy_(values)
    )
