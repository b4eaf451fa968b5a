"""Everything before the first step of a run: data, gate, plan, base, adapters. Cheap checks come first."""

import hashlib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from datetime import date
from itertools import islice
from pathlib import Path
from typing import Any

import torch

from smidgen.data.batch import Batching
from smidgen.data.gate import check_examples
from smidgen.data.mixture import Mixture
from smidgen.data.records import Row
from smidgen.data.render import Renderer
from smidgen.data.report import build_report
from smidgen.data.tokens import Examples
from smidgen.errors import DataError, RunError
from smidgen.events import Note, Report, Warned, silent
from smidgen.export.adapter import StoredAdapter, read_adapter
from smidgen.export.quantise import quantise_model
from smidgen.lora.attach import attach_lora
from smidgen.lora.targets import select_modules, select_targets
from smidgen.model.build import Base
from smidgen.model.calibration import GPTQ_ON_THE_WAY, calibration_on_the_way
from smidgen.model.device import choose_device, current_rss_bytes, free_memory_bytes
from smidgen.model.fused import is_fused, learns_norms
from smidgen.model.inventory import inventory_of
from smidgen.model.load import Decided, Source, decide, load_base, needs_gptq, open_source
from smidgen.model.recompute import set_recompute
from smidgen.model.tokenizer import ids_of_tokens, pieces_of_tokens
from smidgen.model.trained import (
    Adapters,
    attach_modules,
    attach_tokens,
    embedding_name,
    initialise_tokens,
    is_tied,
    trainable_names,
)
from smidgen.planning.conversion import LEFT_BY_GPTQ
from smidgen.planning.planner import Forecast, Machine
from smidgen.planning.work import Rows
from smidgen.quant.linear import FrozenEmbedding
from smidgen.train.config import Settings
from smidgen.train.loop import Schedule
from smidgen.train.memory import (
    budget_of,
    give_memory_back,
    machine_now,
    plan_run,
    process_now,
    settings_for,
    with_trained_norms,
    work_of,
)
from smidgen.train.optimizers import check_optimizer
from smidgen.train.rows import read_rows
from smidgen.train.run import adapter_folder, read_record
from smidgen.train.sharing import choose_batching, estimate_sharing, planned_rows
from smidgen.units import format_bytes, format_count, parse_bytes

__all__ = ["Prepared", "gptq_folder", "initial_adapter", "prepare"]

_CALIBRATION_TOKENS = 1 << 16  # more than GPTQ takes


@dataclass(frozen=True)
class Prepared:
    """Everything before the first step. settings: with the sizes that the plan chose. compared: rows to be
    answered before and after; asked: at each evaluation.
    """

    settings: Settings
    plan: Forecast
    source: Source
    renderer: Renderer
    base: Base
    adapters: Adapters
    batching: Batching
    train: Examples
    mixture: Mixture | None
    held_out: Examples
    compared: list[Row]
    asked: list[Row]
    data_sha256: str
    system: str
    statistics: dict[str, Any]


def initial_adapter(settings: Settings, source: Source, report: Report) -> StoredAdapter | None:
    """The adapter to start from. Raises RunError where there is none, or where it is known to be for another base."""
    if settings.init_adapter is None:
        return None
    folder = adapter_folder(Path(settings.init_adapter), report)
    if folder is None:
        raise RunError(f"init_adapter: {settings.init_adapter} is no adapter", expected="a PEFT folder or a run")
    record = read_record(folder)
    if record and record.base_fingerprint != source.checkpoint.fingerprint():
        raise RunError(
            f"init_adapter: {source.checkpoint.path} is not the base that {folder} was trained on (its weights differ)",
            cure=f"give {record.model}, or start without it",
        )
    return read_adapter(folder)


