"""Runs as GGUF files, read back with the gguf package and with transformers' numbers beside them."""

import copy
import json
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

import smidgen
import smidgen.export.verified as verified
from gguf_models import ROTARY, UNSAID, write_gguf
from smidgen.checkpoint.architectures import ARCHITECTURES
from smidgen.errors import RunError, SettingsError
from smidgen.export.adapter import load_adapter
from smidgen.export.gguf_model import save_gguf
from smidgen.model.build import Base
from smidgen.model.load import load_base, open_source
from stories import stories_folder, stories_golden_text
from tiny import VOCAB_SIZE, tiny_folder, write_rows

IDS = torch.randint(0, VOCAB_SIZE, (1, 11), generator=torch.Generator().manual_seed(0))


def _run(tmp_path: Path, model: Path, **settings: Any) -> Path:
    rows = write_rows(tmp_path / "rows.jsonl")
    how = {"learning_rate": 5e-3, "compute_dtype": "float32", "compare": 0} | settings
    return smidgen.finetune(str(model), str(rows), tmp_path / "run", **how).path


def _tensors(path: Path) -> dict[str, np.ndarray]:
    return {
        tensor.name: gguf.dequantize(tensor.data, tensor.tensor_type) if tensor.data.dtype == np.uint8 else tensor.data
        for tensor in gguf.GGUFReader(path).tensors
    }


def _in_pairs(weight: np.ndarray, heads: int) -> np.ndarray:
    """What llama.cpp's converter does to rows of q and k."""
    return weight.reshape(heads, 2, weight.shape[0] // heads // 2, -1).swapaxes(1, 2).reshape(weight.shape)


@pytest.mark.parametrize("from_gguf", [False, True])
def test_adapter(from_gguf: bool, tmp_path: Path) -> None:
    model = tiny_folder(tmp_path / "tiny")
    if from_gguf:
        write_gguf(model, tmp_path / "tiny.gguf", {})
        model = tmp_path / "tiny.gguf"
    run = _run(tmp_path, model, rank=4, alpha=10.0)
    result = smidgen.export_run(run, tmp_path / "lora.gguf", to="gguf-lora")
    assert result["max_logit_difference"] == 0 < result["base_kl"]
    reader = gguf.GGUFReader(tmp_path / "lora.gguf")
    fields = {key: field.contents() for key, field in reader.fields.items()}
    assert fields["general.architecture"] == "llama" and fields["general.type"] == "adapter"
    assert fields["adapter.type"] == "lora" and fields["adapter.lora.alpha"] == 10.0
    source = open_source(str(model))
    layers = load_adapter(load_base(source, compute_dtype="float32"), run)
    tensors = _tensors(tmp_path / "lora.gguf")
    assert len(tensors) == 2 * len(layers) == 28
    for ours, theirs, heads in (("self_attn.q_proj", "attn_q", 4), ("self_attn.k_proj", "attn_k", 2)):
        layer = layers[f"model.layers.1.{ours}"]
        assert np.array_equal(tensors[f"blk.1.{theirs}.weight.lora_a"], layer.lora_A.numpy())
        assert np.array_equal(tensors[f"blk.1.{theirs}.weight.lora_b"], _in_pairs(layer.lora_B.numpy(), heads))
    layer = layers["model.layers.0.mlp.down_proj"]
    assert np.array_equal(tensors["blk.0.ffn_down.weight.lora_b"], layer.lora_B.numpy())


@pytest.mark.parametrize("too_long", ["left", "right"])
def test_what_is_compared_has_labels(too_long: str, tmp_path: Path) -> None:
    """Rows longer than seq_len used to be cut at the right, whatever the run did, which left no label of them."""
    run = _run(tmp_path, tiny_folder(tmp_path / "tiny"), seq_len=64, too_long=too_long, max_steps=4)
    turns = [{"role": "user", "content": 20 * "long "}, {"role": "assistant", "content": "grey"}]
    rows = "".join(json.dumps({"messages": turns, "id": number}) + "\n" for number in range(8))
    (tmp_path / "rows.jsonl").write_text(rows, encoding="utf-8")
    said: list[Any] = []
    result = smidgen.export_run(run, tmp_path / "lora.gguf", to="gguf-lora", report=said.append)
    plain = [event for event in said if "no held-out row has a label within seq_len 64" in str(event)]
    assert result["compared_tokens"] > 0 and bool(plain) == (too_long == "right")


def test_an_alpha_of_a_layers_own_goes_into_lora_b(tmp_path: Path) -> None:
    run = _run(tmp_path, tiny_folder(tmp_path / "tiny"))
    from smidgen.export.gguf_lora import save_gguf_lora

    base = smidgen.load(run, compute_dtype="float32").base
    layer: Any = base.model.get_submodule("model.layers.0.mlp.up_proj")
    first: Any = base.model.get_submodule("model.layers.0.self_attn.q_proj")
    layer.scaling = 3 * first.scaling
    save_gguf_lora(base, tmp_path / "lora.gguf")
    written = _tensors(tmp_path / "lora.gguf")["blk.0.ffn_up.weight.lora_b"]
    assert np.array_equal(written, 3 * layer.lora_B.detach().numpy())


@pytest.mark.parametrize("architecture", [*ARCHITECTURES, "mistral", "llama-tied"])
def test_merged_model(architecture: str, tmp_path: Path) -> None:
    """The file's numbers are the merged ones; it opens again, tokenizer included, and answers like the run."""
    folder = tiny_folder(tmp_path / "tiny", architecture, **UNSAID.get(architecture, {}))
    run = _run(tmp_path, folder, max_time="3s")
    result = smidgen.export_run(run, tmp_path / "merged.gguf", to="gguf", type="F16")
    assert result["mean_kl"] < 1e-4 < result["base_kl"] and result["type"] == "F16"
    trained, opened = (smidgen.load(path, compute_dtype="float32") for path in (run, tmp_path / "merged.gguf"))
    for text in ("hello <|im_end|> 12", "naïve\n\n  café 🙂"):
        assert opened.tokenizer(text).input_ids == trained.tokenizer(text).input_ids
    assert opened.tokenizer.chat_template == trained.tokenizer.chat_template
    smidgen.merge(run, tmp_path / "merged", dtype="float32")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "merged", dtype=torch.float32).eval()
    with torch.no_grad():
        loaded = smidgen.load(tmp_path / "merged.gguf", quantize="none", compute_dtype="float32").base.model
        ours, theirs = loaded(IDS).logits, model(IDS).logits
    # float16 weights: 11 bits
    torch.testing.assert_close(ours, theirs, rtol=0, atol=5e-3 * float(theirs.abs().max()))


