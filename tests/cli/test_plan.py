"""`smidgen plan` on the command line: what scripts rely on, a shape, a config.json, a model with data, mistakes."""

import json
from pathlib import Path

import pytest

from smidgen.cli.main import main
from tiny import tiny_folder, write_rows


def run(capfd: pytest.CaptureFixture[str], *words: str) -> tuple[int, str, str]:
    with pytest.raises(SystemExit) as leaving:
        main(["plan", *words])
    captured = capfd.readouterr()
    return int(leaving.value.code or 0), captured.out, captured.err


def test_a_shape_within_a_budget(capfd: pytest.CaptureFixture[str]) -> None:
    words = ["llama-7b", "--memory", "3GiB", "--seq-len", "512", "--micro-batch", "1", "--compute-dtype", "float32"]
    code, out, _ = run(capfd, *words, "--json")
    found = json.loads(out.splitlines()[-1])
    assert code == 0 and found["fits"]
    assert {"peak_bytes", "terms", "step_s", "settings", "what_if", "smallest_bytes"} <= found.keys()
    assert found["peak_bytes"] == sum(found["terms"].values()) <= 3 << 30
    assert found["settings"]["streamed_layers"] > 0 and found["step_s"] > 0
    assert all(row["peak_bytes"] > 0 for row in found["what_if"])


def test_a_table_with_a_bar_for_each_part(capfd: pytest.CaptureFixture[str]) -> None:
    code, out, err = run(capfd, "tiny", "--seq-len", "64", "--compute-dtype", "float32")
    assert code == 0
    assert "Memory of tiny on cpu" in out and "framework" in out and "####" in out and "what if" in out
    assert "every row has 64 tokens" in err


def test_a_model_with_data_and_a_config_alone(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    model, rows = tiny_folder(tmp_path / "model"), write_rows(tmp_path / "rows.jsonl")
    words = [str(model), str(rows), "--micro-batch", "4", "--epochs", "2", "--compute-dtype", "float32", "--json"]
    code, out, _ = run(capfd, *words)
    found = json.loads(out.splitlines()[-1])
    assert code == 0 and found["model"] == "model"
    assert found["settings"]["longest_row_tokens"] < 100 and found["steps"] > 5
    code, out, _ = run(capfd, str(model / "config.json"), "--compute-dtype", "float32", "--json")
    alone = json.loads(out.splitlines()[-1])
    assert code == 0 and alone["model"] == "model" and alone["weights"] == found["weights"]


def test_a_card_that_is_not_here(capfd: pytest.CaptureFixture[str]) -> None:
    import torch

    if torch.cuda.is_available():
        pytest.skip("there is one here")
    code, out, err = run(capfd, "llama-7b", "--device", "cuda", "--seq-len", "512", "--micro-batch", "1", "--json")
    found = json.loads(out.splitlines()[-1])
    assert code == 0 and found["step_s"] is None and "its time is not" in err
    assert 4e9 < found["peak_bytes"] < 8e9  # 3.3 GB of weights, adapters on all layers, one layer at a time


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (("llama-8t",), "no model 'llama-8t'"),
        (("llama-7b", "--memory", "lots"), "memory: not a size: 'lots' (write 6GiB, 1.5GB or 900MB)."),
        (("llama-7b", "--targets", "nose"), "no layer matches nose"),
    ],
)
def test_mistakes_are_one_line(words: tuple[str, ...], said: str, capfd: pytest.CaptureFixture[str]) -> None:
    code, out, err = run(capfd, *words)
    assert code == 2 and not out
    assert said in err.splitlines()[-1]


def test_too_little_is_said_with_what_would_do(capfd: pytest.CaptureFixture[str]) -> None:
    words = ["llama-7b", "--memory", "500MB", "--seq-len", "512", "--compute-dtype", "float32"]
    code, out, err = run(capfd, *words, "--json")
    found = json.loads(out.splitlines()[-1])
    assert code == 0 and not found["fits"] and found["smallest_bytes"] > 500_000_000
    assert "is too little: at least" in err


def test_a_file_for_finetune_is_taken_whole(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    """Settings that have no flag here count too: DoRA trains more. A shape's data is not read, and it is said."""
    file = tmp_path / "run.yaml"
    lines = ["data: owner/rows", "out: runs/a", "learning-rate: 1e-4", "seq-len: 64", "targets: q"]
    words = ["tiny", "--config", str(file), "--compute-dtype", "float32", "--json"]
    trainable = []
    for more in ([], ["use-dora: true"]):
        file.write_text("\n".join([*lines, *more]) + "\n")
        code, out, err = run(capfd, *words)
        assert code == 0 and "tiny is without a tokenizer: owner/rows is not read" in err
        trainable.append(json.loads(out.splitlines()[-1])["trainable_parameters"])
    assert trainable[1] == trainable[0] + 2 * 64  # a length for each output of q, in both layers
    file.write_text("learning-rate: fast\nouts: runs/a\n")
    code, _, err = run(capfd, *words)
    assert code == 2 and "learning-rate: expected a number, found 'fast'" in err and "'outs'" in err
