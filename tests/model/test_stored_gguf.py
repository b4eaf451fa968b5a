"""Models trained on the very blocks of their GGUF file, for every architecture and block type that is read."""

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM, LlamaConfig

import smidgen
from gguf_models import UNSAID, write_gguf
from smidgen.checkpoint.architectures import ARCHITECTURES
from smidgen.checkpoint.gguf_header import read_header
from smidgen.checkpoint.open import open_checkpoint
from smidgen.errors import ModelError
from smidgen.quant.blocks import BlockMatrix
from smidgen.quant.linear import FrozenEmbedding
from tiny import VOCAB_SIZE, byte_tokenizer, tiny_folder, write_rows

IDS = torch.randint(0, VOCAB_SIZE, (2, 11), generator=torch.Generator().manual_seed(0))
MIXED = {"attn_q": "Q4_0", "attn_k": "Q5_1", "attn_v": "F16", "ffn_up": "Q5_0", "ffn_down": "Q4_1", "output": "F32"}


def _logits(path: Path, **how: Any) -> torch.Tensor:
    with torch.no_grad():
        return smidgen.load(path, compute_dtype="float32", **how).base.model(IDS).logits


def _dense_twin(folder: Path, dense: dict[str, torch.Tensor]) -> Path:
    """transformers' own folder with the numbers that the file stands for."""
    twin = folder.with_name("twin")
    shutil.copytree(folder, twin)
    save_file({k: v.contiguous() for k, v in dense.items()}, twin / "model.safetensors", metadata={"format": "pt"})
    return twin


@pytest.mark.parametrize("architecture", [*ARCHITECTURES, "mistral"])
def test_logits_are_those_of_transformers_over_the_same_numbers(architecture: str, tmp_path: Path) -> None:
    folder = tiny_folder(tmp_path / "tiny", architecture, **UNSAID.get(architecture, {}))
    twin = _dense_twin(folder, write_gguf(folder, tmp_path / "tiny.gguf", MIXED))
    expected = AutoModelForCausalLM.from_pretrained(twin, dtype=torch.float32, attn_implementation="eager").eval()
    loaded = smidgen.load(tmp_path / "tiny.gguf", compute_dtype="float32")
    assert loaded.base.storage == "gguf"
    with torch.no_grad():
        ours, theirs = loaded.base.model(IDS).logits, expected(IDS).logits
    torch.testing.assert_close(ours, theirs, rtol=1e-3, atol=1e-4 * float(theirs.abs().max()))
    assert type(loaded.base.model.get_input_embeddings()) is FrozenEmbedding
    packed = [linear.weight for linear in loaded.base.linears.values() if isinstance(linear.weight, BlockMatrix)]
    assert {"Q4_0", "Q8_0"} <= {matrix.ggml_type for matrix in packed} or architecture == "phi3"
    assert loaded.tokenizer.decode(loaded.tokenizer.encode("hello 12", add_special_tokens=False)) == "hello 12"


@pytest.mark.parametrize("architecture", [*ARCHITECTURES, "mistral"])
def test_it_trains_generates_and_merges(architecture: str, tmp_path: Path) -> None:
    folder = tiny_folder(tmp_path / "tiny", architecture, **UNSAID.get(architecture, {}))
    write_gguf(folder, tmp_path / "tiny.gguf", MIXED)
    rows = write_rows(tmp_path / "rows.jsonl")
    run = smidgen.finetune(
        str(tmp_path / "tiny.gguf"), str(rows), tmp_path / "run", learning_rate=5e-3, compute_dtype="float32"
    )
    assert run.summary["base_format"] == "gguf"
    assert run.summary["loss_after"] < run.summary["loss_before"] - 0.3
    assert smidgen.merge(run.path, tmp_path / "merged", dtype="float32")["max_logit_difference"] < 1e-3
    assert smidgen.load(run.path).base.storage == "gguf"


