"""`smidgen.evaluate` on real files and models: every setting changes what it says, and a run stands beside its base."""

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import smidgen
from smidgen.errors import DataError, RunError, SettingsError
from smidgen.events import Answers, Event, Note, Warned
from stories import stories_folder
from tiny import tiny_folder

PLAIN: dict[str, Any] = {"quantize": "none", "compute_dtype": "float32"}


@pytest.fixture(scope="module")
def run(model: Path, rows: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("run") / "run"
    how: dict[str, Any] = {"rank": 4, "alpha": 8, "learning_rate": 5e-3, "epochs": 3.0, "compute_dtype": "float32"}
    return smidgen.finetune(str(model), str(rows), out, **how).path


@pytest.fixture(scope="module")
def stories(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return stories_folder(tmp_path_factory.mktemp("model"))


def real(name: str) -> str:
    return str(Path(os.environ["SMIDGEN_TEST_DATA"]) / "eval" / name)


def figures(*arguments: Any, **settings: Any) -> dict[str, Any]:
    """Of the one file given."""
    (part,) = smidgen.evaluate(*arguments, **settings)["data"]
    return part["figures"]


def test_real_files_of_every_kind_are_measured(stories: Path) -> None:
    names = ("arc_easy.jsonl", "piqa.jsonl", "mmlu_zero_shot_val.jsonl", "lambada_openai.jsonl")
    result = smidgen.evaluate(stories, *map(real, names), limit=12, **PLAIN)
    assert [(part["kind"], part["rows"]) for part in result["data"]] == [("choices", 12)] * 3 + [("last word", 12)]
    assert [set(part["figures"]) for part in result["data"]] == [
        {"accuracy", "accuracy_norm"}, {"accuracy", "accuracy_norm"}, {"accuracy"}, {"accuracy", "perplexity"},
    ]  # fmt: skip
    for part in result["data"]:
        for figure in part["figures"].values():
            assert figure["low"] <= figure["value"] <= figure["high"]
    assert "worse" not in result and result["against"] is None
    assert json.loads(json.dumps(result)) == result


@pytest.fixture(scope="module")
def copied(rows: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The run's rows, all of them, in a file that it does not know."""
    return Path(shutil.copy(rows, tmp_path_factory.mktemp("rows") / "copied.jsonl"))


def test_a_run_is_measured_on_what_it_held_out_of_its_own_data(run: Path, rows: Path, copied: Path) -> None:
    """Once on all of it, its training rows too, which said nothing of new ones, and nobody said so."""
    seen: list[Event] = []
    how: dict[str, Any] = {"answers": False, "batch_size": 4, "report": seen.append}

    def said() -> list[str]:
        texts = [event.text for event in seen if isinstance(event, (Note, Warned))]
        seen.clear()
        return texts

    own = figures(run, str(rows), **how)["loss"]["value"]
    assert own == pytest.approx(json.loads((run / "summary.json").read_text())["loss_after"], rel=1e-6)
    assert any("rows that it did not train on are measured" in text for text in said())
    checkpoint = next((run / "checkpoints").iterdir())
    assert figures(checkpoint, str(rows), **how)["loss"]["value"] == own
    said()
    assert figures(run, str(copied), **how)["loss"]["value"] != own
    count = len(rows.read_text().splitlines())
    (told,) = (text for text in said() if "training rows too" in text)
    assert f"of {count} copied.jsonl rows are training rows too" in told
    assert "first: copied.jsonl:1, the same as rows.jsonl:" in told


def test_rows_that_a_run_has_not_seen_are_measured_without_a_word(run: Path, tmp_path: Path) -> None:
    new, seen = tmp_path / "new.jsonl", list[Event]()
    new.write_text(json.dumps({"prompt": "a new one", "completion": "new"}) + "\n")
    figures(run, str(new), answers=False, report=seen.append)
    assert not any("training rows" in getattr(event, "text", "") for event in seen)
    moved = Path(shutil.copytree(run, tmp_path / "moved"))
    settings = (moved / "settings.yaml").read_text().splitlines()
    lines = (f"data: {tmp_path}/gone.jsonl" if line.startswith("data: ") else line for line in settings)
    (moved / "settings.yaml").write_text("\n".join(lines))
    figures(moved, str(new), answers=False, report=seen.append)
    (told,) = (event.text for event in seen if isinstance(event, Note) and "training rows" in event.text)
    assert "is not known: no data at" in told and "gone.jsonl" in told


def test_a_run_stands_beside_its_base_and_both_are_what_they_are_alone(model: Path, run: Path, copied: Path) -> None:
    rows, events = copied, list[Event]()
    both = figures(run, str(rows), against="base", report=events.append)
    alone = figures(run, str(rows))
    base = figures(model, str(rows), compute_dtype="float32")  # in 4 bits, as for the run
    assert set(both) == {"loss", "perplexity", "exact_match", "valid_json", "json_f1"}
    for name, figure in both.items():
        assert {key: figure[key] for key in ("value", "low", "high")} == alone[name]
        assert figure["against"] == base[name]
        assert figure["difference"]["value"] == figure["value"] - figure["against"]["value"]
        assert not figure["worse"]
    assert both["loss"]["difference"]["high"] < 0, "training helped"
    assert [event.when for event in events if isinstance(event, Answers)] == ["before", "after"]


def test_what_a_run_forgot_is_told(stories: Path, tmp_path: Path) -> None:
    """A model that has learned one tale by heart reads an encyclopaedia worse than before, and that tale better."""
    tales = tmp_path / "tales.jsonl"
    told = "Once upon a time, there was a green frog named Zog. Zog loved to {} every day."
    verbs = ("sing", "jump", "paint", "swim", "read", "dance", "climb", "bake")
    tales.write_text("".join(json.dumps({"text": told.format(verb)}) + "\n" for verb in verbs * 4))
    known = shutil.copy(tales, tmp_path / "known.jsonl")
    how: dict[str, Any] = {"learning_rate": 1e-2, "epochs": 3.0, "compute_dtype": "float32"}
    run = smidgen.finetune(str(stories), str(tales), tmp_path / "run", **how)
    wiki = str(Path(real("x")).parents[1] / "text" / "wiki.test.raw")
    files = (str(known), wiki, real("lambada_openai.jsonl"))
    result = smidgen.evaluate(run.path, *files, against="base", protocol="llama.cpp", limit=12)
    assert result["worse"] == [{"data": wiki, "kind": "text", "figure": "perplexity"}]
    perplexity = result["data"][1]["figures"]["perplexity"]
    assert perplexity["worse"] and perplexity["value"] > perplexity["against"]["value"]
    assert perplexity["difference"]["low"] > 0
    assert result["data"][0]["figures"]["loss"]["difference"]["high"] < 0
    assert smidgen.evaluate(run.path, files[0], against="base", limit=12)["worse"] == []


def test_two_models_are_compared_where_their_rows_are_the_same(stories: Path, model: Path, run: Path) -> None:
    found = figures(model, real("arc_easy.jsonl"), against=stories, limit=10, **PLAIN)["accuracy"]
    assert found["against"] == figures(stories, real("arc_easy.jsonl"), limit=10, **PLAIN)["accuracy"]
    assert "difference" in found
    # per word, so two tokenizers do not matter
    assert (
        "difference" in figures(model, real("lambada_openai.jsonl"), against=stories, limit=10, **PLAIN)["perplexity"]
    )
    rows = str(Path(real("x")).parents[1] / "sft" / "wikisql_test.jsonl")
    found = figures(model, rows, against=stories, limit=10, answers=False, **PLAIN)["loss"]
    assert "against" in found and "difference" not in found, "per token, and the tokens are others"


def test_only_the_first_rows_are_measured_and_batches_change_nothing(model: Path, rows: Path, tmp_path: Path) -> None:
    first = tmp_path / "first.jsonl"
    first.write_text("".join(rows.read_text().splitlines(keepends=True)[:5]))
    limited = figures(model, str(rows), limit=5, **PLAIN)
    assert limited == figures(model, str(first), **PLAIN)
    assert limited != figures(model, str(rows), **PLAIN)
    alone = figures(model, str(rows), limit=5, batch_size=1, **PLAIN)
    assert alone["loss"]["value"] == pytest.approx(limited["loss"]["value"], rel=1e-5)


def test_settings_for_rows_change_rows(model: Path, rows: Path) -> None:
    usual = figures(model, str(rows), limit=6, **PLAIN)
    assert set(figures(model, str(rows), limit=6, answers=False, **PLAIN)) == {"loss", "perplexity"}
    assert figures(model, str(rows), limit=6, train_on_prompt=True, **PLAIN)["loss"] != usual["loss"]
    assert figures(model, str(rows), limit=6, seq_len=40, **PLAIN)["loss"] != usual["loss"]
    seen: list[Event] = []
    for longest in (3, 30):
        figures(model, str(rows), limit=6, max_new_tokens=longest, report=seen.append, **PLAIN)
    # a token has two bytes at the most
    few, more = (event for event in seen if isinstance(event, Answers))
    assert max(len(row.answer) for row in few.rows) <= 6 < max(len(row.answer) for row in more.rows)
    assert few.cut == 6
    said = [event.text for event in seen if isinstance(event, Warned) and "did not come to their end" in event.text]
    assert said[0] == "6 of 6 answers did not come to their end in 3 tokens; --max-new-tokens sets another number"


def test_answers_are_as_long_as_those_of_a_run(model: Path, tmp_path: Path) -> None:
    """They once ended at 128 tokens, whatever was expected; longer ones had no chance."""
    data, seen = tmp_path / "rows.jsonl", list[Event]()
    data.write_text("".join(json.dumps({"prompt": "hi", "completion": "n" * count}) + "\n" for count in (1, 150)))
    figures(model, str(data), report=seen.append, **PLAIN)
    (given,) = (event for event in seen if isinstance(event, Answers))
    assert given.longest_tokens == 150 + 8
    told = f"{given.cut} of {len(given.rows)} answers did not come to their end in 158 tokens, 8 more than any expected"
    assert given.cut and any(event.text.startswith(told) for event in seen if isinstance(event, Warned))


def test_a_row_that_fills_all_positions_is_left_out_and_named(model: Path, tmp_path: Path) -> None:
    """It once ended the whole evaluation, and was not named. A model with more positions answers it."""
    data, seen = tmp_path / "rows.jsonl", list[Event]()
    rows = [{"prompt": "hi " * (100 if index == 3 else 1 + index), "completion": "ho"} for index in range(12)]
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    wide = tiny_folder(tmp_path / "wide", max_position_embeddings=1024)
    found = figures(model, str(data), against=wide, report=seen.append, **PLAIN)
    other, own = (event for event in seen if isinstance(event, Answers))
    assert (len(other.rows), len(own.rows)) == (12, 11)
    (told,) = (event.text for event in seen if isinstance(event, Warned) and "not answered" in event.text)
    assert "1 of 12 rows are not answered" in told and "(first: rows.jsonl:4, 3" in told
    assert "difference" not in found["exact_match"], "over other rows"
    assert found["exact_match"]["against"]["value"] == 0

    data.write_text(json.dumps(rows[3]) + "\n")
    assert set(figures(model, str(data), too_long="left", **PLAIN)) == {"loss", "perplexity"}, "no row has an answer"


QUESTIONS: list[dict[str, Any]] = [
    {"question_id": 81, "category": "writing", "turns": ["say red 0", "say blue 1"]},
    {"question_id": 82, "category": "math", "turns": ["say green 2"]},
    {"question_id": 83, "category": "math", "turns": ["say grey 2"]},
]


def test_a_run_is_measured_on_rows_as_it_was_trained_on_them(model: Path, tmp_path: Path) -> None:
    """The loss on a run's own validation file is the one that it shows itself, whatever its rows were made of."""
    rows = [
        {"messages": [{"role": "user", "content": f"I am {{{{who}}}}. {'please ' * (i % 9)}say {i}"},
                      {"role": "assistant", "content": f"{{{{who}}}}: {i}"}]}
        for i in range(40)
    ]  # fmt: skip
    for name, part in (("train", rows[:28]), ("valid", rows[28:])):
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in part))
    made: dict[str, Any] = {"system": "Be brief.", "fill": {"who": "Ann"}, "seq_len": 100, "too_long": "left"}
    how: dict[str, Any] = {"rank": 4, "max_steps": 2, "compute_dtype": "float32", "share_prefix": "off"}
    run = smidgen.finetune(str(model), str(tmp_path), tmp_path / "run", train_on_prompt=True, **made, **how)
    valid, seen = str(tmp_path / "valid.jsonl"), list[Event]()

    def loss(which: Path, **settings: Any) -> float:
        # the run's batches: other ones round otherwise
        given = {"answers": False, "batch_size": 4, "report": seen.append} | settings
        return figures(which, valid, **given)["loss"]["value"]

    own = loss(run.path)
    assert own == run.summary["loss_after"]
    assert loss(next((run.path / "checkpoints").iterdir())) == own
    said = [event.text for event in seen if isinstance(event, (Note, Warned))]
    assert any("rows as" in text and "system 'Be brief.'" in text and "seq_len 100" in text for text in said)
    assert any("rows are longer than seq_len 100: their beginnings are cut" in text for text in said)
    others = [{"system": ""}, {"fill": {"who": "Bo"}}, {"seq_len": 90}, {"too_long": "right"},
              {"too_long": "drop"}, {"train_on_prompt": False}]  # fmt: skip
    losses = [loss(run.path, **other) for other in others]
    assert len({own, *losses}) == 1 + len(others), "each flag wins over the run, and matters"
    same = loss(model, train_on_prompt=True, compute_dtype="float32", **made)
    assert same == pytest.approx(run.summary["loss_before"], rel=1e-6), "the same flags make the same rows of a base"


def test_open_questions_are_answered_turn_by_turn(stories: Path, tmp_path: Path) -> None:
    file = tmp_path / "questions.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in QUESTIONS))
    out, how = tmp_path / "a.jsonl", {"max_new_tokens": 24, "limit": 2, "batch_size": 1}
    result = smidgen.evaluate(stories, questions=file, out=out, **how, **PLAIN)
    assert result["questions"] == {"out": str(out), "questions": 2}
    assert result["data"] == []
    lines = [json.loads(line) for line in out.read_text().splitlines()]
    loaded = smidgen.load(stories, **PLAIN)

    def answered(*turns: str) -> str:
        roles = ("user", "assistant", "user")
        conversation = [{"role": role, "content": turn} for role, turn in zip(roles, turns, strict=False)]
        return loaded.generate(conversation, max_new_tokens=24).text.strip()

    first = answered("say red 0")
    second = answered("say red 0", first, "say blue 1")
    assert second != answered("say red 0", "", "say blue 1"), "what was answered before is in view"
    assert lines[0] == QUESTIONS[0] | {"model_id": str(stories), "choices": [{"index": 0, "turns": [first, second]}]}
    assert [line["question_id"] for line in lines] == [81, 82]


def test_answers_of_the_base_stand_beside_those_of_the_run(run: Path, tmp_path: Path) -> None:
    file = tmp_path / "questions.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in QUESTIONS))
    events: list[Event] = []
    smidgen.evaluate(
        run, questions=file, out=tmp_path / "b.jsonl", max_new_tokens=4, against="base", report=events.append
    )
    lines = [json.loads(line) for line in (tmp_path / "b.jsonl").read_text().splitlines()]
    untrained = smidgen.load(run, adapter=False).generate("say green 2", max_new_tokens=4).text.strip()
    assert lines[1]["against"] == {"model_id": "base", "choices": [{"index": 0, "turns": [untrained]}]}
    assert lines[1]["choices"] != lines[1]["against"]["choices"]
    assert any("of 4 answers did not come to their end" in event.text for event in events if isinstance(event, Warned))


def test_questions_that_fill_all_positions_are_left_unanswered(model: Path, tmp_path: Path) -> None:
    file = tmp_path / "questions.jsonl"
    file.write_text(json.dumps({"turns": ["hi", "a" * 300, "and?"]}) + "\n" + json.dumps({"turns": ["ho"]}) + "\n")
    events: list[Event] = []
    smidgen.evaluate(model, questions=file, out=tmp_path / "a.jsonl", max_new_tokens=8, report=events.append, **PLAIN)
    first, second = (json.loads(line) for line in (tmp_path / "a.jsonl").read_text().splitlines())
    assert first["choices"][0]["turns"][0] is not None and first["choices"][0]["turns"][1:] == [None, None]
    assert second["choices"][0]["turns"] != [None]
    assert any("2 of 4 turns have no answer" in event.text for event in events if isinstance(event, Warned))


def test_the_base_of_a_run_is_what_it_was_trained_on(model: Path, run: Path) -> None:
    ids = torch.arange(20)[None]
    base, alone = smidgen.load(run, adapter=False), smidgen.load(model, compute_dtype="float32")
    with torch.no_grad():
        assert torch.equal(base.model(input_ids=ids).logits, alone.model(input_ids=ids).logits)
    assert base.base.storage == "nf4-dq"


def _wrong(model: Path, rows: Path, folder: Path) -> dict[str, tuple[type, str, Callable[[], Any]]]:
    (folder / "taken.jsonl").write_text("x")
    (folder / "q.jsonl").write_text('{"turns": ["hi"]}\n')
    (folder / "broken.jsonl").write_text('{"query": "q", "choices": ["a", "b"], "gold": 7}\n')
    data, questions, out = str(rows), folder / "q.jsonl", folder / "new.jsonl"
    return {
        "nothing to do": (SettingsError, "data: missing", lambda: smidgen.evaluate(model)),
        "no file for answers": (SettingsError, "out: ", lambda: smidgen.evaluate(model, questions=questions)),
        "no questions": (SettingsError, "out: ", lambda: smidgen.evaluate(model, data, out=out)),
        "no base": (SettingsError, "is no run, so it has no", lambda: smidgen.evaluate(model, data, against="base")),
        "no text": (SettingsError, "protocol: is for", lambda: smidgen.evaluate(model, data, protocol="gptq")),
        "protocol": (SettingsError, "protocol: expected", lambda: smidgen.evaluate(model, data, protocol="zz")),
        "limit": (SettingsError, "limit: expected 1 or more", lambda: smidgen.evaluate(model, data, limit=0)),
        "no such setting": (TypeError, "batchsize", lambda: smidgen.evaluate(model, data, batchsize=1)),
        "bad row": (
            DataError, "broken.jsonl:1, column gold", lambda: smidgen.evaluate(model, str(folder / "broken.jsonl")),
        ),
        "questions as data": (DataError, "--questions FILE", lambda: smidgen.evaluate(model, str(questions))),
        "no file": (DataError, "no data at", lambda: smidgen.evaluate(model, str(folder / "none.jsonl"))),
        "taken": (
            RunError, "exists already",
            lambda: smidgen.evaluate(model, questions=questions, out=folder / "taken.jsonl"),
        ),
    }  # fmt: skip


WRONG = ["nothing to do", "no file for answers", "no questions", "no base", "no text", "protocol", "limit"]
WRONG += ["no such setting", "bad row", "questions as data", "no file", "taken"]


@pytest.mark.parametrize("case", WRONG)
def test_what_cannot_work_is_said_before_anything_is_loaded_or_written(
    case: str, model: Path, rows: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    kind, said, call = _wrong(model, rows, tmp_path)[case]
    if case != "no such setting":
        monkeypatch.setattr("smidgen.evaluation.evaluate.load", lambda *_, **__: pytest.fail("a model was loaded"))
    with pytest.raises(kind, match=said):
        call()
    assert not (tmp_path / "new.jsonl").exists()
    assert (tmp_path / "taken.jsonl").read_text() == "x"


def test_plain_text_says_its_protocol(stories: Path, tmp_path: Path) -> None:
    text = tmp_path / "story.txt"
    text.write_text("Once upon a time, there was a little girl named Lily. She loved to play outside. " * 40)
    notes: list[str] = []
    with pytest.raises(DataError, match=r"windows of 2048 tokens"):
        smidgen.evaluate(stories, str(text), report=lambda event: notes.append(getattr(event, "text", "")), **PLAIN)
    assert any("protocol gptq" in note for note in notes)
    result = smidgen.evaluate(stories, str(text), protocol="llama.cpp", limit=1, **PLAIN)
    (part,) = result["data"]
    assert (part["kind"], part["protocol"], part["rows"], part["tokens"]) == ("text", "llama.cpp", 1, 255)
    assert part["figures"]["perplexity"]["low"] is None, "one window says nothing of others"


def test_notes_name_what_was_found(stories: Path) -> None:
    events: list[Event] = []
    smidgen.evaluate(stories, real("piqa.jsonl"), limit=3, report=events.append, **PLAIN)
    assert any(isinstance(event, Note) and event.text.endswith("piqa.jsonl: 3 rows, choices") for event in events)
