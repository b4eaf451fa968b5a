"""A whole run: data, gate, base, adapters, training, evaluation before and after, files."""

import hashlib
import json
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from smidgen.data.batch import Batching
from smidgen.data.gate import check_examples
from smidgen.data.records import DataSet, Row, read_data
from smidgen.data.render import IGNORED, Example, Renderer
from smidgen.data.report import show_row
from smidgen.errors import RunError
from smidgen.events import Answers, Evaluated, Note, Report, Warned, silent
from smidgen.export.adapter import read_adapter
from smidgen.export.files import check_vacant
from smidgen.export.quantise import quantise_model
from smidgen.kernels.library import describe_library
from smidgen.lora.attach import attach_lora
from smidgen.lora.linear import LoraLinear
from smidgen.lora.targets import select_targets
from smidgen.model.build import Base
from smidgen.model.calibration import GPTQ_ON_THE_WAY, calibration_on_the_way
from smidgen.model.device import free_memory_bytes, peak_rss_bytes
from smidgen.model.fused import is_fused
from smidgen.model.load import Source, load_base, needs_gptq, open_source
from smidgen.model.recompute import set_recompute
from smidgen.plan.estimate import RECOMPUTE, estimate_activation_bytes
from smidgen.train.config import QUANTIZE, Settings
from smidgen.train.evaluate import answer_rows, held_out_loss
from smidgen.train.loop import Schedule, make_optimizer, train
from smidgen.train.run import Record, RunFolder, read_record
from smidgen.train.sharing import choose_batching
from smidgen.train.state import Cursor, latest_checkpoint, load_state
from smidgen.units import format_bytes, format_count

__all__ = ["Run", "resume", "run_finetune"]


@dataclass(frozen=True)
class Run:
    """A finished run: its folder and the content of its summary.json."""

    path: Path
    summary: dict[str, Any]


@dataclass(frozen=True)
class _Prepared:
    """Everything before the first step."""

    source: Source
    renderer: Renderer
    base: Base
    adapters: dict[str, LoraLinear]
    batching: Batching
    train: list[Example]
    held_out: list[Example]
    compared: list[Row]
    data_sha256: str
    system: str


def run_finetune(model: str, data: str, out: Path, settings: Settings, report: Report = silent) -> Run:
    """Train from the start into a new folder. Raises SmidgenError before anything is written if it cannot work."""
    started = time.perf_counter()
    resumable = f", or go on: smidgen finetune --resume {out}" if read_record(out) else ""
    check_vacant(out, "choose another folder" + resumable)
    source = open_source(model, report)
    if needs_gptq(settings.quantize, source.checkpoint):
        check_vacant(_gptq_folder(out), f"train on it: smidgen finetune {_gptq_folder(out)}, or remove it first")
    prepared = _prepare(source, data, settings, report, out)
    record = Record(
        model=prepared.source.name,
        model_path=str(prepared.source.checkpoint.path),
        checkpoint_format=prepared.source.checkpoint.format,
        base_fingerprint=prepared.source.checkpoint.fingerprint(),
        storage=prepared.base.storage,
        compute_dtype=str(prepared.base.compute_dtype).removeprefix("torch."),
        data_sha256=prepared.data_sha256,
        versions=Record.versions_now(),
        threads=torch.get_num_threads(),
        system=prepared.system,
        kernels=describe_library(),
    )
    folder = RunFolder.create(out, settings, record.model, _absolute(data), record, prepared.source.tokenizer)
    return _train(prepared, folder, settings, None, started, report)


