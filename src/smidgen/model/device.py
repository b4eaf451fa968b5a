"""Where and in which number type to compute, chosen by measuring, each with its reason."""

import os
import sys
import time
from pathlib import Path

import torch

from smidgen.errors import SettingsError

__all__ = [
    "choose_compute_dtype",
    "choose_device",
    "current_rss_bytes",
    "free_memory_bytes",
    "measure_gflops",
    "peak_rss_bytes",
]

_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def choose_device(wanted: str) -> torch.device:
    """'auto' -> CUDA, then MPS, then CPU. Raises SettingsError for a device that is not there."""
    if wanted == "auto":
        if torch.cuda.is_available():
            return torch.device("cuda")
        return torch.device("mps" if torch.backends.mps.is_available() else "cpu")
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
    return device


def measure_gflops(dtype: torch.dtype, device: torch.device, budget_s: float = 0.15) -> float:
    """Speed of a [256, 1024] x [1024, 1024] matrix product, GFLOP/s, best of the runs that fit in `budget_s`."""
    a, b = torch.randn(256, 1024, device=device).to(dtype), torch.randn(1024, 1024, device=device).to(dtype)
    best, end = float("inf"), time.perf_counter() + budget_s
    for run in range(50):
        start = time.perf_counter()
        torch.mm(a, b)
        best = min(best, time.perf_counter() - start)
        if run >= 1 and time.perf_counter() > end:
            break
    return 2 * 256 * 1024 * 1024 / best / 1e9


def choose_compute_dtype(wanted: str, device: torch.device) -> tuple[torch.dtype, str]:
    """(type, the sentence that says why). 'auto': the faster of float32 and bfloat16 on this machine's CPU."""
    if wanted != "auto":
        return _DTYPES[wanted], f"compute type {wanted}, as asked"
    if device.type == "cuda":
        dtype = torch.bfloat16 if torch.cuda.is_bf16_supported() else torch.float32
        return (
            dtype,
            f"compute type {str(dtype).removeprefix('torch.')}: the fastest that {device} supports in training",
        )
    if device.type != "cpu":
        return torch.float32, f"compute type float32 on {device}"
    speed = {name: measure_gflops(_DTYPES[name], device) for name in ("float32", "bfloat16")}
    best = "bfloat16" if speed["bfloat16"] > 1.2 * speed["float32"] else "float32"
    figures = ", ".join(f"{name} {gflops:.0f}" for name, gflops in speed.items())
    return _DTYPES[best], f"compute type {best}: measured {figures} GFLOP/s on this machine"


def current_rss_bytes() -> int:
    """Memory of this process now."""
    try:
        return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGESIZE")
    except OSError:
        return peak_rss_bytes()


def peak_rss_bytes() -> int:
    """Largest memory of this process so far (VmHWM on Linux, ru_maxrss elsewhere)."""
    try:
        status = Path("/proc/self/status").read_text()
        return int(status.split("VmHWM:")[1].split()[0]) * 1024
    except (OSError, IndexError):
        import resource  # not on Windows

        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        return peak if sys.platform == "darwin" else peak * 1024


def free_memory_bytes() -> int:
    """What this process may still take: available memory, or less where a cgroup limits it."""
    free = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGESIZE") // 2
    try:
        available = Path("/proc/meminfo").read_text().split("MemAvailable:")[1].split()[0]
        free = int(available) * 1024
    except (OSError, IndexError):
        pass
    for limit, usage in (
        ("memory.max", "memory.current"),
        ("memory/memory.limit_in_bytes", "memory/memory.usage_in_bytes"),
    ):
        try:
            root = Path("/sys/fs/cgroup")
            free = min(free, int((root / limit).read_text()) - int((root / usage).read_text()))
        except (OSError, ValueError):
            continue
    return max(free, 0)
