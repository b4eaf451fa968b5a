"""A whole run: what prepare.py makes ready, training, evaluation before and after, files."""

import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass, replace
from datetime import date
from pathlib import Path
from typing import Any

import torch

from smidgen.data.records import Row, as_specs
from smidgen.data.report import show_row
from smidgen.errors import RunError
from smidgen.events import Answer, Answers, Evaluated, Note, Report, Warned, silent
from smidgen.export.adapter import is_adapter, read_adapter
from smidgen.export.files import check_vacant, check_writable, read_object
from smidgen.kernels.library import describe_library
from smidgen.measures.answers import ANSWER_MEASURES
from smidgen.model.device import choose_device, device_name, peak_rss_bytes, processor_name
from smidgen.model.load import needs_gptq, open_source
from smidgen.model.tokenizer import add_tokens
from smidgen.model.trained import Adapters
from smidgen.train.best import best_step, evaluations, since_best
from smidgen.train.config import QUANTIZE, Settings
from smidgen.train.evaluate import answer_rows, held_out_loss
from smidgen.train.lock import check_unlocked, locked
from smidgen.train.logs import check_logs, open_logs
from smidgen.train.loop import Schedule, train
from smidgen.train.memory import COMPUTED_AT_ONCE
from smidgen.train.optimizers import make_optimizer
from smidgen.train.prepare import Prepared, gptq_folder, initial_adapter, prepare
from smidgen.train.rows import check_mix
from smidgen.train.run import SUMMARY, Record, RunFolder, read_record
from smidgen.train.state import Cursor, is_whole, latest_checkpoint, load_state

__all__ = ["Run", "finished", "resume", "run_finetune"]


@dataclass(frozen=True)
class Run:
    """A finished run: its folder and the content of its summary.json."""

    path: Path
    summary: dict[str, Any]


def run_finetune(model: str, data: str | Sequence[str], out: Path, settings: Settings, report: Report = silent) -> Run:
    """Train from the start into a new folder. Raises SmidgenError before anything is written if it cannot work."""
    started = time.perf_counter()
    check_unlocked(out)
    resumable = f", or go on: smidgen finetune --resume {out}" if read_record(out) else ""
    check_vacant(out, "choose another folder" + resumable)
    check_writable(out)
    check_logs(settings.logs)
    check_mix(data, settings)
    source = open_source(model, report)
    add_tokens(source.tokenizer, settings.tokens, source.vocab_size)
    if needs_gptq(settings.quantize, source.checkpoint):
        check_vacant(gptq_folder(out), f"train on it: smidgen finetune {gptq_folder(out)}, or remove it first")
    if settings.init_adapter is not None:
        settings = replace(settings, init_adapter=_absolute(settings.init_adapter))
    today = date.today()
    prepared = prepare(source, data, settings, report, out, initial_adapter(settings, source, report), today)
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
        processor=processor_name(),
        device=device_name(prepared.base.device),
        started=str(today),
    )
    places = [_absolute(spec) for spec in as_specs(data)]
    folder = RunFolder.create(
        out, prepared.settings, record.model, places, record, prepared.statistics, prepared.source.tokenizer
    )
    with locked(out, report):
        return _train(prepared, folder, None, started, report)


def finished(run: Path) -> Run | None:
    """The run if nothing of it is left to do; what `max_time` stopped goes on. Raises RunError if it is no run."""
    RunFolder.open(run)
    try:
        summary = read_object(run / SUMMARY, cure="remove it, and the run goes on")
    except FileNotFoundError:
        return None
    return None if summary.get("stopped") == "max_time" else Run(run, summary)


def resume(run: Path, report: Report = silent) -> Run:
    """Go on with a run that is not finished from its newest whole checkpoint.

    Raises RunError where base or data have changed.
    """
    started = time.perf_counter()
    opened = RunFolder.open(run)
    with locked(run, report):
        return _resume(run, *opened, started, report)


