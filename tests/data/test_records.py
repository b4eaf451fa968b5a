"""Reading rows: every layout and kind of file, what is held out, and what bad input is told."""

import json
import os
import random
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from smidgen.data.records import read_data
from smidgen.data.rows import first_alike
from smidgen.errors import DataError
from smidgen.events import Note

USER_AND_ANSWER = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "bye"}]
GOOD = json.dumps({"messages": USER_AND_ANSWER})


def write(path: Path, *records: Any) -> str:
    path.write_text("\n".join(json.dumps(record) for record in records), encoding="utf-8")
    return str(path)


@pytest.mark.parametrize(
    ("record", "layout", "messages"),
    [
        ({"messages": USER_AND_ANSWER}, "messages", USER_AND_ANSWER),
        ({"prompt": "hi", "completion": "bye"}, "prompt/completion", USER_AND_ANSWER),
        ({"prompt": USER_AND_ANSWER[:1], "completion": USER_AND_ANSWER[1:]}, "prompt/completion", USER_AND_ANSWER),
        ({"prompt": "hi", "response": "bye"}, "prompt/response", USER_AND_ANSWER),
        ({"instruction": "hi", "input": "", "output": "bye"}, "alpaca", USER_AND_ANSWER),
        ({"instruction": "hi", "response": "bye"}, "dolly", USER_AND_ANSWER),
        (
            {"instruction": "Add.", "input": "1 + 1", "output": "2"},
            "alpaca",
            [{"role": "user", "content": "Add.\n\n1 + 1"}, {"role": "assistant", "content": "2"}],
        ),
        (
            {"instruction": "Who?", "context": "Ann came.", "response": "Ann"},
            "dolly",
            [{"role": "user", "content": "Who?\n\nAnn came."}, {"role": "assistant", "content": "Ann"}],
        ),
        (
            {
                "system": "Be kind.",
                "conversations": [{"from": "human", "value": "hi"}, {"from": "gpt", "value": "bye"}],
            },
            "sharegpt",
            [{"role": "system", "content": "Be kind."}, *USER_AND_ANSWER],
        ),
        ({"conversations": USER_AND_ANSWER}, "sharegpt", USER_AND_ANSWER),
        ({"text": "Once upon a time"}, "text", []),
        ({"prompt": "hi", "chosen": "bye", "rejected": "no"}, "preference", USER_AND_ANSWER),
        ({"prompt": USER_AND_ANSWER[:1], "chosen": USER_AND_ANSWER[1:], "rejected": []}, "preference", USER_AND_ANSWER),
        ({"prompt": "hi", "chosen": USER_AND_ANSWER, "rejected": USER_AND_ANSWER}, "preference", USER_AND_ANSWER),
        ({"chosen": USER_AND_ANSWER, "rejected": USER_AND_ANSWER}, "preference", USER_AND_ANSWER),
        (
            {"chosen": "\n\nHuman: hi\n\nAssistant: bye", "rejected": "\n\nHuman: hi\n\nAssistant: no"},
            "preference",
            USER_AND_ANSWER,
        ),
        (
            {"instruction": "hi", "input": "", "output": "no", "chosen": "bye", "rejected": "no"},
            "preference",
            USER_AND_ANSWER,
        ),
    ],
)
def test_a_layout_is_told_by_its_columns(tmp_path: Path, record: Any, layout: str, messages: Any) -> None:
    events: list[Any] = []
    data = read_data(write(tmp_path / "a.jsonl", record), report=events.append)
    assert data.layout == layout
    assert list(data.train[0].messages) == messages
    assert data.train[0].text == record.get("text")
    assert data.train[0].where == "a.jsonl:1"
    assert f"layout {layout}" in events[0].text


