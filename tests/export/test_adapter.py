"""Adapters that real PEFT loads with the same logits, and adapters that must not be loaded."""

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from smidgen.errors import RunError
from smidgen.export.adapter import load_adapter, read_adapter, save_adapter
from smidgen.export.compare import check_saved_adapter
from smidgen.lora.attach import attach_lora
from smidgen.lora.targets import select_targets
from tiny import VOCAB_SIZE, build, tiny_folder

IDS = torch.randint(0, VOCAB_SIZE, (2, 15), generator=torch.Generator().manual_seed(0))


def _adapted(folder: Path, targets: str = "all", storage: str = "none", **kind: Any) -> tuple[Any, dict]:
    base = build(folder, storage)
    names, _ = select_targets(targets, base.linears, base.head_name)
    adapters = attach_lora(base.model, names, rank=4, alpha=12, dropout=0.0, seed=0, **kind)
    with torch.no_grad():
        for index, layer in enumerate(adapters.values()):
            layer.lora_B.copy_(torch.randn(layer.lora_B.shape, generator=torch.Generator().manual_seed(index)) * 0.1)
    return base, adapters


@pytest.mark.parametrize(
    ("architecture", "targets"),
    [
        ("llama", "all"),
        ("llama", "q,v"),
        ("llama", "o,down"),
        ("llama", "layers.1.self_attn.q_proj"),
        ("llama", "q,head"),
        ("llama-tied", "v,head"),
        ("gpt2", "all"),
        ("gpt2", "q,down"),
        ("gpt-neox", "all"),
        ("gpt-neox", "o,up"),
        ("gemma3", "all"),
        ("qwen3", "all"),
        ("phi3", "q,gate"),
        ("falcon", "all"),
        ("mixtral", "all"),
    ],
)
def test_real_peft_gives_the_same_logits(architecture: str, targets: str, tmp_path: Path) -> None:
    peft = pytest.importorskip("peft")
    folder = tiny_folder(tmp_path / "base", architecture)
    base, adapters = _adapted(folder, targets)
    (tmp_path / "adapter").mkdir()
    save_adapter(tmp_path / "adapter", base, adapters, str(folder))
    dense = AutoModelForCausalLM.from_pretrained(folder).eval()
    bare = dense(IDS).logits.clone()
    theirs = peft.PeftModel.from_pretrained(dense, tmp_path / "adapter").eval()(IDS).logits
    ours = base.model(IDS).logits
    assert float((ours - bare).abs().max()) > 0.01  # the adapter does something
    torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)


def test_a_saved_adapter_loads_to_the_same_bits(tmp_path: Path) -> None:
    folder = tiny_folder(tmp_path / "base")
    base, adapters = _adapted(folder, storage="nf4-dq")
    (tmp_path / "a").mkdir()
    save_adapter(tmp_path / "a", base, adapters, str(folder))
    again = build(folder, "nf4-dq")
    loaded = load_adapter(again, tmp_path / "a")
    assert list(loaded) == list(adapters)
    assert torch.equal(again.model(IDS).logits, base.model(IDS).logits)
    assert not any(parameter.requires_grad for parameter in again.model.parameters())


def _broken(folder: Path, config: dict | None = None, tensors: dict | None = None) -> Path:
    if config:
        file = folder / "adapter_config.json"
        file.write_text(json.dumps(json.loads(file.read_text()) | config))
    if tensors is not None:
        kept = load_file(folder / "adapter_model.safetensors") | tensors
        save_file({k: v for k, v in kept.items() if v is not None}, folder / "adapter_model.safetensors")
    return folder


_Q = "base_model.model.model.layers.0.self_attn.q_proj"


