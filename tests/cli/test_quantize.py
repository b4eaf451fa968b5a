"""`smidgen quantize`: what it passes on, what it prints, and what it says about mistakes."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tiny import tiny_folder

ERRORS = [
    {"layer": "model.layers.0.mlp.down_proj", "gptq": 0.05, "rtn": 0.10},
    {"layer": "model.layers.1.mlp.down_proj", "gptq": 0.07, "rtn": 0.14},
]
RESULT: dict[str, Any] = {
    "out": "packed",
    "to": "gptq",
    "bytes": 1_200_000,
    "mean_error": {"gptq": 0.06, "rtn": 0.12},
    "errors": ERRORS,
    "perplexity": {"tokens": 2048, "before": 20.0, "gptq": 21.5, "rtn": 25.25, "nf4": 22.0},
}


@pytest.fixture
def seen(api: Any) -> dict[str, Any]:
    seen: dict[str, Any] = {}

    def quantize(model: str, out: Path, *, report: Any, **settings: Any) -> dict[str, Any]:
        seen.update(settings, model=model, out=out)
        return RESULT

    api.quantize = quantize
    return seen


def test_it_passes_every_flag_of_gptq_on(smidgen: Callable[..., Any], seen: dict[str, Any]) -> None:
    words = ("--bits", "3", "--group-size", "-1", "--asym", "--act-order", "--damp", "0.05", "--calibration", "a.txt")
    more = ("--calibration-rows", "7", "--calibration-len", "64", "--no-perplexity")
    assert smidgen("quantize", "m", "--to", "gptq", "--out", "packed", *words, *more).code == 0
    assert seen == {
        "model": "m", "out": Path("packed"), "to": "gptq", "memory": None, "trust_remote_code": False, "bits": 3,
        "group_size": -1,
        "sym": False, "act_order": True, "damp": 0.05, "calibration": "a.txt", "calibration_rows": 7,
        "calibration_len": 64, "perplexity": False,
    }  # fmt: skip


def test_other_forms_have_no_such_settings(smidgen: Callable[..., Any], seen: dict[str, Any]) -> None:
    assert smidgen("quantize", "m", "--to", "nf4-dq", "--out", "packed").code == 0
    assert seen == {"model": "m", "out": Path("packed"), "to": "nf4-dq", "memory": None, "trust_remote_code": False}


def test_the_table_is_by_kind_of_layer(smidgen: Callable[..., Any], seen: dict[str, Any]) -> None:
    out = smidgen("quantize", "m", "--to", "gptq", "--out", "packed").out
    lines = [" ".join(line.split()) for line in out.splitlines()]
    assert "down_proj 2 6 % 7 % 12 % 14 %" in lines
    for line in ("before 20.00", "GPTQ 21.50", "rounding to nearest 25.25", "NF4 22.00"):
        assert line in lines
    assert "Perplexity of 2,048 held-out tokens" in lines
    assert "smidgen generate packed 'Hello!'" in lines
    assert "layers.0" not in out


def test_json_has_every_layer(smidgen: Callable[..., Any], seen: dict[str, Any]) -> None:
    assert json.loads(smidgen("quantize", "m", "--to", "gptq", "--out", "packed", "--json").out) == RESULT


@pytest.mark.parametrize(
    ("words", "says"),
    [
        ((), ["MODEL: missing", "--to: missing", "--out: missing"]),
        (("m", "--to", "awq", "--out", "x"), ["--to: expected one of nf4-dq, nf4, fp4, int8, gptq, found 'awq'"]),
        (
            ("m", "--to", "gptq", "--out", "x", "--bits", "5", "--group-size", "100"),
            ["--bits: expected 2, 3, 4 or 8, found '5'", "--group-size: expected 32, 64, 128 or -1, found '100'"],
        ),
        (("m", "--to", "gptq", "--out", "x", "--damp", "0"), ["--damp: expected more than 0 and at most 1, found '0'"]),
        (
            ("m", "--to", "nf4", "--out", "x", "--bits", "4", "--asym"),
            ["--bits: only --to gptq has this, found --to nf4", "--sym: only --to gptq has this, found --to nf4"],
        ),
        (("m", "--to", "nf4", "--out", ""), ["--out: missing"]),
        (("m", "--to", "gptq", "--out", "x", "--calibration-rows", "0"), ["--calibration-rows: expected 1 or more"]),
    ],
)
def test_mistakes_are_one_line_each(words: tuple[str, ...], says: list[str], smidgen: Callable[..., Any]) -> None:
    outcome = smidgen("quantize", *words)
    assert outcome.code == 2
    lines = outcome.err.splitlines()
    assert len(lines) == len(says) and not outcome.out
    for line, said in zip(lines, says, strict=True):
        assert line.startswith(f"smidgen: error: {said}")


def _calibration(tmp_path: Path, name: str, content: bytes) -> str:
    (tmp_path / name).write_bytes(content)
    return str(tmp_path / name)


def test_models_and_texts_that_cannot_be_used(smidgen: Callable[..., Any], tmp_path: Path) -> None:
    """With the library itself: each is one line with the file's name, and nothing is written."""
    model = str(tiny_folder(tmp_path / "model"))
    packed = str(tmp_path / "packed")
    assert smidgen("quantize", model, "--to", "nf4", "--out", packed).code == 0
    cases = [
        ((packed, "--to", "int8"), "is stored as nf4 already, expected a 16-bit model or a GGUF file"),
        ((str(tmp_path / "no"), "--to", "int8"), "no model"),
        ((model, "--to", "gptq", "--calibration", str(tmp_path / "no.txt")), "no.txt cannot be read"),
        ((model, "--to", "gptq", "--calibration", str(tmp_path / "no.jsonl")), "no data at"),
        (
            (model, "--to", "gptq", "--calibration", _calibration(tmp_path, "a.txt", b"abc\xff")),
            "byte 3, expected UTF-8",
        ),
        (
            (model, "--to", "gptq", "--calibration", _calibration(tmp_path, "b.txt", b"too short")),
            "b.txt: too little text to calibrate with, expected 64 tokens or more, found 9",
        ),
    ]
    for words, says in cases:
        outcome = smidgen("quantize", *words, "--out", str(tmp_path / "new"))
        errors = [line for line in outcome.err.splitlines() if line.startswith("smidgen: error: ")]
        assert outcome.code == 2 and len(errors) == 1 and says in errors[0], outcome.err
        assert "Traceback" not in outcome.err and not (tmp_path / "new").exists()
    outcome = smidgen("quantize", model, "--to", "nf4", "--out", packed)
    assert outcome.code == 2 and "holds something already" in outcome.err


@pytest.mark.parametrize("layout", ["messages", "text"])
def test_rows_of_data_as_calibration(layout: str, smidgen: Callable[..., Any], tmp_path: Path) -> None:
    model = str(tiny_folder(tmp_path / "model"))
    row: dict[str, Any] = {"text": "one two three four five six seven " * 4}
    if layout == "messages":
        row = {"messages": [{"role": "user", "content": "say it"}, {"role": "assistant", "content": row["text"]}]}
    data = _calibration(tmp_path, "rows.jsonl", (json.dumps(row) + "\n").encode() * 30)
    words = ("--calibration", data, "--calibration-rows", "3", "--calibration-len", "64", "--group-size", "32")
    outcome = smidgen("quantize", model, "--to", "gptq", "--out", str(tmp_path / "new"), *words, "--json")
    assert outcome.code == 0, outcome.err
    result = json.loads(outcome.out)
    assert result["calibration"] == {"source": "rows.jsonl", "rows": 3, "tokens": 192}
    assert "3 rows of 64 tokens from rows.jsonl, 1 more held out" in outcome.err
    assert len(result["errors"]) == 14 and result["perplexity"]["tokens"] == 64