def test_the_best_ranked_path_of_a_tree_is_taken_up_to_its_last_answer(tmp_path: Path) -> None:
    def said(text: str, role: str, *replies: Any, **more: Any) -> Any:
        return {"text": text, "role": role, "replies": list(replies), **more}

    tree = said(
        "hi",
        "prompter",
        said("no rank", "assistant"),
        said("second", "assistant", said("why?", "prompter"), rank=1),
        said("best but deleted", "assistant", rank=0, deleted=True),
        said("bye", "assistant", said("and?", "prompter", rank=None), rank=0),
    )
    data = read_data(write(tmp_path / "a.jsonl", {"message_tree_id": "x", "tree_state": "ready", "prompt": tree}))
    assert data.layout == "oasst"
    assert list(data.train[0].messages) == USER_AND_ANSWER
    for broken, says in (
        (said("hi", "prompter"), "a.jsonl:1 has no answer"),
        (said("hi", "prompter", "bye"), "a.jsonl:1, message 2: wrong type"),
        ({"text": "hi", "role": "prompter", "replies": {}}, None),
        ({"text": "hi", "role": "prompter", "replies": "bye"}, "message 1, replies: wrong type"),
    ):
        spec = write(tmp_path / "a.jsonl", {"message_tree_id": "x", "prompt": broken})
        with pytest.raises(DataError, match=says or "has no answer"):
            read_data(spec)


def test_a_preference_without_its_prompt_is_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"column chosen: nothing says what it answers.*expected a column prompt"):
        read_data(write(tmp_path / "a.jsonl", {"chosen": "bye", "rejected": "no"}))


def test_a_text_of_a_whole_conversation_keeps_its_turns(tmp_path: Path) -> None:
    """hh-rlhf's: a speaker is one only after a blank line."""
    chosen = "\n\nHuman: hi\nHuman: you\n\nAssistant: bye\n\nso long\n\nHuman: what?\n\nAssistant: bye"
    row = read_data(write(tmp_path / "a.jsonl", {"chosen": chosen, "rejected": chosen})).train[0]
    said = [(message["role"], message["content"]) for message in row.messages]
    assert said == [
        ("user", "hi\nHuman: you"),
        ("assistant", "bye\n\nso long"),
        ("user", "what?"),
        ("assistant", "bye"),
    ]


def test_single_messages_of_trees_are_refused(tmp_path: Path) -> None:
    """OASST as the hub has it: as plain text every message was a document of its own, without roles."""
    one = {"message_id": "a", "parent_id": None, "message_tree_id": "a", "text": "hi", "role": "prompter", "rank": None}
    with pytest.raises(DataError, match=r"a.jsonl:1 is one message of a tree, expected a whole tree.* oasst1"):
        read_data(write(tmp_path / "a.jsonl", one))


def test_calls_and_tools_come_out_in_one_form(tmp_path: Path) -> None:
    spec = write(
        tmp_path / "a.jsonl",
        {
            "tools": '[{"name": "add"}]',
            "conversations": [
                {"from": "human", "value": "1 + 1"},
                {"from": "function_call", "value": '{"name": "add", "arguments": {"a": 1}}'},
                {"from": "observation", "value": "2"},
                {"from": "gpt", "value": "Two."},
            ],
        },
    )
    row = read_data(spec).train[0]
    call = {"type": "function", "function": {"name": "add", "arguments": {"a": 1}}}
    assert row.messages[1] == {"role": "assistant", "content": "", "tool_calls": [call]}
    assert row.messages[2] == {"role": "tool", "content": "2"}
    assert row.tools == ({"type": "function", "function": {"name": "add"}},)
    assert row.answer == "Two."
    called = {"role": "assistant", "tool_calls": [{"id": "x", "function": {"name": "add", "arguments": '{"a": 1}'}}]}
    row = read_data(write(tmp_path / "b.jsonl", {"messages": [USER_AND_ANSWER[0], called]})).train[0]
    assert row.messages[1] == {"role": "assistant", "content": "", "tool_calls": [{"id": "x", **call}]}


def test_all_kinds_of_file_hold_the_same_rows(tmp_path: Path) -> None:
    parquet = pytest.importorskip("pyarrow.parquet")
    arrow = pytest.importorskip("pyarrow")
    records = [{"prompt": f"say, {i}", "completion": f"line\nbreak \u2028 {i}"} for i in range(3)]
    write(tmp_path / "a.jsonl", *records)
    (tmp_path / "a.json").write_text(json.dumps(records, indent=1), encoding="utf-8")
    cells = "".join(f'"{record["prompt"]}","{record["completion"]}"\r\n' for record in records)
    (tmp_path / "a.csv").write_text("\ufeffprompt,completion\r\n" + cells, encoding="utf-8", newline="")
    parquet.write_table(arrow.Table.from_pylist(records), tmp_path / "a.parquet")
    read = {suffix: read_data(str(tmp_path / f"a.{suffix}")).train for suffix in ("jsonl", "json", "csv", "parquet")}
    assert [row.messages for row in read["jsonl"]] == [
        ({"role": "user", "content": one["prompt"]}, {"role": "assistant", "content": one["completion"]})
        for one in records
    ]
    for rows in read.values():
        assert [row.messages for row in rows] == [row.messages for row in read["jsonl"]]
    assert [row.where for row in read["json"]] == ["a.json:2", "a.json:6", "a.json:10"]
    assert [row.where for row in read["csv"]] == ["a.csv:2", "a.csv:4", "a.csv:6"]


