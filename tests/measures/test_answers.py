"""Wording and fields of answers, against other packages and by hand."""

import json
import os
import random
from pathlib import Path

import numpy as np
import pytest

from smidgen.events import Answer
from smidgen.measures.answers import ANSWER_MEASURES, measure_answers
from smidgen.measures.fields import field_counts, is_json
from smidgen.measures.overlap import bleu_counts, bleu_of, rouge_l, rouge_n


def bleu(answers: list[str], expected: list[str]) -> float:
    counts = [bleu_counts(want, given) for want, given in zip(expected, answers, strict=True)]
    return 100 * float(bleu_of(np.array(counts, dtype=float).sum(axis=0)))


# What sacrebleu 2.6.0 gives: corpus_bleu([answer], [[expected]]).
@pytest.mark.parametrize(
    ("answer", "expected", "score"),
    [
        ("It is 3.5 km, isn't it?", "It's 3.5 km, is it not?", 24.446151121745064),
        ("the cat sat on the mat .", "a cat sat on a mat .", 30.739407647563215),
        ("a b c", "a b c", 0.0),
        ("one two three four", "five six seven eight", 0.0),
        ("the the the the the", "the cat is on the mat", 10.400597689005304),
        ("a b c d e f", "a b c d e f", 100.0),
        ("q b c d x y", "a b c d e f g h", 21.64910073203448),
        ("", "a b c d", 0.0),
    ],
)
def test_bleu_is_that_of_sacrebleu(answer: str, expected: str, score: float) -> None:
    assert bleu([answer], [expected]) == pytest.approx(score, rel=1e-12)


def test_bleu_of_real_texts_is_that_of_sacrebleu() -> None:
    texts = _real_answers()
    thinned = [" ".join(word for place, word in enumerate(text.split(" ")) if place % 5 != 3) for text in texts]
    assert bleu(thinned, texts) == pytest.approx(50.624692426418605, rel=1e-12)  # sacrebleu 2.6.0
    assert bleu(texts[1:], texts[:-1]) == pytest.approx(0.2016336232871908, rel=1e-12)


def test_bleu_of_several_files_at_once_is_that_of_each() -> None:
    one, other = bleu_counts("a b c d e", "a b c d x"), bleu_counts("a b c d", "q w e r")
    both = bleu_of(np.array([one, other], dtype=float))
    assert both[0] > 0 and both[1] == 0.0


WORDS = ["a", "b", "c", "d", "e", "Don't", "3.5", "x_y"]


def test_rouge_is_that_of_rouge_score() -> None:
    scorer = pytest.importorskip("rouge_score.rouge_scorer").RougeScorer(["rouge1", "rouge2", "rougeL"])
    draws = random.Random(0)
    texts = [text.encode("ascii", "ignore").decode() for text in _real_answers()[:20]]
    texts += [" ".join(draws.choices(WORDS, k=draws.randint(0, 12))) for _ in range(200)]
    for expected, answer in zip(texts, [*texts[1:], texts[0]], strict=True):
        theirs = scorer.score(expected, answer)
        assert rouge_n(expected, answer, 1) == pytest.approx(theirs["rouge1"].fmeasure)
        assert rouge_n(expected, answer, 2) == pytest.approx(theirs["rouge2"].fmeasure)
        assert rouge_l(expected, answer) == pytest.approx(theirs["rougeL"].fmeasure)


def test_rouge_counts_the_letters_of_every_script() -> None:
    assert rouge_l("où est la gare", "où est le gare") == pytest.approx(0.75)
    assert rouge_n("да нет", "нет да", 1) == 1.0
    assert rouge_n("да нет", "нет да", 2) == 0.0


@pytest.mark.parametrize(
    ("expected", "answer", "f1"),
    [
        ('{"a": 1, "b": {"c": "x"}}', '{"b": {"c": "x"}, "a": 1}', 1.0),  # the order of keys says nothing
        ('{"a": 1, "b": {"c": "x"}}', '{"a": 1, "b": {"c": "y"}}', 0.5),
        ('{"a": 1, "b": 2}', '{"a": 1}', 2 / 3),  # one of two found, nothing wrong
        ('{"a": 1}', '{"a": 1, "b": 2, "c": 3}', 0.5),
        ('{"a": 1}', '{"b": 1}', 0.0),  # the value under another key
        ('{"a": 1}', '{"a": 1.0}', 1.0),
        ('{"a": 1}', '{"a": true}', 0.0),
        ('{"a": "1"}', '{"a": 1}', 0.0),
        ('["x", "y"]', '["y", "x"]', 0.0),  # a list has an order
        ('["x", "y"]', '["x"]', 2 / 3),
        ('{"a": {}}', '{"a": []}', 0.0),
        ("{}", "{}", 1.0),
        ('{"a": 1}', 'Sure! {"a": 1}', 0.0),
        ('{"a": 1}', "[" * 100_000, 0.0),
    ],
)
def test_f1_of_fields(expected: str, answer: str, f1: float) -> None:
    twice_shared, together = field_counts(expected, answer)
    assert twice_shared / together == pytest.approx(f1)


@pytest.mark.parametrize(
    ("text", "valid"), [("{}", True), ("[1]", True), ("1", False), ('"x"', False), ("{} x", False), ("", False)]
)
def test_json_is_one_object_or_list(text: str, valid: bool) -> None:
    assert is_json(text) is valid


def test_what_the_data_expects_decides_the_measures() -> None:
    fields = measure_answers([Answer("q", '{"a": 1, "b": 2}', '{"a": 1}'), Answer("q", '{"a": 1}', "no")])
    assert {name: measure.value for name, measure in fields.items()} == {
        "exact_match": 0.0,
        "valid_json": 0.5,
        "json_f1": pytest.approx(2 / 4),  # over all fields of all rows: 1 found, of 3 expected and 1 given
    }
    words = measure_answers([Answer("q", "so it is", "so it is"), Answer("q", '{"a": 1}', "no")])
    assert words["exact_match"].value == words["rouge_2"].value == 0.5
    assert [*fields, *words] == [name for name in ANSWER_MEASURES if name in fields] + [
        name for name in ANSWER_MEASURES if name in words
    ]
    assert {*fields, *words} == set(ANSWER_MEASURES)


def _real_answers() -> list[str]:
    data = os.environ.get("SMIDGEN_TEST_DATA")
    if not data:
        pytest.skip("SMIDGEN_TEST_DATA is not set")
    file = Path(data) / "chat" / "dolly_hhrlhf_train_small.jsonl"
    return [json.loads(line)["response"] for line in file.read_text(encoding="utf-8").splitlines()[:60]]
