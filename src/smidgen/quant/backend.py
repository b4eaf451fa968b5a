"""Who de-quantises: the native kernels, plain PyTorch, or bitsandbytes' kernels on the same packed bytes.

On the CPU the native kernels are taken where they are installed, on CUDA bitsandbytes', and plain PyTorch everywhere
else. bitsandbytes also runs on the CPU, where the tests send the same cases through all three. The environment variable
SMIDGEN_BACKEND=native|torch|bitsandbytes decides otherwise.
"""

import math
import os
from functools import cache
from importlib.util import find_spec

import torch

from smidgen.errors import SettingsError
from smidgen.kernels import packed as kernels
from smidgen.kernels.library import MISSING, TYPES, native_library
from smidgen.kernels.scratch import scratch
from smidgen.quant import fourbit
from smidgen.quant.codebooks import dynamic_map, four_bit_code
from smidgen.quant.fourbit import NESTED_BLOCKSIZE, NestedScales

__all__ = [
    "BACKENDS",
    "as_asked",
    "backend_name",
    "dequantise_4bit",
    "dequantise_int8",
    "has_blas",
    "is_native",
    "quantise_4bit",
    "quantise_int8",
    "weights_4bit",
    "weights_dense",
    "weights_int8",
]

BACKENDS = ("native", "torch", "bitsandbytes")
_COPY_WEIGHTS = 1 << 20  # copied at once, where a weight has to be copied to be quantised


def backend_name(device: torch.device) -> str:
    """'native', 'torch' or 'bitsandbytes' for tensors on this device.

    Raises SettingsError for a SMIDGEN_BACKEND that is unknown, not installed or not for this device.
    """
    wanted = os.environ.get("SMIDGEN_BACKEND", "")
    if wanted:
        if wanted not in BACKENDS:
            raise SettingsError([f"SMIDGEN_BACKEND: expected one of {', '.join(BACKENDS)}, found {wanted!r}"])
        if wanted == "bitsandbytes" and not _bitsandbytes_installed():
            raise SettingsError(["SMIDGEN_BACKEND: bitsandbytes is not installed. Run pip install 'smidgen[bnb]'"])
        if wanted == "native" and device.type != "cpu":
            raise SettingsError([f"SMIDGEN_BACKEND: the native kernels work on the CPU, not on {device}"])
        if wanted == "native" and native_library() is None:
            raise SettingsError([f"SMIDGEN_BACKEND: {MISSING}"])
        return wanted
    if device.type == "cpu":
        return "torch" if native_library() is None else "native"
    return "bitsandbytes" if device.type == "cuda" and _bitsandbytes_installed() else "torch"


@cache
def _bitsandbytes_installed() -> bool:
    return find_spec("bitsandbytes") is not None