def _resume(
    run: Path,
    folder: RunFolder,
    settings: Settings,
    model: str,
    data: str | list[str],
    started: float,
    report: Report,
) -> Run:
    check_logs(settings.logs)
    checkpoint = latest_checkpoint(run)
    step = checkpoint.name.removeprefix("step-") if checkpoint else None
    if checkpoint is None and is_adapter(run):
        cure = f"start from the result: smidgen finetune MODEL DATA --init-adapter {run}"
        raise RunError(f"{run} has no whole checkpoint to go on from", cure=cure)
    report(Note(f"resuming {run} from step {step}" if step else f"{run} has no checkpoint yet: starting anew"))
    spec = folder.record.find_base(run) if model == folder.record.model else model
    source = open_source(spec, report, tokenizer_from=run)
    if source.checkpoint.fingerprint() != folder.record.base_fingerprint:
        raise RunError(f"{source.checkpoint.path} is not the base that {run} was started with", cure="put it back")
    if differences := _differences(folder.record, settings):
        then, now = (", ".join(side) for side in zip(*differences, strict=True))
        report(Warned(f"started with {then}; now {now}: rounding will differ from the uninterrupted run"))
    # what `auto` chose at the start is kept, whatever it would choose now
    storage = folder.record.storage if folder.record.storage in QUANTIZE else "keep"
    settings = replace(settings, quantize=storage, compute_dtype=folder.record.compute_dtype)
    initial = None if checkpoint else initial_adapter(settings, source, report)
    prepared = prepare(source, data, settings, report, run, initial, folder.record.day)
    if prepared.data_sha256 != folder.record.data_sha256:
        names = ", ".join(as_specs(data))
        raise RunError(f"{names} is not the data that {run} was started with", cure="put it back, or start a new run")
    sizes = [(name, getattr(settings, name), getattr(prepared.settings, name)) for name in COMPUTED_AT_ONCE]
    if changed := [f"{name} {then}, now {now}" for name, then, now in sizes if then != now]:
        why = "by the memory there is: rounding and dropout will differ"
        report(Warned(f"started with {'; '.join(changed)} {why}"))
    return _train(prepared, folder, checkpoint, started, report)


def _differences(record: Record, settings: Settings) -> list[tuple[str, str]]:
    """(then, now) of what a run's rounding hangs on, where it has changed. Older records do not know all of it."""
    versions = Record.versions_now()
    pairs = [
        (f"{record.threads} threads", f"{torch.get_num_threads()} threads"),
        (record.kernels and f"kernels {record.kernels}", f"kernels {describe_library()}"),
        (record.processor, processor_name()),
        (record.device, device_name(choose_device(settings.device))),
        *((f"{name} {then}", f"{name} {versions.get(name)}") for name, then in record.versions.items()),
    ]
    return [(then, now) for then, now in pairs if then and then != now]


def _absolute(path: str) -> str:
    return str(Path(path).resolve()) if Path(path).exists() else path


def _train(prepared: Prepared, folder: RunFolder, checkpoint: Path | None, started: float, report: Report) -> Run:
    settings, stream = prepared.settings, prepared.base.stream
    optimizer = make_optimizer(prepared.adapters, settings)
    with torch.random.fork_rng(devices=[]), ExitStack() as closing:
        if stream is not None:
            closing.callback(stream.close)
        torch.manual_seed(settings.seed)
        cursor = _restore(checkpoint, prepared.adapters, optimizer) if checkpoint else Cursor()
        folder.withdraw_result()
        folder.rewind_log(cursor.step if checkpoint else -1)
        also = closing.enter_context(open_logs(settings.logs, folder.path, asdict(settings), cursor.step, report))
        report(show_row(prepared.train[0], prepared.source.tokenizer))
        at_work = _Training(prepared, folder, optimizer, also, started - cursor.wall_s, report)
        if not checkpoint:
            at_work.measure_before(cursor)
        outcome = train(
            prepared.base,
            optimizer,
            prepared.train,
            prepared.mixture,
            settings,
            prepared.batching,
            cursor,
            save=at_work.save,
            evaluate=at_work.evaluate,
            record=at_work.log,
            report=report,
        )
        at_work.save(cursor)
        if outcome.stopped == "interrupted":
            raise KeyboardInterrupt
        return Run(folder.path, at_work.finish(cursor, outcome.stopped))


