"""The settings of a run's rows: each changes what it says."""

import json
from pathlib import Path
from typing import Any

import pytest
import yaml

import smidgen
from smidgen.data.edits import Edits
from smidgen.data.records import read_data
from smidgen.errors import DataError, SettingsError
from smidgen.events import Note, Warned


@pytest.fixture
def data(tmp_path: Path) -> str:
    """20 rows, of which two have long questions, one of them so long that no answer fits, and one is a copy."""
    rows = [{"prompt": f"say {i % 19}", "completion": f"{{{{who}}}} says {i % 19}"} for i in range(20)]
    rows[4]["prompt"], rows[7]["prompt"] = "x" * 70, "x" * 400
    (tmp_path / "a.jsonl").write_text("\n".join(map(json.dumps, rows)))
    return str(tmp_path / "a.jsonl")


def inspect(model: Path, data: Any, **settings: Any) -> tuple[Any, list[str], list[str]]:
    events: list[Any] = []
    found = smidgen.inspect_data(str(model), data, report=events.append, **settings)
    notes = [event.text for event in events if isinstance(event, Note)]
    return found, notes, [event.text for event in events if isinstance(event, Warned)]


def shown(report: Any) -> str:
    return "".join(text for text, _ in report.shown.pieces)


@pytest.mark.parametrize(
    ("how", "rows", "said"),
    [
        ("right", 18, ["their ends are cut", "1 rows have no trained token within seq_len and are left out"]),
        ("left", 19, ["their beginnings are cut"]),
        ("drop", 17, ["they are left out"]),
    ],
)
def test_rows_and_tokens_that_length_costs_are_counted(
    how: str, rows: int, said: list[str], model: Path, data: str, tmp_path: Path
) -> None:
    settings: dict[str, Any] = {"seq_len": 100, "too_long": how}
    report, _, warned = inspect(model, data, **settings)
    assert (report.truncated, report.lost_tokens) == (2, 105 + 435 - (0 if how == "drop" else 2 * 100))
    assert f"2 of 19 rows are longer than seq_len 100: {said[0]}, {report.lost_tokens:,} tokens are lost" in warned[0]
    assert [text for text in warned[1:] if text.startswith(tuple(said[1:]))] == warned[1:]
    assert "a.jsonl:5" in warned[0]
    events: list[Any] = []
    smidgen.finetune(
        str(model),
        data,
        tmp_path / "run",
        rank=2,
        max_steps=1,
        compute_dtype="float32",
        report=events.append,
        **settings,
    )
    texts = [event.text for event in events if isinstance(event, (Note, Warned))]
    assert warned[0] in texts and f"data: {rows} rows to train on, 1 held out" in texts


def test_too_long_error_names_the_row_before_anything_is_written(model: Path, data: str, tmp_path: Path) -> None:
    with pytest.raises(
        DataError, match=r"a\.jsonl:5 is too long, expected at most 70 tokens, found \d+\. Raise --seq-len"
    ):
        smidgen.finetune(str(model), data, tmp_path / "run", seq_len=70, too_long="error")
    assert not (tmp_path / "run").exists()
    with pytest.raises(SettingsError, match="too_long: expected one of right, left, drop, error, found 'middle'"):
        smidgen.finetune(str(model), data, tmp_path / "run", too_long="middle")


def test_most_rows_may_lose_their_beginnings_but_not_their_answers(model: Path, data: str, tmp_path: Path) -> None:
    quick: dict[str, Any] = {"seq_len": 30, "rank": 2, "max_steps": 1, "compute_dtype": "float32"}
    with pytest.raises(DataError, match=r"the answers of .* rows are cut off"):
        smidgen.finetune(str(model), data, tmp_path / "run", **quick)
    smidgen.finetune(str(model), data, tmp_path / "run", too_long="left", **quick)


def test_dropping_every_row_is_an_error(model: Path, data: str, tmp_path: Path) -> None:
    with pytest.raises(DataError, match="there are no rows to train on"):
        smidgen.finetune(str(model), data, tmp_path / "run", seq_len=8, too_long="drop")


def test_limit_takes_the_first_rows_of_each_data_set(model: Path, data: str, rows: Path) -> None:
    assert inspect(model, data, limit=5)[0].rows == 5
    assert inspect(model, [data, str(rows)], limit=5)[0].rows == 10
    assert inspect(model, data, limit=500)[0].rows == 20
    with pytest.raises(SettingsError, match="limit: expected 1 or more"):
        inspect(model, data, limit=0)