def dequantise_4bit(
    packed: torch.Tensor,
    scales: torch.Tensor | NestedScales,
    quant_type: str,
    blocksize: int,
    first: int,
    count: int,
    dtype: torch.dtype,
) -> torch.Tensor:
    """Weights first .. first + count of a flat 4-bit matrix -> `dtype` [count]; computed in float32, rounded once.

    packed uint8 and scales are those of the whole matrix, as fourbit.quantise_4bit gives them. The result may lie in
    scratch memory: use it before the next call.
    """
    name = backend_name(packed.device)
    if name == "native":
        values = scratch("panel", (count,), dtype if dtype in TYPES else torch.float32, packed.device)
        weights = kernels.weights_4bit(_parts(packed, scales, quant_type), blocksize)
        kernels.dequantise(weights, first, values.view(-1, 1))
        return as_asked(values, dtype)
    # Where a range begins or ends within a block, whole blocks are decoded and cut.
    last = first + count
    first_block, last_block = first // blocksize, math.ceil(last / blocksize)
    begin, end = first_block * blocksize, min(last_block * blocksize, packed.numel() * 2)
    some = packed[begin // 2 : (end + 1) // 2]
    if name == "bitsandbytes":
        import bitsandbytes  # noqa: F401  (registers torch.ops.bitsandbytes)
    if not isinstance(scales, NestedScales):
        absmax = scales[first_block:last_block]
    elif name == "bitsandbytes" and not first_block:  # one operation in place of six
        absmax = torch.ops.bitsandbytes.dequantize_blockwise.default(
            scales.codes[:last_block], scales.absmax, dynamic_map(packed.device), NESTED_BLOCKSIZE, torch.float32
        ).add_(scales.offset)
    else:
        absmax = scales.scales(first_block, last_block)
    if name == "bitsandbytes":
        values = torch.ops.bitsandbytes.dequantize_4bit.default(
            some.view(-1, 1), absmax, blocksize, quant_type, [some.numel() * 2], dtype
        ).view(-1)
    else:
        values = fourbit.dequantise_4bit(some, absmax, quant_type, blocksize)
    return as_asked(values[first - begin : last - begin], dtype)


def as_asked(values: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """values as `dtype`, in scratch memory where that is another type."""
    return values if values.dtype == dtype else scratch("cast", values.shape, dtype, values.device).copy_(values)


def _parts(packed: torch.Tensor, scales: torch.Tensor | NestedScales, quant_type: str) -> kernels.FourBitParts:
    if isinstance(scales, NestedScales):
        return packed, four_bit_code(quant_type), scales.codes, dynamic_map(), scales.absmax, scales.offset
    return packed, four_bit_code(quant_type), scales, None, None, None


def dequantise_int8(codes: torch.Tensor, scale: torch.Tensor, out: torch.Tensor) -> torch.Tensor:
    """codes int8 [N, K], scale float32 [N] -> out [N, K] = codes * (scale / 127), computed in float32, rounded once."""
    if out.dtype in TYPES and backend_name(codes.device) == "native":
        kernels.dequantise(kernels.weights_int8(codes, scale), 0, out)
        return out
    if out.dtype == torch.float32:
        return out.copy_(codes).mul_(scale[:, None] / 127)
    values = scratch("int8", tuple(codes.shape), torch.float32, codes.device)
    return out.copy_(values.copy_(codes).mul_(scale[:, None] / 127))


def quantise_4bit(weight: torch.Tensor, quant_type: str, blocksize: int = 64) -> tuple[torch.Tensor, torch.Tensor]:
    """weight [N, K] of a float type -> (packed uint8 [ceil(N K / 2)], absmax float32 [ceil(N K / blocksize)]).

    As fourbit.quantise_4bit, and with its bytes, on whichever back end.
    """
    if backend_name(weight.device) != "native" or weight.dtype not in kernels.WEIGHT_TYPES:
        return fourbit.quantise_4bit(weight, quant_type, blocksize)
    packed = torch.empty((weight.numel() + 1) // 2, dtype=torch.uint8)
    absmax = torch.empty(math.ceil(weight.numel() / blocksize), dtype=torch.float32)
    # A transposed weight is copied piece by piece; every piece but the last has whole blocks.
    height = weight.shape[0]
    if not weight.is_contiguous():
        unit = blocksize // math.gcd(blocksize, weight.shape[1])
        height = max(unit, _COPY_WEIGHTS // weight.shape[1] // unit * unit)
    for row in range(0, weight.shape[0], height):
        start = row * weight.shape[1]
        kernels.quantise_4bit(
            weight[row : row + height].contiguous(),
            *fourbit.midpoints_and_codes(quant_type),
            blocksize,
            packed[start // 2 :],
            absmax[start // blocksize :],
        )
    return packed, absmax


def quantise_int8(weight: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """weight [N, K] of a float type -> (codes int8 [N, K], scale float32 [N]), row by row, in float32:

    scale = max |row|, codes = round(127 row / scale), ties to even. What is not finite gets code 0.
    """
    use_native = backend_name(weight.device) == "native" and weight.dtype in kernels.WEIGHT_TYPES
    codes = torch.empty(weight.shape, dtype=torch.int8, device=weight.device)
    scale = torch.empty(weight.shape[0], dtype=torch.float32, device=weight.device)
    whole = use_native and weight.is_contiguous()
    height = weight.shape[0] if whole else max(1, _COPY_WEIGHTS // weight.shape[1])
    for i in range(0, weight.shape[0], height):
        panel = weight[i : i + height]
        if use_native:
            kernels.quantise_int8(panel.contiguous(), codes[i : i + height], scale[i : i + height])
            continue
        panel = panel.float()
        scale[i : i + height] = row_max = panel.abs().amax(dim=1)
        factor = torch.where(row_max > 0, 127.0 / row_max, 0.0)
        scaled = (panel * factor[:, None]).round()
        codes[i : i + height] = scaled.nan_to_num_(nan=0, posinf=0, neginf=0).to(torch.int8)
    return codes, scale


def weights_4bit(
    packed: torch.Tensor, scales: torch.Tensor | NestedScales, quant_type: str, blocksize: int
) -> kernels.Weights | None:
    """The matrix as the native products take it; None where another back end is at work."""
    return kernels.weights_4bit(_parts(packed, scales, quant_type), blocksize) if is_native(packed) else None


def weights_int8(codes: torch.Tensor, scale: torch.Tensor) -> kernels.Weights | None:
    """As weights_4bit."""
    return kernels.weights_int8(codes, scale) if is_native(codes) else None


def weights_dense(weight: torch.Tensor) -> kernels.Weights | None:
    """As weights_4bit, for a 16-bit weight [N, K]. A float32 weight is left to BLAS: both only wait for memory."""
    known = weight.dtype in (torch.bfloat16, torch.float16) and weight.is_contiguous()
    return kernels.weights_dense(weight) if known and is_native(weight) else None


def is_native(stored: torch.Tensor) -> bool:
    """Whether the native kernels work on tensors of this device."""
    return backend_name(stored.device) == "native"


def has_blas() -> bool:
    """Whether the native kernels found PyTorch's BLAS, which products of many rows need."""
    return bool(native_library().smidgen_has_sgemm())