@pytest.mark.parametrize(
    ("config", "tensors", "words"),
    [
        ({"use_dora": True}, None, "lora_magnitude_vector of model.layers.0.self_attn.q_proj is missing"),
        ({"peft_type": "IA3"}, None, "peft_type 'IA3'"),
        ({"bias": "all"}, None, "bias is not supported"),
        ({"lora_alpha": float("nan")}, None, "cannot be read (alpha is nan, beyond float32)"),
        ({"lora_alpha": 1e39}, None, "cannot be read (alpha is 1e+39, beyond float32)"),
        ({"lora_alpha": 10**400}, None, "cannot be read (int too large to convert to float)"),
        ({"lora_dropout": 2}, None, "cannot be read (lora_dropout is 2.0)"),
        ({"alpha_pattern": {"(": 1}}, None, "cannot be read (missing )"),
        ({"alpha_pattern": {"(.|.|.)*!": 1}}, None, "cannot be read (computes for more than 2 s)"),
        (None, {f"{_Q}.lora_A.weight": torch.tensor(1.0)}, "expected a matrix, of rank 1 at least, found shape []"),
        (
            None,
            {f"{_Q}.lora_A.weight": torch.ones(0, 64)},
            "expected a matrix, of rank 1 at least, found shape [0, 64]",
        ),
        (None, {f"{_Q}.lora_B.weight": torch.ones(64)}, "q_proj.lora_B.weight, expected a matrix"),
        (None, {f"{_Q}.lora_A.weight": torch.full((4, 64), torch.nan)}, "q_proj.lora_A.weight holds numbers that are"),
        (None, {f"{_Q}.lora_B.weight": torch.full((64, 4), torch.inf)}, "q_proj.lora_B.weight holds numbers that are"),
        (None, {f"{_Q}.lora_B.weight": torch.ones(64, 4, dtype=torch.int32)}, "expected floats of 16 to 64 bits"),
        (None, {f"{_Q}.lora_B.weight": None}, "lora_A or lora_B"),
        (None, {f"{_Q}.lora_B.weight": torch.ones(63, 4)}, "expected shape [64, 4], found [63, 4]"),
        (None, {f"{_Q}.lora_magnitude_vector": torch.ones(64)}, "unexpected tensor"),
        (
            None,
            {
                "base_model.model.model.layers.9.mlp.up_proj.lora_A.weight": torch.ones(4, 64),
                "base_model.model.model.layers.9.mlp.up_proj.lora_B.weight": torch.ones(96, 4),
            },
            "for another model",
        ),
    ],
)
def test_adapters_that_do_not_fit_are_refused(config: Any, tensors: Any, words: str, tmp_path: Path) -> None:
    folder = tiny_folder(tmp_path / "base")
    base, adapters = _adapted(folder, "q")
    (tmp_path / "a").mkdir()
    save_adapter(tmp_path / "a", base, adapters, str(folder))
    with pytest.raises(RunError) as refused:
        load_adapter(build(folder), _broken(tmp_path / "a", config, tensors))
    assert words in str(refused.value) and "\n" not in str(refused.value)


@pytest.mark.parametrize("start", ["pissa", "pissa_niter_4", "olora", "corda", "loftq", "lora_ga", "of a later PEFT"])
def test_adapters_to_a_base_that_peft_changes_are_refused(start: str, tmp_path: Path) -> None:
    """They were applied to the plain base, which computes something else, without a word."""
    base, adapters = _adapted(tiny_folder(tmp_path / "base"), "q")
    (tmp_path / "a").mkdir()
    save_adapter(tmp_path / "a", base, adapters, "x")
    with pytest.raises(RunError, match=f"init_lora_weights '{start}' is not supported.*merge it with PEFT"):
        read_adapter(_broken(tmp_path / "a", {"init_lora_weights": start}))


@pytest.mark.parametrize("start", [True, False, None, "gaussian", "eva", "orthogonal", "mica"])
def test_adapters_that_only_started_elsewhere_are_read(start: Any, tmp_path: Path) -> None:
    base, adapters = _adapted(tiny_folder(tmp_path / "base"), "q")
    (tmp_path / "a").mkdir()
    save_adapter(tmp_path / "a", base, adapters, "x")
    read_adapter(_broken(tmp_path / "a", {"init_lora_weights": start}))


# Of PEFT's LoraConfig: what does not change what the stored tensors compute (which layers have them, how they were
# started or trained, how the base stores its weights), and what is honoured.
_HARMLESS = {
    "auto_mapping", "base_model_name_or_path", "corda_config", "eva_config", "exclude_modules",
    "fan_in_fan_out", "inference_mode", "layers_pattern", "layers_to_transform", "loftq_config", "lora_ga_config",
    "megatron_config", "megatron_core", "peft_version", "qalora_group_size", "r", "rank_pattern", "revision",
    "runtime_config", "target_modules", "task_type",
}  # fmt: skip
_HONOURED = {
    "alpha_pattern", "bias", "ensure_weight_tying", "init_lora_weights", "lora_alpha", "lora_dropout",
    "modules_to_save", "peft_type", "trainable_token_indices", "use_dora", "use_rslora",
}  # fmt: skip


