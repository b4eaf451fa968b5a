"""Loading and quantising a 16-bit folder: time and peak memory, ours and theirs, each time in a fresh process."""

from statistics import median
from typing import Any

import torch

from smidgen.bench.controller import start_worker
from smidgen.bench.figures import paired_ratio, spread
from smidgen.bench.machine import describe
from smidgen.bench.peers import STEP_PEERS, peer_interpreter
from smidgen.bench.shapes import SHAPES, random_token_ids
from smidgen.bench.step import ALPHA, LEARNING_RATE, RANK, STORAGE, StepSettings, model_folder
from smidgen.errors import RunError
from smidgen.events import Progress, Report, Warned, silent

__all__ = ["bench_load"]


def bench_load(settings: StepSettings, report: Report = silent) -> dict[str, Any]:
    """Of the settings only shape, compute_dtype, repeats, against (the first), isa and keep matter here.

    Both sides read the same files from the page cache; imports are over before the clock starts.
    """
    shape, threads = SHAPES[settings.shape], torch.get_num_threads()
    common = {
        "input_ids": random_token_ids(shape, 8),
        "rank": RANK,
        "alpha": ALPHA,
        "learning_rate": LEARNING_RATE,
        "probe_width": 256,
    }
    ours = {"storage": STORAGE, "compute_dtype": settings.compute_dtype, "recompute": "none"}
    sides: dict[str, tuple[str, Any, dict[str, Any]]] = {"smidgen": ("step_smidgen", None, ours)}
    skipped: dict[str, str] = {}
    for peer in (STEP_PEERS[name] for name in settings.against[:1]):
        try:
            sides[peer.name] = ("step_peft", peer_interpreter("peft", peer.needs, report), peer.settings)
        except RunError as error:
            skipped[peer.name] = str(error)
            report(Warned(f"{peer.name} is skipped: {error}"))
    loads: dict[str, list[dict[str, Any]]] = {name: [] for name in sides}
    with model_folder(shape, settings.keep, report) as folder:
        for number in range(settings.repeats):
            for name, (program, interpreter, own) in sides.items():
                report(Progress(f"loading {shape.name}", number * len(sides) + len(loads[name]), None))
                with start_worker(name, program, interpreter=interpreter, threads=threads, isa=settings.isa) as worker:
                    loads[name].append(worker.ask("load", folder=str(folder), **own, **common))
    report(Progress(f"loading {shape.name}", settings.repeats, settings.repeats))
    return {
        "shape": shape.name,
        "storage": STORAGE,
        **_figures(loads["smidgen"]),
        **_against(loads),
        "skipped": skipped,
        **describe(settings.isa, threads, {k: v for load in loads.values() for k, v in load[0]["versions"].items()}),
    }


def _figures(loads: list[dict[str, Any]]) -> dict[str, Any]:
    return {
        **spread([load["load_s"] for load in loads], "load_s"),
        "load_peak_rss_bytes": median(load["load_peak_rss_bytes"] for load in loads),
        "repeats": [{key: load[key] for key in ("load_s", "load_peak_rss_bytes")} for load in loads],
    }


def _against(loads: dict[str, list[dict[str, Any]]]) -> dict[str, Any]:
    """peer_..., the share of the peer's time and of its peak that ours takes."""
    ours = loads["smidgen"]
    for name, theirs in loads.items():
        if name == "smidgen":
            continue
        return {
            "against": name,
            **{f"peer_{key}": value for key, value in _figures(theirs).items()},
            "time_ratio": paired_ratio([load["load_s"] for load in ours], [load["load_s"] for load in theirs]),
            "memory_ratio": paired_ratio(
                [load["load_peak_rss_bytes"] for load in ours], [load["load_peak_rss_bytes"] for load in theirs]
            ),
        }
    return {"against": None}
