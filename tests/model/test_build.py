"""The packed model computes what transformers computes, for every kind of architecture."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from smidgen.checkpoint.open import open_checkpoint
from smidgen.errors import ModelError
from smidgen.events import Warned
from smidgen.export.merge import write_merged
from smidgen.model.build import build_base
from smidgen.model.inventory import inventory_of
from smidgen.model.trained import is_tied
from smidgen.quant.matrix import FrozenMatrix
from tiny import CONFIGS, VOCAB_SIZE, build, byte_tokenizer, tiny_folder

IDS = torch.randint(0, VOCAB_SIZE, (2, 21), generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("architecture", CONFIGS)
def test_unquantised_logits_equal_transformers(architecture: str, tmp_path: Path) -> None:
    folder = tiny_folder(tmp_path, architecture)
    expected = AutoModelForCausalLM.from_pretrained(folder).eval()(IDS).logits
    base = build(folder)
    # the same products in panels: equal to a few ulps of float32
    torch.testing.assert_close(base.model(IDS).logits, expected, rtol=1e-5, atol=1e-5)
    if architecture != "opt":  # its backbone is called in parts
        torch.testing.assert_close(base.logits_of(base.hidden_of(IDS)), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("architecture", CONFIGS)
def test_quantised_logits_are_those_of_the_dequantised_weights(architecture: str, tmp_path: Path) -> None:
    """Put each de-quantised matrix into transformers' own dense model: the logits must be the same."""
    folder = tiny_folder(tmp_path, architecture)
    base = build(folder, "nf4-dq")
    dense = AutoModelForCausalLM.from_pretrained(folder).eval()
    unpacked = 0
    with torch.no_grad():
        for name, module in dense.named_modules():
            if type(module).__name__.endswith("Experts"):
                ours = base.model.get_submodule(name)
                for key, experts in (
                    ("gate_up_proj", [gate_up for (gate_up,) in ours.gate_up]),
                    ("down_proj", ours.down),
                ):
                    for index, expert in enumerate(experts):
                        getattr(module, key)[index] = expert.rows(0, expert.out_features, torch.float32)
            elif name in base.linears and name != base.head_name:
                matrix = base.linears[name].weight
                rows = matrix.rows(0, matrix.out_features, torch.float32)
                assert not torch.equal(rows, module.weight.t() if base.linears[name].transposed else module.weight)
                module.weight.copy_(rows.t() if base.linears[name].transposed else rows)
                unpacked += 1
    assert unpacked >= 4
    torch.testing.assert_close(base.model(IDS).logits, dense(IDS).logits, rtol=1e-4, atol=1e-5)


def test_a_bfloat16_base_is_mapped_and_never_copied_to_float32(tmp_path: Path) -> None:
    base = build(tiny_folder(tmp_path, dtype=torch.bfloat16))
    types = {module.storage for module in base.model.modules() if isinstance(module, FrozenMatrix)}
    assert types == {"bfloat16"}
    assert base.model.get_input_embeddings().weight.dtype == torch.bfloat16
    assert base.model(IDS).logits.dtype == torch.float32


def test_a_tied_head_shares_the_embedding(tmp_path: Path) -> None:
    base = build(tiny_folder(tmp_path, "llama-tied"), "nf4-dq")
    embedding = base.model.get_input_embeddings().weight
    assert base.head.weight.weight.data_ptr() == embedding.data_ptr()


def _edit(folder: Path, change: dict[str, torch.Tensor | None]) -> Path:
    tensors = load_file(folder / "model.safetensors") | change
    save_file(
        {k: v for k, v in tensors.items() if v is not None}, folder / "model.safetensors", metadata={"format": "pt"}
    )
    return folder