def test_a_byte_order_mark_and_null_keys_are_no_part_of_a_row(tmp_path: Path) -> None:
    turns = [turn | {"name": None, "tool_calls": None} for turn in USER_AND_ANSWER]
    (tmp_path / "a.jsonl").write_text("\ufeff" + json.dumps({"messages": turns}), encoding="utf-8")
    assert list(read_data(str(tmp_path / "a.jsonl")).train[0].messages) == USER_AND_ANSWER


def test_a_folder_has_its_splits_by_file_name(tmp_path: Path) -> None:
    for name, count in {"train-0": 2, "train-1": 1, "valid": 4, "test": 3}.items():
        write(tmp_path / f"{name}.jsonl", *[{"text": f"{name} {i}"} for i in range(count)])
    (tmp_path / "notes.md").write_text("not data")
    data = read_data(str(tmp_path))
    assert [row.text for row in data.train] == ["train-0 0", "train-0 1", "train-1 0"]
    assert (len(data.validation), len(data.test)) == (4, 3)


def test_the_shipped_data_set_is_found_by_name() -> None:
    data = read_data("toolcalls")
    assert (len(data.train), len(data.validation), len(data.test)) == (640, 100, 100)


def texts(rows: list[Any]) -> set[str]:
    return {row.text for row in rows}


@pytest.mark.parametrize(("rows", "held_out"), [(9, 0), (10, 1), (200, 10), (5000, 100)])
def test_rows_are_held_out_where_there_is_no_validation_file(tmp_path: Path, rows: int, held_out: int) -> None:
    spec = write(tmp_path / "a.jsonl", *[{"text": str(i)} for i in range(rows)])
    events: list[Any] = []
    data = read_data(spec, report=events.append)
    assert (len(data.train), len(data.validation)) == (rows - held_out, held_out)
    assert any("held out" in event.text for event in events if isinstance(event, Note)) == (held_out > 0)
    assert len(read_data(spec, hold_out=False).train) == rows


def test_the_same_rows_are_held_out_in_any_order_and_never_a_copy_of_a_training_row(tmp_path: Path) -> None:
    records = [{"text": str(i)} for i in range(60)] + [{"text": f"again {i % 20}"} for i in range(40)]
    first = read_data(write(tmp_path / "a.jsonl", *records))
    random.Random(1).shuffle(records)
    second = read_data(write(tmp_path / "b.jsonl", *records))
    assert texts(first.validation) == texts(second.validation)
    assert len(first.validation) == 5
    assert not any(text.startswith("again") for text in texts(first.validation))


def test_the_first_of_rows_that_are_alike_is_found() -> None:
    draw = np.random.default_rng(0)
    kinds = draw.integers(0, 256, (50, 16), np.uint8)
    kinds[1, 8:], kinds[3, :8] = kinds[0, 8:], kinds[2, :8]  # halves alone do not make rows alike
    hashes = kinds[draw.integers(0, 50, 400)]
    rows = [row.tobytes() for row in hashes]
    assert first_alike(hashes).tolist() == [rows.index(row) for row in rows]
    assert first_alike(hashes[:0]).tolist() == []


def test_rows_of_several_files_know_their_places(tmp_path: Path) -> None:
    for name, count in (("train-a", 3), ("train-b", 2)):
        (tmp_path / f"{name}.jsonl").write_text("".join(f'{{"text": "{name} {i}"}}\n' for i in range(count)))
    (tmp_path / "c.jsonl").write_text('\n{"text": "c"}\n')
    rows = read_data([str(tmp_path), str(tmp_path / "c.jsonl"), str(tmp_path)], hold_out=False).train
    places = ["train-a.jsonl:1", "train-a.jsonl:2", "train-a.jsonl:3", "train-b.jsonl:1", "train-b.jsonl:2"]
    assert [rows.where(index) for index in range(len(rows))] == [*places, "c.jsonl:2", *places]
    chosen = np.arange(11) % 3 == 1
    assert [row.where for row in rows.select(chosen)] == [row.where for row in rows][1::3]
    assert [rows.select(chosen).where(index) for index in range(4)] == [row.where for row in rows][1::3]


