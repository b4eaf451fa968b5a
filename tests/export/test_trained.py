"""Whole modules and rows of tokens that learn beside LoRA: real PEFT computes and learns the same with them."""

import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from smidgen.errors import RunError, SettingsError
from smidgen.export.adapter import load_adapter, save_adapter
from smidgen.export.compare import without_adapters
from smidgen.export.gguf_lora import save_gguf_lora
from smidgen.export.merge import write_merged
from smidgen.lora.attach import attach_lora
from smidgen.lora.targets import select_modules, select_targets
from smidgen.model.trained import attach_modules, attach_tokens, embedding_name, initialise_tokens, trainable_names
from tiny import VOCAB_SIZE, build, byte_tokenizer, tiny_folder

IDS = torch.randint(0, VOCAB_SIZE, (2, 15), generator=torch.Generator().manual_seed(0))
TOKENS = [VOCAB_SIZE - 1, VOCAB_SIZE, VOCAB_SIZE + 1]  # a spare row of the base, and two that it does not have
IDS[0, 3], IDS[0, 9], IDS[1, 5] = TOKENS[0], VOCAB_SIZE - 2, VOCAB_SIZE - 1
LARGER = VOCAB_SIZE + 2
WHATS = ["embedding", "head", "norms", "tokens"]
ARCHITECTURES = ["llama", "llama-tied", "gemma3", "gpt2", "qwen3"]


def _trained(folder: Path, what: str, *, changed: bool = True, storage: str = "none", targets: str = "q,v") -> Any:
    """(a base with LoRA and with what else learns, all of it away from where it started; all parts; ids)."""
    base, ids = build(folder, storage), IDS.clone()
    names, _ = select_targets(targets, base.linears, base.head_name)
    parts: dict[str, Any] = dict(attach_lora(base.model, names, rank=4, alpha=8, dropout=0.0, seed=0))
    ends = (embedding_name(base), base.head_name)
    if what == "tokens":
        rows = attach_tokens(base, dict.fromkeys(ends, TOKENS))
        initialise_tokens(rows, [[1, 2], [3], []])
        parts |= rows
        ids[0, 4], ids[1, 7] = TOKENS[1:]
    else:
        norms = [name for name in trainable_names(base.model) if "norm" in name or "ln_" in name]
        parts |= attach_modules(base, {"embedding": ends[:1], "head": ends[1:], "norms": norms}[what])
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for part in parts.values() if changed else ():
            for parameter in part.trainable.values():
                parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.05)
    return base, parts, ids


def _saved(folder: Path, base: Any, parts: dict[str, Any], name: Path) -> Path:
    folder.mkdir()
    save_adapter(folder, base, parts, str(name))
    return folder


def _peft(folder: Path, saved: Path, what: str, *, is_trainable: bool = False) -> Any:
    peft = pytest.importorskip("peft")
    theirs = AutoModelForCausalLM.from_pretrained(folder)
    if what == "tokens":
        theirs.resize_token_embeddings(LARGER)  # its new rows are random
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)  # PEFT's about tied weights that part, and keys not found
        return peft.PeftModel.from_pretrained(theirs, saved, is_trainable=is_trainable)


