"""The worker's side of a benchmark: a JSON line for each request, on stdin and stdout, and what all workers measure.

    -> {"do": "load", ...}     <- {"ok": {...}}     or     <- {"error": "one line"}

A worker may run under an interpreter that has neither smidgen nor PyTorch, so this module imports only the standard
library; PyTorch is imported where it is used. Workers are started as `python FILE`, which puts this folder first on the
path, or as modules of the package.

Memory is VmHWM of the whole process, the largest resident size, which Linux lets a process set back to its present size
by writing 5 to /proc/self/clear_refs. So each phase has a peak of its own.
"""

import gc
import json
import os
import sys
import time
from collections.abc import Callable
from importlib.metadata import PackageNotFoundError, version
from typing import Any

__all__ = [
    "current_rss_bytes",
    "measure_sgemm_gflops",
    "peak_rss_bytes",
    "reset_peak_rss",
    "serve",
    "timed_step",
    "versions",
]

Handler = Callable[..., dict[str, Any]]


def serve(handlers: dict[str, Handler]) -> None:
    """Answer requests until "quit" or the end of stdin. handlers: the value of "do" -> function of the other values."""
    # What libraries print must not get between the answers: from now on their standard output is standard error.
    answers = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)
    for line in sys.stdin:
        request = json.loads(line)
        name = request.pop("do")
        if name == "quit":
            return
        try:
            answer = {"ok": handlers[name](**request)}
        except Exception as error:  # whatever a peer raises is an answer: the controller decides what it means
            first = (str(error).strip().splitlines() or [""])[0]
            answer = {"error": f"{type(error).__name__}: {first}"[:500]}
        answers.write(json.dumps(answer) + "\n")
        answers.flush()


def measure_sgemm_gflops(rows: int = 512, width: int = 4096) -> float:
    """Speed of float32 [rows, width] x [width, width] in GFLOP/s, the better of two: what the machine can do now."""
    import torch

    x, w = torch.rand(rows, width), torch.rand(width, width)
    y = torch.empty(rows, width)
    best_s = float("inf")
    for _ in range(2):
        started = time.perf_counter()
        torch.mm(x, w, out=y)
        best_s = min(best_s, time.perf_counter() - started)
    return 2 * rows * width * width / best_s / 1e9


def timed_step(step: Callable[[], float], probe_width: int) -> dict[str, Any]:
    """One training step between two probes, which are outside its time and its memory. `step` returns its loss."""
    before = measure_sgemm_gflops(width=probe_width)
    gc.collect()
    reset_peak_rss()
    started = time.perf_counter()
    loss = step()
    step_s = time.perf_counter() - started
    peak = peak_rss_bytes()
    after = measure_sgemm_gflops(width=probe_width)
    return {"step_s": step_s, "loss": loss, "peak_rss_bytes": peak, "sgemm_gflops": [before, after]}


def reset_peak_rss() -> None:
    """The peak of this process is its present size from now on (Linux)."""
    with open("/proc/self/clear_refs", "w", encoding="ascii") as file:
        file.write("5")


def peak_rss_bytes() -> int:
    """VmHWM: the largest resident size since the last reset."""
    return _status_bytes("VmHWM")


def current_rss_bytes() -> int:
    """VmRSS: the resident size now."""
    return _status_bytes("VmRSS")


def _status_bytes(name: str) -> int:
    with open("/proc/self/status", encoding="ascii", errors="replace") as file:
        return next(int(line.split()[1]) * 1024 for line in file if line.startswith(name + ":"))


def versions(*names: str) -> dict[str, str]:
    """Package -> version, for those that are installed."""
    found = {}
    for name in names:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found
