"""Each kind of LoRA, trained or made here: real PEFT computes the same with it, and so do all that we write of it."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from smidgen.errors import RunError
from smidgen.export.adapter import load_adapter, save_adapter
from smidgen.export.gguf_lora import read_gguf_lora, save_gguf_lora
from smidgen.export.merge import write_merged
from smidgen.lora.attach import adapters, attach_lora
from smidgen.lora.targets import select_targets
from tiny import VOCAB_SIZE, build, byte_tokenizer, tiny_folder

IDS = torch.randint(0, VOCAB_SIZE, (2, 15), generator=torch.Generator().manual_seed(0))
PLAIN = {"rank": 4, "alpha": 12.0}
VARIANTS: dict[str, dict[str, Any]] = {
    "rslora": {"use_rslora": True},
    "patterns": {
        # 'layers.1.*' and 'down_proj' both match one layer: the first counts, in PEFT too
        "rank_pattern": {"layers.1.mlp.down_proj": 9, "down_proj|c_proj": 2},
        "alpha_pattern": {"q_proj|c_attn|lm_head": 30.0, r".*\.0\.(mlp.down|self_attn.v)_proj": 2.5},
    },
    "dora": {"use_dora": True},
    "dora-rslora-patterns": {"use_dora": True, "use_rslora": True, "rank_pattern": {"down_proj|c_fc": 2}},
    "patterns-rslora": {
        "use_rslora": True,
        "rank_pattern": {"down_proj|c_fc": 9},
        "alpha_pattern": {"down_proj|c_fc": 5},
    },
}


def _adapted(folder: Path, variant: dict[str, Any], targets: str = "all", storage: str = "none") -> Any:
    """A base with adapters whose every part is random."""
    base = build(folder, storage)
    names, _ = select_targets(targets, base.linears, base.head_name)
    attached = attach_lora(base.model, names, **PLAIN | {"dropout": 0.0, "seed": 0} | variant)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for layer in attached.values():
            layer.lora_B.copy_(torch.randn(layer.lora_B.shape, generator=generator) * 0.05)
            if layer.lora_magnitude_vector is not None:
                layer.lora_magnitude_vector.mul_(torch.rand(layer.out_features, generator=generator) + 0.5)
    return base


def _saved(base: Any, folder: Path, name: str) -> Path:
    folder.mkdir()
    save_adapter(folder, base, adapters(base.model), name)
    return folder


def _in_peft(folder: Path, saved: Path) -> Any:
    """The saved adapter over the model in `folder`, as PEFT itself loads both."""
    peft = pytest.importorskip("peft")
    return peft.PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(folder).eval(), saved).eval()


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize(("architecture", "targets"), [("llama", "all"), ("llama-tied", "v,head"), ("gpt2", "all")])
def test_real_peft_gives_the_same_logits(architecture: str, targets: str, variant: str, tmp_path: Path) -> None:
    folder = tiny_folder(tmp_path / "base", architecture)
    base = _adapted(folder, VARIANTS[variant], targets)
    saved = _saved(base, tmp_path / "a", str(folder))
    theirs = _in_peft(folder, saved)
    ours = base.model(IDS).logits.detach()
    plain = _adapted(folder, {}, targets).model(IDS).logits
    assert float((ours - plain).detach().abs().max()) > 0.01  # it is another function than plain LoRA's
    torch.testing.assert_close(ours, theirs(IDS).logits, rtol=1e-4, atol=1e-4)  # float32, sums in another order


@pytest.mark.parametrize("variant", VARIANTS)
def test_a_setting_that_was_not_written_would_be_seen_in_real_pefts_logits(variant: str, tmp_path: Path) -> None:
    """The control arm: the same tensors, but PEFT is not told what the variant is."""
    folder = tiny_folder(tmp_path / "base")
    base = _adapted(folder, VARIANTS[variant])
    saved = _saved(base, tmp_path / "a", str(folder))
    config = json.loads((saved / "adapter_config.json").read_text())
    told = {"use_dora": False, "use_rslora": False, "alpha_pattern": {}}
    (saved / "adapter_config.json").write_text(json.dumps(config | told))
    theirs = _in_peft(folder, saved)
    assert not torch.allclose(base.model(IDS).logits, theirs(IDS).logits, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("variant", VARIANTS)
def test_an_adapter_of_peft_is_loaded_with_the_same_logits(variant: str, tmp_path: Path) -> None:
    peft = pytest.importorskip("peft")
    folder = tiny_folder(tmp_path / "base")
    how = {"r" if key == "rank" else "lora_alpha" if key == "alpha" else key: value
           for key, value in (PLAIN | VARIANTS[variant]).items()}  # fmt: skip
    config = peft.LoraConfig(target_modules=["q_proj", "down_proj"], init_lora_weights=False, **how)
    theirs = peft.get_peft_model(AutoModelForCausalLM.from_pretrained(folder), config).eval()
    with torch.no_grad():  # else PEFT's magnitudes are the norms, and nothing would depend on them
        for name, parameter in theirs.named_parameters():
            if "magnitude" in name:
                parameter.mul_(torch.linspace(0.5, 2.0, len(parameter)))
    theirs.save_pretrained(tmp_path / "a")
    base = build(folder)
    load_adapter(base, tmp_path / "a")
    torch.testing.assert_close(base.model(IDS).logits, theirs(IDS).logits, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("variant", VARIANTS)
def test_gradients_are_those_of_real_peft(variant: str, tmp_path: Path) -> None:
    peft = pytest.importorskip("peft")
    folder = tiny_folder(tmp_path / "base")
    base = _adapted(folder, VARIANTS[variant])
    saved = _saved(base, tmp_path / "a", str(folder))
    dense = AutoModelForCausalLM.from_pretrained(folder)
    theirs = peft.PeftModel.from_pretrained(dense, saved, is_trainable=True)
    weight = torch.randn(*IDS.shape, VOCAB_SIZE, generator=torch.Generator().manual_seed(2))
    for model in (base.model, theirs):
        model.train()
        (model(IDS, use_cache=False).logits * weight).sum().backward()
    found = {
        name.replace(".default", "").removesuffix(".weight").removeprefix("base_model.model."): parameter.grad
        for name, parameter in theirs.named_parameters()
        if parameter.grad is not None
    }
    ours = {
        f"{name}.{part}": p.grad for name, layer in adapters(base.model).items() for part, p in layer.trainable.items()
    }
    assert ours.keys() == found.keys()
    for name, gradient in ours.items():
        # float32 through two layers, in another order of sums
        assert float((gradient - found[name]).norm() / found[name].norm()) < 1e-4, name


@pytest.mark.parametrize("variant", VARIANTS)
def test_a_saved_adapter_loads_to_the_same_bits_and_saves_to_the_same_files(variant: str, tmp_path: Path) -> None:
    folder = tiny_folder(tmp_path / "base")
    base = _adapted(folder, VARIANTS[variant], storage="nf4-dq")
    first = _saved(base, tmp_path / "a", "x")
    again = build(folder, "nf4-dq")
    load_adapter(again, first)
    assert torch.equal(again.model(IDS).logits, base.model(IDS).logits)
    second = _saved(again, tmp_path / "b", "x")
    for file in first.iterdir():
        assert file.read_bytes() == (second / file.name).read_bytes()


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("architecture", ["llama", "gpt2"])
def test_the_merged_model_computes_the_same(architecture: str, variant: str, tmp_path: Path) -> None:
    base = _adapted(tiny_folder(tmp_path / "base", architecture), VARIANTS[variant], storage="nf4-dq")
    write_merged(base, tmp_path / "merged", torch.float32, byte_tokenizer())
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged").eval()
    torch.testing.assert_close(merged(IDS).logits, base.model(IDS).logits, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("variant", VARIANTS)
def test_llama_cpp_is_given_what_its_own_scaling_makes_right(variant: str, tmp_path: Path) -> None:
    """llama.cpp multiplies by alpha / r, with the file's one alpha and each layer's own r."""
    base = _adapted(tiny_folder(tmp_path / "base"), VARIANTS[variant])
    if VARIANTS[variant].get("use_dora"):
        with pytest.raises(RunError, match=r"llama.cpp has no DoRA.*--to gguf, which merges it"):
            save_gguf_lora(base, tmp_path / "lora.gguf")
        assert not (tmp_path / "lora.gguf").exists()
        return
    save_gguf_lora(base, tmp_path / "lora.gguf")
    read = read_gguf_lora(base, tmp_path / "lora.gguf")
    for name, layer in adapters(base.model).items():
        lora_A, lora_B, scaling = read[name]
        # float32 rounds alpha and what goes into lora_B
        torch.testing.assert_close(scaling * lora_B @ lora_A, layer.delta(0, layer.out_features), rtol=1e-5, atol=1e-7)


def test_a_first_layer_of_alpha_0_goes_into_lora_b(tmp_path: Path) -> None:
    """It was divided by; and llama.cpp takes an alpha of 0 in the file for one that is not said: it multiplies by 1."""
    base = _adapted(tiny_folder(tmp_path / "base"), {"alpha_pattern": {"layers.0.self_attn.q_proj": 0.0}})
    save_gguf_lora(base, tmp_path / "lora.gguf")
    for name, (lora_A, lora_B, scaling) in read_gguf_lora(base, tmp_path / "lora.gguf").items():
        layer = adapters(base.model)[name]
        assert scaling and bool(lora_B.any()) == (layer.alpha != 0)
        torch.testing.assert_close(scaling * lora_B @ lora_A, layer.delta(0, layer.out_features), rtol=1e-5, atol=1e-7)