@pytest.mark.parametrize("what", WHATS)
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_real_peft_gives_the_same_logits(architecture: str, what: str, tmp_path: Path) -> None:
    folder = tiny_folder(tmp_path / "base", architecture)
    base, parts, ids = _trained(folder, what)
    saved = _saved(tmp_path / "a", base, parts, folder)
    ours = base.model(ids).logits.detach()
    plain, _, _ = _trained(folder, what, changed=False)
    assert float((ours - plain.model(ids).logits).detach().abs().max()) > 0.01
    # float32, sums in another order
    torch.testing.assert_close(ours, _peft(folder, saved, what).eval()(ids).logits, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("what", WHATS)
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_where_training_starts_nothing_is_changed(architecture: str, what: str, tmp_path: Path) -> None:
    folder = tiny_folder(tmp_path / "base", architecture)
    base, _, _ = _trained(folder, what, changed=False, storage="nf4-dq")
    expected = build(folder, "nf4-dq").model(IDS.clamp(max=VOCAB_SIZE - 3)).logits
    ours = base.model(IDS.clamp(max=VOCAB_SIZE - 3)).logits[..., :VOCAB_SIZE]
    if what == "tokens":  # but for the row that the base has
        expected, ours = expected[..., : TOKENS[0]], ours[..., : TOKENS[0]]
    torch.testing.assert_close(ours, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("what", WHATS)
@pytest.mark.parametrize("architecture", ["llama", "llama-tied", "qwen3"])
def test_gradients_are_those_of_real_peft(architecture: str, what: str, tmp_path: Path) -> None:
    """Through the packed rows and the chunked loss of a run, and through transformers' modules and all logits."""
    from smidgen.data.batch import make_batch
    from smidgen.data.render import Example
    from smidgen.train.loss import batch_loss

    folder = tiny_folder(tmp_path / "base", architecture)
    base, parts, ids = _trained(folder, what)
    saved = _saved(tmp_path / "a", base, parts, folder)
    theirs = _peft(folder, saved, what, is_trainable=True)
    rows = [row[:length].tolist() for row, length in zip(ids, (15, 11), strict=True)]
    labels = [[-100] * 3 + row[3:] for row in rows]
    base.model.train()
    examples = [Example(row, label, False, "") for row, label in zip(rows, labels, strict=True)]
    loss = batch_loss(base, make_batch(examples))
    loss.backward()
    theirs.train()
    for row, label in zip(rows, labels, strict=True):
        logits = theirs(torch.tensor([row]), use_cache=False).logits[0, :-1]
        torch.nn.functional.cross_entropy(logits, torch.tensor(label[1:]), reduction="sum").backward()
    found = {
        name.replace(".default", "").replace(".modules_to_save", "").removeprefix("base_model.model."): parameter.grad
        for name, parameter in theirs.named_parameters()
        if parameter.grad is not None
    }
    for name, part in parts.items():
        for key, parameter in part.trainable.items():
            key = key if key in ("weight", "bias") else f"{key}.weight"
            key = key.replace("trainable_tokens_delta.weight", "token_adapter.trainable_tokens_delta")
            gradient = found.pop(f"{name}.{key}")
            assert float(gradient.norm()) > 0
            # float32 through two layers, in another order of sums
            assert float((parameter.grad - gradient).norm() / gradient.norm()) < 1e-4, name
    assert not found


@pytest.mark.parametrize("what", WHATS)
def test_a_saved_one_loads_to_the_same_bits_and_saves_to_the_same_files(what: str, tmp_path: Path) -> None:
    folder = tiny_folder(tmp_path / "base", "llama-tied")
    base, parts, ids = _trained(folder, what, storage="nf4-dq")
    first = _saved(tmp_path / "a", base, parts, folder)
    again = build(folder, "nf4-dq")
    loaded = load_adapter(again, first)
    assert torch.equal(again.model(ids).logits, base.model(ids).logits)
    assert not any(parameter.requires_grad for parameter in again.model.parameters())
    second = _saved(tmp_path / "b", again, dict(loaded), folder)
    for file in first.iterdir():
        assert file.read_bytes() == (second / file.name).read_bytes()


@pytest.mark.parametrize("what", WHATS)
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_the_merged_model_computes_the_same(architecture: str, what: str, tmp_path: Path) -> None:
    folder = tiny_folder(tmp_path / "base", architecture)
    base, _, ids = _trained(folder, what, storage="nf4-dq")
    write_merged(base, tmp_path / "merged", torch.float32, byte_tokenizer())
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged").eval()
    torch.testing.assert_close(merged(ids).logits, base.model(ids).logits, rtol=1e-4, atol=1e-4)
    assert merged.config.vocab_size == (LARGER if what == "tokens" else VOCAB_SIZE)
    was_tied = AutoModelForCausalLM.from_pretrained(folder).config.tie_word_embeddings
    assert merged.config.tie_word_embeddings == was_tied  # one weight stays one
    assert ("lm_head.weight" in load_file(tmp_path / "merged" / "model.safetensors")) == (not was_tied)


@pytest.mark.parametrize("modules", [["embed_tokens"], ["lm_head"], ["embed_tokens", "lm_head"]])
def test_a_weight_that_peft_has_parted_stays_parted(modules: list[str], tmp_path: Path) -> None:
    """Without ensure_weight_tying PEFT trains embedding and head of a tied model on their own."""
    peft = pytest.importorskip("peft")
    folder = tiny_folder(tmp_path / "base", "llama-tied")
    config = peft.LoraConfig(r=4, target_modules=["q_proj"], modules_to_save=modules, init_lora_weights=False)
    theirs = peft.get_peft_model(AutoModelForCausalLM.from_pretrained(folder), config).eval()
    with torch.no_grad():
        for name, parameter in theirs.named_parameters():
            if "modules_to_save" in name:
                parameter.add_(torch.randn_like(parameter) * 0.05)
    theirs.save_pretrained(tmp_path / "a")
    base = build(folder)
    load_adapter(base, tmp_path / "a")
    torch.testing.assert_close(base.model(IDS).logits, theirs(IDS).logits, rtol=1e-4, atol=1e-4)
    write_merged(base, tmp_path / "merged", torch.float32, byte_tokenizer())
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged").eval()
    torch.testing.assert_close(merged(IDS).logits, theirs(IDS).logits, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("indices", [[5, 9], {"embed_tokens": [5, 9], "lm_head": [9]}])
def test_tokens_that_peft_has_trained_are_loaded(indices: Any, tmp_path: Path) -> None:
    peft = pytest.importorskip("peft")
    folder = tiny_folder(tmp_path / "base")
    config = peft.LoraConfig(r=4, target_modules=["q_proj"], trainable_token_indices=indices, init_lora_weights=False)
    theirs = peft.get_peft_model(AutoModelForCausalLM.from_pretrained(folder), config).eval()
    with torch.no_grad():
        for name, parameter in theirs.named_parameters():
            if "delta" in name:
                parameter.add_(torch.randn_like(parameter))
    theirs.save_pretrained(tmp_path / "a")
    base, ids = build(folder), IDS.clone()
    ids[0, :2] = torch.tensor([5, 9])
    load_adapter(base, tmp_path / "a")
    torch.testing.assert_close(base.model(ids).logits, theirs(ids).logits, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("what", WHATS)
def test_llama_cpps_adapters_cannot_hold_them(what: str, tmp_path: Path) -> None:
    base, _, _ = _trained(tiny_folder(tmp_path / "base"), what)
    with pytest.raises(RunError, match=r"llama.cpp's adapters cannot hold.*--to gguf, which merges"):
        save_gguf_lora(base, tmp_path / "lora.gguf")
    assert not (tmp_path / "lora.gguf").exists()


@pytest.mark.parametrize("what", WHATS)
def test_the_bare_base_is_there_without_them(what: str, tmp_path: Path) -> None:
    folder = tiny_folder(tmp_path / "base", "llama-tied")
    base, _, ids = _trained(folder, what)
    plain, ids = build(folder).model(IDS).logits, ids if what == "tokens" else IDS
    trained = base.model(ids).logits
    with without_adapters(base):
        bare = base.model(ids).logits
        if what != "tokens":
            assert torch.equal(bare, plain)
    assert bare.shape == trained.shape and not torch.equal(bare, trained)
    assert torch.equal(base.model(ids).logits, trained)


def test_what_cannot_be_is_refused(tmp_path: Path) -> None:
    folder = tiny_folder(tmp_path / "base", "llama-tied")
    names = trainable_names(build(folder).model)
    assert select_modules(["norm", "embed_tokens"], names) == ["model.embed_tokens", "model.norm"]
    with pytest.raises(SettingsError, match="no module matches q_proj, x, there are embed_tokens, input_layernorm"):
        select_modules(["q_proj", "norm", "x"], names)
    with pytest.raises(SettingsError, match="lm_head has an adapter already"):
        _trained(folder, "embedding", targets="head")
    with pytest.raises(SettingsError, match="lm_head has an adapter or is trained whole"):
        _trained(folder, "tokens", targets="head")
    base, _, _ = _trained(folder, "embedding")
    with pytest.raises(SettingsError, match=r"model.embed_tokens has an adapter or is trained whole"):
        attach_tokens(base, {embedding_name(base): [3]})


@pytest.mark.parametrize(
    ("what", "said", "words"),
    [
        ("tokens", {"trainable_token_indices": [1]}, "3 different token ids for model.embed_tokens"),
        ("tokens", {"trainable_token_indices": {"embed_tokens": [1, 1, 2]}}, "3 different token ids"),
        ("tokens", {"trainable_token_indices": {"embed_tokens": "abc"}}, "3 different token ids"),
        ("tokens", {"trainable_token_indices": None}, "unexpected tensor"),
        ("embedding", {"modules_to_save": None}, "unexpected tensor"),
    ],
)
def test_a_config_that_does_not_fit_its_tensors_is_refused(
    what: str, said: dict[str, Any], words: str, tmp_path: Path
) -> None:
    import json

    folder = tiny_folder(tmp_path / "base", "llama-tied")
    base, parts, _ = _trained(folder, what)
    file = _saved(tmp_path / "a", base, parts, folder) / "adapter_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | said))
    with pytest.raises(RunError, match=words):
        load_adapter(build(folder), tmp_path / "a")


def test_modules_of_another_shape_or_kind_are_refused(tmp_path: Path) -> None:
    folder, small = tiny_folder(tmp_path / "base"), tiny_folder(tmp_path / "small", vocab_size=261)
    base, parts, _ = _trained(folder, "embedding")
    saved = _saved(tmp_path / "a", base, parts, folder)
    with pytest.raises(RunError, match=r"weight of model.embed_tokens, expected shape \[261, 64\], found \[272, 64\]"):
        load_adapter(build(small), saved)
    peft = pytest.importorskip("peft")
    config = peft.LoraConfig(r=4, target_modules=["q_proj"], modules_to_save=["down_proj"])
    peft.get_peft_model(AutoModelForCausalLM.from_pretrained(folder), config).save_pretrained(tmp_path / "b")
    with pytest.raises(RunError, match="down_proj is trained whole, which is not known here"):
        load_adapter(build(folder), tmp_path / "b")