@dataclass(frozen=True)
class _Training:
    """What is done beside the steps. also: writes figures elsewhere too. started: when the run was, as
    time.perf_counter() would have said it, without the time between a run's processes.
    """

    prepared: Prepared
    folder: RunFolder
    optimizer: torch.optim.Optimizer
    also: Callable[[Mapping[str, Any]], None]
    started: float
    report: Report

    @property
    def _wall_s(self) -> float:
        return time.perf_counter() - self.started

    def log(self, line: dict[str, Any]) -> None:
        self.folder.log(line)
        self.also(line)

    def save(self, at: Cursor) -> None:
        """A checkpoint, if there is none of this step."""
        prepared, settings = self.prepared, self.prepared.settings
        best = best_step(evaluations(self.folder.logged(), settings.eval_interval)) if settings.keep_best else None
        at.wall_s = self._wall_s
        tokenizer, keep = prepared.source.tokenizer, settings.keep_checkpoints
        self.folder.save_checkpoint(prepared.base, prepared.adapters, self.optimizer, at, tokenizer, keep, best)

    def evaluate(self, at: Cursor) -> bool:
        """Whether early stopping has seen enough. What was measured before an interruption is not again."""
        prepared, settings = self.prepared, self.prepared.settings
        if not prepared.held_out:
            return False
        if "held_out_loss" not in self.folder.logged_at(at.step):
            share = prepared.batching.share_prefix
            result = held_out_loss(
                prepared.base, prepared.held_out, settings.micro_batch, self.report, share_prefix=share
            )
            measured = {"held_out_loss": result.loss, "perplexity": result.perplexity}
            asked = prepared.asked
            answers = self._answer(f"at step {at.step}", asked).measures if asked else {}
            measured |= {f"held_out_{name}": value for name, value in answers.items()}
            self.log({"step": at.step, **measured, "held_out_tokens": result.tokens})
            self.report(Evaluated(at.step, result.loss, result.rows, result.tokens, answers))
        found = evaluations(self.folder.logged(), settings.eval_interval)
        if settings.keep_best and best_step(found) == at.step:
            self.save(at)
        return 0 < settings.early_stopping <= since_best(found)

    def measure_before(self, at: Cursor) -> None:
        """Loss and answers of the adapters as they start."""
        self.evaluate(at)
        if before := self._compare("before", at.step):
            self.folder.save_answers([_answered(row) | {"before": row.answer, "after": None} for row in before.rows])

    def finish(self, cursor: Cursor, stopped: str) -> dict[str, Any]:
        """Measure and save the result; returns its summary."""
        prepared, folder, settings = self.prepared, self.folder, self.prepared.settings
        if stopped:
            reasons = {
                "max_time": f"max_time; smidgen finetune --resume {folder.path} goes on",
                "early_stopping": f"early_stopping: {settings.early_stopping} evaluations without a lower loss",
            }
            total = Schedule(prepared.train.lengths, settings, prepared.mixture).total_steps
            self.report(Note(f"stopped after {cursor.step} of {total} steps by {reasons[stopped]}"))
        self.evaluate(cursor)
        result_step = cursor.step
        if settings.keep_best:
            result_step = _restore_best(folder, prepared.adapters, settings, cursor, self.report)
        after = self._compare("after", result_step)
        rows = after.rows if after else ()
        earlier = [line["before"] for line in folder.answers()] or [None] * len(rows)
        pairs = zip(rows, earlier, strict=True)
        answers = [_answered(row) | {"before": before, "after": row.answer} for row, before in pairs]
        summary = _summary(prepared, folder, cursor, result_step)
        summary |= {"stopped": stopped or None, "wall_s": round(self._wall_s, 1)}
        folder.save_result(prepared.base, prepared.adapters, summary, answers, self.report)
        return summary

    def _answer(self, when: str, rows: Sequence[Row]) -> Answers:
        room = self.prepared.plan.terms["kept activations"]  # which are not there between steps
        return answer_rows(self.prepared.base, self.prepared.renderer, rows, when=when, room=room, report=self.report)

    def _compare(self, when: str, step: int) -> Answers | None:
        """Answers to the rows to be compared; None where there are none."""
        if not self.prepared.compared:
            return None
        answers = self._answer(when, self.prepared.compared)
        if not answers.rows:
            return None
        self.log({"step": step, **answers.measures})
        self.report(answers)
        return answers