@pytest.mark.parametrize("architecture", ["llama-tied", "gpt2", "falcon", "opt", "gemma3"])
def test_a_head_beside_a_tied_embedding_counts_where_it_differs(architecture: str, tmp_path: Path) -> None:
    """The file was ignored where config.json says tie_word_embeddings."""
    folder = tiny_folder(tmp_path / "model", architecture)
    names = dict(AutoModelForCausalLM.from_pretrained(folder).named_parameters())
    embedding = next(weight.detach() for name, weight in names.items() if "embed" in name or "wte" in name)
    for other, texts in ((torch.zeros_like(embedding), 0), (0.1 * torch.randn_like(embedding), 1)):
        _edit(folder, {"lm_head.weight": embedding + other})
        expected = AutoModelForCausalLM.from_pretrained(folder).eval()(IDS).logits
        said: list[Any] = []
        base = build_base(
            open_checkpoint(folder), storage="none", compute_dtype=torch.float32, device=torch.device("cpu"),
            report=said.append,
        )  # fmt: skip
        torch.testing.assert_close(base.model(IDS).logits, expected, rtol=1e-5, atol=1e-5)
        assert ["a head of its own" in event.text for event in said if isinstance(event, Warned)] == [True] * texts
        assert is_tied(base) == (not texts)
        assert bool(inventory_of(base.checkpoint, base.checkpoint.config, "none").head_bytes) == bool(texts)
    write_merged(base, tmp_path / "written", torch.float32, byte_tokenizer())
    assert json.loads((tmp_path / "written" / "config.json").read_text())["tie_word_embeddings"] is False
    written = AutoModelForCausalLM.from_pretrained(tmp_path / "written").eval()
    torch.testing.assert_close(written(IDS).logits, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"model.layers.1.mlp.up_proj.weight": None}, "model.layers.1.mlp.up_proj.weight missing"),
        ({"lm_head.weight": None}, "lm_head.weight missing"),  # it was taken for the embedding
        ({"model.layers.7.extra.weight": torch.ones(2)}, "model.layers.7.extra.weight left over"),
        ({"model.norm.weight": torch.ones(63)}, "expected shape [64]"),
        ({"model.layers.0.self_attn.q_proj.weight": torch.ones(64, 32)}, "expected shape [64, 64]"),
    ],
)
def test_tensors_that_do_not_fit_are_refused_by_name(change: dict, words: str, tmp_path: Path) -> None:
    with pytest.raises(ModelError) as refused:
        build(_edit(tiny_folder(tmp_path), change), "nf4-dq")
    assert words in str(refused.value)


def test_an_architecture_that_would_stay_unpacked_is_refused(tmp_path: Path) -> None:
    import transformers

    config = transformers.GptOssConfig(
        hidden_size=64, intermediate_size=64, num_hidden_layers=1, num_attention_heads=4, num_key_value_heads=2,
        vocab_size=VOCAB_SIZE, head_dim=16, num_local_experts=4,
    )  # fmt: skip
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path)
    with pytest.raises(ModelError, match=r"would stay unpacked .*expected at most 5%"):
        build(tmp_path, "nf4-dq")


@pytest.mark.parametrize(
    ("config", "words"),
    [
        ({"model_type": "no_such_model"}, "model_type 'no_such_model' is unknown"),
        ({"model_type": "no_such_model", "auto_map": {"AutoConfig": "x.Y"}}, "--trust-remote-code"),
        ({"model_type": "t5"}, "does not describe a causal language model"),
    ],
)
def test_configs_that_cannot_be_trained_on_are_refused(config: dict, words: str, tmp_path: Path) -> None:
    folder = tiny_folder(tmp_path)
    file = folder / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | config))
    with pytest.raises(ModelError) as refused:
        build(folder)
    assert words in str(refused.value)


@pytest.mark.parametrize("storage", ["nf4-dq", "nf4", "int8"])
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_weight_that_is_not_finite_is_named(storage: str, value: float, tmp_path: Path) -> None:
    folder = tiny_folder(tmp_path)
    tensors = load_file(folder / "model.safetensors")
    tensors["model.layers.1.mlp.up_proj.weight"][3, 5] = value
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ModelError, match=r"up_proj\.weight holds numbers that are not finite"):
        build(folder, storage)


def _mapped_kb(file: Path) -> int:
    """Resident pages of a file in this process."""
    found, inside = 0, False
    for line in Path("/proc/self/smaps").read_text().splitlines():
        if "-" in line.split(" ")[0]:
            inside = line.endswith(str(file))
        elif inside and line.startswith("Rss:"):
            found += int(line.split()[1])
    return found


@pytest.mark.parametrize("tied", [False, True])
def test_pages_of_looked_up_rows_are_given_back(tied: bool, tmp_path: Path) -> None:
    """40,000 rows of 256 bytes: all of an untied embedding would stay in memory; a tied one is read as the head too."""
    folder = tiny_folder(tmp_path, vocab_size=40_000, tie_word_embeddings=tied)
    base, file = build(folder), folder / "model.safetensors"
    base.checkpoint.release()
    assert _mapped_kb(file) == 0
    base.checkpoint.fingerprint()
    assert _mapped_kb(file) == 0, "the ends of every tensor and what is around them"
    rows = torch.arange(0, 40_000, 16)[None]
    whole_kb = 40_000 * 256 >> 10
    found = base.model.get_input_embeddings()(rows)
    assert (_mapped_kb(file) > whole_kb / 2) == tied
    torch.testing.assert_close(found[0], load_file(file)["model.embed_tokens.weight"][rows[0]])
