"""Measures a model on files, and beside another model: a run beside the base that it was trained on.

All files are read before a weight is. The two models are loaded one after the other, so that memory holds one.
"""

import gc
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from smidgen.data.files import read_text
from smidgen.data.gate import leave_out_untrained
from smidgen.data.records import as_specs, read_data, warn_of_copies
from smidgen.data.render import Renderer
from smidgen.data.rows import Rows
from smidgen.data.tasks import Question, Task, is_plain_text, read_questions, read_task
from smidgen.data.tokens import tokenise
from smidgen.errors import SettingsError, SmidgenError
from smidgen.evaluation.likelihood import measure_choices, measure_last_words, score_tasks
from smidgen.evaluation.questions import answer_questions, write_answers
from smidgen.events import Note, Report, Warned, silent
from smidgen.export.files import check_new, check_writable
from smidgen.loading import LoadedModel, adapter_folder, load
from smidgen.measures.answers import measure_answers
from smidgen.measures.measure import Measure, compare
from smidgen.train.config import Settings
from smidgen.train.evaluate import PROTOCOLS, answer_rows, held_out_loss, text_perplexity
from smidgen.train.rows import edits_of, renderer_of
from smidgen.train.run import RunFolder, open_run_of

__all__ = ["Evaluation", "evaluate"]

# By which figure a file of each kind is said to have become worse: one, so that chance has one chance.
_DECISIVE = {"rows": ("loss",), "text": ("perplexity",), "choices": ("accuracy_norm", "accuracy"),
             "last word": ("accuracy",)}  # fmt: skip
_OF_ROWS = ("seq_len", "too_long", "system", "fill", "train_on_prompt")  # settings that decide what rows become


@dataclass(frozen=True)
class Evaluation:
    """How files are measured; see api.evaluate. rows: those settings of rows that were given."""

    protocol: str | None = None
    limit: int | None = None
    answers: bool = True
    max_new_tokens: int | None = None
    batch_size: int = 16
    rows: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        problems = []
        if self.protocol is not None and self.protocol not in PROTOCOLS:
            problems.append(f"protocol: expected one of {', '.join(PROTOCOLS)}, found {self.protocol!r}")
        for name in ("limit", "max_new_tokens", "batch_size"):
            value = getattr(self, name)
            if value is not None and value < 1:
                problems.append(f"{name}: expected 1 or more, found {value!r}")
        if problems:
            raise SettingsError(problems)


@dataclass(frozen=True)
class _File:
    """kind: rows, text, choices or last word; content: Rows, str or list[Task]. placeholders: see DataSet.

    held_out: the rows of a run's own data that it was not trained on.
    """

    name: str
    kind: str
    content: Any
    placeholders: frozenset[str] = frozenset()
    held_out: bool = False


_Opened = tuple[RunFolder, Settings, str, str | list[str]]  # as RunFolder.open has it


def evaluate(
    model: str,
    data: Sequence[str],
    how: Evaluation,
    *,
    against: str | None,
    questions: str | None,
    out: Path | None,
    report: Report,
    loading: dict[str, Any],
) -> dict[str, Any]:
    """See api.evaluate. Raises SettingsError for settings without a use, DataError before a model is loaded."""
    _check(model, data, against, questions, out)
    run = open_run_of(Path(model))
    settings = _settings_of_rows(model, run, how, report)
    files = [_read(name, how, settings, run, report) for name in data]
    if run:
        _warn_of_training_rows(files, run, report)
    if "fill" in how.rows:  # a run's own may be for rows that are not here
        edits_of(settings).check_fill(frozenset().union(*(file.placeholders for file in files)))
    if how.protocol and all(file.kind != "text" for file in files):
        raise SettingsError(["protocol: is for plain text, which none of the files is"])
    asked = read_questions(Path(questions).expanduser(), how.limit) if questions else []
    renderer_for = partial(renderer_of, settings, today=run[0].record.day if run else None)

    def measured(spec: str, when: str, *, adapter: bool = True) -> tuple[list[dict[str, Measure]], list[Any]]:
        loaded = load(spec, adapter=adapter, report=report, **loading)
        measures = [_measure(loaded, file, how, renderer_for, when, report) for file in files]
        return measures, _answers(loaded, asked, how, report)

    other, when = None, "given"
    if against is not None:
        report(Note(f"measuring {against} first, then {model}"))
        if against == "base":
            other, when = measured(model, "before", adapter=False), "after"
        else:
            other = measured(against, "against")
        gc.collect()  # a model's modules refer to one another
    own = measured(model, when)
    result: dict[str, Any] = {"model": model, "against": against}
    result["data"] = [
        _figures(file, how, measures, other[0][place] if other else None)
        for place, (file, measures) in enumerate(zip(files, own[0], strict=True))
    ]
    if other and files:
        result["worse"] = _worse(result["data"])
    if asked and out is not None:
        write_answers(out, asked, own[1], model, (str(against), other[1]) if other else None, report)
        result["questions"] = {"out": str(out), "questions": len(asked)}
    return result


def _check(
    model: str,
    data: Sequence[str],
    against: str | None,
    questions: str | None,
    out: Path | None,
) -> None:
    problems = []
    if not data and not questions:
        problems.append("data: missing; give files to be measured on, or questions")
    if bool(questions) != (out is not None):
        problems.append("out: questions and the file for their answers need each other")
    if against == "base" and adapter_folder(Path(model), silent) is None:
        problems.append(f"against: {model} is no run, so it has no base; name a model or a run")
    if problems:
        raise SettingsError(problems)
    if out is not None:
        check_new(out)
        check_writable(out)


