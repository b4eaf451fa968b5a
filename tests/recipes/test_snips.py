"""tools/make_snips.py: what the SNIPS recipe trains on, from the files as their authors publish them."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

import smidgen
from tiny import tiny_folder

ROOT = Path(__file__).parents[2]
TOOL = [sys.executable, str(ROOT / "tools" / "make_snips.py")]


def pieces(number: int) -> list[dict[str, str]]:
    """A request in the source's form, with two values of one slot, blanks to spare and letters beyond ASCII."""
    return [
        {"text": "bring  "},
        {"text": f"café {number}", "entity": "what"},
        {"text": " and "},
        {"text": "tea ", "entity": "what"},
        {"text": " to "},
        {"text": "me", "entity": "to"},
        {"text": " "},
    ]


@pytest.fixture
def clone(tmp_path: Path) -> Path:
    """Two intents; the files of one are not UTF-8."""
    for intent, encoding in (("Bring", "utf-8"), ("Fetch", "latin-1")):
        folder = tmp_path / "clone" / "2017-06-custom-intent-engines" / intent
        folder.mkdir(parents=True)
        for name, first, count in ((f"train_{intent}_full", 0, 340), (f"validate_{intent}", 900, 5)):
            content = {intent: [{"data": pieces(first + number)} for number in range(count)]}
            (folder / f"{name}.json").write_text(json.dumps(content, ensure_ascii=False), encoding=encoding)
        (folder / f"train_{intent}.json").write_text(json.dumps({intent: [{"data": pieces(1)}]}))  # a smaller choice
    return tmp_path / "clone"


def lines(file: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()]


def test_one_command_makes_the_folder_that_the_recipe_trains_on(
    clone: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    subprocess.run([*TOOL, "clone", "snips"], check=True, stdout=subprocess.DEVNULL)
    splits = {name: lines(Path("snips") / f"{name}.jsonl") for name in ("train", "valid", "test")}
    assert {name: len(rows) for name, rows in splits.items()} == {"train": 600, "valid": 60, "test": 10}
    assert splits["train"][1]["messages"] == [
        {"role": "system", "content": "Extract the intent and slots of the request as one line of JSON."},
        {"role": "user", "content": "bring café 0 and tea to me"},
        {"role": "assistant", "content": '{"intent": "Fetch", "slots": {"to": "me", "what": ["café 0", "tea"]}}'},
    ]
    asked = [{row["messages"][1]["content"] for row in rows} for rows in splits.values()]
    assert not asked[0] & asked[1] and not asked[2] & (asked[0] | asked[1]), "no request is in two files"

    recipe = yaml.safe_load((ROOT / "recipes" / "smollm2-snips.yaml").read_text())
    report = smidgen.inspect_data(str(tiny_folder(tmp_path / "model")), recipe["data"], seq_len=recipe["seq-len"])
    assert (report.layout, report.rows, report.truncated) == ("messages", 670, 0)


def test_a_folder_without_the_files_is_refused_in_a_line(tmp_path: Path) -> None:
    done = subprocess.run([*TOOL, str(tmp_path), str(tmp_path / "snips")], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr == (
        f"{tmp_path}: no train_INTENT_full.json in it; give a clone of github.com/sonos/nlu-benchmark\n"
    )
    assert not (tmp_path / "snips").exists()
