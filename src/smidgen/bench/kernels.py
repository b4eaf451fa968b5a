"""`smidgen bench kernels`: de-quantise, quantise and multiply one matrix, ours, bitsandbytes' and dense, in turn."""

from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

import torch

from smidgen.bench.controller import Worker, start_worker
from smidgen.bench.figures import paired_ratio, spread
from smidgen.bench.machine import describe
from smidgen.bench.peers import peer_interpreter
from smidgen.errors import RunError
from smidgen.events import Note, Progress, Report, Warned, silent

__all__ = ["KernelSettings", "bench_kernels"]

_PEER = "bitsandbytes"
_STORAGES = ("nf4", "nf4-dq", "int8")


@dataclass(frozen=True)
class KernelSettings:
    """size: of the square matrix. rows: of the products' input, small ones first."""

    repeats: int = 7
    isa: str = ""
    size: int = 4096
    rows: tuple[int, ...] = (1, 4, 16, 512)


def bench_kernels(settings: KernelSettings, report: Report = silent) -> dict[str, Any]:
    """All cases at one thread and at all threads, and the extra memory of quantising, each in a fresh process."""
    everything = torch.get_num_threads()
    skipped: dict[str, str] = {}
    programs: dict[str, tuple[str, Path | None]] = {"smidgen": ("kernels_smidgen", None)}
    try:
        programs[_PEER] = ("kernels_bitsandbytes", peer_interpreter("peft", (_PEER,), report))
    except RunError as error:
        skipped[_PEER] = str(error)
        report(Warned(f"{_PEER} is skipped: {error}"))
    cases: list[dict[str, Any]] = []
    versions: dict[str, str] = {}
    notes: list[str] = []
    for threads in sorted({1, everything}):
        with ExitStack() as stack:
            workers = {
                name: stack.enter_context(
                    start_worker(name, program, interpreter=interpreter, threads=threads, isa=settings.isa)
                )
                for name, (program, interpreter) in programs.items()
            }
            loaded = {}
            for name, worker in workers.items():
                report(Note(f"{name}: starting with {threads} threads"))
                loaded[name] = worker.ask("load", size=settings.size, rows=list(settings.rows))
                versions |= loaded[name]["versions"]
            if not loaded.get(_PEER, {}).get("kept_to_isa", True):
                notes = [f"{_PEER} could not be kept to the instruction set, it uses AVX-512 where that is there"]
            cases += _measure(workers, loaded, settings, threads, report)
    return {
        "size": settings.size,
        "repeats_wanted": settings.repeats,
        "cases": cases,
        "quantise_memory": _memory(programs, settings, everything, report),
        "skipped": skipped,
        "notes": notes,
        **describe(settings.isa, everything, versions),
    }


def _measure(
    workers: Mapping[str, Worker], loaded: Mapping[str, Any], settings: KernelSettings, threads: int, report: Report
) -> list[dict[str, Any]]:
    """For each case all sides in turn, `repeats` times; the dense products are a side of their own."""
    names = [name for name in loaded["smidgen"]["cases"] if not name.startswith("dense ")]
    rows = []
    for number, name in enumerate(names):
        report(Progress(f"kernels at {threads} threads", number, len(names)))
        sides = [("smidgen", workers["smidgen"], name)]
        if f"dense {name}" in loaded["smidgen"]["cases"]:
            sides.append(("dense", workers["smidgen"], f"dense {name}"))
        if _PEER in workers and name in loaded[_PEER]["cases"]:
            sides.append((_PEER, workers[_PEER], name))
        seconds: dict[str, list[float]] = {side: [] for side, _, _ in sides}
        failed: dict[str, str] = {}
        for _ in range(settings.repeats):
            for side, worker, case in sides:
                if side in failed:
                    continue
                try:
                    seconds[side].append(worker.ask("run", case=case)["seconds"])
                except RunError as error:
                    if side == "smidgen":
                        raise
                    failed[side] = str(error)
        rows.append(_case(name, threads, settings.size, seconds, failed))
    report(Progress(f"kernels at {threads} threads", len(names), len(names)))
    return rows


def _case(
    name: str, threads: int, size: int, seconds: dict[str, list[float]], failed: dict[str, str]
) -> dict[str, Any]:
    """Times of all sides; weights a second and thread, or floating point operations a second; ratios to ours."""
    ours = seconds["smidgen"]
    multiplied = int(name.partition("M=")[2]) if "M=" in name else None
    case: dict[str, Any] = {"case": name, "threads": threads}
    for side, times in seconds.items():
        if side in failed:
            continue
        figures: dict[str, Any] = {**spread(times, "seconds"), "repeats": times}
        if multiplied:
            figures["gflops"] = 2 * multiplied * size**2 / median(times) / 1e9
        else:
            figures["gweights_per_s_per_thread"] = size**2 / median(times) / threads / 1e9
        case[side] = figures
        if side != "smidgen":
            case[f"speedup_over_{side}"] = paired_ratio(times, ours)
    return case | ({"failed": failed} if failed else {})


def _memory(
    programs: Mapping[str, tuple[str, Path | None]], settings: KernelSettings, threads: int, report: Report
) -> list[dict[str, Any]]:
    rows = []
    for number, storage in enumerate(_STORAGES):
        report(Progress("memory of quantising", number, len(_STORAGES)))
        row: dict[str, Any] = {"storage": storage}
        for name, (program, interpreter) in programs.items():
            with start_worker(name, program, interpreter=interpreter, threads=threads, isa=settings.isa) as worker:
                try:
                    answer = worker.ask("memory", size=settings.size, storage=storage)
                except RunError as error:
                    if name == "smidgen":
                        raise
                    row[name] = {"failed": str(error)}
                    continue
            row[name] = {**answer, "ratio": answer["extra_bytes"] / answer["tensor_bytes"]}
        rows.append(row)
    report(Progress("memory of quantising", len(_STORAGES), len(_STORAGES)))
    return rows