def _summary(prepared: Prepared, folder: RunFolder, cursor: Cursor, result_step: int) -> dict[str, Any]:
    """What summary.json says, of the adapter of `result_step`; the figures before and after come from the log, where a
    resumed run finds them too.
    """
    before, after = folder.logged_at(0), folder.logged_at(result_step)
    steps = [line for line in folder.logged() if "loss" in line]
    choice = prepared.plan.choice
    summary: dict[str, Any] = {
        "run": str(folder.path),
        "base_format": prepared.base.storage,
        "loss_before": before.get("held_out_loss"),
        "loss_after": after.get("held_out_loss"),
        "perplexity_before": before.get("perplexity"),
        "perplexity_after": after.get("perplexity"),
        "steps": cursor.step,
        "tokens": cursor.tokens,
        "tokens_per_s": round(cursor.tokens / max(cursor.train_s, 1e-9), 1),
        "peak_rss_bytes": peak_rss_bytes(),
        "forecast_peak_bytes": prepared.plan.peak_bytes,
        "forecast_terms": prepared.plan.terms,
        "recompute": choice.recompute_name,
        "streamed_layers": len(choice.streamed),
        "read_bytes": sum(line.get("read_bytes", 0) for line in steps),
        "wait_s": round(sum(line.get("wait_s", 0) for line in steps), 3),
        "trainable_parameters": sum(
            p.numel() for layer in prepared.adapters.values() for p in layer.trainable.values()
        ),
    }
    if swapped := max((line.get("swapped_bytes", 0) for line in steps), default=0):
        summary["swapped_bytes"] = swapped
    if result_step != cursor.step:
        summary["result_step"] = result_step
    for figure in ANSWER_MEASURES:
        if figure in after:
            summary |= {f"{figure}_before": before.get(figure), f"{figure}_after": after[figure]}
    return summary


def _restore(checkpoint: Path, adapters: Adapters, optimizer: torch.optim.Optimizer) -> Cursor:
    read_adapter(checkpoint).copy_into(adapters)
    return load_state(checkpoint, adapters, optimizer)


def _restore_best(folder: RunFolder, adapters: Adapters, settings: Settings, cursor: Cursor, report: Report) -> int:
    """Put the adapter with the lowest held-out loss in the place of the last one; returns its step."""
    best = best_step(evaluations(folder.logged(), settings.eval_interval, cursor.step)) or cursor.step
    checkpoint = folder.path / "checkpoints" / f"step-{best}"
    if best == cursor.step:
        report(Note(f"the last step, {best}, has the lowest held-out loss"))
    elif is_whole(checkpoint):
        read_adapter(checkpoint).copy_into(adapters)
        report(Note(f"the result is the adapter of step {best}, which has the lowest held-out loss"))
    else:
        report(Warned(f"{checkpoint} is damaged: the result is the adapter of the last step instead"))
        best = cursor.step
    return best


def _answered(answer: Answer) -> dict[str, Any]:
    return {"prompt": answer.prompt, "expected": answer.expected}
