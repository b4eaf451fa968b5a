"""The forecast of memory beside the measured peak, over shapes and settings: each a fresh process with real steps.

Peaks are of anonymous memory (what files back can be given up and read again). Models have random packed weights and
are cut to a few layers, so that none takes long. Combinations with a budget run in a memory cgroup of that size, where
one can be made. Every combination is kept as soon as it is measured; a second start goes on with what is missing.
"""

import argparse
import json
import tempfile
from functools import partial
from pathlib import Path
from typing import Any

from common import Kept, write_result

from smidgen.bench.memory import MemorySettings, bench_memory

_SMALL, _OVER, _SLACK = 1_300_000_000, 1.05, 64 << 20

LLAMA, TINY, QWEN, NEOX = "smollm2-135m", "tinyllama-1.1b", "qwen2.5-0.5b", "stablelm-base-alpha-3b"


def _of(shape: str, layers: int, **settings: Any) -> dict[str, Any]:
    return {"shape": shape, "layers": layers, **settings}


COMBINATIONS = [
    # length of the rows
    *(_of(LLAMA, 12, seq_len=tokens) for tokens in (64, 256, 512, 1024, 2048)),
    _of(LLAMA, 6, seq_len=4096),
    _of(LLAMA, 3, seq_len=8192),
    *(_of(TINY, 4, seq_len=tokens) for tokens in (128, 512, 2048)),
    _of(TINY, 2, seq_len=4096),
    # what is computed again
    *(_of(LLAMA, 12, seq_len=1024, recompute=name) for name in ("cheap", "full")),  # none: above
    *(_of(TINY, 4, seq_len=1024, recompute=name) for name in ("none", "cheap", "full")),
    *(_of(NEOX, 2, seq_len=512, recompute=name) for name in ("none", "full")),
    # rows at once
    *(_of(LLAMA, 8, seq_len=256, micro_batch=rows) for rows in (4, 16)),
    *(_of(TINY, 3, seq_len=256, micro_batch=rows, recompute="full") for rows in (8, 16)),
    _of(NEOX, 2, seq_len=128, micro_batch=4, recompute="full"),
    # the form of the base
    *(_of(LLAMA, 12, seq_len=512, quantize=form) for form in ("nf4", "int8", "gptq", "none")),
    *(_of(TINY, 3, seq_len=512, quantize=form) for form in ("nf4", "int8", "gptq", "none")),
    # adapters
    *(_of(LLAMA, 12, seq_len=512, rank=rank, targets="all-linear") for rank in (16, 128)),
    _of(TINY, 3, seq_len=512, rank=64, targets="all-linear"),
    # vocabularies
    *(_of(LLAMA, 6, seq_len=512, vocab_size=classes) for classes in (32000, 128256, 262144)),
    _of(QWEN, 6, seq_len=512),
    _of(QWEN, 6, seq_len=2048, recompute="full"),
    _of(QWEN, 6, seq_len=512, vocab_size=262144, targets="all-linear", rank=32),
    # bfloat16
    _of(LLAMA, 6, seq_len=512, compute_dtype="bfloat16"),
    *(_of(LLAMA, 12, seq_len=1024, activation_dtype="bfloat16", recompute=name) for name in ("none", "full")),
    _of(TINY, 4, seq_len=1024, activation_dtype="bfloat16"),
    # larger layers
    _of("llama-7b", 2, seq_len=512),
    _of("llama-7b", 2, seq_len=512, quantize="gptq", recompute="full"),
    _of("llama-3-8b", 2, seq_len=256, targets="all-linear"),
    # streamed
    _of(TINY, 12, seq_len=512, memory=900_000_000),
    _of(TINY, 12, seq_len=512, memory=900_000_000, quantize="gptq"),
    _of(LLAMA, 30, seq_len=1024, memory=900_000_000, micro_batch=2),
    _of("llama-7b", 4, seq_len=512, memory=1_500_000_000, recompute="full"),
    # many small tensors, at ease and within a budget
    *(_of(LLAMA, 30, seq_len=256, micro_batch=2, targets="all-linear", recompute=name) for name in ("none", "full")),
    _of(LLAMA, 30, seq_len=256, micro_batch=2, targets="all-linear", memory=570_000_000),
    # in smaller pieces
    _of(LLAMA, 12, seq_len=256, memory=640_000_000, micro_batch=16, recompute="full"),
    _of(TINY, 4, seq_len=1024, memory=915_000_000, recompute="full"),
    _of(QWEN, 6, seq_len=512, memory=815_000_000, micro_batch=2, recompute="full"),
    # a shape that was added after the terms were written
    _of("qwen2.5-1.5b", 3, seq_len=512),
    _of("qwen2.5-1.5b", 3, seq_len=1024, micro_batch=2, recompute="full", targets="all-linear"),
]


def _verdict(forecast: int, measured: int) -> str:
    """'under', 'over' or 'good': never under, at most 5 % over, or 64 MiB below 1.3 GB."""
    if forecast < measured:
        return "under"
    most = measured + _SLACK if measured < _SMALL else measured * _OVER
    return "good" if forecast <= most else "over"


def _run(combination: dict[str, Any]) -> dict[str, Any]:
    found = bench_memory(MemorySettings(**combination))
    forecast, measured = found["forecast_peak_bytes"], found["measured_peak_bytes"]
    keys = (
        "terms", "streamed_layers", "recompute", "computed_micro_batch", "tile_tokens", "loss_chunk", "limit_enforced",
        "peak_rss_bytes", "forecast_rss_bytes",
    )  # fmt: skip
    print(f"{forecast / 1e6:8.0f} {measured / 1e6:8.0f} MB {forecast / measured:6.3f} {combination}", flush=True)
    return {
        "settings": combination,
        "forecast_bytes": forecast,
        "measured_bytes": measured,
        "ratio": forecast / measured,
        "verdict": _verdict(forecast, measured),
        **{key: found[key] for key in keys},
    }


parser = argparse.ArgumentParser(description=__doc__)
parser.add_argument("--again", action="store_true", help="measure all of them anew")
parser.add_argument("--only", default="", help="those whose settings contain this text")
given = parser.parse_args()
kept, names = Kept("forecasts", again=given.again), {json.dumps(each): each for each in COMBINATIONS}
for name, combination in names.items():
    if given.only in name:
        kept.once(name, partial(_run, combination))
runs = [found for name in names if (found := kept.get(name))]
not_measured = len(names) - len(runs)
if not_measured:
    print(f"{not_measured} of {len(names)} combinations are not measured", flush=True)
with tempfile.TemporaryDirectory() as name:
    verdicts = [run["verdict"] for run in runs]
    figures = {
        "command": "python benchmarks/forecasts.py",
        "combinations": len(runs),
        "not_measured": not_measured,
        **{verdict: verdicts.count(verdict) for verdict in ("good", "under", "over")},
        "smallest_ratio": min(run["ratio"] for run in runs),
        "largest_ratio": max(run["ratio"] for run in runs),
    }
    write_result("forecasts", {**figures, "runs": runs}, Path(name), shown=figures)