def test_columns_that_the_layout_does_not_know_are_left_out_and_said(tmp_path: Path) -> None:
    notes = read_data(write(tmp_path / "a.jsonl", {"id": 1, "text": "a", "lang": "en"})).notes
    assert "a.jsonl: columns left out: id, lang" in notes


DEEP = '{"text": ' + "[" * 70 + "]" * 70 + "}"
BAD_LINES = {
    "not json": ('{"messages": [', r"a.jsonl:3 is not valid JSON, .*expected one object a line"),
    "a list": ("[1]", r"a.jsonl:3 is not a row, .*found a list"),
    "mixed layout": (
        '{"text": "hi"}',
        r"a.jsonl:3 has another layout than a.jsonl:1, expected columns messages .*text",
    ),
    "no answer": ('{"messages": [{"role": "user", "content": "x"}]}', r"a.jsonl:3 has no answer, .*found user"),
    "no turns": ('{"messages": []}', r"a.jsonl:3 has no answer, .*no messages"),
    "empty answer": (GOOD.replace("bye", " "), r"a.jsonl:3 has no answer, .*found empty text"),
    "wrong type": ('{"messages": 5}', r"a.jsonl:3, column messages: wrong type, expected a list .*found a number"),
    "wrong turn": ('{"messages": ["hi"]}', r"a.jsonl:3, messages\[0\]: wrong type, .*found text"),
    "wrong content": (GOOD.replace('"hi"', "7"), r"a.jsonl:3, messages\[0\]: wrong type of content, .*a number"),
    "unknown role": (GOOD.replace("user", "boss"), r"a.jsonl:3, messages\[0\]: unknown role, .*found 'boss'"),
    "lone surrogate": (GOOD.replace("hi", "\\ud83d"), r"a.jsonl:3 holds text that is no Unicode, .*U\+D83D"),
    "too deep": (DEEP, r"a.jsonl:3 is nested too deep, expected at most 64 levels"),
    "much too deep": ("[" * 100_000, r"a.jsonl:3 is (nested too deep|not valid JSON)"),
    "too long": (GOOD.replace("hi", "x" * 16_000_001), r"a.jsonl:3 is too long, expected at most 16 MB"),
    "huge number": (f'{{"text": {"9" * 5000}}}', r"a.jsonl:3 (is not valid JSON|has another layout)"),
}


@pytest.mark.parametrize("case", BAD_LINES)
def test_a_bad_line_is_named(tmp_path: Path, case: str) -> None:
    line, message = BAD_LINES[case]
    (tmp_path / "a.jsonl").write_text(f"{GOOD}\n\n{line}\n{GOOD}\n", encoding="utf-8")
    with pytest.raises(DataError, match=message):
        read_data(str(tmp_path / "a.jsonl"))


LATIN = "caf\xe9".encode("latin-1")
BAD_FILES = {
    "empty": ("a.jsonl", b"", r"a\.jsonl is empty"),
    "blank": ("a.jsonl", b"\n\n", r"no rows in train"),
    "empty list": ("a.json", b"[]", r"a\.json is an empty list"),
    "open list": ("a.json", b'[\n{"text": "a"},\n{"text": "b"}\n', r"a\.json:4 is not valid JSON.*the end of the file"),
    "broken list": ("a.json", b'[\n{"text": "a"},\n{"text" "b"}]', r"a\.json:3 is not valid JSON"),
    "missing comma": ("a.json", b'[\n{"text": "a"}\n{"text": "b"}]', r"a\.json:3 is not valid JSON.*after a row"),
    "list item": ("a.json", b'[\n{"text": "a"},\n7]', r"a\.json:3 is not a row"),
    "latin-1 line": ("a.jsonl", b'{"text": "a"}\n{"text": "' + LATIN + b'"}', r"a\.jsonl:2 is not UTF-8.*byte 0xe9"),
    "latin-1 list": ("a.json", b'[{"text": "a"},\n{"text": "' + LATIN + b'"}]', r"a\.json:2 is not UTF-8"),
    "utf-16": ("a.jsonl", '{"text": "a"}'.encode("utf-16"), r"a\.jsonl:1 is not UTF-8.*found UTF-16"),
    "ragged csv": ("a.csv", b"prompt,completion\na,b\na,b,c\n", r"a\.csv:3 does not fit the header.*found 3"),
    "open quote": ("a.csv", b'prompt,completion\na,b\n"a,b\n', r"a\.csv:3 is not CSV"),
    "no answer in csv": ("a.csv", b'prompt,completion\n"a\nb",c\nd,\n', r"a\.csv:4 has no answer"),
    "header twice": ("a.csv", b"text,text\na,b\n", r"a\.csv:1 names a column twice"),
    "header only": ("a.csv", b"prompt,completion\n", r"no rows in train"),
    "unknown columns": ("a.csv", b"question,reply\na,b\n", r"a\.csv:2 has columns of no known layout.*question, reply"),
    "parquet": ("a.parquet", b"PAR1 not really", r"a\.parquet.*not a readable parquet file"),
    "unknown kind": ("a.xlsx", b"PK", r"a\.xlsx: unknown kind of data file"),
}


