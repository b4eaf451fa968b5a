"""The data set that the demo trains on: what its README promises."""

import importlib.util
import json
from collections import Counter
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

import smidgen.data

ROOT = Path(__file__).parents[2]
FOLDER = Path(smidgen.data.__file__).parent / "toolcalls"
SPLITS = {"train": 640, "validation": 100, "test": 100}


def rows_of(split: str) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (FOLDER / f"{split}.jsonl").read_text(encoding="utf-8").splitlines()]


def calls_of(split: str) -> list[dict[str, Any]]:
    return [json.loads(row["messages"][-1]["content"]) for row in rows_of(split)]


def values_of(split: str) -> set[str]:
    return {str(value).casefold() for call in calls_of(split) for value in call["arguments"].values()}


@pytest.fixture(scope="module")
def maker() -> ModuleType:
    path = ROOT / "tools" / "make_toolcalls.py"
    spec = importlib.util.spec_from_file_location("make_toolcalls", path)
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize(("split", "count"), SPLITS.items())
def test_the_shipped_files_are_what_the_generator_writes(maker: ModuleType, split: str, count: int) -> None:
    assert rows_of(split) == maker.make_split(split)
    assert len(rows_of(split)) == count


@pytest.mark.parametrize("split", ["validation", "test"])
def test_held_out_rows_share_no_argument_value_with_training_rows(split: str) -> None:
    assert len(values_of(split)) > 90
    assert not values_of(split) & values_of("train")


def test_no_request_occurs_twice() -> None:
    requests = Counter(row["messages"][1]["content"] for split in SPLITS for row in rows_of(split))
    assert requests.most_common(1)[0][1] == 1


def test_each_tool_is_asked_for_in_thirty_ways_or_more(maker: ModuleType) -> None:
    phrasings = maker.read_sections(ROOT / "tools" / "toolcalls_phrasings.txt")
    assert list(phrasings) == list(maker.TOOLS)
    assert len(maker.TOOLS) >= 8
    assert all(len(set(lines)) == len(lines) >= 30 for lines in phrasings.values())
    assert min(Counter(call["tool"] for call in calls_of("train")).values()) >= 2 * 32


def test_argument_values_stand_in_the_request_and_arguments_in_the_tools_order(maker: ModuleType) -> None:
    for split in SPLITS:
        for row in rows_of(split):
            system, user, assistant = (message["content"] for message in row["messages"])
            call = json.loads(assistant)
            assert json.dumps(call) == assistant and "\n" not in assistant and system == maker.SYSTEM
            assert list(call["arguments"]) == [name for name in maker.TOOLS[call["tool"]] if name in call["arguments"]]
            assert all(str(value) in user for value in call["arguments"].values())
            assert len(user.split()) <= 14
