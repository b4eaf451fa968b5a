"""Answers to open questions, for a person or another model to judge.

Each line of the file has what FastChat's judge reads, "question_id" and "choices", beside the question itself. Answers
are greedy, so that they come out the same again.
"""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from smidgen.data.tasks import Question
from smidgen.events import Report, Saved, Warned, silent
from smidgen.export.files import new_file
from smidgen.loading import LoadedModel
from smidgen.train.evaluate import answer_prompts

__all__ = ["answer_questions", "write_answers"]


def answer_questions(
    loaded: LoadedModel, questions: Sequence[Question], *, max_new_tokens: int, batch_size: int, report: Report = silent
) -> list[list[str | None]]:
    """An answer to each turn of each question, the turns before it in view; None where they fill all positions."""
    renderer, positions = loaded.renderer, loaded.base.max_positions
    opening = [{"role": "system", "content": loaded.system}] if loaded.system else []
    answers: list[list[str | None]] = [[] for _ in questions]
    cut = 0
    turns = max(len(question.turns) for question in questions)
    for turn in range(turns):
        prompts: dict[int, list[int]] = {}
        for number, question in enumerate(questions):
            if turn >= len(question.turns):
                continue
            ids = renderer.prompt_ids([*opening, *_conversation(question, answers[number], turn)])
            if len(ids) < positions and None not in answers[number]:
                prompts[number] = ids
            else:
                answers[number].append(None)
        given = answer_prompts(
            loaded.base, renderer, list(prompts.values()), max_new_tokens=max_new_tokens, batch_size=batch_size,
            what=f"questions, turn {turn + 1} of {turns}", report=report,
        )  # fmt: skip
        for number, (text, was_cut) in zip(prompts, given, strict=True):
            answers[number].append(text)
            cut += was_cut
    total = sum(len(row) for row in answers)
    if cut:
        report(Warned(f"{cut} of {total} answers did not come to their end; --max-new-tokens is {max_new_tokens}"))
    if unanswered := sum(answer is None for row in answers for answer in row):
        report(Warned(f"{unanswered} of {total} turns have no answer: the model has {positions} positions"))
    return answers


def _conversation(question: Question, answers: Sequence[str | None], turn: int) -> list[dict[str, Any]]:
    messages = []
    for asked, answer in zip(question.turns, answers, strict=False):
        messages += [{"role": "user", "content": asked}, {"role": "assistant", "content": answer or ""}]
    return [*messages, {"role": "user", "content": question.turns[turn]}]


def write_answers(
    out: Path,
    questions: Sequence[Question],
    answers: Sequence[Sequence[str | None]],
    name: str,
    against: tuple[str, Sequence[Sequence[str | None]]] | None = None,
    report: Report = silent,
) -> None:
    """One line for each question, whole or not at all. against: another model's name and answers, put beside."""
    lines = []
    for number, question in enumerate(questions):
        line = {**question.fields, "turns": question.turns, **_given(name, answers[number])}
        if against:
            line["against"] = _given(against[0], against[1][number])
        lines.append(json.dumps(line, ensure_ascii=False) + "\n")
    with new_file(out) as staging:
        staging.write_text("".join(lines), encoding="utf-8")
    report(Saved(out, out.stat().st_size))


def _given(name: str, turns: Sequence[str | None]) -> dict[str, Any]:
    return {"model_id": name, "choices": [{"index": 0, "turns": list(turns)}]}