@pytest.mark.parametrize("case", BAD_FILES)
def test_a_bad_file_is_named(tmp_path: Path, case: str) -> None:
    name, content, message = BAD_FILES[case]
    (tmp_path / name).write_bytes(content)
    with pytest.raises(DataError, match=message):
        read_data(str(tmp_path / name))


def test_missing_data_is_told_what_there_could_be(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"no data at .*nope\.jsonl, expected a file .*toolcalls"):
        read_data(str(tmp_path / "nope.jsonl"))
    with pytest.raises(DataError, match=r"has no training file, .*found no data files"):
        read_data(str(tmp_path))


@pytest.mark.parametrize(("spec", "module"), [("owner/name", "datasets"), ("a.parquet", "pyarrow")])
def test_a_missing_package_is_named_with_its_extra(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, spec: str, module: str
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "a.parquet").write_bytes(b"PAR1")
    monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(DataError, match=rf"needs the package {module}\. Pip install 'smidgen\[data\]'"):
        read_data(spec)


def test_a_hub_data_set_is_read_by_its_splits(monkeypatch: pytest.MonkeyPatch) -> None:
    splits = {"train": [{"text": "a"}], "valid": [{"text": "b"}]}
    monkeypatch.setitem(sys.modules, "datasets", SimpleNamespace(load_dataset=lambda spec: splits))
    data = read_data("owner/name")
    assert [(row.text, row.where) for row in data.train] == [("a", "owner/name train:1")]
    assert texts(data.validation) == {"b"}