def resume(run: Path, report: Report = silent) -> Run:
    """Go on from the newest whole checkpoint; a finished run is returned as it is, one that `max_time` stopped goes on.

    Raises RunError where base or data have changed.
    """
    started = time.perf_counter()
    folder, settings, model, data = RunFolder.open(run)
    summary = _read_summary(run)
    if summary is not None and not summary.get("stopped"):
        report(Note(f"{run} is finished: nothing to do"))
        return Run(run, summary)
    checkpoint = latest_checkpoint(run)
    step = checkpoint.name.removeprefix("step-") if checkpoint else None
    report(Note(f"resuming {run} from step {step}" if step else f"{run} has no checkpoint yet: starting anew"))
    source = open_source(model, report, tokenizer_from=run)
    if source.checkpoint.fingerprint() != folder.record.base_fingerprint:
        raise RunError(f"{source.checkpoint.path} is not the base that {run} was started with", cure="put it back")
    if folder.record.threads != torch.get_num_threads():
        now, then = torch.get_num_threads(), folder.record.threads
        report(Warned(f"started with {then} threads, now {now}: rounding will differ from the uninterrupted run"))
    if folder.record.kernels not in ("", describe_library()):
        now, then = describe_library(), folder.record.kernels
        report(Warned(f"started with kernels {then}, now {now}: rounding will differ from the uninterrupted run"))
    # what `auto` chose at the start is kept, whatever it would choose now
    storage = folder.record.storage if folder.record.storage in QUANTIZE else "keep"
    settings = replace(settings, quantize=storage, compute_dtype=folder.record.compute_dtype)
    prepared = _prepare(source, data, settings, report, run)
    if prepared.data_sha256 != folder.record.data_sha256:
        raise RunError(f"{data} is not the data that {run} was started with", cure="put it back, or start a new run")
    return _train(prepared, folder, settings, checkpoint, started, report)


def _read_summary(run: Path) -> dict[str, Any] | None:
    file = run / "summary.json"
    return json.loads(file.read_text(encoding="utf-8")) if file.is_file() else None


def _absolute(data: str) -> str:
    return str(Path(data).resolve()) if Path(data).exists() else data


def _prepare(source: Source, data: str, settings: Settings, report: Report, out: Path) -> _Prepared:
    """Cheap checks first: data and gate come before the weights are read."""
    rows = read_data(data, report=report)
    seq_len = min(settings.seq_len, source.max_positions)
    if seq_len < settings.seq_len:
        report(Note(f"seq_len {seq_len}: the model has no more positions"))
    renderer = Renderer(source.tokenizer, train_on_prompt=settings.train_on_prompt, seq_len=seq_len, report=report)
    examples = _labelled(renderer.render_all(rows.train), report)
    held_out = _labelled(renderer.render_all(rows.validation), silent) if rows.validation else []
    check_examples([*examples, *held_out], source.tokenizer, source.vocab_size, renderer.end_ids, layout=rows.layout)
    if held_out:
        report(Note(f"data: {len(examples)} rows to train on, {len(held_out)} held out"))
    else:
        report(Warned("no held-out rows: the loss before and after training cannot be shown"))

    if needs_gptq(settings.quantize, source.checkpoint):
        source = _quantised(source, examples, _gptq_folder(out), settings, report)
    base = load_base(
        source,
        quantize=settings.quantize,
        compute_dtype=settings.compute_dtype,
        device=settings.device,
        trust_remote_code=settings.trust_remote_code,
        report=report,
    )
    names, notes = select_targets(settings.targets, base.linears, base.head_name)
    for note in notes:
        report(Note(note))
    adapters = attach_lora(
        base.model, names, rank=settings.rank, alpha=settings.alpha, dropout=settings.dropout, seed=settings.seed
    )
    trainable = sum(parameter.numel() for parameter in base.model.parameters() if parameter.requires_grad)
    report(Note(f"adapters on {len(names)} layers: {format_count(trainable)} trainable parameters"))
    longest = max(len(example.input_ids) for example in examples)
    _choose_recompute(base, settings, max(longest, settings.pack or settings.micro_batch * longest), report)
    return _Prepared(
        source,
        renderer,
        base,
        adapters,
        choose_batching(base, examples, settings, report),
        examples,
        held_out,
        _compared(rows, settings.compare),
        _digest([*examples, *held_out]),
        _shared_system(rows.train),
    )


def _gptq_folder(out: Path) -> Path:
    return out.with_name(f"{out.name}-gptq")