def prepare(
    source: Source,
    data: str | Sequence[str],
    settings: Settings,
    report: Report,
    out: Path,
    initial: StoredAdapter | None,
    today: date | None,
) -> Prepared:
    """Cheap checks first: data and gate come before the weights are read. initial: where the adapters start. today: as
    for read_rows.
    """
    give_memory_back()
    rows = read_rows(source, data, settings, report, today=today)
    examples, held_out, layout = rows.train, rows.held_out, rows.data.layout
    vocab_size = max(source.vocab_size, *(index + 1 for index in ids_of_tokens(source.tokenizer, settings.tokens)), 0)
    for part in (examples, held_out) if held_out else (examples,):
        ends, how = rows.renderer.end_ids, settings.too_long
        check_examples(part, source.tokenizer, vocab_size, ends, layout=layout, too_long=how)
    if held_out:
        report(Note(f"data: {len(examples)} rows to train on, {len(held_out)} held out"))
    elif settings.early_stopping or settings.keep_best or settings.eval_answers:
        raise DataError(
            "no held-out rows",
            expected="some for early_stopping and keep_best to go by, and for eval_answers",
            cure="give a folder with train and validation files, or more rows",
        )
    else:
        report(Warned("no held-out rows: the loss before and after training cannot be shown"))

    asked = _with_answers(rows.data.validation, settings.eval_answers)
    compared = _with_answers(rows.data.test or rows.data.validation, settings.compare)
    for name, count, found in (("eval_answers", settings.eval_answers, asked), ("compare", settings.compare, compared)):
        if count and held_out and not found:
            raise DataError(
                "the held-out rows are plain text", expected=f"rows with answers for {name}", cure="leave it out"
            )
    check_optimizer(settings, choose_device(settings.device))
    statistics = build_report(rows.rendered[:1], source.tokenizer, layout=layout, mix=rows.mix)
    decided = decide(source, settings.quantize, settings.compute_dtype, settings.device, report)
    planned = planned_rows(examples, held_out, Schedule(examples.lengths, settings, rows.mixture))
    if needs_gptq(settings.quantize, source.checkpoint):
        _plan(source, decided, settings, planned, silent, before_gptq=True)  # or minutes would be lost
        source = _quantised(source, examples, gptq_folder(out), settings, decided.device, report)
    plan = _plan(source, decided, settings, planned, report)
    base = load_base(
        source,
        decided=decided,
        streamed=plan.choice.streamed,
        trust_remote_code=settings.trust_remote_code,
        report=report,
    )
    adapters = _adapt(base, source, settings, initial, report)
    set_recompute(base, plan.choice.recompute, settings.activation_dtype)
    settings = settings_for(settings, plan)
    base.tile_tokens, base.loss_chunk = settings.tile_tokens, settings.loss_chunk
    schedule = Schedule(examples.lengths, settings, rows.mixture)
    batching = choose_batching(base, examples, schedule, plan.tokens, report)
    if batching.share_prefix:
        statistics = replace(statistics, sharing=estimate_sharing(examples, schedule))
    return Prepared(
        settings=settings,
        plan=plan,
        source=source,
        renderer=rows.renderer,
        base=base,
        adapters=adapters,
        batching=batching,
        train=examples,
        mixture=rows.mixture,
        held_out=held_out,
        compared=compared,
        asked=asked,
        data_sha256=hashlib.sha256(examples.digest() + held_out.digest()).hexdigest(),
        system=_shared_system(rows.data.train),
        statistics=statistics.as_dict() | {"held_out_rows": len(held_out)},
    )


def _adapt(base: Base, source: Source, settings: Settings, initial: StoredAdapter | None, report: Report) -> Adapters:
    """Put everything that learns into the model, as it starts."""
    if initial:
        initial.check_base(base, is_start=True)
    names, notes = select_targets(settings.targets, base.linears, base.head_name)
    for note in notes:
        report(Note(note))
    loras = attach_lora(
        base.model,
        names,
        rank=settings.rank,
        alpha=settings.alpha,
        dropout=settings.dropout,
        seed=settings.seed,
        use_rslora=settings.use_rslora,
        use_dora=settings.use_dora,
        rank_pattern=settings.rank_pattern,
        alpha_pattern=settings.alpha_pattern,
    )
    if settings.rank_pattern or settings.alpha_pattern:
        report(Note("vLLM ignores rank_pattern and alpha_pattern of an adapter: give it the merged model"))
    adapters: Adapters = {**loras, **_attach_others(base, source, settings, report)}
    if initial:
        initial.copy_into(adapters)
        report(Note(f"the adapters start from {initial.folder}"))
    trainable = sum(parameter.numel() for parameter in base.model.parameters() if parameter.requires_grad)
    report(Note(f"adapters on {len(names)} layers: {format_count(trainable)} trainable parameters"))
    if is_fused(base.backbone) and (settings.dropout or learns_norms(base.backbone)):
        what = "dropout is" if settings.dropout else "trained norms are"
        report(Note(f"{what} computed by transformers' layers, which are slower than smidgen's own"))
    return adapters