@pytest.mark.parametrize(
    ("names", "taken", "said"),
    [
        (["train", "test"], "train", []),
        (["train_sft", "test_sft", "other"], "train_sft", [
            "owner/name: split train_sft is taken for train", "owner/name: split test_sft is taken for test",
            "owner/name: splits left out: other",
        ]),
        (["train", "train_full", "test_a", "test_b"], "train", [
            "owner/name: splits left out: train_full, test_a, test_b"
        ]),
    ],
)  # fmt: skip
def test_which_splits_of_a_hub_data_set_were_taken_is_said(
    names: list[str], taken: str, said: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    found = {name: [{"text": name}] for name in names}
    monkeypatch.setitem(sys.modules, "datasets", SimpleNamespace(load_dataset=lambda spec: found))
    events: list[Any] = []
    data = read_data("owner/name", report=events.append)
    assert [row.text for row in data.train] == [taken]
    assert [event.text for event in events if "split" in event.text] == said


def test_several_splits_to_train_on_are_not_guessed(monkeypatch: pytest.MonkeyPatch) -> None:
    """Once the first one was taken without a word, whatever it was."""
    splits = {name: [{"text": "a"}] for name in ("train_gen", "test_gen", "train_sft")}
    monkeypatch.setitem(sys.modules, "datasets", SimpleNamespace(load_dataset=lambda spec: splits))
    expected = r"several splits to train on, found train_gen, test_gen, train_sft. Name one: owner/name::train_gen"
    with pytest.raises(DataError, match=expected):
        read_data("owner/name")


def test_a_hub_that_cannot_be_reached_says_what_to_do(monkeypatch: pytest.MonkeyPatch) -> None:
    def load_dataset(spec: str) -> None:
        raise ConnectionError("Couldn't reach the hub")

    monkeypatch.setitem(sys.modules, "datasets", SimpleNamespace(load_dataset=load_dataset))
    with pytest.raises(
        DataError, match=r"owner/name could not be had.*Couldn't reach the hub.*network, or give a file"
    ):
        read_data("owner/name")


@pytest.mark.parametrize(
    ("name", "hub_id", "row", "messages"),
    [
        ("alpaca", "tatsu-lab/alpaca", {"instruction": "hi", "input": "", "output": "bye", "text": "x"}, None),
        ("alpaca-cleaned", "yahma/alpaca-cleaned", {"instruction": "hi", "input": "", "output": "bye"}, None),
        (
            "dolly",
            "databricks/databricks-dolly-15k",
            {"instruction": "hi", "context": "", "response": "bye", "category": "x"},
            None,
        ),
        (
            "lima",
            "GAIR/lima",
            {"conversations": ["hi", "bye", "again", "so long"], "source": "x"},
            ["again", "so long"],
        ),
        (
            "oasst1",
            "timdettmers/openassistant-guanaco",
            {"text": "### Human: hi### Assistant: bye\n### Human: again### Assistant: so long"},
            ["again", "so long"],
        ),
    ],
)
def test_short_names_are_data_sets_of_the_hub_with_their_columns(
    name: str, hub_id: str, row: Any, messages: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[Any] = []

    def load_dataset(name: str, **chosen: str) -> Any:
        asked.append((name, chosen))
        return {"train": [row], "test": [row]}

    monkeypatch.setitem(sys.modules, "datasets", SimpleNamespace(load_dataset=load_dataset))
    data = read_data(name)
    assert asked == [(hub_id, {})]
    roles = ("user", "assistant")
    more = tuple({"role": role, "content": text} for role, text in zip(roles, messages or (), strict=False))
    assert data.train[0].messages == (*USER_AND_ANSWER, *more)
    assert len(data.test) == (name == "oasst1")  # LIMA's test rows have no answers
    assert not any("left out" in note for note in data.notes)


@pytest.mark.parametrize(
    ("spec", "chosen"),
    [
        ("owner/name:sub", {"name": "sub"}),
        ("owner/name:sub:train_sft", {"name": "sub", "split": "train_sft"}),
        ("owner/name::test", {"split": "test"}),
    ],
)
def test_a_subset_and_a_split_of_the_hub_may_be_named(
    spec: str, chosen: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def load_dataset(path: str, **given: str) -> Any:
        assert (path, given) == ("owner/name", chosen)
        return [{"text": "a"}] if "split" in given else {"train": [{"text": "a"}]}

    monkeypatch.setitem(sys.modules, "datasets", SimpleNamespace(load_dataset=load_dataset))
    data = read_data(spec)
    assert [row.where for row in data.train] == [f"owner/name {chosen.get('split', 'train')}:1"]


def test_without_a_network_the_hub_is_asked_once_and_the_line_says_what_helps(tmp_path: Path) -> None:
    """A hub that refuses the connection, in a process of its own: the client reads its address when it is loaded."""
    pytest.importorskip("datasets")
    code = (
        "import sys, time; from smidgen.data import hub; from smidgen.data.records import read_data\n"
        "asked = []; from huggingface_hub import HfApi; ask = HfApi.dataset_info\n"
        "HfApi.dataset_info = lambda *given, **more: asked.append(given) or ask(*given, **more)\n"
        "import datasets; datasets.load_dataset = lambda *given, **more: sys.exit('asked for again')\n"
        "try: read_data('alpaca')\n"
        "except Exception as error: print(type(error).__name__, len(asked), error)"
    )
    more = {"HF_HUB_OFFLINE": "0", "HF_ENDPOINT": "http://127.0.0.1:9", "HF_HOME": str(tmp_path)}
    done = subprocess.run([sys.executable, "-c", code], env=os.environ | more, capture_output=True, text=True)
    assert done.stdout.startswith("DataError 1 the data set tatsu-lab/alpaca could not be had from the hub, found ")
    assert "HF_HUB_OFFLINE=1" in done.stdout and len(done.stdout.splitlines()) == 1


def test_an_unknown_name_lists_those_that_are_known() -> None:
    with pytest.raises(DataError, match=r"no data at alpacca.*toolcalls, alpaca, alpaca-cleaned, dolly, lima, oasst1"):
        read_data("alpacca")