def _angles(model: Any, tokens: int) -> list[torch.Tensor]:
    """Cosines and sines of the first positions, for each kind of layer that has its own."""
    rotary, positions = model.rotary_emb, torch.arange(tokens)[None]
    kinds = [(kind,) for kind in getattr(rotary, "layer_types", [])] or [()]
    return [table for kind in kinds for table in rotary(torch.zeros(1), positions, *kind)]


@pytest.mark.parametrize("scaling", ROTARY)
def test_rotary_scalings(scaling: str, tmp_path: Path) -> None:
    """The file's positions are turned as transformers turns the folder's, in short and in long texts."""
    architecture, changes = ROTARY[scaling]
    folder = tiny_folder(tmp_path / "tiny", architecture, **copy.deepcopy(changes))
    loaded = smidgen.load(folder, quantize="none", compute_dtype="float32")
    said: list[Any] = []
    save_gguf(loaded.base, loaded.tokenizer, tmp_path / "out.gguf", "F16", said.append)
    assert ("betas" in scaling) == any("YaRN's beta_fast, beta_slow: llama.cpp has 32 and 1" in str(e) for e in said)
    opened = smidgen.load(tmp_path / "out.gguf", quantize="none", compute_dtype="float32").base.backbone
    plain = smidgen.load(tiny_folder(tmp_path / "plain", architecture), quantize="none").base.backbone
    theirs = AutoModelForCausalLM.from_pretrained(folder).model
    for tokens in (20, 200):
        expected = _angles(theirs, tokens)
        torch.testing.assert_close(_angles(opened, tokens), expected, rtol=0, atol=1e-4)  # float32's 200 radians
    unlike = [float((a - b).abs().max()) for a, b in zip(expected, _angles(plain, 200), strict=False)]
    assert max(unlike) > 0.1, "the scaling does nothing"