@pytest.mark.parametrize("kind", ["Q2_K", "Q3_K", "Q4_K", "Q5_K", "Q6_K"])
def test_blocks_of_256(kind: str, tmp_path: Path) -> None:
    """The packed model equals the one over the decoded numbers."""
    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=256, intermediate_size=512, num_hidden_layers=1, num_attention_heads=4, num_key_value_heads=2,
        vocab_size=VOCAB_SIZE, max_position_embeddings=64, tie_word_embeddings=True,
    )  # fmt: skip
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path / "tiny")
    byte_tokenizer().save_pretrained(tmp_path / "tiny")
    twin = _dense_twin(tmp_path / "tiny", write_gguf(tmp_path / "tiny", tmp_path / "k.gguf", {}, default=kind))
    torch.testing.assert_close(_logits(tmp_path / "k.gguf"), _logits(twin, quantize="none"), rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize(
    ("damaged", "named"),
    [
        ("token_embd", "model.embed_tokens"),  # in a row that no check looks up, of a model that has a head of its own
        ("blk.1.attn_k", "model.layers.1.self_attn.k_proj"),
        ("output", "lm_head"),
    ],
)
def test_a_scale_that_is_not_finite_is_named(damaged: str, named: str, tmp_path: Path) -> None:
    write_gguf(tiny_folder(tmp_path / "tiny"), tmp_path / "tiny.gguf", {})
    raw = bytearray((tmp_path / "tiny.gguf").read_bytes())
    tensor = read_header(tmp_path / "tiny.gguf", raw).tensors[f"{damaged}.weight"]
    assert tensor.dtype == "Q8_0" and tensor.shape[1] == 64
    at = tensor.offset + 20 * 2 * 34  # of row 20, two blocks of 34 bytes each
    raw[at : at + 2] = b"\0\x7c"
    (tmp_path / "tiny.gguf").write_bytes(raw)
    with pytest.raises(ModelError, match=rf"tensor {named}\.weight holds numbers that are not finite"):
        smidgen.load(tmp_path / "tiny.gguf")


def test_the_file_may_be_decoded_and_quantised_anew(tmp_path: Path) -> None:
    write_gguf(tiny_folder(tmp_path / "tiny"), tmp_path / "tiny.gguf", {})
    base = smidgen.load(tmp_path / "tiny.gguf", quantize="nf4-dq").base
    assert base.linears["model.layers.0.mlp.up_proj"].weight.storage == "nf4-dq"


def test_a_model_in_parts(tmp_path: Path) -> None:
    folder = tiny_folder(tmp_path / "tiny")
    write_gguf(folder, tmp_path / "whole.gguf", MIXED)
    write_gguf(folder, tmp_path / "parts.gguf", MIXED, tensors_of_part=8)
    parts = sorted(tmp_path.glob("parts-*-of-*.gguf"))
    assert len(parts) == 3
    whole = open_checkpoint(tmp_path / "whole.gguf")
    for part in (parts[0], parts[2]):
        assert open_checkpoint(part).fingerprint() == whole.fingerprint()
    assert torch.equal(_logits(parts[1]), _logits(tmp_path / "whole.gguf"))
    parts[1].rename(tmp_path / "away.gguf")
    with pytest.raises(ModelError, match=r"parts-00002-of-00003.gguf is missing: part 2 of 3"):
        smidgen.load(parts[0])
    shutil.copy(parts[2], parts[1])
    with pytest.raises(ModelError, match=r"says that it is part 3 of 3.*expected part 2 of 3"):
        smidgen.load(parts[0])


def test_plain_numbers_stay_where_they_lie(tmp_path: Path) -> None:
    """Rows of q and k in float16 are found at their place too; auto still packs such a file."""
    folder = tiny_folder(tmp_path / "tiny")
    twin = _dense_twin(folder, write_gguf(folder, tmp_path / "tiny.gguf", {}, default="F16"))
    for how in ("keep", "none"):
        base = smidgen.load(tmp_path / "tiny.gguf", quantize=how, compute_dtype="float32").base
        matrix = base.linears["model.layers.0.self_attn.q_proj"].weight
        assert isinstance(matrix, BlockMatrix) and matrix.ggml_type == "F16" and base.storage == "none"
        with torch.no_grad():
            torch.testing.assert_close(base.model(IDS).logits, _logits(twin, quantize="none"), rtol=1e-3, atol=1e-4)
    assert smidgen.load(tmp_path / "tiny.gguf").base.storage == "nf4-dq"
