"""Memory tables of xTuring, LitGPT and QLoRA, made again: the same models, rows, micro-batches and adapters; on a CPU.

A model of random packed weights is cut to a few layers, real steps are measured, and what the other layers add is
taken from the forecast: what is extrapolated is marked so. Everything counts, the interpreter and the libraries too.
Where 24 or 48 rows go through at once, activations wait in bfloat16.
The others' figures are theirs, on cards: xTuring's INT4 example (512 tokens, layers computed again), LitGPT's resource
tables (bf16-true, its longest rows, no recomputation) and QLoRA's paper (weights of the models of its table 6).
Each measured cell is kept as soon as it is done; a second start goes on. An hour.
"""

import argparse
import tempfile
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from common import Kept, write_result

from smidgen.bench.memory import MemorySettings, bench_memory
from smidgen.model.inventory import inventory_of
from smidgen.planning.generation import generation_plans
from smidgen.planning.inventory import Inventory
from smidgen.planning.planner import Choice, Forecast, forecast
from smidgen.planning.shapes import SHAPES
from smidgen.train.config import Settings
from smidgen.train.memory import process_now, work_of

ALPACA_ROWS = 52_002
PROMPT, NEW_TOKENS = 16, 50  # of LitGPT's answer


@dataclass(frozen=True)
class Cell:
    """theirs: decimal GB as they give it, and for answering. cut: layers that are measured; 0: none, a forecast."""

    table: str
    shape: str
    quantize: str
    seq_len: int
    micro_batch: int
    recompute: str
    theirs: float | None
    theirs_answer: float | None = None
    cut: int = 2
    rank: int = 8
    targets: str = "q,v"
    activation_dtype: str = "auto"


def _cells() -> list[Cell]:
    found = []
    for form, sizes in (("none", (14.6, 24.08, None)), ("int8", (8.85, 20.4, 32.78)), ("gptq", (5.96, 17.1, 27.32))):
        for rows, size in zip((1, 24, 48), sizes, strict=True):
            cut = {1: 2, 24: 8, 48: 4}[rows] if rows == 1 or form == "gptq" else 0
            waits = "auto" if rows == 1 else "bfloat16"
            found.append(Cell("xTuring", "llama-7b", form, 512, rows, "full", size, cut=cut, activation_dtype=waits))
    for shape, tokens, sizes, answering in (
        ("stablelm-base-alpha-3b", 1034, (9.69, 6.35, 6.19), (7.30, 3.20, 3.04)),
        ("llama-2-7b", 1304, (21.30, 14.14, 13.84), (13.52, 4.57, 4.26)),
    ):
        for form, size, answer in zip(("none", "nf4", "nf4-dq"), sizes, answering, strict=True):
            found.append(Cell("LitGPT", shape, form, tokens, 1, "none", size, answer))
    for shape, size in (("llama-7b", 5), ("llama-13b", 10), ("llama-33b", 21), ("llama-65b", 41)):
        cut = {"llama-33b": 1, "llama-65b": 1}.get(shape, 2)
        found.append(Cell("QLoRA", shape, "nf4-dq", 512, 1, "full", size, cut=cut, rank=64, targets="all-linear"))
    return found


def _forecast(cell: Cell, layers: int | None) -> tuple[Inventory, Forecast]:
    """Of the model cut to so many layers, in this process; everything resident."""
    config = dict(SHAPES[cell.shape])
    config["num_hidden_layers"] = layers or config["num_hidden_layers"]
    model = inventory_of(None, config, cell.quantize, name=cell.shape)
    settings = Settings(
        rank=cell.rank, targets=cell.targets, micro_batch=cell.micro_batch, accumulation=1, seq_len=cell.seq_len,
        activation_dtype=cell.activation_dtype,
    )  # fmt: skip
    work = work_of(model, settings, [cell.seq_len] * cell.micro_batch, 4)
    choice = Choice(cell.micro_batch, 1, (cell.recompute,) * model.num_layers)
    return model, forecast(model, work, process_now(torch.device("cpu")), choice)


def _measured(cell: Cell) -> dict[str, Any]:
    fields = ("shape", "quantize", "seq_len", "micro_batch", "recompute", "rank", "targets", "activation_dtype")
    chosen = {field: getattr(cell, field) for field in fields}
    found = bench_memory(MemorySettings(layers=cell.cut, repeats=int(cell.micro_batch == 1), **chosen))
    wanted = ("forecast_rss_bytes", "peak_rss_bytes", "forecast_peak_bytes", "measured_peak_bytes", "step_s")
    return {key: found[key] for key in wanted}


def _row(cell: Cell, kept: Kept) -> dict[str, Any]:
    model, whole = _forecast(cell, None)
    row = {**vars(cell), "forecast_bytes": whole.peak_bytes, "peak_bytes": whole.peak_bytes, "how": "forecast"}
    if cell.theirs_answer:
        ways = generation_plans(model, process_now(torch.device("cpu")), PROMPT, NEW_TOKENS, 4)
        row["answer_bytes"] = next(ways).forecast.peak_bytes
    if cell.cut:
        measured = kept.once(str(cell), partial(_measured, cell))
        cut_model, cut = _forecast(cell, cell.cut)
        share = (model.weights + model.vocab_size * model.hidden_size) / (
            cut_model.weights + cut_model.vocab_size * cut_model.hidden_size
        )
        row |= {
            "how": f"{cell.cut} of {model.num_layers} layers measured",
            "peak_bytes": measured["peak_rss_bytes"] + whole.peak_bytes - cut.peak_bytes,
            "step_s": measured["step_s"] * share,
            "epoch_days": measured["step_s"] * share * ALPACA_ROWS / cell.micro_batch / 86400,
            "measured": measured,
        }
    what = f"{cell.table} {cell.shape} {cell.quantize} x{cell.micro_batch}"
    print(f"{what}: {row['peak_bytes'] / 1e9:.2f} GB", flush=True)
    return row


parser = argparse.ArgumentParser(description=__doc__)
parser.add_argument("--again", action="store_true", help="measure all of them anew")
given = parser.parse_args()
kept = Kept("seed_memory", again=given.again)
torch.ones(256, 256).mm(torch.ones(256, 256))  # a process that trains has loaded what products need
rows = [_row(cell, kept) for cell in _cells()]
with tempfile.TemporaryDirectory() as name:
    write_result("seed_memory", {"command": "python benchmarks/seed_memory.py", "cells": rows}, Path(name), shown={})
