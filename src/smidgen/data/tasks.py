"""Files that models are measured by, which have no conversation to train on: what each row asks, and the right answer.

    choices     {"query", "choices", "gold"}, gold a place in choices: ARC, PIQA, HellaSwag, ...
                {"input", "output"}, the options "A. ...", "B. ..." on lines of input, their letter in output: MMLU
    last word   {"context", "continuation"}: LAMBADA
    questions   {"turns"}: MT-bench; {"text"} with "question_id": Vicuna; answered, not scored

A row becomes a text and its possible continuations, which a model scores as plain text, without a chat template. A
query that begins with "Question:" is followed by "Answer:" on a line of its own, as these files are commonly scored.
"""

import re
from collections.abc import Iterable
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Any

from smidgen.data.files import SUFFIXES, TEXT_SUFFIXES, describe, read_records
from smidgen.errors import DataError

__all__ = ["Question", "Task", "is_plain_text", "read_questions", "read_task"]

_OPTION = re.compile(r"^([A-Z])[.)] ", re.MULTILINE)
_MOST_CHOICES = 1000


@dataclass(frozen=True)
class Task:
    """context: the text before; continuations: texts that may follow, right: the place of the true one among them.

    lengths: characters of each continuation as the file has it, by which likelihoods are normalised.
    """

    context: str
    continuations: tuple[str, ...]
    right: int
    lengths: tuple[int, ...]
    where: str


@dataclass(frozen=True)
class Question:
    """turns: what the user says, one after another. fields: the row as the file has it, without them."""

    turns: tuple[str, ...]
    fields: dict[str, Any]
    where: str


def is_plain_text(path: Path, *, asked: bool = False) -> bool:
    """Whether a file is a text without rows, by its name. asked: a perplexity is wanted: unknown kinds are text."""
    return path.suffix.lower() in TEXT_SUFFIXES or (asked and path.is_file() and path.suffix.lower() not in SUFFIXES)


def read_task(spec: str, limit: int | None = None) -> tuple[str, list[Task]] | None:
    """("choices" or "last word", rows) of a file, at most the first `limit`; None where it holds something else.

    Raises DataError with the line of a row that does not fit the first one, and for a file of questions.
    """
    path = Path(spec).expanduser()
    if not path.is_file() or path.suffix.lower() not in SUFFIXES:
        return None
    records = read_records(path)
    first = next(records, None)
    if first is None:
        return None
    if _question_columns(first[1]):
        cure = "answer it: --questions FILE --out ANSWERS.jsonl"
        raise DataError(f"{path} holds open questions, which have no right answer to be measured by", cure=cure)
    for kind, columns, read in (
        ("choices", {"query", "choices", "gold"}, _choices),
        ("choices", {"input", "output"}, _letters),
        ("last word", {"context", "continuation"}, _last_word),
    ):
        if columns <= first[1].keys() and (read is not _letters or _is_lettered(first[1])):
            rows = []
            for where, record in chain([first], records):
                if not columns <= record.keys():
                    found = ", ".join(record)
                    raise DataError(f"{where}: missing columns", expected=", ".join(sorted(columns)), found=found)
                rows.append(read(record, where))
                if len(rows) == limit:
                    break
            return kind, rows
    return None


def read_questions(path: Path, limit: int | None = None) -> list[Question]:
    """Open questions of a file, at most the first `limit`. Raises DataError for anything else."""
    found = []
    for where, record in read_records(path):
        column = _question_columns(record)
        if column is None:
            expected, columns = "columns turns, or question_id and text", ", ".join(record) or "no columns"
            raise DataError(f"{where} is no question", expected=expected, found=columns)
        value = record[column]
        turns = [value] if isinstance(value, str) else value
        if (
            not isinstance(turns, list)
            or not turns
            or not all(isinstance(turn, str) and turn.strip() for turn in turns)
        ):
            raise DataError(f"{where}, column {column}: wrong type", expected="one text or more", found=describe(value))
        found.append(Question(tuple(turns), {key: item for key, item in record.items() if key != column}, where))
        if len(found) == limit:
            break
    if not found:
        raise DataError(f"{path} holds no questions", expected="one row or more")
    return found


def _question_columns(record: dict[str, Any]) -> str | None:
    if "turns" in record:
        return "turns"
    return "text" if {"text", "question_id"} <= record.keys() else None


def _choices(record: dict[str, Any], where: str) -> Task:
    query, choices, gold = record["query"], record["choices"], record["gold"]
    if not isinstance(choices, list) or not 2 <= len(choices) <= _MOST_CHOICES:
        found = f"{len(choices)} choices" if isinstance(choices, list) else describe(choices)
        raise DataError(f"{where}, column choices", expected=f"a list of 2 to {_MOST_CHOICES} texts", found=found)
    _check_texts(where, query=query, **{f"choices[{place}]": choice for place, choice in enumerate(choices)})
    if not isinstance(gold, int) or isinstance(gold, bool) or not 0 <= gold < len(choices):
        expected = f"a place in choices, 0 to {len(choices) - 1}"
        raise DataError(f"{where}, column gold", expected=expected, found=repr(gold)[:40])
    context = query.rstrip()
    if context.startswith("Question:") and not context.endswith("Answer:"):
        context += "\nAnswer:"
    return _task(context, choices, gold, where)


def _is_lettered(record: dict[str, Any]) -> bool:
    """Whether `input` has options and `output` is a letter: other files of these columns are rows to train on."""
    text, letter = record["input"], record["output"]
    is_letter = isinstance(letter, str) and re.fullmatch(r"\s*[A-Z]\s*", letter) is not None
    return is_letter and isinstance(text, str) and len(_options(text)) > 1


def _options(text: str) -> list[str]:
    """The letters of the last options in a text: A, B, C, ... as far as they go on; I, II, III may stand before."""
    letters = _OPTION.findall(text)
    last = len(letters) - 1 - letters[::-1].index("A") if "A" in letters else len(letters)
    return [letter for place, letter in enumerate(letters[last:]) if letter == chr(ord("A") + place)]


def _letters(record: dict[str, Any], where: str) -> Task:
    _check_texts(where, input=record["input"], output=record["output"])
    letters = _options(record["input"])
    letter = record["output"].strip()
    if letter not in letters:
        expected = "one of the options " + (", ".join(letters) or 'of input ("A. ...", a line each)')
        raise DataError(f"{where}, column output", expected=expected, found=repr(record["output"])[:40])
    return _task(record["input"].rstrip(), letters, letters.index(letter), where)


def _last_word(record: dict[str, Any], where: str) -> Task:
    _check_texts(where, context=record["context"], continuation=record["continuation"])
    return _task(record["context"].rstrip(), [record["continuation"].strip()], 0, where)


def _task(context: str, choices: Iterable[str], right: int, where: str) -> Task:
    """Continuations begin with the space that separates them from the context, as tokenizers want it."""
    texts = [choice.strip() for choice in choices]
    return Task(context, tuple(f" {text}" for text in texts), right, tuple(map(len, texts)), where)


def _check_texts(where: str, **columns: object) -> None:
    for name, text in columns.items():
        if not isinstance(text, str) or not text.strip():
            raise DataError(f"{where}, column {name}: wrong type", expected="some text", found=describe(text))
        try:
            text.encode("utf-8")
        except UnicodeEncodeError:
            raise DataError(f"{where}, column {name} holds a lone surrogate", expected="UTF-8 text") from None