@pytest.mark.parametrize(
    ("architecture", "rope", "says"),
    [
        ("llama", ROTARY["yarn"][1]["rope_parameters"] | {"truncate": False}, "'yarn with truncate = false'"),
        ("llama", ROTARY["longrope"][1]["rope_parameters"], "'longrope'"),
        ("qwen2", {"rope_type": "dynamic", "rope_theta": 10_000.0, "factor": 2.0}, "'dynamic'"),
    ],
)
def test_rotary_scalings_without_a_place_are_refused(
    architecture: str, rope: dict[str, Any], says: str, tmp_path: Path
) -> None:
    loaded = smidgen.load(tiny_folder(tmp_path / "tiny", architecture, rope_parameters=dict(rope)), quantize="none")
    with pytest.raises(RunError, match=f"rotary scaling {says} is not written as GGUF here.*--to hf"):
        save_gguf(loaded.base, loaded.tokenizer, tmp_path / "out.gguf", "F16")


@pytest.mark.parametrize("kind", ["Q8_0", "Q4_0", "BF16"])
def test_types(kind: str, tmp_path: Path) -> None:
    write_gguf(tiny_folder(tmp_path / "tiny"), tmp_path / "tiny.gguf", {"attn_v": "Q5_1"})
    run = _run(tmp_path, tmp_path / "tiny.gguf")
    result = smidgen.export_run(run, tmp_path / "merged.gguf", to="gguf", type=kind)
    assert result["mean_kl"] < 0.2 * result["base_kl"]
    types = {tensor.name: tensor.tensor_type.name for tensor in gguf.GGUFReader(tmp_path / "merged.gguf").tensors}
    assert types["blk.0.attn_q.weight"] == kind and types["blk.0.attn_norm.weight"] == "F32"
    assert types["token_embd.weight"] == ("Q8_0" if kind == "Q4_0" else kind)


def test_a_base_of_another_alignment(tmp_path: Path) -> None:
    """Its general.alignment was copied beside tensors that are written 32 bytes apart."""
    folder = tiny_folder(tmp_path / "tiny", hidden_size=96, num_attention_heads=6)  # norms of no whole 256 bytes
    write_gguf(folder, tmp_path / "tiny.gguf", {}, alignment=256)
    run = _run(tmp_path, tmp_path / "tiny.gguf")
    result = smidgen.export_run(run, tmp_path / "merged.gguf", to="gguf")
    assert result["mean_kl"] < 0.2 * result["base_kl"]
    assert gguf.GGUFReader(tmp_path / "merged.gguf").alignment == 32


def test_ollama_and_hf(tmp_path: Path) -> None:
    run = _run(tmp_path, tiny_folder(tmp_path / "tiny"))
    assert smidgen.export_run(run, tmp_path / "ollama", to="ollama")["type"] == "Q8_0"
    text = (tmp_path / "ollama" / "Modelfile").read_text()
    assert text.startswith("FROM ./model.gguf\n") and "PARAMETER stop <|im_end|>" in text
    assert "<|im_start|>{{ .Role }}\n{{ .Content }}<|im_end|>" in text
    assert smidgen.load(tmp_path / "ollama" / "model.gguf").base.storage == "gguf"
    assert smidgen.export_run(run, tmp_path / "hf", to="hf")["type"] == "float32"
    AutoModelForCausalLM.from_pretrained(tmp_path / "hf")


def test_bitsandbytes_folder(tmp_path: Path) -> None:
    run = _run(tmp_path, tiny_folder(tmp_path / "tiny"), quantize="none")
    result = smidgen.export_run(run, tmp_path / "bnb", to="bnb-4bit")
    assert result["type"] == "nf4-dq" and 0 < result["mean_kl"] < result["base_kl"]
    assert smidgen.load(tmp_path / "bnb").base.storage == "nf4-dq"


def test_a_fine_tune_that_does_not_survive_is_an_error_and_leaves_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Adapters so small that 4-bit blocks swallow them: the file would be the base's, rounded anew."""
    run = _run(tmp_path, tiny_folder(tmp_path / "tiny"), learning_rate=1e-6, quantize="none")
    with pytest.raises(RunError, match="the fine-tune is lost in Q4_0"):
        smidgen.export_run(run, tmp_path / "merged.gguf", to="gguf", type="Q4_0")
    assert not [path for path in tmp_path.iterdir() if "merged" in path.name]