def _attach_others(base: Base, source: Source, settings: Settings, report: Report) -> Adapters:
    """What learns beside LoRA: whole modules, rows of new tokens."""
    modules = attach_modules(base, select_modules(settings.whole_modules, trainable_names(base.model)))
    for name, part in modules.items():
        count = format_count(sum(parameter.numel() for parameter in part.trainable.values()))
        form = ", made dense from its packed form" if isinstance(part.base, FrozenEmbedding) else ""
        report(Note(f"modules_to_save: {name} is trained whole, {count} numbers in float32{form}"))
    rows: Adapters = {}
    if settings.tokens:
        ids = ids_of_tokens(source.tokenizer, settings.tokens)
        rows = attach_tokens(base, dict.fromkeys((embedding_name(base), base.head_name), ids))
        initialise_tokens(rows, pieces_of_tokens(source.tokenizer, settings.tokens))
        report(Note(f"new_tokens: {len(ids)} rows of {', '.join(rows)} start as the mean of their pieces' rows"))
    if (rows or embedding_name(base) in modules) and is_tied(base):
        report(Note(f"{embedding_name(base)} and {base.head_name} are one weight, and stay one"))
    return {**modules, **rows}


def gptq_folder(out: Path) -> Path:
    return out.with_name(f"{out.name}-gptq")


def _quantised(
    source: Source, examples: Examples, folder: Path, settings: Settings, device: torch.device, report: Report
) -> Source:
    """The base quantised by GPTQ on the training rows into a folder beside the run, which is the run's base from then
    on: it takes minutes, and would be another one on other rows. device: what trains on it, whose memory
    settings.memory is.
    """
    ids = list(islice((token for example in examples for token in example.input_ids), _CALIBRATION_TOKENS))
    text = calibration_on_the_way(ids, "the training rows", source.tokenizer, source.max_positions, report)
    if device.type != "cpu":
        report(Note(f"GPTQ runs on the CPU; {device} trains on what it makes"))
    quantise_model(
        source,
        folder,
        "gptq",
        settings=GPTQ_ON_THE_WAY,
        calibration=text,
        trust_remote_code=settings.trust_remote_code,
        memory=parse_bytes(settings.memory) if settings.memory and device.type == "cpu" else None,
        report=report,
    )
    report(Note(f"the quantised base lies in {folder}: the run needs it from now on"))
    return open_source(str(folder), report)


def _shared_system(rows: Iterable[Row]) -> str:
    """The system message that every row begins with, "" if there is no such one."""
    first: set[str] = set()
    for row in rows:
        first.add(row.messages[0]["content"] if row.messages and row.messages[0]["role"] == "system" else "")
        if len(first) > 1:
            return ""
    return first.pop()


def _with_answers(rows: Iterable[Row], count: int) -> list[Row]:
    """The first rows that are conversations, at most `count`."""
    return list(islice((row for row in rows if row.messages), count)) if count else []


def _plan(
    source: Source,
    decided: Decided,
    settings: Settings,
    rows: Rows,
    report: Report,
    *,
    before_gptq: bool = False,
) -> Forecast:
    """What the run will need, before weights are read. Raises SettingsError where the memory does not suffice.

    before_gptq: this process will have quantised the base before it trains, which leaves it larger.
    """
    checkpoint, item = source.checkpoint, decided.dtype.itemsize
    model = inventory_of(
        checkpoint,
        checkpoint.config,
        decided.storage,
        name=checkpoint.path.name,
        itemsize=item,
        fuses=decided.device.type == "cpu" and not settings.dropout,
        trust_remote_code=settings.trust_remote_code,
    )
    model = with_trained_norms(model, settings)
    if model.expert_share:
        share = f"{model.expert_share:.0%} of the decoder's weights"
        report(Note(f"the mixture's experts, {share}, get no adapter: they stay as they are"))
    work = work_of(model, settings, rows, item)
    left = LEFT_BY_GPTQ if before_gptq and decided.device.type == "cpu" else 0

    def with_left(machine: Machine) -> Machine:
        return replace(machine, framework_bytes=machine.framework_bytes + left)

    plan = plan_run(
        model,
        work,
        with_left(process_now(decided.device)),
        settings,
        budget_of(settings, decided.device),
        can_stream=decided.device.type == "cpu",
        probe=lambda: with_left(machine_now(decided.device, decided.dtype, model, checkpoint, report=report)),
        report=report,
    )
    free = current_rss_bytes() + free_memory_bytes()
    if settings.memory is not None and decided.device.type == "cpu" and free < plan.peak_bytes:
        report(
            Warned(
                f"the run needs {format_bytes(plan.peak_bytes)}, but other processes leave it {format_bytes(free)}:"
                " it may be swapped out, which is very slow, or be killed"
            )
        )
    return plan