def _quantised(source: Source, examples: Sequence[Example], folder: Path, settings: Settings, report: Report) -> Source:
    """The base quantised by GPTQ on the training rows into a folder beside the run, which is the run's base from then
    on: it takes minutes, and would be another one on other rows.
    """
    ids = [token for example in examples for token in example.input_ids]
    text = calibration_on_the_way(ids, "the training rows", source.tokenizer, source.max_positions, report)
    if settings.device not in ("auto", "cpu"):
        report(Note(f"GPTQ runs on the CPU; {settings.device} trains on what it makes"))
    quantise_model(
        source,
        folder,
        "gptq",
        settings=GPTQ_ON_THE_WAY,
        calibration=text,
        trust_remote_code=settings.trust_remote_code,
        report=report,
    )
    report(Note(f"the quantised base lies in {folder}: the run needs it from now on"))
    return open_source(str(folder), report)


def _labelled(examples: Sequence[Example], report: Report) -> list[Example]:
    """The rows that have a label; without one a row costs time and teaches nothing. All of them if none has."""
    kept = [example for example in examples if any(label != IGNORED for label in example.labels)]
    if kept and len(kept) < len(examples):
        first = next(e.where for e in examples if all(label == IGNORED for label in e.labels))
        report(
            Warned(f"{len(examples) - len(kept)} rows have no trained token within seq_len and are left out ({first})")
        )
    return kept or list(examples)


def _shared_system(rows: Sequence[Row]) -> str:
    """The system message that every row begins with, "" if there is no such one."""
    first = {row.messages[0]["content"] if row.messages and row.messages[0]["role"] == "system" else "" for row in rows}
    return first.pop() if len(first) == 1 else ""


def _compared(rows: DataSet, count: int) -> list[Row]:
    return [row for row in rows.test or rows.validation if row.messages][:count]


def _digest(examples: Sequence[Example]) -> str:
    digest = hashlib.sha256()
    for example in examples:
        digest.update(repr((example.input_ids, example.labels)).encode())
    return digest.hexdigest()


def _choose_recompute(base: Base, settings: Settings, most_tokens: int, report: Report) -> None:
    """Set the layers' choice; 'auto' takes the first of none, cheap, full that fits in half of the free memory.

    most_tokens: computed at once.
    """
    choice = settings.recompute
    fused = is_fused(base.backbone) and not settings.dropout
    if is_fused(base.backbone) and settings.dropout:
        report(Note("dropout is computed by transformers' layers, which are slower than smidgen's own"))
    if choice == "auto" and base.device.type != "cpu":
        choice = "full"
        report(Note(f"recompute full: memory of {base.device} is not measured yet; --recompute none is faster"))
    elif choice == "auto":
        config: Any = base.model.config.get_text_config()
        free = free_memory_bytes()
        for choice in RECOMPUTE:
            needed = estimate_activation_bytes(
                most_tokens,
                hidden_size=config.hidden_size,
                intermediate_size=getattr(config, "intermediate_size", None) or 4 * config.hidden_size,
                num_layers=config.num_hidden_layers,
                itemsize=base.compute_dtype.itemsize,
                recompute=choice if fused or choice == "full" else "modules",
            )
            if needed <= free / 2:
                break
        fits = "within" if needed <= free / 2 else "more than"
        about, there = format_bytes(needed), format_bytes(free)
        report(Note(f"recompute {choice}: activations need about {about}, {fits} half of the {there} free"))
    set_recompute(base, choice)


