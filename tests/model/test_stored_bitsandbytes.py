"""Folders that transformers and bitsandbytes have packed: their very blocks are trained on."""

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, BitsAndBytesConfig

import smidgen
from packers import pack_with_bitsandbytes
from smidgen.checkpoint.open import open_checkpoint
from smidgen.errors import ModelError
from smidgen.model.load import choose_storage
from tiny import VOCAB_SIZE, build, byte_tokenizer, tiny_folder, write_rows

pytest.importorskip("bitsandbytes")
IDS = torch.randint(0, VOCAB_SIZE, (2, 11), generator=torch.Generator().manual_seed(0))


def _packed_folder(path: Path, **how: Any) -> tuple[Path, Any]:
    """A folder written by transformers + bitsandbytes, and the model that wrote it."""
    dense = tiny_folder(path / "dense")
    config = BitsAndBytesConfig(bnb_4bit_compute_dtype=torch.float32, **how)
    model = AutoModelForCausalLM.from_pretrained(dense, quantization_config=config, dtype=torch.float32).eval()
    model.save_pretrained(path / "packed")
    byte_tokenizer().save_pretrained(path / "packed")
    return path / "packed", model


@pytest.mark.parametrize("quant_type", ["nf4", "fp4"])
@pytest.mark.parametrize("double", [True, False])
@pytest.mark.parametrize("quant_storage", [torch.uint8, torch.bfloat16])
def test_logits_equal_those_of_transformers_with_bitsandbytes(
    quant_type: str, double: bool, quant_storage: torch.dtype, tmp_path: Path
) -> None:
    folder, model = _packed_folder(
        tmp_path, load_in_4bit=True, bnb_4bit_quant_type=quant_type, bnb_4bit_use_double_quant=double,
        bnb_4bit_quant_storage=quant_storage,
    )  # fmt: skip
    checkpoint = open_checkpoint(folder)
    storage = quant_type + ("-dq" if double else "")
    assert choose_storage("auto", checkpoint)[0] == choose_storage("keep", checkpoint)[0] == storage
    base = build(folder, storage)
    matrix = base.linears["model.layers.0.self_attn.q_proj"].weight
    assert matrix.storage == storage
    raw = load_file(folder / "model.safetensors")["model.layers.0.self_attn.q_proj.weight"]
    assert raw.dtype == quant_storage and torch.equal(matrix.packed, raw.flatten().view(torch.uint8))
    # K = 96 is no multiple of 64: there bitsandbytes' AVX-512 kernel takes wrong scales, so down_proj is left out
    for layer in model.model.layers:
        layer.mlp.down_proj.forward = lambda x: x[..., :64] * 0
    for layer in base.model.model.layers:
        layer.mlp.down_proj.forward = lambda x: x[..., :64] * 0
    torch.testing.assert_close(base.model(IDS).logits, model(IDS).logits, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("kind", ["nf4-dq", "nf4", "fp4"])
@pytest.mark.parametrize("quant_storage", [torch.uint8, torch.bfloat16, torch.float32])
@pytest.mark.parametrize("blocksize", [32, 128, 256, 4096])
def test_blocks_of_other_sizes(blocksize: int, quant_storage: torch.dtype, kind: str, tmp_path: Path) -> None:
    """bitsandbytes makes them, transformers' own models are always in blocks of 64."""
    shape = {"hidden_size": 256, "intermediate_size": 512, "num_hidden_layers": 1}
    dense = tiny_folder(tmp_path / "dense", **shape)
    twin = pack_with_bitsandbytes(dense, tmp_path / "packed", kind, blocksize, quant_storage)
    base = smidgen.load(tmp_path / "packed", compute_dtype="float32").base
    assert base.storage == kind
    numbers = load_file(twin / "model.safetensors")
    for name in base.linears.keys() - {base.head_name}:
        matrix = base.linears[name].weight
        assert matrix.blocksize == blocksize
        assert torch.equal(matrix.rows(0, matrix.out_features, torch.float32), numbers[f"{name}.weight"]), name
    expected = AutoModelForCausalLM.from_pretrained(twin, dtype=torch.float32).eval()
    with torch.no_grad():
        torch.testing.assert_close(base.model(IDS).logits, expected(IDS).logits, rtol=1e-4, atol=1e-4)


def test_a_packed_folder_trains_and_merges(tmp_path: Path) -> None:
    folder, _ = _packed_folder(tmp_path, load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True)
    rows = write_rows(tmp_path / "rows.jsonl")
    run = smidgen.finetune(str(folder), str(rows), tmp_path / "run", learning_rate=5e-3, compute_dtype="float32")
    assert run.summary["base_format"] == "nf4-dq"
    assert run.summary["loss_after"] < run.summary["loss_before"] - 0.3
    merged = smidgen.merge(run.path, tmp_path / "merged", dtype="float32")
    assert merged["max_logit_difference"] < 1e-3


def test_quantising_anew_is_refused(tmp_path: Path) -> None:
    folder, _ = _packed_folder(tmp_path, load_in_4bit=True, bnb_4bit_quant_type="nf4")
    with pytest.raises(ModelError, match="is stored as nf4 already"):
        smidgen.load(folder, quantize="int8")