def test_an_export_that_is_not_finite_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = _run(tmp_path, tiny_folder(tmp_path / "tiny"), quantize="none", max_time="1s")
    reopened = verified.reopened

    def broken(*given: Any, **how: Any) -> Base:
        base = reopened(*given, **how)
        monkeypatch.setattr(
            base.head, "forward", lambda hidden: torch.full((*hidden.shape[:-1], VOCAB_SIZE), torch.nan)
        )
        return base

    monkeypatch.setattr(verified, "reopened", broken)
    with pytest.raises(RunError, match="nothing finite in Q8_0"):
        smidgen.export_run(run, tmp_path / "merged.gguf", to="gguf")
    assert not [path for path in tmp_path.iterdir() if "merged" in path.name]


@pytest.mark.parametrize(
    ("how", "says"),
    [
        ({"to": "onnx"}, "to: expected one of gguf-lora"),
        ({"to": "gguf", "type": "Q4_K"}, "type: expected auto, Q8_0, F16, BF16, Q4_0 with --to gguf, found 'Q4_K'"),
        ({"to": "gguf"}, "ends in .gguf"),
    ],
)
def test_wrong_settings(how: dict[str, Any], says: str, tmp_path: Path) -> None:
    with pytest.raises(SettingsError, match=says):
        smidgen.export_run(_run(tmp_path, tiny_folder(tmp_path / "tiny"), max_time="1s"), tmp_path / "out", **how)


def test_an_architecture_that_gguf_is_not_written_for(tmp_path: Path) -> None:
    run = _run(tmp_path, tiny_folder(tmp_path / "tiny", "gpt-neox"), max_time="1s")
    with pytest.raises(RunError, match="GPTNeoXForCausalLM cannot be written as GGUF here"):
        smidgen.export_run(run, tmp_path / "merged.gguf", to="gguf")


def test_a_sentencepiece_model_keeps_its_words(tmp_path: Path) -> None:
    """stories260K from its Hugging Face folder through GGUF: the same tokens, and the story that llama2.c tells."""
    loaded = smidgen.load(stories_folder(tmp_path), quantize="none", compute_dtype="float32")
    save_gguf(loaded.base, loaded.tokenizer, tmp_path / "stories.gguf", "F16")
    again = smidgen.load(tmp_path / "stories.gguf", quantize="none", compute_dtype="float32")
    for text in ("Once upon a time, there was a dog.", "  2 ünusual   words\n\n🙂"):
        assert again.tokenizer(text).input_ids == loaded.tokenizer(text).input_ids
    golden = stories_golden_text()
    prompt = "Once upon a time"
    told = again.generate(prompt, raw=True, temperature=0.0, max_new_tokens=60).text
    assert golden.startswith(prompt + told)


@pytest.mark.parametrize(("to", "kind"), [("gguf", "F16"), ("gguf-lora", "F32")])
def test_a_file_with_rows_in_the_wrong_order_is_found_out(
    to: str, kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = _run(tmp_path, tiny_folder(tmp_path / "tiny"))
    monkeypatch.setattr("smidgen.export.gguf_layout.permute", lambda tensor, heads: tensor)
    with pytest.raises(RunError, match=f"computes something else than the run.*rounding of {kind}"):
        smidgen.export_run(run, tmp_path / "out.gguf", to=to, type=kind)
    assert not (tmp_path / "out.gguf").exists()


def test_layers_with_windows_that_no_reader_would_expect_are_refused(tmp_path: Path) -> None:
    run = _run(tmp_path, tiny_folder(tmp_path / "tiny", "gemma3", query_pre_attn_scalar=16), max_time="1s")
    with pytest.raises(RunError, match=r"layer_types = .*full_attention.* has no place in GGUF"):
        smidgen.export_run(run, tmp_path / "out.gguf", to="gguf")


def test_the_chat_template_of_training_goes_with_the_file(tmp_path: Path) -> None:
    """Also where the base's own file had none."""
    folder = tiny_folder(tmp_path / "tiny")
    write_gguf(folder, tmp_path / "tiny.gguf", {}, template=False)
    run = _run(tmp_path, tmp_path / "tiny.gguf", max_time="1s")
    smidgen.export_run(run, tmp_path / "out.gguf", to="gguf")
    assert smidgen.load(tmp_path / "out.gguf").tokenizer.chat_template == smidgen.load(run).tokenizer.chat_template
    assert "<|im_start|>" in smidgen.load(run).tokenizer.chat_template
