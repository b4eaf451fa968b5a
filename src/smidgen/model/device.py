"""Where and in which number type to compute, chosen by measuring, each with its reason."""

import os
import platform
import sys
import time
import warnings
from copy import deepcopy
from pathlib import Path

import torch

from smidgen.errors import SettingsError
from smidgen.model.cgroups import cgroup_limits
from smidgen.quant.matrix import quantise

__all__ = [
    "budget_on",
    "choose_compute_dtype",
    "choose_device",
    "compiles_products",
    "current_rss_bytes",
    "device_name",
    "free_bytes",
    "free_memory_bytes",
    "measure_gflops",
    "measure_weights_read",
    "memory_limit_bytes",
    "padded_rows",
    "peak_rss_bytes",
    "processor_name",
    "resident_bytes",
    "swapped_bytes",
]

_MUCH_FASTER = 1.5  # bfloat16 has to be this much faster on a CPU to be worth its rounding
_MARGIN = 0.05  # of what is free is left to others where no budget was given
_ROWS = 64  # of a product in 16 bits: see padded_rows
_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def padded_rows(rows: int, dtype: torch.dtype, device: torch.device) -> int:
    """How many rows a matrix product takes so as to compute `rows`.

    For every size of a product in 16 bits oneDNN compiles a program of up to a megabyte on a CPU, and gives none back,
    whatever its cache may hold: each step over rows of another length kept about 8 MB (docs/log.md). With multiples of
    64 there are few sizes.
    """
    narrow = dtype.itemsize == 2 and device.type == "cpu"
    return -(-rows // _ROWS) * _ROWS if narrow else rows


def choose_device(wanted: str) -> torch.device:
    """'auto' -> CUDA, then MPS, then CPU. Raises SettingsError for a device that is not there."""
    if wanted == "auto":
        wanted = "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
    try:
        device = torch.device(wanted)
    except RuntimeError:
        raise SettingsError([f"device: expected auto, cpu, cuda, cuda:N or mps, found {wanted!r}"]) from None
    present = {
        "cpu": True,
        "cuda": torch.cuda.is_available() and (device.index or 0) < torch.cuda.device_count(),
        "mps": torch.backends.mps.is_available(),
    }
    if not present.get(device.type, False):
        raise SettingsError(
            [f"device: {wanted} is not available to PyTorch {torch.__version__} here. Use --device cpu"]
        )
    if device.type == "cuda":
        # PyTorch says so once where the first operation of the backward pass's thread is a product; nothing is wrong.
        warnings.filterwarnings("ignore", message="Attempting to run cuBLAS, but there was no current CUDA context")
    return device


def processor_name() -> str:
    """As the system names it, or the kind of machine where it does not."""
    try:
        text = Path("/proc/cpuinfo").read_text(encoding="utf-8")
        return text.split("model name")[1].split(":", 1)[1].split("\n")[0].strip()
    except (OSError, IndexError):
        return platform.processor() or platform.machine()


def device_name(device: torch.device) -> str:
    """'cpu' or 'mps', or what kind of GPU it is."""
    return torch.cuda.get_device_name(device) if device.type == "cuda" else device.type


def measure_gflops(dtype: torch.dtype, device: torch.device, budget_s: float = 0.3) -> float:
    """Speed of what training does most, in GFLOP/s: products with a packed matrix, forwards and backwards.

    256 tokens, NF4 [1536, 1024]; the best of the runs that fit in `budget_s`, because other programs only ever slow it.
    """
    weight = torch.randn(1536, 1024, generator=torch.Generator().manual_seed(0))
    matrix = quantise(weight, "nf4").to(device)
    x = torch.ones(256, 1024, dtype=dtype, device=device)
    best, end = float("inf"), time.perf_counter() + budget_s
    for run in range(100):
        start = time.perf_counter()
        matrix.matmul_t(matrix.matmul(x))
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        best = min(best, time.perf_counter() - start)
        if run >= 2 and time.perf_counter() > end:
            break
    return 4 * 256 * weight.numel() / best / 1e9


def measure_weights_read(dtype: torch.dtype, device: torch.device, repeats: int = 3) -> float:
    """Packed weights a second that the products of one token take from memory: what generation waits for.

    NF4, 64 matrices [1024, 2048], 75 MB together, which no cache keeps, or fewer where memory is short; the best of the
    repeats.
    """
    matrix = quantise(torch.randn(1024, 2048, generator=torch.Generator().manual_seed(0)), "nf4").to(device)
    room = free_memory_bytes() // 4
    matrices = [deepcopy(matrix) for _ in range(max(1, min(64, room // matrix.nbytes)))]
    x, best = torch.ones(1, 2048, dtype=dtype, device=device), float("inf")
    for _ in range(repeats):
        start = time.perf_counter()
        for each in matrices:
            each.matmul(x)
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        best = min(best, time.perf_counter() - start)
    return len(matrices) * matrix.out_features * matrix.in_features / best


def compiles_products() -> bool:
    """Whether PyTorch has oneDNN compile products in 16 bits on this CPU: it does where there are instructions for
    bfloat16 or at least AVX-512, and computes without oneDNN elsewhere. True where that is not known.
    """
    knows = getattr(torch.ops.mkldnn, "_is_mkldnn_bf16_supported", None)
    return knows is None or bool(knows())


def choose_compute_dtype(wanted: str, device: torch.device) -> tuple[torch.dtype, str]:
    """(type, the sentence that says why). 'auto': float32, or bfloat16 where this machine is much faster at it."""
    if wanted != "auto":
        return _DTYPES[wanted], f"compute type {wanted}"
    if device.type == "cuda":
        dtype = torch.bfloat16 if torch.cuda.is_bf16_supported() else torch.float32
        return (
            dtype,
            f"compute type {str(dtype).removeprefix('torch.')}: the fastest that {device} supports in training",
        )
    if device.type != "cpu":
        return torch.float32, f"compute type float32 on {device}"
    speed = {name: measure_gflops(_DTYPES[name], device) for name in ("float32", "bfloat16")}
    best = "bfloat16" if speed["bfloat16"] > _MUCH_FASTER * speed["float32"] else "float32"
    figures = ", ".join(f"{name} {gflops:.0f}" for name, gflops in speed.items())
    return _DTYPES[best], f"compute type {best}: measured {figures} GFLOP/s on this machine"


def current_rss_bytes() -> int:
    """Memory of this process now."""
    try:
        return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGESIZE")
    except OSError:
        return peak_rss_bytes()


def resident_bytes() -> tuple[int, int]:
    """Memory of this process now: (anonymous, pages of files); where the system does not tell, all is anonymous."""
    try:
        status = Path("/proc/self/status").read_text()
        anonymous, files = (int(status.split(name)[1].split()[0]) * 1024 for name in ("RssAnon:", "RssFile:"))
        return anonymous, files
    except (OSError, IndexError):
        return current_rss_bytes(), 0


def swapped_bytes() -> int:
    """Memory of this process that the system has put on disk; 0 where it does not tell."""
    try:
        return int(Path("/proc/self/status").read_text().split("VmSwap:")[1].split()[0]) * 1024
    except (OSError, IndexError):
        return 0


def peak_rss_bytes() -> int:
    """Largest memory of this process so far (VmHWM on Linux, ru_maxrss elsewhere)."""
    try:
        status = Path("/proc/self/status").read_text()
        return int(status.split("VmHWM:")[1].split()[0]) * 1024
    except (OSError, IndexError):
        import resource  # not on Windows

        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        return peak if sys.platform == "darwin" else peak * 1024


def memory_limit_bytes() -> int | None:
    """What the cgroups (1 or 2) of this process let it have in all; None where they set no limit."""
    total = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGESIZE")
    return min((limit for limit, _ in cgroup_limits() if limit < total), default=None)


def free_bytes(device: torch.device) -> int:
    """What is free where this device computes: a card's own memory, or this process's share of the machine's."""
    return torch.cuda.mem_get_info(device)[0] if device.type == "cuda" else free_memory_bytes()


def budget_on(device: torch.device, memory: int | None, said: str = "--memory") -> tuple[int, str]:
    """(bytes that this process may have in all, the words for where the number comes from). memory: bytes that were
    asked for, as `said`; None: what is free, less a margin.
    """
    if memory is not None:
        return memory, said
    if device.type == "cuda":
        return int(free_bytes(device) * (1 - _MARGIN)), f"what {device} has free"
    return current_rss_bytes() + int(free_memory_bytes() * (1 - _MARGIN)), "what this machine has free"


def free_memory_bytes() -> int:
    """What this process may still take: available memory, or less where a cgroup limits it."""
    free = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGESIZE") // 2
    try:
        available = Path("/proc/meminfo").read_text().split("MemAvailable:")[1].split()[0]
        free = int(available) * 1024
    except (OSError, IndexError):
        pass
    return max(0, min([free, *(limit - used for limit, used in cgroup_limits())]))
