"""`smidgen bench memory`: real steps of a model of an exact shape within a limit, forecast and measured.

The weights are random and packed (packed_model.py). The worker is a fresh process; with a limit, and where this machine
lets us, it lives in a memory cgroup of that size, in which the page cache counts and nothing is swapped.
"""

from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

import torch

from smidgen.bench.controller import start_worker
from smidgen.bench.machine import describe
from smidgen.bench.packed_model import drop_page_cache, write_packed_model
from smidgen.bench.places import passing_folder
from smidgen.events import Note, Progress, Report, Warned, silent
from smidgen.model.cgroups import MemoryGroup, memory_group
from smidgen.planning.shapes import SHAPES
from smidgen.units import format_bytes

__all__ = ["MemorySettings", "bench_memory"]


@dataclass(frozen=True)
class MemorySettings:
    """layers: of the model, cut for a quick look; None: all. vocab_size: in place of the shape's own; 0: that one.
    new_tokens: generated after the row. memory: bytes; None: no limit. resident: also measure the same steps with every
    layer in memory.
    """

    shape: str
    quantize: str = "nf4-dq"
    mode: str = "train"
    seq_len: int = 512
    micro_batch: int = 1
    layers: int | None = None
    vocab_size: int = 0
    compute_dtype: str = "float32"
    new_tokens: int = 8
    memory: int | None = None
    activation_dtype: str = "auto"
    recompute: str = "auto"
    rank: int = 8
    targets: str = "q,v"
    repeats: int = 1
    resident: bool = False
    isa: str = ""
    keep: Path | None = None


def bench_memory(settings: MemorySettings, report: Report = silent) -> dict[str, Any]:
    """One warm-up step (or answer) and `repeats` that count, or where that is 0 the first one alone.

    Raises RunError, before weights are written, where the limit is too low, settings are wrong or the disk has no room.
    """
    config = dict(SHAPES[settings.shape])
    if settings.layers:
        config["num_hidden_layers"] = settings.layers
    config["vocab_size"] = settings.vocab_size or config["vocab_size"]
    config["max_position_embeddings"] = max(settings.seq_len, config["max_position_embeddings"])
    threads = torch.get_num_threads()
    _check(settings, config, threads)
    with ExitStack() as stack:
        folder = _folder(stack, settings, config, report)
        measured = _run(settings, config, folder, settings.memory, threads, report)
        resident = _run(settings, config, folder, None, threads, report) if settings.resident else None
    loaded, steps = measured["loaded"], measured["steps"]
    return {
        "shape": settings.shape,
        "layers": config["num_hidden_layers"],
        "vocab_size": config["vocab_size"],
        "quantize": settings.quantize,
        "compute_dtype": settings.compute_dtype,
        "activation_dtype": settings.activation_dtype,
        "rank": settings.rank,
        "targets": settings.targets,
        "mode": settings.mode,
        "seq_len": settings.seq_len,
        "micro_batch": settings.micro_batch,
        "limit_bytes": settings.memory,
        "limit_enforced": measured["enforced"],
        "forecast_peak_bytes": loaded["forecast_peak_bytes"],
        "measured_peak_bytes": max(step["measured_peak_bytes"] for step in steps),
        "forecast_rss_bytes": loaded["forecast_rss_bytes"],
        "peak_rss_bytes": max(step["peak_rss_bytes"] for step in steps),
        "resident_peak_rss_bytes": max(step["peak_rss_bytes"] for step in resident["steps"]) if resident else None,
        "cgroup_peak_bytes": measured["cgroup_peak_bytes"],
        "swapped_bytes": max(step["swapped_bytes"] for step in steps),
        "forecast_step_s": loaded["forecast_step_s"],
        "step_s": median(step["step_s"] for step in steps),
        "resident_step_s": median(step["step_s"] for step in resident["steps"]) if resident else None,
        "resident_recompute": resident["loaded"]["recompute"] if resident else None,
        "read_bytes_per_step": median(step["read_bytes"] for step in steps),
        "wait_s_per_step": median(step["wait_s"] for step in steps),
        "streamed_layers": loaded["streamed_layers"],
        "recompute": loaded["recompute"],
        "cache_dtype": loaded["cache_dtype"],
        "computed_micro_batch": loaded["micro_batch"],
        "tile_tokens": loaded["tile_tokens"],
        "loss_chunk": loaded["loss_chunk"],
        "disk_bytes_per_s": loaded["disk_bytes_per_s"],
        "loss": [step["loss"] for step in steps if "loss" in step],
        "terms": loaded["terms"],
        "repeats_wanted": settings.repeats,
        "repeats": steps,
        "skipped": {},
        **describe(settings.isa, threads, loaded["versions"]),
    }