def test_every_setting_that_peft_knows_is_honoured_harmless_or_refused(tmp_path: Path) -> None:
    """A new PEFT may bring a new kind of adapter: look at it, and put its field into one of the three."""
    peft = pytest.importorskip("peft")
    base, adapters = _adapted(tiny_folder(tmp_path / "base"), "q")
    (tmp_path / "a").mkdir()
    save_adapter(tmp_path / "a", base, adapters, "x")
    config = json.loads((tmp_path / "a" / "adapter_config.json").read_text())
    for field in dataclasses.fields(peft.LoraConfig):
        if field.name not in _HARMLESS | _HONOURED:
            _broken(tmp_path / "a", config | {field.name: {"set": [1]}})
            with pytest.raises(RunError, match=f"{field.name} is not supported"):
                read_adapter(tmp_path / "a")
            _broken(tmp_path / "a", config | {field.name: None})
            read_adapter(tmp_path / "a")


@pytest.mark.parametrize(
    ("what", "kind", "refused"),
    [
        ("lora_A", {}, True),
        ("lora_B", {}, True),
        ("alpha", {}, True),
        ("alpha of one", {}, False),
        ("lora_B", {"use_dora": True}, True),  # as it starts: the magnitudes are the rows' lengths
        ("lora_B, not m", {"use_dora": True}, False),
    ],
)
def test_an_adapter_that_would_change_nothing_is_refused(
    what: str, kind: dict[str, Any], refused: bool, tmp_path: Path
) -> None:
    folder = tiny_folder(tmp_path / "base")
    base, adapters = _adapted(folder, "q", **kind)
    with torch.no_grad():
        for layer in adapters.values():
            if what in ("lora_A", "lora_B"):
                getattr(layer, what).zero_()
            elif what == "lora_B, not m":
                layer.lora_B.zero_()
                layer.lora_magnitude_vector.mul_(1.1)
    (tmp_path / "a").mkdir()
    save_adapter(tmp_path / "a", base, adapters, str(folder))
    if what == "alpha":
        _broken(tmp_path / "a", {"lora_alpha": 0})
    elif what == "alpha of one":
        _broken(tmp_path / "a", {"alpha_pattern": {"layers.0.self_attn.q_proj": 0}})
    if refused:
        with pytest.raises(RunError, match="would change nothing"):
            load_adapter(build(folder), tmp_path / "a")
    else:
        load_adapter(build(folder), tmp_path / "a")


def test_numbers_that_are_not_finite_are_never_saved(tmp_path: Path) -> None:
    base, adapters = _adapted(tiny_folder(tmp_path / "base"), "q")
    with torch.no_grad():
        next(iter(adapters.values())).lora_A[0, 0] = torch.inf
    (tmp_path / "a").mkdir()
    with pytest.raises(RunError, match="not finite"):
        save_adapter(tmp_path / "a", base, adapters, "x")
    assert not list((tmp_path / "a").iterdir())


@pytest.mark.parametrize("damage", ["", "alpha", "numbers", "a layer"])
def test_a_saved_adapter_is_held_to_what_the_model_computes(damage: str, tmp_path: Path) -> None:
    base, adapters = _adapted(tiny_folder(tmp_path / "base"), "q,v")
    layer = next(iter(adapters.values()))
    before = layer.lora_A.data.clone(), layer.alpha
    (tmp_path / "a").mkdir()
    save_adapter(tmp_path / "a", base, adapters, "x")
    config, tensors = tmp_path / "a" / "adapter_config.json", load_file(tmp_path / "a" / "adapter_model.safetensors")
    if damage == "alpha":
        config.write_text(json.dumps(json.loads(config.read_text()) | {"lora_alpha": 99}))
    elif damage == "numbers":
        tensors[f"{_Q}.lora_B.weight"] += 0.1
    elif damage == "a layer":
        tensors = {name: tensor for name, tensor in tensors.items() if not name.startswith(_Q)}
    save_file(tensors, tmp_path / "a" / "adapter_model.safetensors")
    if damage:
        with pytest.raises(RunError, match="computes something else than the model, found logits"):
            check_saved_adapter(base, adapters, tmp_path / "a")
    else:
        check_saved_adapter(base, adapters, tmp_path / "a")
    assert torch.equal(layer.lora_A.data, before[0]) and layer.alpha == before[1]  # as it was