def _train(
    prepared: _Prepared, folder: RunFolder, settings: Settings, checkpoint: Path | None, started: float, report: Report
) -> Run:
    base, adapters = prepared.base, prepared.adapters
    optimizer = make_optimizer(adapters, settings)
    tokenizer = prepared.source.tokenizer
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(settings.seed)
        cursor = _restore(checkpoint, adapters, optimizer) if checkpoint else Cursor()
        folder.rewind_log(cursor.step if checkpoint else -1)
        report(show_row(prepared.train[0], tokenizer))

        def evaluate(when: Cursor) -> None:
            if not prepared.held_out:
                return
            result = held_out_loss(base, prepared.held_out, settings.micro_batch * 2, report)
            folder.log({"step": when.step, "held_out_loss": result.loss, "held_out_tokens": result.tokens})
            report(Evaluated(when.step, result.loss, result.rows, result.tokens))

        before_answers: Answers | None = None
        if not checkpoint:
            evaluate(cursor)
            before_answers = _answer(prepared, "before", folder, cursor, report)
        outcome = train(
            base,
            optimizer,
            prepared.train,
            settings,
            prepared.batching,
            cursor,
            save=lambda at: _save(folder, prepared, optimizer, at, settings),
            evaluate=evaluate,
            record=folder.log,
            report=report,
        )
        _save(folder, prepared, optimizer, cursor, settings)
        if outcome.stopped == "interrupted":
            raise KeyboardInterrupt
        if outcome.stopped:
            total = Schedule([len(example.input_ids) for example in prepared.train], settings).total_steps
            done = f"stopped by {outcome.stopped} after {cursor.step} of {total} steps"
            report(Note(f"{done}; smidgen finetune --resume {folder.path} goes on"))
        evaluate(cursor)
        after_answers = _answer(prepared, "after", folder, cursor, report)
    wall_s = round(time.perf_counter() - started, 1)
    summary = _summary(prepared, folder, cursor) | {"stopped": outcome.stopped or None, "wall_s": wall_s}
    folder.save_result(base, adapters, summary, _side_by_side(before_answers, after_answers), report)
    return Run(folder.path, summary)


def _summary(prepared: _Prepared, folder: RunFolder, cursor: Cursor) -> dict[str, Any]:
    """What summary.json says; the figures before and after come from the log, where a resumed run finds them too."""
    before, after = folder.logged_at(0), folder.logged_at(cursor.step)
    summary: dict[str, Any] = {
        "run": str(folder.path),
        "base_format": prepared.base.storage,
        "loss_before": before.get("held_out_loss"),
        "loss_after": after.get("held_out_loss"),
        "steps": cursor.step,
        "tokens": cursor.tokens,
        "tokens_per_s": round(cursor.tokens / max(cursor.train_s, 1e-9), 1),
        "peak_rss_bytes": peak_rss_bytes(),
        "trainable_parameters": sum(p.numel() for layer in prepared.adapters.values() for p in layer.parameters()),
    }
    for figure in ("exact_match", "valid_json"):
        if figure in after:
            summary |= {f"{figure}_before": before.get(figure), f"{figure}_after": after[figure]}
    return summary


def _restore(checkpoint: Path, adapters: dict[str, LoraLinear], optimizer: torch.optim.Optimizer) -> Cursor:
    _, layers = read_adapter(checkpoint)
    if layers.keys() != adapters.keys():
        raise RunError(f"{checkpoint}: its adapters are on other layers than the settings say")
    with torch.no_grad():
        for name, layer in adapters.items():
            layer.lora_A.copy_(layers[name]["lora_A"])
            layer.lora_B.copy_(layers[name]["lora_B"])
    return load_state(checkpoint, adapters, optimizer)


def _save(
    folder: RunFolder, prepared: _Prepared, optimizer: torch.optim.Optimizer, cursor: Cursor, settings: Settings
) -> None:
    folder.save_checkpoint(
        prepared.base,
        prepared.adapters,
        optimizer,
        cursor,
        prepared.source.tokenizer,
        settings.keep_checkpoints,
    )


def _answer(prepared: _Prepared, when: str, folder: RunFolder, cursor: Cursor, report: Report) -> Answers | None:
    if not prepared.compared:
        return None
    answers = answer_rows(prepared.base, prepared.renderer, prepared.compared, when=when, report=report)
    folder.log({"step": cursor.step, "exact_match": answers.exact_match, "valid_json": answers.valid_json})
    report(answers)
    return answers


def _side_by_side(before: Answers | None, after: Answers | None) -> list[dict[str, Any]]:
    if after is None:
        return []
    earlier = [answer.answer for answer in before.rows] if before else [None] * len(after.rows)
    return [
        {"prompt": now.prompt, "expected": now.expected, "before": then, "after": now.answer}
        for now, then in zip(after.rows, earlier, strict=True)
    ]