def _folder(stack: ExitStack, settings: MemorySettings, config: dict[str, Any], report: Report) -> Path:
    """The model: below `keep`, used again if it is there, or one that is removed at the end."""
    keep = settings.keep or stack.enter_context(passing_folder("packed"))
    sizes = [str(config[key]) for key in ("num_hidden_layers", "vocab_size", "max_position_embeddings")]
    folder = keep / "-".join([settings.shape, *sizes, settings.quantize])
    if (folder / "config.json").is_file():
        return folder
    return write_packed_model(config, folder, settings.quantize, report)


def _check(settings: MemorySettings, config: dict[str, Any], threads: int) -> None:
    """Plan from the sizes alone, in a process as that which is measured, but without a limit: its libraries may take
    more than that.
    """
    lengths = [settings.seq_len] * settings.micro_batch
    with start_worker("smidgen", "memory_smidgen", threads=threads, isa=settings.isa) as worker:
        worker.ask("check", name=settings.shape, config=config, lengths=lengths, **_how(settings, settings.memory))


def _how(settings: MemorySettings, limit: int | None) -> dict[str, Any]:
    """What the worker's plan follows from, beside the model and the rows."""
    names = ("recompute", "rank", "targets", "compute_dtype", "activation_dtype", "new_tokens")
    chosen = {name: getattr(settings, name) for name in names}
    return {"storage": settings.quantize, "budget": limit, "train": settings.mode == "train", **chosen}


def _run(
    settings: MemorySettings, config: dict[str, Any], folder: Path, limit: int | None, threads: int, report: Report
) -> dict[str, Any]:
    generator = torch.Generator().manual_seed(1)
    rows = torch.randint(config["vocab_size"], (settings.micro_batch, settings.seq_len), generator=generator)
    for file in folder.glob("*.safetensors"):  # kept from before, or read by the run before
        drop_page_cache(file)
    with ExitStack() as stack:
        group = _limited(stack, limit, report)
        worker = stack.enter_context(
            start_worker("smidgen", "memory_smidgen", threads=threads, isa=settings.isa, group=group)
        )
        loaded = worker.ask("load", folder=str(folder), input_ids=rows.tolist(), **_how(settings, limit))
        streamed = f"{loaded['streamed_layers']} layers streamed, recompute {loaded['recompute']}"
        report(Note(f"forecast {format_bytes(loaded['forecast_rss_bytes'])}; {streamed}"))
        steps = []
        for number in range(settings.repeats + 1):
            report(Progress(f"{settings.mode} {folder.name}", number, settings.repeats + 1))
            train = settings.mode == "train"
            step = worker.ask("step") if train else worker.ask("generate", tokens=settings.new_tokens)
            steps.append(step)
        report(Progress(f"{settings.mode} {folder.name}", settings.repeats + 1, settings.repeats + 1))
        peak = group.peak_bytes if group else None
        return {"loaded": loaded, "steps": steps[1:] or steps, "enforced": group is not None, "cgroup_peak_bytes": peak}


def _limited(stack: ExitStack, limit: int | None, report: Report) -> MemoryGroup | None:
    """A memory cgroup of this size until the stack ends; None without a limit, or where none can be made."""
    if limit is None:
        return None
    try:
        return stack.enter_context(memory_group("smidgen", limit))
    except OSError as error:
        report(Warned(f"the limit is kept but not enforced: no memory cgroup can be made here ({error.strerror})"))
        return None
