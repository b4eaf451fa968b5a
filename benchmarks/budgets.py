"""Fifty budgets that can be kept, each a hard limit: real steps in a memory cgroup of that size, page cache included.

For each model and data the budgets lie between the smallest that is possible and what the fastest settings need; one
below the smallest must be refused. Within the third budget of each, the planner's choice is timed beside every other
that can be asked for, what is computed again by rows at once: the fastest of these is the best found by brute force.
Where no memory cgroup can be made nothing is measured. Half an hour.
"""

import argparse
import json
import tempfile
from functools import partial
from pathlib import Path
from typing import Any

import torch
from common import Kept, skip, write_result

from smidgen.bench.memory import MemorySettings, bench_memory
from smidgen.errors import RunError
from smidgen.model.cgroups import memory_group
from smidgen.model.inventory import inventory_of
from smidgen.planning.estimate import RECOMPUTE
from smidgen.planning.planner import forecasts, smallest
from smidgen.planning.shapes import SHAPES
from smidgen.train.config import Settings
from smidgen.train.memory import choice_of, process_now, work_of

_WHERE = (0.0, 0.15, 0.4, 0.7, 1.0)  # between the smallest and what the fastest needs
_TIMED = _WHERE[2]
_CHOSEN = ("recompute", "streamed_layers", "computed_micro_batch", "tile_tokens", "loss_chunk")
_NEAR = 1.25
_MARGIN = 1.02  # over the smallest forecast of this process: the worker's own libraries differ by a few megabytes

JOBS = [
    {"shape": "smollm2-135m", "layers": 12, "seq_len": 256, "micro_batch": 4},
    {"shape": "smollm2-135m", "layers": 12, "seq_len": 1024, "micro_batch": 1},
    {"shape": "smollm2-135m", "layers": 30, "seq_len": 256, "micro_batch": 2, "targets": "all-linear"},
    {"shape": "smollm2-360m", "layers": 8, "seq_len": 512, "micro_batch": 2},
    {"shape": "tinyllama-1.1b", "layers": 6, "seq_len": 256, "micro_batch": 1},
    {"shape": "tinyllama-1.1b", "layers": 6, "seq_len": 256, "micro_batch": 4, "quantize": "gptq"},
    {"shape": "tinyllama-1.1b", "layers": 6, "seq_len": 128, "micro_batch": 2, "quantize": "int8", "rank": 32},
    {"shape": "qwen2.5-0.5b", "layers": 6, "seq_len": 256, "micro_batch": 2},
    {"shape": "stablelm-base-alpha-3b", "layers": 2, "seq_len": 128, "micro_batch": 2},
    {"shape": "llama-7b", "layers": 3, "seq_len": 128, "micro_batch": 2},
]


def _range(job: dict[str, Any]) -> tuple[int, int]:
    """(smallest forecast, that of the fastest settings)."""
    job = {"rank": 8, "targets": "q,v", "quantize": "nf4-dq", **job}
    config = {**SHAPES[job["shape"]], "num_hidden_layers": job["layers"]}
    model = inventory_of(None, config, job["quantize"], name=job["shape"])
    settings = Settings(rank=job["rank"], targets=job["targets"], micro_batch=job["micro_batch"], accumulation=1)
    work = work_of(model, settings, [job["seq_len"]] * job["micro_batch"], 4)
    every = forecasts(model, work, process_now(torch.device("cpu")), choice_of(model, settings))
    return smallest(every).peak_bytes, every[0].peak_bytes


def _run(job: dict[str, Any], budget: int, repeats: int = 1) -> dict[str, Any]:
    try:
        found = bench_memory(MemorySettings(memory=budget, repeats=repeats, **job))
    except RunError as error:
        end = "refused" if "is too little" in str(error) else "failed"
        return {"budget_bytes": budget, "end": end, "why": str(error)}
    keys = (
        *_CHOSEN, "step_s", "limit_enforced", "cgroup_peak_bytes", "peak_rss_bytes", "forecast_rss_bytes",
        "measured_peak_bytes", "forecast_peak_bytes",
    )  # fmt: skip
    steps = [step["step_s"] for step in found["repeats"]]
    return {"budget_bytes": budget, "end": "finished", "steps_s": steps, **{key: found[key] for key in keys}}


def _brute_force(job: dict[str, Any], budget: int) -> dict[str, Any]:
    """ways: seconds for the job's rows of each way that fits, 'planned' is the planner's: the best of two steps, and of
    two more in another process for what is near the best, since other programs only ever slow one. A way that comes to
    the same as another one counts with it.
    """
    rows = job["micro_batch"]
    ways = [("planned", rows, job)]
    for count in (count for count in range(1, rows + 1) if rows % count == 0):
        ways += [
            (f"{name}, {count} rows", count, {**job, "micro_batch": count, "recompute": name}) for name in RECOMPUTE
        ]
    names: dict[tuple[Any, ...], str] = {}
    found: dict[str, float] = {}
    for _ in range(2):
        near = _NEAR * min(found.values(), default=0)
        chosen = [way for way in ways if way[0] == "planned" or found.get(way[0], near) < near] if found else ways
        for name, count, way in chosen:
            run = _run(way, budget, 2)
            if "step_s" in run:
                first = names.setdefault(tuple(run[key] for key in _CHOSEN), name)
                found[first] = min(found.get(first, float("inf")), rows // count * min(run["steps_s"]))
    return {"ways": found}


parser = argparse.ArgumentParser(description=__doc__)
parser.add_argument("--again", action="store_true", help="measure all of them anew")
parser.add_argument("--limits-only", action="store_true", help="leave out the brute force, which wants a quiet machine")
given = parser.parse_args()
try:
    with memory_group("smidgen", 1 << 30):
        pass
except OSError as error:
    skip(f"no memory cgroup can be made here ({error.strerror})")
kept, runs = Kept("budgets", again=given.again), []
timed_later: list[tuple[dict[str, Any], dict[str, Any], str]] = []
for job in JOBS:
    least, most = _range(job)
    for where in (-1.0, *_WHERE):
        budget = round(least * 0.8 if where < 0 else least * _MARGIN + where * (most - least))
        name = json.dumps({**job, "where": where})
        run = {**job, "feasible": where >= 0, **kept.once(name, partial(_run, job, budget))}
        print(f"{run['end']:9} {run['budget_bytes'] / 1e6:6.0f} MB {job}", flush=True)
        runs.append(run)
        if where == _TIMED:
            timed_later.append((run, job, f"{name} brute force"))
for run, job, name in [] if given.limits_only else timed_later:
    found = kept.once(name, partial(_brute_force, job, run["budget_bytes"]))
    run["brute_force"] = found.get("ways", found)  # those of before commits were kept have no more than the ways
    run["brute_force_commit"] = found.get("commit")
    print(f"{run['budget_bytes'] / 1e6:6.0f} MB {job}", run["brute_force"], flush=True)
feasible = [run for run in runs if run["feasible"]]
timed = [run["brute_force"] for run in feasible if "brute_force" in run]
figures = {
    "command": "python benchmarks/budgets.py",
    "feasible": len(feasible),
    "finished": sum(run["end"] == "finished" for run in feasible),
    "infeasible": len(runs) - len(feasible),
    "refused": sum(run["end"] == "refused" for run in runs if not run["feasible"]),
    "planned_over_best": [round(ways["planned"] / min(ways.values()), 3) for ways in timed],
    "enforced": all(run.get("limit_enforced", True) for run in runs),
}
with tempfile.TemporaryDirectory() as name:
    write_result("budgets", {**figures, "runs": runs}, Path(name), shown=figures)
