"""`smidgen plan`: memory and time of a run before it is started, for a model on disk or for a shape alone."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from smidgen.checkpoint.base import Checkpoint
from smidgen.checkpoint.hub import BUILTIN_MODELS
from smidgen.checkpoint.safetensors import read_config
from smidgen.data.records import as_specs
from smidgen.errors import DataError
from smidgen.events import Note, Report, Warned, silent
from smidgen.export.quantise import plan_quantising
from smidgen.model.calibration import GPTQ_ON_THE_WAY, most_tokens_on_the_way
from smidgen.model.device import choose_compute_dtype, choose_device
from smidgen.model.inventory import inventory_of
from smidgen.model.load import DEFAULT_STORAGE, choose_storage, max_positions_of, needs_gptq, open_source
from smidgen.model.tokenizer import add_tokens
from smidgen.planning.budget import too_little
from smidgen.planning.conversion import LEFT_BY_GPTQ, Conversion
from smidgen.planning.generation import GenerationPlan, generation_plans
from smidgen.planning.inventory import Inventory
from smidgen.planning.planner import Forecast, Machine, fastest, forecast, forecasts, reasons, smallest
from smidgen.planning.shapes import SHAPES
from smidgen.planning.work import Rows, Work
from smidgen.train.config import Settings
from smidgen.train.loop import Schedule
from smidgen.train.memory import (
    CUDA_CONTEXT_BYTES,
    budget_of,
    choice_of,
    estimate_host,
    machine_now,
    with_trained_norms,
    work_of,
)
from smidgen.train.optimizers import check_optimizer
from smidgen.train.rows import read_rows, seq_len_within
from smidgen.train.sharing import planned_rows
from smidgen.train.what_if import what_if
from smidgen.units import format_bytes, parse_duration

__all__ = ["ANSWER_SETTINGS", "plan_answers", "plan_model"]

ANSWER_SETTINGS = frozenset({"quantize", "compute_dtype", "device", "memory", "seq_len", "trust_remote_code"})
_CPU = torch.device("cpu")


@dataclass(frozen=True)
class _Subject:
    """What is to be planned for."""

    name: str
    checkpoint: Checkpoint | None
    config: dict[str, Any]
    rows: Rows
    steps: int


def plan_model(
    model: str, data: str | Sequence[str] | None, settings: Settings, report: Report = silent
) -> dict[str, Any]:
    """See api.plan."""
    subject = _subject(model, data, settings, report)
    device, dtype, runs_here = _place(settings, report)
    storage = _storage(settings.quantize, subject.checkpoint, report)
    on_cpu = device == "cpu"

    def inventory(form: str) -> Inventory:
        found = inventory_of(
            subject.checkpoint, subject.config, form, name=subject.name, itemsize=dtype.itemsize,
            fuses=on_cpu and not settings.dropout, trust_remote_code=settings.trust_remote_code,
        )  # fmt: skip
        return with_trained_norms(found, settings)

    shape = inventory(storage)
    work = work_of(shape, settings, subject.rows, dtype.itemsize)
    machine = _machine(device, dtype, shape, subject.checkpoint, report, runs_here=runs_here)
    budget, where = _budget(settings, device, runs_here=runs_here)
    of_host = budget if on_cpu else budget_of(replace(settings, memory=None), _CPU)[0]
    gptq, gptq_least_bytes = _quantising(subject, settings, of_host)
    if gptq and on_cpu:
        machine = replace(machine, framework_bytes=machine.framework_bytes + LEFT_BY_GPTQ)
    given = choice_of(shape, settings)
    every = forecasts(shape, work, machine, given, recompute=settings.recompute, can_stream=on_cpu)
    found, least_bytes = fastest(every, budget), smallest(every).peak_bytes
    fits = found is not None or not budget
    found = found or (smallest(every) if budget else forecast(shape, work, machine, given))
    result = _figures(found, work, runs_here=runs_here)
    host_bytes = found.peak_bytes if on_cpu else estimate_host(shape)
    if gptq:
        sizes = [format_bytes(size) for size in (gptq.peak_bytes, found.peak_bytes)]
        report(Note(f"the base is quantised by GPTQ first: forecast {sizes[0]} of RAM; of the training {sizes[1]}"))
        host_bytes = max(host_bytes, gptq.peak_bytes)
    if gptq and on_cpu:
        least_bytes, fits = max(least_bytes, gptq_least_bytes), fits and gptq.peak_bytes <= budget
        if gptq.peak_bytes > found.peak_bytes:
            size = gptq.peak_bytes
            result |= {"during": "GPTQ", "peak_bytes": size, "anonymous_bytes": size, "terms": gptq.terms}
    if fits:
        for line in reasons(shape, found, work, given, budget or found.peak_bytes):
            report(Note(line))
    else:
        report(Warned(too_little(budget, where, f"for {subject.name}", least_bytes)))
    return {
        "model": subject.name,
        "device": device,
        **result,
        "run_s": _run_s(result["step_s"], subject.steps, settings),
        "tokens_per_step": round(work.mean_tokens),
        "computed_tokens_per_step": round(work.mean_tokens * work.rows.computed),
        "labels_per_step": round(work.mean_tokens * work.rows.labelled),
        "steps": subject.steps,
        "budget_bytes": budget or None,
        "fits": fits,
        "smallest_bytes": least_bytes,
        "host_bytes": host_bytes,
        "trainable_parameters": work.parameters,
        "weights": shape.weights,
        "settings": {
            "quantize": storage, "compute_dtype": str(dtype).removeprefix("torch."), "rank": settings.rank,
            "targets": settings.targets, "micro_batch": found.choice.micro_batch,
            "accumulation": found.choice.accumulation, "recompute": found.choice.recompute_name,
            "pack": found.choice.pack, "tile_tokens": found.choice.tile_tokens, "loss_chunk": found.choice.loss_chunk,
            "streamed_layers": len(found.choice.streamed), "longest_row_tokens": work.rows.longest,
        },
        "what_if": [
            {"change": name, "peak_bytes": other.peak_bytes, "step_s": other.step_s if runs_here else None}
            for name, other in what_if(
                shape, work, machine, found.choice, settings, subject.checkpoint, inventory, can_stream=on_cpu
            )
        ],
    }  # fmt: skip


def plan_answers(model: str, new_tokens: int, settings: Settings, report: Report = silent) -> dict[str, Any]:
    """See api.plan: generation after a prompt of seq_len tokens. settings: those of ANSWER_SETTINGS count."""
    subject = _subject(model, None, settings, silent)
    device, dtype, runs_here = _place(settings, report)
    storage = _storage(settings.quantize, subject.checkpoint, report)
    shape = inventory_of(
        subject.checkpoint, subject.config, storage, name=subject.name, itemsize=dtype.itemsize, fuses=device == "cpu",
        trust_remote_code=settings.trust_remote_code,
    )  # fmt: skip
    machine = _machine(device, dtype, shape, subject.checkpoint, report, runs_here=runs_here, generates=True)
    budget, where = _budget(settings, device, runs_here=runs_here)
    length, compute_dtype = settings.seq_len, str(dtype).removeprefix("torch.")
    plans = list(generation_plans(shape, machine, length, new_tokens, dtype.itemsize, can_stream=device == "cpu"))
    fitting = [plan for plan in plans if not budget or plan.forecast.peak_bytes <= budget]
    least, found = plans[-1].forecast, (fitting or plans[-1:])[0]
    if fitting:
        for line in found.reasons(shape, budget or found.forecast.peak_bytes):
            report(Note(line))
    else:
        report(Warned(too_little(budget, where, f"for {subject.name}", least.peak_bytes)))

    def step_s(plan: GenerationPlan) -> float | None:
        return plan.forecast.step_s if runs_here else None

    others = {f"{len(plan.streamed)} of {shape.num_layers} layers streamed": plan for plan in plans if plan.streamed}
    few = [name for name, plan in others.items() if len(plan.streamed) in (shape.num_layers // 2, shape.num_layers)]
    rounded = {"key cache in bfloat16": plans[1]} if shape.fused else {}
    changes = {**rounded, **{name: others[name] for name in few}}
    return {
        "model": subject.name,
        "device": device,
        "peak_bytes": found.forecast.peak_bytes,
        "anonymous_bytes": found.forecast.anonymous_bytes,
        "terms": found.forecast.terms,
        "step_s": step_s(found),
        "read_bytes_per_step": found.forecast.read_bytes,
        "budget_bytes": budget or None,
        "fits": bool(fitting),
        "smallest_bytes": least.peak_bytes,
        "weights": shape.weights,
        "settings": {
            "quantize": storage, "compute_dtype": compute_dtype,
            "cache_dtype": found.cache_dtype if shape.fused else compute_dtype,
            "prompt_tokens": length, "new_tokens": new_tokens, "streamed_layers": len(found.streamed),
        },
        "what_if": [
            {"change": name, "peak_bytes": plan.forecast.peak_bytes, "step_s": step_s(plan)}
            for name, plan in changes.items()
            if plan != found
        ],
    }  # fmt: skip


def _subject(model: str, data: str | Sequence[str] | None, settings: Settings, report: Report) -> _Subject:
    """A built-in shape, a config.json alone, or a model that is opened; with rows of data, or rows of seq_len."""
    path = Path(model)
    is_shape = model in SHAPES and model not in BUILTIN_MODELS and not path.exists()
    if is_shape or path.name == "config.json":
        if data is not None:
            report(Note(f"{model} is without a tokenizer: {', '.join(as_specs(data))} is not read"))
        config = SHAPES[model] if is_shape else read_config(path.parent)
        name, checkpoint = model if is_shape else path.resolve().parent.name, None
    else:
        source = open_source(model, report)
        add_tokens(source.tokenizer, settings.tokens, source.vocab_size)
        name, checkpoint, config = path.name or model, source.checkpoint, source.checkpoint.config
        if data is not None:
            found = read_rows(source, data, settings, report)
            if not found.train:
                raise DataError(f"{', '.join(found.data.names)}: no row is left to train on", cure="raise --seq-len")
            schedule = Schedule(found.train.lengths, settings, found.mixture)
            rows = planned_rows(found.train, found.held_out, schedule)
            return _Subject(name, checkpoint, config, rows, schedule.total_steps)
    seq_len = seq_len_within(max_positions_of(config), settings, report)
    rows = Rows(np.full(settings.micro_batch * settings.accumulation, seq_len, np.int32))
    report(Note(f"no rows to measure: every row has {seq_len} tokens"))
    return _Subject(name, checkpoint, config, rows, settings.max_steps or 1)


def _place(settings: Settings, report: Report) -> tuple[str, torch.dtype, bool]:
    """(kind of device, compute type, whether it is this machine's)."""
    if settings.device.startswith("cuda") and not torch.cuda.is_available():
        report(Note("there is no CUDA device here: its memory is forecast, its time is not"))
        dtype = torch.bfloat16 if settings.compute_dtype == "auto" else getattr(torch, settings.compute_dtype)
        return "cuda", dtype, False
    device = choose_device(settings.device)
    check_optimizer(settings, device)
    dtype, why = choose_compute_dtype(settings.compute_dtype, device)
    report(Note(why))
    return device.type, dtype, True


def _storage(quantize: str, checkpoint: Checkpoint | None, report: Report) -> str:
    if checkpoint is None:
        return DEFAULT_STORAGE if quantize in ("auto", "keep") else quantize
    storage, why = choose_storage(quantize, checkpoint)
    report(Note(why))
    return storage


def _machine(
    device: str,
    dtype: torch.dtype,
    model: Inventory,
    checkpoint: Checkpoint | None,
    report: Report,
    *,
    runs_here: bool,
    generates: bool = False,
) -> Machine:
    if not runs_here:
        return Machine(1.0, 1.0, 1.0, CUDA_CONTEXT_BYTES, 0, 1, is_cpu=False)
    return machine_now(torch.device(device), dtype, model, checkpoint, generates=generates, report=report)


def _quantising(subject: _Subject, settings: Settings, budget: int) -> tuple[Conversion | None, int]:
    """(what GPTQ needs before the training, where the run begins with it; the least that it can do with)."""
    checkpoint = subject.checkpoint
    if checkpoint is None or not needs_gptq(settings.quantize, checkpoint):
        return None, 0
    tokens, trust = most_tokens_on_the_way(), settings.trust_remote_code
    found, least = (
        plan_quantising(checkpoint, "gptq", GPTQ_ON_THE_WAY, tokens, size, trust_remote_code=trust)
        for size in (budget, 0)
    )
    return found, least.peak_bytes


def _budget(settings: Settings, device: str, *, runs_here: bool) -> tuple[int, str]:
    """(bytes, where from); 0 where nothing is known about the device."""
    if settings.memory is None and not runs_here:
        return 0, ""
    return budget_of(settings, torch.device(device))


def _run_s(step_s: float | None, steps: int, settings: Settings) -> float | None:
    if step_s is None:
        return None
    return min(step_s * steps, parse_duration(settings.max_time) if settings.max_time else math.inf)


def _figures(found: Forecast, work: Work, *, runs_here: bool) -> dict[str, Any]:
    return {
        "peak_bytes": found.peak_bytes,
        "anonymous_bytes": found.anonymous_bytes,
        "terms": found.terms,
        "step_s": found.step_s if runs_here else None,
        "tokens_per_s": work.mean_tokens / found.step_s if runs_here else None,
        "read_bytes_per_step": found.read_bytes,
    }
