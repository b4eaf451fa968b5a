"""Every verb that takes a model, on a model of every family of formats, by the command line itself."""

import io
import json
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import smidgen
from gguf_models import write_gguf
from packers import pack_folder
from smidgen.cli.main import main
from smidgen.quant.blocks import BlockMatrix
from smidgen.quant.grouped import GroupedMatrix
from smidgen.quant.matrix import DenseMatrix, FourBitMatrix, Int8Matrix
from tiny import tiny_folder, write_rows

Q4_K_M = {"attn_v": "Q6_K", "ffn_down": "Q6_K", "token_embd": "Q6_K", "output.weight": "Q6_K"}
BLOCKS_OF_256 = {"hidden_size": 256, "intermediate_size": 256, "head_dim": 64, "num_hidden_layers": 1}
MIXED = {"attn_q": "Q4_0", "attn_k": "Q5_1", "attn_v": "F16", "ffn_up": "Q5_0", "ffn_down": "Q4_1"}


def _sixteen_bits(path: Path) -> Path:
    return tiny_folder(path / "model", dtype=torch.bfloat16)


def _bitsandbytes(path: Path, to: str) -> Path:
    smidgen.quantize(str(tiny_folder(path / "dense")), path / "model", to=to)
    return path / "model"


def _groups(path: Path, **how: Any) -> Path:
    pack_folder(tiny_folder(path / "dense"), path / "model", symmetric=False, **how)
    return path / "model"


def _q4_k_m(path: Path) -> Path:
    write_gguf(tiny_folder(path / "dense", **BLOCKS_OF_256), path / "model.gguf", Q4_K_M, default="Q4_K")
    return path / "model.gguf"


def _gguf_in_parts(path: Path) -> Path:
    write_gguf(tiny_folder(path / "dense"), path / "model.gguf", MIXED, tensors_of_part=8)
    return path / "model-00002-of-00003.gguf"


# family -> (makes the model, what a run calls its form, how its weights lie in memory)
FAMILIES: dict[str, tuple[Callable[[Path], Path], str, type]] = {
    "16 bits": (_sixteen_bits, "none", DenseMatrix),
    "bitsandbytes, 4 bits": (lambda path: _bitsandbytes(path, "nf4-dq"), "nf4-dq", FourBitMatrix),
    "bitsandbytes, 8 bits": (lambda path: _bitsandbytes(path, "int8"), "int8", Int8Matrix),
    "gptq": (lambda path: _groups(path, act_order=True), "gptq", GroupedMatrix),
    "awq": (lambda path: _groups(path, method="awq"), "awq", GroupedMatrix),
    "gguf": (_q4_k_m, "gguf", BlockMatrix),
    "gguf in parts": (_gguf_in_parts, "gguf", BlockMatrix),
}


@pytest.fixture
def verb(capfd: pytest.CaptureFixture[str]) -> Callable[..., Any]:
    """Runs `smidgen VERB WORDS... --json` in this process and returns the object that it prints."""

    def run(*words: Any) -> Any:
        with pytest.raises(SystemExit) as leaving:
            main([*map(str, words), "--json"])
        captured = capfd.readouterr()
        assert not leaving.value.code, captured.err
        return json.loads(captured.out.splitlines()[-1])

    return run


@pytest.mark.parametrize("family", FAMILIES)
def test_every_verb_takes_it(
    family: str, verb: Callable[..., Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    make, stored, matrix = FAMILIES[family]
    model, rows, run = make(tmp_path), write_rows(tmp_path / "rows.jsonl"), tmp_path / "run"
    as_it_is = ("--quantize", "none" if family == "16 bits" else "keep", "--compute-dtype", "float32")
    quick = ("--rank", 4, "--learning-rate", 5e-3, "--max-steps", 8, "--compare", 0)
    summary = verb("finetune", model, rows, "--out", run, *quick, *as_it_is)
    assert summary["base_format"] == stored
    assert summary["loss_after"] < summary["loss_before"] - 0.1

    losses, others = [], shutil.copy(rows, tmp_path / "others.jsonl")  # of its own file a run has held some rows out
    for spec, how in ((model, as_it_is), (run, ())):
        greedy = ("--temperature", 0, "--max-new-tokens", 5)
        answer = verb("generate", spec, "say red 1", *greedy, *how)
        assert answer["new_tokens"] >= 1
        monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(b"say red 1\n/exit\n")))
        assert verb("chat", spec, *greedy, *how)["messages"][-1]["content"] == answer["text"]
        (measured,) = verb("evaluate", spec, others, "--no-answers", *how)["data"]
        losses.append(measured["figures"]["loss"]["value"])
    assert losses[1] < losses[0] - 0.1

    assert verb("merge", run, "--out", tmp_path / "merged", "--dtype", "float32")["max_logit_difference"] < 1e-3
    how = ("--quantize", "none", "--compute-dtype", "float32")
    (measured,) = verb("evaluate", tmp_path / "merged", others, "--no-answers", *how)["data"]
    assert measured["figures"]["loss"]["value"] == pytest.approx(losses[1], rel=1e-4)

    linears = smidgen.load(run).base.linears
    assert {type(linear.weight) for name, linear in linears.items() if "up_proj" in name} == {matrix}
