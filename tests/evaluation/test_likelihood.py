"""Likelihoods of continuations equal those of transformers' whole logits, whatever shares a batch."""

from pathlib import Path

import pytest
import torch

import smidgen
from smidgen.data.tasks import Task
from smidgen.errors import DataError
from smidgen.evaluation.likelihood import measure_choices, measure_last_words, score_tasks
from smidgen.loading import LoadedModel
from stories import stories_folder
from tiny import tiny_folder


def task(context: str, *choices: str, right: int = 0) -> Task:
    return Task(context, tuple(f" {choice}" for choice in choices), right, tuple(map(len, choices)), "rows.jsonl:1")


TASKS = [
    task("Once upon a time, there was a little girl named", "Lily", "Tom", "a very red ball"),
    task("Tom", "ran", "sat"),
    task("They all lived happily ever", "after", "because of the dog"),
    task("She loved to play outside in the", "park", right=0),
]


@pytest.fixture(scope="module")
def stories(tmp_path_factory: pytest.TempPathFactory) -> LoadedModel:
    folder = stories_folder(tmp_path_factory.mktemp("model"))
    return smidgen.load(folder, quantize="none", compute_dtype="float32")


@torch.no_grad()
def by_whole_logits(loaded: LoadedModel, one: Task) -> list[tuple[float, bool]]:
    found = []
    context = loaded.tokenizer(one.context).input_ids
    for continuation in one.continuations:
        ids = loaded.tokenizer(one.context + continuation).input_ids
        assert ids[: len(context)] == context, "these texts are cut where their contexts end"
        logits = loaded.model(input_ids=torch.tensor([ids])).logits[0].double().log_softmax(dim=1)
        places = range(len(context), len(ids))
        likelihood = sum(float(logits[place - 1, ids[place]]) for place in places)
        found.append((likelihood, all(int(logits[place - 1].argmax()) == ids[place] for place in places)))
    return found


@pytest.mark.parametrize("batch_size", [1, 3, 16])
def test_likelihoods_are_those_of_the_whole_logits(batch_size: int, stories: LoadedModel) -> None:
    scores = score_tasks(stories.base, stories.tokenizer, TASKS, batch_size=batch_size, what="x")
    for one, row in zip(TASKS, scores, strict=True):
        for (ours, likeliest), (theirs, is_likeliest) in zip(row, by_whole_logits(stories, one), strict=True):
            assert ours == pytest.approx(theirs, rel=1e-4)  # float32 against float64 from the logits on
            assert likeliest == is_likeliest
    assert any(likeliest for row in scores for _, likeliest in row), "a trained model knows some of these"


def test_the_head_is_applied_in_chunks_to_what_is_looked_up(
    stories: LoadedModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    from smidgen.planning import estimate

    whole = score_tasks(stories.base, stories.tokenizer, TASKS, batch_size=16, what="x")
    monkeypatch.setattr(estimate, "_CHUNK_LOGITS", 16 * stories.base.head.out_features)
    seen: list[int] = []
    handle = stories.base.head.register_forward_hook(lambda _m, inputs, _o: seen.append(len(inputs[0])))
    chunked = score_tasks(stories.base, stories.tokenizer, TASKS, batch_size=16, what="x")
    handle.remove()
    looked_up = 0
    for one in TASKS:
        before = len(stories.tokenizer(one.context).input_ids)
        looked_up += sum(len(stories.tokenizer(one.context + text).input_ids) - before for text in one.continuations)
    assert sum(seen) == looked_up and max(seen) <= 16 < looked_up
    for one, other in zip(chunked, whole, strict=True):
        # a product over other rows may sum in another order
        assert [value for value, _ in one] == pytest.approx([value for value, _ in other], rel=1e-5)


def test_choices_of_one_token_share_one_pass(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    loaded = smidgen.load(tiny_folder(tmp_path / "m"), quantize="none", compute_dtype="float32")  # a byte is a token
    rows: list[int] = []
    original = type(loaded.base).hidden_of_rows

    def counted(base: object, ids: torch.Tensor, lengths: torch.Tensor) -> object:
        rows.append(len(ids))
        return original(base, ids, lengths)  # type: ignore[arg-type]

    monkeypatch.setattr(type(loaded.base), "hidden_of_rows", counted)
    letters = Task("Which?\nAnswer:", ("A", "B", "C"), 0, (1, 1, 1), "x:1")
    scores = score_tasks(loaded.base, loaded.tokenizer, [letters], batch_size=16, what="x")
    assert rows == [1]
    assert scores[0] == [
        (pytest.approx(value, rel=1e-4), likeliest) for value, likeliest in by_whole_logits(loaded, letters)
    ]


def test_a_text_beyond_the_positions_loses_its_beginning(tmp_path: Path) -> None:
    loaded = smidgen.load(tiny_folder(tmp_path / "gpt2", "gpt2"), quantize="none", compute_dtype="float32")
    positions = loaded.base.max_positions
    tail = "x" * (positions - 3)
    (long,), (short,) = score_tasks(
        loaded.base, loaded.tokenizer, [task("abc" * 300 + tail, "yes"), task(tail, "yes")], batch_size=2, what="x"
    )
    assert long[0] == pytest.approx(short[0], rel=1e-5)
    with pytest.raises(DataError, match=r"rows.jsonl:1: a choice alone is too long, expected at most the model's 256"):
        score_tasks(loaded.base, loaded.tokenizer, [task("abc", "y" * positions)], batch_size=1, what="x")


def test_a_context_of_no_tokens_is_begun_with_the_start_token(tmp_path: Path) -> None:
    loaded = smidgen.load(tiny_folder(tmp_path / "m"), quantize="none", compute_dtype="float32")
    ((score, _),) = score_tasks(loaded.base, loaded.tokenizer, [task("", "hey")], batch_size=1, what="x")[0]
    with torch.no_grad():
        ids = [256, *loaded.tokenizer(" hey").input_ids]
        logits = loaded.model(input_ids=torch.tensor([ids])).logits[0].log_softmax(dim=1)
    assert score == pytest.approx(sum(float(logits[at, ids[at + 1]]) for at in range(len(ids) - 1)), rel=1e-4)


def test_accuracy_by_length_does_not_prefer_what_is_short() -> None:
    tasks = [task("q", "yes", "a much longer one", right=1), task("q", "ab", "cd", right=0)]
    scores = [[(-3.0, False), (-6.0, False)], [(-1.0, False), (-2.0, False)]]
    measures = measure_choices(tasks, scores)
    assert {name: measure.value for name, measure in measures.items()} == {"accuracy": 0.5, "accuracy_norm": 1.0}
    assert set(measure_choices(tasks[1:], scores[1:])) == {"accuracy"}, "equally long: both would be the same"


def test_last_words_count_when_every_token_is_the_likeliest() -> None:
    measures = measure_last_words([[(-1.0, True)], [(-3.0, False)]])
    assert measures["accuracy"].value == 0.5
    assert measures["perplexity"].value == pytest.approx(2.718281828**2)
