"""Files to be measured by: real ones, and ones that do not fit."""

import json
import os
from pathlib import Path
from typing import Any

import pytest

from smidgen.data.tasks import is_plain_text, read_questions, read_task
from smidgen.errors import DataError


def real(name: str) -> str:
    data = os.environ.get("SMIDGEN_TEST_DATA")
    if not data:
        pytest.skip("SMIDGEN_TEST_DATA is not set")
    return str(Path(data) / name)


def written(folder: Path, *rows: dict[str, Any]) -> str:
    file = folder / "rows.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return str(file)


@pytest.mark.parametrize(
    ("name", "kind", "rows", "choices"),
    [
        ("eval/arc_easy.jsonl", "choices", 2376, {4}),
        ("eval/piqa.jsonl", "choices", 1838, {2}),
        ("eval/mmlu_zero_shot_val.jsonl", "choices", 1531, {4}),
        ("eval/lambada_openai.jsonl", "last word", 5153, {1}),
    ],
)
def test_real_files_are_read_whole(name: str, kind: str, rows: int, choices: set[int]) -> None:
    read = read_task(real(name))
    assert read is not None
    assert (read[0], len(read[1])) == (kind, rows)
    assert {len(task.continuations) for task in read[1]} == choices
    for task in read[1]:
        assert task.context == task.context.rstrip()
        assert all(text.startswith(" ") and text[1:].strip() == text[1:] for text in task.continuations)
    assert read_task(real(name), limit=3) == (kind, read[1][:3])


def test_a_question_is_followed_by_answer_and_other_queries_are_not(tmp_path: Path) -> None:
    rows = [{"query": query, "choices": ["a", "bcd"], "gold": 1} for query in ("Question: why?\n", "A man walks")]
    read = read_task(written(tmp_path, *rows))
    assert read is not None
    assert [task.context for task in read[1]] == ["Question: why?\nAnswer:", "A man walks"]
    assert read[1][0].continuations == (" a", " bcd")
    assert (read[1][0].right, read[1][0].lengths) == (1, (1, 3))


def test_the_letters_of_mmlu_are_its_choices(tmp_path: Path) -> None:
    text = "Which?\nA. one\nB. two\nC. three\nAnswer:"
    read = read_task(written(tmp_path, {"input": text, "output": "B", "subject": "s"}))
    assert read is not None
    assert (read[1][0].context, read[1][0].continuations, read[1][0].right) == (text, (" A", " B", " C"), 1)


def test_only_the_last_options_are_choices(tmp_path: Path) -> None:
    """MMLU has questions with statements I, II and III before their options, and prompts with worked examples."""
    text = "1?\nA. x\nB. y\nC. z\nAnswer: C\n\n2?\nI. p\nII. q\nA. I only\nB. both\nAnswer:"
    read = read_task(written(tmp_path, {"input": text, "output": "B"}))
    assert read is not None
    assert (read[1][0].continuations, read[1][0].right) == ((" A", " B"), 1)


@pytest.mark.parametrize(
    "row",
    [
        {"messages": []},
        {"instruction": "x", "input": "y", "output": "z"},
        {"input": "no options here", "output": "A"},
        {"text": "plain"},
    ],
)
def test_rows_to_train_on_are_left_to_others(row: dict[str, Any], tmp_path: Path) -> None:
    assert read_task(written(tmp_path, row)) is None


CHOICES = {"query": "q", "choices": ["a", "b"], "gold": 0}


@pytest.mark.parametrize(
    ("bad", "said"),
    [
        (CHOICES | {"gold": 2}, r"rows.jsonl:2, column gold, expected a place in choices, 0 to 1, found 2"),
        (CHOICES | {"gold": True}, "column gold"),
        (CHOICES | {"gold": "0"}, "column gold"),
        (CHOICES | {"choices": ["a"]}, "a list of 2 to 1000 texts, found 1 choices"),
        (CHOICES | {"choices": "ab"}, "a list of 2 to 1000 texts, found text"),
        (CHOICES | {"choices": ["a", 3]}, r"column choices\[1\]: wrong type"),
        (CHOICES | {"choices": ["a", " "]}, r"column choices\[1\]"),
        (CHOICES | {"query": ""}, "column query: wrong type, expected some text, found empty text"),
        (CHOICES | {"query": "\ud800"}, "lone surrogate"),
        ({"query": "q", "gold": 0}, r"rows.jsonl:2: missing columns, expected choices, gold, query, found query, gold"),
    ],
)
def test_a_row_that_does_not_fit_is_one_line_with_its_place(bad: dict[str, Any], said: str, tmp_path: Path) -> None:
    with pytest.raises(DataError, match=said):
        read_task(written(tmp_path, CHOICES, bad))


def test_a_letter_without_its_option_is_an_error(tmp_path: Path) -> None:
    good = {"input": "Which?\nA. one\nB. two\nAnswer:", "output": "A"}
    with pytest.raises(DataError, match="expected one of the options A, B, found 'C'"):
        read_task(written(tmp_path, good, good | {"output": "C"}))


def test_questions_are_read_with_their_turns() -> None:
    questions = read_questions(Path(real("eval/mt_bench_question.jsonl")))
    assert len(questions) == 80
    assert {len(question.turns) for question in questions} == {2}
    assert questions[0].fields == {"question_id": 81, "category": "writing"}
    assert read_questions(Path(real("eval/mt_bench_question.jsonl")), limit=2) == questions[:2]


def test_questions_of_one_turn_are_read_too(tmp_path: Path) -> None:
    questions = read_questions(Path(written(tmp_path, {"question_id": 1, "text": "Why?", "category": "c"})))
    assert questions[0].turns == ("Why?",)


@pytest.mark.parametrize("row", [{"messages": []}, {"turns": []}, {"turns": [1]}, {"turns": [""]}, {"text": "x"}])
def test_what_is_no_question_is_said(row: dict[str, Any], tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"rows\.jsonl:1"):
        read_questions(Path(written(tmp_path, row)))


def test_questions_are_not_measured_by(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="--questions FILE --out"):
        read_task(written(tmp_path, {"turns": ["Why?"]}))


def test_plain_text_is_known_by_its_name_or_asked_for(tmp_path: Path) -> None:
    (tmp_path / "corpus").write_text("x")
    assert is_plain_text(Path("a.txt")) and is_plain_text(Path("wiki.test.raw"))
    assert not is_plain_text(tmp_path / "corpus") and is_plain_text(tmp_path / "corpus", asked=True)
    assert not is_plain_text(Path(written(tmp_path, CHOICES)), asked=True)