def test_system_replaces_the_rows_own_and_may_take_it_away(model: Path, tmp_path: Path) -> None:
    turns = [{"role": r, "content": c} for r, c in (("system", "old"), ("user", "hi"), ("assistant", "bye"))]
    (tmp_path / "s.jsonl").write_text("\n".join(json.dumps({"messages": turns[i % 2 :]}) for i in range(12)))
    spec = str(tmp_path / "s.jsonl")
    assert "system\nold" in shown(inspect(model, spec)[0])
    assert "system\nnew" in shown(inspect(model, spec, system="new")[0])
    assert "system" not in shown(inspect(model, spec, system="")[0])
    tokens = {system: inspect(model, spec, system=system)[0].tokens for system in (None, "new", "")}
    assert tokens["new"] > tokens[None] > tokens[""]  # every row gets it, also those that had none
    run = smidgen.finetune(
        str(model), spec, tmp_path / "run", system="new", rank=2, max_steps=1, compute_dtype="float32"
    )
    assert json.loads((run.path / "smidgen.json").read_text())["system"] == "new"  # for generate and exports
    assert yaml.safe_load((run.path / "settings.yaml").read_text())["system"] == "new"


def test_placeholders_are_filled_and_those_that_are_not_are_named(model: Path, data: str) -> None:
    plain, notes, _ = inspect(model, data)
    assert "{{who}} says" in shown(plain)
    assert any("placeholders are trained on as they stand ({{who}})" in note for note in notes)
    filled, notes, _ = inspect(model, data, fill={"who": "Ann"})
    assert "Ann says" in shown(filled)
    assert not any("placeholders" in note for note in notes)


def test_placeholders_of_texts_and_of_calls_are_named_and_filled(model: Path, tmp_path: Path) -> None:
    call = {"name": "greet", "arguments": {"names": ["{{who}}"]}}
    turns = [{"role": "user", "content": "hi"}, {"role": "assistant", "tool_calls": [{"function": call}]}]
    for name, row in (("text", {"text": "I am {{who}}."}), ("call", {"messages": turns})):
        (tmp_path / name).with_suffix(".jsonl").write_text(json.dumps(row))
        spec = str((tmp_path / name).with_suffix(".jsonl"))
        said = f"{name}.jsonl: placeholders are trained on as they stand ({{{{who}}}}); --fill NAME=TEXT fills them"
        assert said in read_data(spec).notes
        filled = read_data(spec, edits=Edits(fill={"who": "Ann"}))
        assert "Ann" in str(filled.train[0]) and "who" not in str(filled.train[0])
        assert said not in filled.notes


def test_placeholders_of_the_given_system_message_are_filled(
    model: Path, data: str, rows: Path, tmp_path: Path
) -> None:
    how: dict[str, Any] = {"system": "You are {{who}}. It is {{day}}.", "fill": {"who": "Ann"}}
    for spec in (data, str(rows)):  # rows that have the name themselves, and rows that have not
        filled, notes, _ = inspect(model, spec, **how)
        assert "You are Ann. It is {{day}}." in shown(filled)
        assert any("placeholders are trained on as they stand ({{day}})" in note for note in notes)
    kept = {Edits(how["system"], fill).key() for fill in ({}, {"who": "Ann"}, {"day": "Monday"})}
    assert len(kept) == 3  # tokens of one are not taken for those of another
    run = smidgen.finetune(str(model), str(rows), tmp_path / "run", rank=2, max_steps=1, compute_dtype="float32", **how)
    assert json.loads((run.path / "smidgen.json").read_text())["system"] == "You are Ann. It is {{day}}."


def test_a_name_that_only_a_replaced_system_message_had_is_refused(model: Path, tmp_path: Path) -> None:
    turns = [{"role": r, "content": c} for r, c in (("system", "{{who}}"), ("user", "hi"), ("assistant", "bye"))]
    (tmp_path / "s.jsonl").write_text("\n".join(json.dumps({"messages": turns}) for _ in range(12)))
    assert "Ann" in shown(inspect(model, str(tmp_path / "s.jsonl"), fill={"who": "Ann"})[0])
    with pytest.raises(SettingsError, match=r"fill: no row says \{\{who\}\}"):
        inspect(model, str(tmp_path / "s.jsonl"), fill={"who": "Ann"}, system="new")


