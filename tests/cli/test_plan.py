"""`smidgen plan` on the command line: what scripts rely on, a shape, a config.json, a model with data, mistakes."""

import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch

import smidgen
from packers import pack_folder
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


def test_generation_is_forecast_too(capfd: pytest.CaptureFixture[str]) -> None:
    words = ["llama-7b", "--generate", "256", "--seq-len", "32", "--compute-dtype", "float32", "--memory", "3GiB"]
    code, out, err = run(capfd, *words, "--json")
    found = json.loads(out.splitlines()[-1])
    assert code == 0 and found["fits"] and found["peak_bytes"] == sum(found["terms"].values()) <= 3 << 30
    assert found["settings"]["cache_dtype"] == "bfloat16" and found["settings"]["streamed_layers"] > 0
    assert "keys and values wait in bfloat16" in err and "are read for each token" in err
    code, out, _ = run(capfd, *words)
    assert code == 0 and "key cache" in out and "32 of 32 layers streamed" in out
    code, out, err = run(capfd, "llama-7b", "rows.jsonl", "--generate", "256", "--rank", "8", "--recompute", "full")
    assert code == 2 and not out
    for name in ("data", "rank", "recompute"):
        assert f"{name}: generation has none, leave it out." in err


def test_rows_are_no_longer_than_the_models_positions(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    """As in a run: of a shape, and of a model whose config.json names them in another way."""
    for model, positions in (("llama-7b", 2048), (str(tiny_folder(tmp_path / "model", "gpt2")), 256)):
        code, out, err = run(capfd, model, "--seq-len", "9000", "--compute-dtype", "float32", "--json")
        assert code == 0 and json.loads(out.splitlines()[-1])["settings"]["longest_row_tokens"] == positions
        assert f"seq_len {positions}: the model has no more positions" in err


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
    if torch.cuda.is_available():
        pytest.skip("there is one here")
    code, out, err = run(capfd, "llama-7b", "--device", "cuda", "--seq-len", "512", "--micro-batch", "1", "--json")
    found = json.loads(out.splitlines()[-1])
    assert code == 0 and found["step_s"] is None and "its time is not" in err
    # what finetune does on a card with room: nothing is computed again. With --recompute full: 3.3 GB of weights,
    # adapters on all layers, one layer at a time
    assert found["settings"]["recompute"] == "none" and found["settings"]["streamed_layers"] == 0
    full = next(row["peak_bytes"] for row in found["what_if"] if row["change"] == "recompute full")
    assert 4e9 < full < 8e9 and found["peak_bytes"] > full + 1e9
    assert 1.5e9 < found["host_bytes"] < found["peak_bytes"]
    code, out, _ = run(capfd, "llama-7b", "--device", "cuda", "--seq-len", "512", "--micro-batch", "1", "--recompute",
                       "full", "--json")  # fmt: skip
    assert json.loads(out.splitlines()[-1])["peak_bytes"] == full


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (("llama-8t",), "no model 'llama-8t'"),
        (("llama-7b", "--memory", "lots"), "memory: not a size: 'lots' (write 6GiB, 1.5GB or 900MB)."),
        (("llama-7b", "--targets", "nose"), "no layer matches nose"),
        (("tiny", "--rank-pattern", "nose=4"), "rank_pattern: no adapted layer is left for nose"),
        (("tiny", "--optimizer", "paged-adamw8bit", "--device", "cpu"), "paged-adamw8bit needs a CUDA device"),
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
    assert "500.0 MB (--memory 500MB) is too little for llama-7b: at least" in err
    asked = re.search(r"at least (\d+) MB", err)
    assert asked and int(asked[1]) * 10**6 >= found["smallest_bytes"] > (int(asked[1]) - 1) * 10**6, "it will do"


def test_other_ways_to_store_the_base_are_those_that_there_are(tmp_path: Path) -> None:
    """A packed base stays as it is; one of plain numbers can be packed, also where it is used as it is."""
    forms = {"base in nf4-dq": "nf4-dq", "base in int8": "int8", "16-bit base": "none"}

    def others(model: Path, quantize: str) -> set[str]:
        found = smidgen.plan(str(model), quantize=quantize, compute_dtype="float32", seq_len=64)
        return {forms[row["change"]] for row in found["what_if"] if row["change"] in forms}

    plain = tiny_folder(tmp_path / "plain")
    assert others(plain, "none") == {"nf4-dq", "int8"} and others(plain, "auto") == {"int8", "none"}
    pack_folder(plain, tmp_path / "packed")
    assert not others(tmp_path / "packed", "auto")


def test_gptq_on_the_way_counts_too(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    """Of a small model and short rows it is what needs most, and finetune would refuse to begin it."""
    model = tiny_folder(tmp_path / "model", hidden_size=128, intermediate_size=4096)
    words = [str(model), "--quantize", "gptq", "--seq-len", "8", "--micro-batch", "1", "--compute-dtype", "float32"]
    code, out, err = run(capfd, *words, "--json")
    found = json.loads(out.splitlines()[-1])
    assert code == 0 and found["during"] == "GPTQ" and "quantised by GPTQ first: forecast" in err
    assert found["peak_bytes"] == sum(found["terms"].values()) == found["host_bytes"] <= found["smallest_bytes"]
    less = str(found["smallest_bytes"] - 200_000_000)
    code, out, err = run(capfd, *words, "--memory", less)
    assert code == 0 and "is too little for model: at least" in err and "while it is quantised by GPTQ" in out


def test_the_disk_of_a_shape_is_that_of_the_cache(
    tmp_path: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    words = ["tiny", "--seq-len", "64", "--compute-dtype", "float32", "--json"]
    monkeypatch.setenv("SMIDGEN_CACHE", str(tmp_path / "cache"))
    _, _, err = run(capfd, *words)
    assert (tmp_path / "cache").is_dir() and not [*(tmp_path / "cache").iterdir()] and "its disk is taken" not in err
    (tmp_path / "file").touch()
    monkeypatch.setenv("SMIDGEN_CACHE", str(tmp_path / "file" / "cache"))
    code, _, err = run(capfd, *words)
    assert code == 0 and "cannot be measured (Not a directory): its disk is taken to give 1.0 GB/s" in err


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


_EFFECTS: dict[str, tuple[Any, set[str]]] = {
    "optimizer": ("sgd", {"optimizer"}),
    "rank": (64, {"adapters", "optimizer"}),
    "rank_pattern": ({"down_proj": 64}, {"adapters", "optimizer"}),
    "use_dora": (True, {"adapters", "optimizer"}),
    "modules_to_save": ("lm_head", {"adapters", "optimizer", "loss chunk"}),
    "new_tokens": ("<a>,<b>", {"adapters", "optimizer"}),
    "pack": (600, {"kept activations", "scratch", "loss chunk"}),
    "tile_tokens": (64, {"scratch"}),
    "loss_chunk": (16, {"loss chunk"}),
    "micro_batch": (2, {"kept activations", "tokens_per_step"}),
    "dropout": (0.1, {"kept activations", "computed_tokens_per_step"}),
    "share_prefix": ("off", {"computed_tokens_per_step"}),
    "neftune_alpha": (5.0, {"computed_tokens_per_step"}),
    "train_on_prompt": (True, {"labels_per_step"}),
    "max_time": ("1s", {"run_s"}),
    "learning_rate": (1e-3, set()),
    "alpha_pattern": ({"down_proj": 4.0}, set()),
}


@pytest.fixture(scope="module")
def shared_rows(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A model, and chats with one long system message; answers of many lengths."""
    folder = tmp_path_factory.mktemp("plan")
    system = {"role": "system", "content": "You are asked for a colour and say it. " * 3}
    rows = [
        [
            system,
            {"role": "user", "content": f"say {n % 7}"},
            {"role": "assistant", "content": "red " * (1 + n * n % 23)},
        ]
        for n in range(80)
    ]
    file = folder / "rows.jsonl"
    file.write_text("".join(json.dumps({"messages": row}) + "\n" for row in rows))
    return tiny_folder(folder / "model", dtype=torch.bfloat16, max_position_embeddings=1024), file


@pytest.mark.parametrize("setting", _EFFECTS)
def test_a_setting_of_finetune_changes_its_own_figures(setting: str, shared_rows: tuple[Path, Path]) -> None:
    """The framework is measured anew each time, and slack follows: those may differ. Times are measured too."""
    value, changed = _EFFECTS[setting]
    model, rows = map(str, shared_rows)
    common = {"compute_dtype": "float32", "recompute": "none", "epochs": 1000.0}
    plain, other = (smidgen.plan(model, rows, **common | how) for how in ({}, {setting: value}))
    counts = ("tokens_per_step", "computed_tokens_per_step", "labels_per_step")
    figures = [found["terms"] | {name: found[name] for name in counts} for found in (plain, other)]
    measured = {"framework", "program files", "runtime and slack"}
    names = {name for name in figures[0] | figures[1] if figures[0].get(name) != figures[1].get(name)} - measured
    if other["run_s"] == 1.0 < plain["run_s"]:
        names.add("run_s")
    assert changed <= names, (setting, names)
    if not changed:
        assert not names
