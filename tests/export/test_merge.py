"""Merged folders load with real transformers and compute what base + adapter computes."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

import smidgen
from smidgen.errors import RunError
from smidgen.export.adapter import save_adapter
from smidgen.export.merge import write_merged
from smidgen.lora.attach import attach_lora
from smidgen.lora.targets import select_targets
from smidgen.model.build import Base
from tiny import CONFIGS, VOCAB_SIZE, build, byte_tokenizer, tiny_folder

IDS = torch.randint(0, VOCAB_SIZE, (2, 15), generator=torch.Generator().manual_seed(0))


def _adapted(folder: Path, targets: str, storage: str = "nf4-dq"):
    base = build(folder, storage)
    names, _ = select_targets(targets, base.linears, base.head_name)
    for index, layer in enumerate(attach_lora(base.model, names, rank=4, alpha=8, dropout=0, seed=0).values()):
        with torch.no_grad():
            layer.lora_B.copy_(torch.randn(layer.lora_B.shape, generator=torch.Generator().manual_seed(index)) * 0.1)
    return base


@pytest.mark.parametrize("architecture", CONFIGS)
def test_merged_folder_computes_the_same_in_transformers(architecture: str, tmp_path: Path) -> None:
    base = _adapted(tiny_folder(tmp_path / "base", architecture), "all")
    write_merged(base, tmp_path / "merged", torch.float32, byte_tokenizer())
    merged, info = AutoModelForCausalLM.from_pretrained(tmp_path / "merged", output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"]
    torch.testing.assert_close(merged.eval()(IDS).logits, base.model(IDS).logits, rtol=1e-4, atol=1e-4)


def test_a_tied_head_with_an_adapter_becomes_its_own_matrix(tmp_path: Path) -> None:
    base = _adapted(tiny_folder(tmp_path / "base", "llama-tied"), "q,head")
    write_merged(base, tmp_path / "merged", torch.float32, byte_tokenizer())
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged").eval()
    assert not torch.equal(merged.lm_head.weight, merged.model.embed_tokens.weight)
    torch.testing.assert_close(merged(IDS).logits, base.model(IDS).logits, rtol=1e-4, atol=1e-4)


def test_shards_have_an_index_and_load(tmp_path: Path) -> None:
    base = _adapted(tiny_folder(tmp_path / "base"), "all")
    write_merged(base, tmp_path / "merged", torch.bfloat16, byte_tokenizer(), shard_bytes=60_000)
    assert len(list((tmp_path / "merged").glob("model-*.safetensors"))) > 2
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged", dtype=torch.float32).eval()
    # bfloat16 keeps 8 bits of each weight
    torch.testing.assert_close(merged(IDS).logits, base.model(IDS).logits, rtol=0.1, atol=0.1)
    assert torch.equal(build(tmp_path / "merged").model(IDS).logits, merged(IDS).logits)  # and we read it as well


def _save_some_adapter(place: Path, base: Base, folder: Path) -> None:
    name = "model.layers.0.mlp.up_proj"
    adapters = attach_lora(base.model, [name], rank=2, alpha=4, dropout=0, seed=0)
    torch.nn.init.normal_(adapters[name].lora_B)
    place.mkdir()
    save_adapter(place, base, adapters, str(folder))


@pytest.mark.parametrize("verb", ["merge", "export"])
def test_weights_beyond_the_range_of_a_type_leave_no_folder(verb: str, tmp_path: Path) -> None:
    """A norm of 1e5, which bfloat16 holds and float16 does not: the folder stayed, and the base was to be downloaded
    again."""
    folder = tiny_folder(tmp_path / "base", dtype=torch.bfloat16)
    tensors = load_file(folder / "model.safetensors")
    tensors["model.norm.weight"][3] = 1e5
    tensors["lm_head.weight"][:, 3] = 0  # so that logits stay as they are
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    base = build(folder)
    _save_some_adapter(tmp_path / "adapter", base, folder)
    with pytest.raises(RunError, match=r"float16: tensor model\.norm\.weight .*; nothing was kept\. Take a wider --"):
        if verb == "merge":
            smidgen.merge(tmp_path / "adapter", tmp_path / "out", dtype="float16")
        else:
            smidgen.export_run(tmp_path / "adapter", tmp_path / "out", to="hf", type="float16")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["adapter", "base"]


def test_an_existing_folder_is_never_overwritten(tmp_path: Path) -> None:
    folder = tiny_folder(tmp_path / "base")
    _save_some_adapter(tmp_path / "adapter", build(folder), folder)
    (tmp_path / "merged").mkdir()
    (tmp_path / "merged" / "mine.txt").write_text("mine")
    with pytest.raises(RunError, match="holds something already"):
        smidgen.merge(tmp_path / "adapter", tmp_path / "merged")
    assert [file.name for file in (tmp_path / "merged").iterdir()] == ["mine.txt"]