def test_fill_for_a_name_that_no_row_has_is_refused(model: Path, data: str, rows: Path) -> None:
    says = r"fill: no row says \{\{wo\}\}, placeholders are who"
    with pytest.raises(SettingsError, match=says):
        inspect(model, data, fill={"who": "Ann", "wo": "Bo"})
    with pytest.raises(SettingsError, match=says):
        smidgen.evaluate(model, data, fill={"wo": "Bo"})
    with pytest.raises(SettingsError, match=r"placeholders are none"):
        inspect(model, str(rows), fill={"who": "Ann"})
    inspect(model, [data, str(rows)], fill={"who": "Ann"})  # one data set with it is enough


def test_a_system_message_for_plain_text_is_said_to_change_nothing(model: Path, data: str, tmp_path: Path) -> None:
    (tmp_path / "t.jsonl").write_text(json.dumps({"text": "Once upon a time"}))
    said = "rows of plain text have no system message, so the one that is given changes nothing"
    assert f"t.jsonl: {said}" in inspect(model, str(tmp_path / "t.jsonl"), system="new")[1]
    assert not any(said in note for note in inspect(model, data, system="new")[1])
    assert not any(said in note for note in inspect(model, str(tmp_path / "t.jsonl"))[1])


def test_measured_rows_that_are_training_rows_too_are_warned_of(tmp_path: Path) -> None:
    def write(place: str, numbers: range) -> str:
        file = tmp_path / place
        file.parent.mkdir(exist_ok=True)
        file.write_text("\n".join(json.dumps({"text": f"row {i}"}) for i in numbers))
        return str(file)

    def warned(*specs: str) -> list[str]:
        events: list[Any] = []
        read_data(specs, report=events.append)
        return [event.text for event in events if isinstance(event, Warned)]

    for name, numbers in (("train", range(9)), ("valid", range(7, 11)), ("test", range(8, 20))):
        write(f"leaky/{name}.jsonl", numbers)
    assert warned(str(tmp_path / "leaky")) == [
        "2 of 4 held-out rows are training rows too, so their figures flatter"
        " (first: valid.jsonl:1, the same as train.jsonl:8)",
        "1 of 12 test rows are training rows too, so their figures flatter"
        " (first: test.jsonl:1, the same as train.jsonl:9)",
    ]
    for name, numbers in (("train", range(9)), ("valid", range(9, 12))):
        write(f"clean/{name}.jsonl", numbers)
    assert warned(str(tmp_path / "clean")) == []
    # the rows that are held out of one file may be trained on in another
    one, other = write("one.jsonl", range(100)), write("other.jsonl", range(300))
    assert warned(one) == warned(other) == []
    assert [text.split(" are ")[0] for text in warned(one, other)] != []


def test_edits_do_not_change_which_rows_are_held_out(model: Path, data: str) -> None:
    places = [
        [row.where for row in read_data(data, edits=edits).validation]
        for edits in (Edits(), Edits("new"), Edits(fill={"who": "Ann"}))
    ]
    assert places[0] == places[1] == places[2] != []


def test_copies_are_counted(model: Path, data: str) -> None:
    report, notes, _ = inspect(model, data)
    assert "a.jsonl: 2 training rows are copies of another one" in notes
    assert ("a.jsonl:20", "the same as a.jsonl:1") in report.suspicious


def test_a_file_of_flags_takes_lists(model: Path, data: str, rows: Path, tmp_path: Path) -> None:
    from click.testing import CliRunner

    from smidgen.cli.main import smidgen as command

    # 18 + 23 rows are left: one is held out of each, and one has no answer within the model's positions
    config = {"model": str(model), "data": [data, str(rows)], "mix": [2, 1], "fill": {"who": "Ann"}}
    (tmp_path / "c.yaml").write_text(yaml.safe_dump(config))
    result = CliRunner().invoke(command, ["data", "--config", str(tmp_path / "c.yaml"), "--json"])
    assert result.exception is None
    found = json.loads(result.output.splitlines()[-1])
    assert found["rows"] == 20 + 24 and found["mix"].startswith("a.jsonl 66% (27 rows")