def _settings_of_rows(model: str, run: _Opened | None, how: Evaluation, report: Report) -> Settings:
    """What rows become: as given, else as the run was trained, so that its figures are those of its own prompts."""
    unset = Settings()
    stored = run[1] if run else unset
    kept = {name: getattr(stored, name) for name in _OF_ROWS if name not in how.rows}
    if said := ", ".join(f"{name} {value!r}" for name, value in kept.items() if value != getattr(unset, name)):
        report(Note(f"rows as {model} was trained on: {said}"))
    return replace(unset, **kept, **how.rows)


def _read(name: str, how: Evaluation, settings: Settings, run: _Opened | None, report: Report) -> _File:
    path = Path(name).expanduser()
    if is_plain_text(path, asked=how.protocol is not None):
        if how.protocol is None:
            report(Note(f"{name} is plain text: perplexity by protocol gptq (windows of 2048, every token)"))
        return _File(name, "text", read_text(path))
    if task := read_task(name, how.limit):
        report(Note(f"{name}: {len(task[1]):,} rows, {task[0]}"))
        return _File(name, *task)
    own = run is not None and (str(path.resolve()) if path.exists() else name) in as_specs(run[3])
    limit = run[1].limit if run and own else None
    parts = read_data(name, hold_out=own, limit=limit, edits=edits_of(settings), report=report)
    rows = parts.test or parts.validation or parts.train
    held_out = own and rows is not parts.train
    if held_out:
        report(Note(f"{name} is the run's own data: the {len(rows):,} rows that it did not train on are measured"))
    rows = rows.select(np.arange(len(rows)) < (how.limit or len(rows)))
    return _File(name, "rows", rows, parts.placeholders, held_out)


def _warn_of_training_rows(files: Sequence[_File], run: _Opened, report: Report) -> None:
    """Of rows that the run was trained on, in files that may have some."""
    folder, settings, _, data = run
    others = [file for file in files if file.kind == "rows" and not file.held_out]
    if not others:
        return
    try:
        trained = read_data(data, limit=settings.limit).train
    except SmidgenError as error:
        report(Note(f"whether rows are training rows of {folder.path} is not known: {error.what}"))
        return
    for file in others:
        warn_of_copies(file.content, Path(file.name).name, trained, report)


def _measure(
    loaded: LoadedModel, file: _File, how: Evaluation, renderer_for: Callable[..., Renderer], when: str, report: Report
) -> dict[str, Measure]:
    base, tokenizer = loaded.base, loaded.tokenizer
    if file.kind == "text":
        return text_perplexity(base, tokenizer, file.content, how.protocol or "gptq", how.limit, report).measures
    if file.kind == "rows":
        return _measure_rows(loaded, file.content, how, renderer_for, when, report)
    tasks: list[Task] = file.content
    what = Path(file.name).name
    scores = score_tasks(base, tokenizer, tasks, batch_size=how.batch_size, what=what, report=report)
    return measure_choices(tasks, scores) if file.kind == "choices" else measure_last_words(scores)


def _measure_rows(
    loaded: LoadedModel, rows: Rows, how: Evaluation, renderer_for: Callable[..., Renderer], when: str, report: Report
) -> dict[str, Measure]:
    renderer = renderer_for(loaded.tokenizer, loaded.base.max_positions, report)
    examples = leave_out_untrained(tokenise(rows, renderer, report=report), "rows", renderer, report)
    measures = held_out_loss(loaded.base, examples, how.batch_size, report).measures
    if how.answers and any(row.messages for row in rows):
        given = answer_rows(
            loaded.base,
            renderer,
            rows,
            when=when,
            max_new_tokens=how.max_new_tokens,
            batch_size=how.batch_size,
            report=report,
        )
        if given.rows:
            report(given)
            measures |= measure_answers(given.rows)
        if given.cut:
            most = f"{given.longest_tokens:,} tokens" + ("" if how.max_new_tokens else ", 8 more than any expected one")
            report(
                Warned(
                    f"{given.cut:,} of {len(given.rows):,} answers did not come to their end in {most};"
                    " --max-new-tokens sets another number"
                )
            )
    return measures


def _answers(loaded: LoadedModel, asked: Sequence[Question], how: Evaluation, report: Report) -> list[Any]:
    if not asked:
        return []
    return answer_questions(
        loaded, asked, max_new_tokens=how.max_new_tokens or 1024, batch_size=how.batch_size, report=report
    )


def _figures(
    file: _File, how: Evaluation, measures: dict[str, Measure], against: dict[str, Measure] | None
) -> dict[str, Any]:
    part: dict[str, Any] = {"data": file.name, "kind": file.kind}
    if file.kind == "text":
        part["protocol"] = how.protocol or "gptq"
    counts = next(iter(measures.values())).counts
    part["rows"] = len(counts)  # windows, of a text
    if "loss" in measures:
        part["tokens"] = int(counts[:, 1].sum())
    return part | {"figures": compare(measures, against)}


def _worse(figures: Sequence[dict[str, Any]]) -> list[dict[str, str]]:
    """The files on which the model became worse beyond the interval, each with the figure that tells."""
    found = []
    for part in figures:
        name = next(name for name in _DECISIVE[part["kind"]] if name in part["figures"])
        if part["figures"][name].get("worse"):
            found.append({"data": part["data"], "kind": part["kind"], "figure": name})
    return found
