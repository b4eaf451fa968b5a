"""Packed folders: what transformers and bitsandbytes make of them, and what the formats' descriptions say they hold."""

import json
import math
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, BitsAndBytesConfig

import smidgen
from gguf_models import write_gguf
from smidgen.errors import ModelError, RunError, SettingsError
from smidgen.events import Note, Progress, Saved
from smidgen.export.packed import save_packed
from smidgen.lora.attach import attach_lora
from smidgen.lora.targets import select_targets
from smidgen.model.calibration import builtin_text
from smidgen.model.gptq import quantise_base
from smidgen.planning import conversion
from smidgen.quant.gptq import GptqSettings, round_to_nearest
from smidgen.quant.grouped import GroupedMatrix
from stories import stories_folder
from tiny import VOCAB_SIZE, build, byte_tokenizer, tiny_folder, write_rows

IDS = torch.randint(0, VOCAB_SIZE, (2, 11), generator=torch.Generator().manual_seed(0))
PROJECTION = "model.layers.0.self_attn.q_proj"
# bitsandbytes' kernels for AVX-512 take no K = 96, which is the tiny models' own
WIDE = {"intermediate_size": 128}
FAST: dict[str, Any] = {"calibration_rows": 4, "calibration_len": 32, "group_size": 32, "perplexity": False}


def _logits(folder: Path, **how: Any) -> torch.Tensor:
    with torch.no_grad():
        return smidgen.load(folder, compute_dtype="float32", **how).base.model(IDS).logits


@pytest.mark.parametrize("storage", ["nf4-dq", "nf4", "fp4", "int8"])
@pytest.mark.parametrize("architecture", ["llama", "llama-tied", "qwen2", "gpt-neox", "opt"])
def test_transformers_and_bitsandbytes_open_it(storage: str, architecture: str, tmp_path: Path) -> None:
    pytest.importorskip("bitsandbytes")
    wide = {"ffn_dim": 128} if architecture == "opt" else WIDE
    dense = tiny_folder(tmp_path / "dense", architecture, **wide)
    result = smidgen.quantize(str(dense), tmp_path / "packed", to=storage)
    assert result["to"] == storage and result["bytes"] < sum(f.stat().st_size for f in dense.iterdir())
    theirs, info = AutoModelForCausalLM.from_pretrained(tmp_path / "packed", output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"]
    # in evaluation mode bitsandbytes computes in bfloat16 or float16 on some CPUs; there is no dropout to switch off
    theirs.train()
    loaded = smidgen.load(tmp_path / "packed", compute_dtype="float32")
    assert loaded.base.storage == storage
    with torch.no_grad():
        ours = loaded.base.model(IDS).logits
        torch.testing.assert_close(ours, theirs(IDS).logits, rtol=1e-4, atol=1e-4)
    assert torch.equal(ours, build(dense, storage).model(IDS).logits)  # what packing while loading gives
    assert loaded.generate("hello", max_new_tokens=3).new_tokens >= 1


def _in_bitsandbytes(folder: Path, **how: Any) -> torch.Tensor:
    """Logits of transformers and bitsandbytes in float32; see above for .train()."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, **how).train()
    with torch.no_grad():
        return model(IDS).logits


@pytest.mark.parametrize(
    ("model", "kind"), [("random", "nf4-dq"), ("random", "nf4"), ("stories260K", "nf4-dq"), ("stories260K", "fp4")]
)
def test_transformers_and_bitsandbytes_open_an_exported_run(model: str, kind: str, tmp_path: Path) -> None:
    """They compute what we do, and what they do over the merged run when they pack that themselves."""
    pytest.importorskip("bitsandbytes")
    dense = stories_folder(tmp_path) if model == "stories260K" else tiny_folder(tmp_path / "dense", **WIDE)
    rows = tmp_path / "rows.jsonl"
    rows.write_text("".join(json.dumps({"text": f"Once upon a time {n} frogs were green."}) + "\n" for n in range(24)))
    how: dict[str, Any] = {"learning_rate": 5e-3, "max_steps": 8, "compute_dtype": "float32", "compare": 0}
    run = smidgen.finetune(str(dense), str(rows), tmp_path / "run", **how).path
    result = smidgen.export_run(run, tmp_path / "packed", to="bnb-4bit", type=kind)
    assert result["mean_kl"] < result["base_kl"]
    theirs = _in_bitsandbytes(tmp_path / "packed")
    torch.testing.assert_close(_logits(tmp_path / "packed"), theirs, rtol=1e-4, atol=1e-4)
    smidgen.merge(run, tmp_path / "merged", dtype="float32")
    config = BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type=kind[:3], bnb_4bit_use_double_quant=kind.endswith("dq")
    )
    assert torch.equal(_in_bitsandbytes(tmp_path / "merged", quantization_config=config), theirs)


@pytest.mark.parametrize("storage", ["nf4-dq", "nf4", "fp4"])
def test_the_file_is_the_one_that_transformers_writes(storage: str, tmp_path: Path) -> None:
    pytest.importorskip("bitsandbytes")
    dense = tiny_folder(tmp_path / "dense", "llama-tied", torch.bfloat16)
    smidgen.quantize(str(dense), tmp_path / "ours", to=storage)
    config = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type=storage[:3],
        bnb_4bit_use_double_quant=storage.endswith("dq"),
        bnb_4bit_compute_dtype=torch.bfloat16,
    )
    model = AutoModelForCausalLM.from_pretrained(dense, quantization_config=config, dtype=torch.bfloat16)
    model.save_pretrained(tmp_path / "theirs")
    ours, theirs = (load_file(tmp_path / name / "model.safetensors") for name in ("ours", "theirs"))
    assert ours.keys() == theirs.keys() and "lm_head.weight" not in ours
    for name, tensor in theirs.items():
        assert ours[name].dtype == tensor.dtype and torch.equal(ours[name], tensor), name
    said = [json.loads((tmp_path / name / "config.json").read_text()) for name in ("ours", "theirs")]
    assert said[0]["dtype"] == said[1]["dtype"] == "bfloat16"
    packed = [each["quantization_config"] for each in said]
    assert packed[0] | {"llm_int8_skip_modules": None} == packed[1]


def _fields(words: list[int], bits: int, count: int) -> list[int]:
    """The first `count` fields of a stream of 32-bit words, lowest bits first."""
    stream = sum((word & 0xFFFFFFFF) << (32 * place) for place, word in enumerate(words))
    return [(stream >> (bits * place)) & ((1 << bits) - 1) for place in range(count)]


def _decoded(tensors: dict[str, torch.Tensor], module: str, bits: int) -> torch.Tensor:
    """W [N, K] by the description of format "gptq": zero points are stored less one."""
    qweight, qzeros, scales, g_idx = (tensors[f"{module}.{part}"] for part in ("qweight", "qzeros", "scales", "g_idx"))
    assert (qweight.dtype, qzeros.dtype, scales.dtype, g_idx.dtype) == (
        torch.int32, torch.int32, torch.float16, torch.int32,
    )  # fmt: skip
    inputs, outputs, groups = len(g_idx), scales.shape[1], scales.shape[0]
    assert qweight.shape == (-(-inputs * bits // 32), outputs)
    assert qzeros.shape == (groups, -(-outputs * bits // 32))
    codes = [_fields(column, bits, inputs) for column in qweight.t().tolist()]
    zeros = [[(field + 1) % (1 << bits) for field in _fields(row, bits, outputs)] for row in qzeros.tolist()]
    return torch.tensor(
        [
            [float(scales[g_idx[k], n]) * (codes[n][k] - zeros[g_idx[k]][n]) for k in range(inputs)]
            for n in range(outputs)
        ]
    )


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize("act_order", [False, True])
@pytest.mark.parametrize("sym", [False, True])
@pytest.mark.parametrize("group_size", [32, -1])
def test_gptq_folder_holds_our_matrices(bits: int, act_order: bool, sym: bool, group_size: int, tmp_path: Path) -> None:
    """96 inputs of down_proj with groups of 32; 16 outputs of k_proj do not fill whole words with 3 bits."""
    how = {"bits": bits, "act_order": act_order, "sym": sym, "group_size": group_size}
    _check_gptq_folder(tiny_folder(tmp_path / "dense"), tmp_path / "packed", **how)


@pytest.mark.parametrize(("bits", "act_order", "sym"), [(4, False, True), (4, True, False), (3, True, True)])
def test_gptq_folder_with_groups_of_128(bits: int, act_order: bool, sym: bool, tmp_path: Path) -> None:
    """256 inputs of down_proj are two groups, 192 of k_proj one and a half."""
    dense = tiny_folder(tmp_path / "dense", hidden_size=192, intermediate_size=256)
    _check_gptq_folder(dense, tmp_path / "packed", bits=bits, act_order=act_order, sym=sym, group_size=128)


def _check_gptq_folder(dense: Path, packed: Path, *, bits: int, act_order: bool, sym: bool, group_size: int) -> None:
    how = FAST | {"bits": bits, "act_order": act_order, "sym": sym, "group_size": group_size}
    result = smidgen.quantize(str(dense), packed, to="gptq", **how)
    tensors = load_file(packed / "model.safetensors")
    loaded = smidgen.load(packed, compute_dtype="float32")
    assert loaded.base.storage == "gptq"
    names = [error["layer"] for error in result["errors"]]
    assert sorted(names) == sorted(name for name in loaded.base.linears if name != "lm_head")
    for module in ("model.layers.1.self_attn.k_proj", "model.layers.0.mlp.down_proj"):
        matrix = loaded.base.linears[module].weight
        assert isinstance(matrix, GroupedMatrix) and matrix.bits == bits
        size = matrix.in_features if group_size == -1 else group_size
        assert len(matrix.ends) == math.ceil(matrix.in_features / size)
        assert torch.equal(matrix.rows(0, matrix.out_features, torch.float32), _decoded(tensors, module, bits))
    config = json.loads((packed / "config.json").read_text())["quantization_config"]
    assert (config["quant_method"], config["bits"], config["group_size"]) == ("gptq", bits, group_size)
    assert (config["desc_act"], config["sym"], config["checkpoint_format"]) == (act_order, sym, "gptq")
    scattered = bool((tensors[f"{PROJECTION}.g_idx"].diff() < 0).any())
    assert scattered == (act_order and group_size != -1)


@pytest.mark.parametrize(
    "architecture",
    ["llama-tied", "llama-odd", "mistral", "qwen2", "qwen3", "gemma3", "gpt-neox", "phi3", "falcon", "opt"],
)
def test_gptq_of_many_architectures(architecture: str, tmp_path: Path) -> None:
    """The folder computes what the base that is quantised in memory does, and with 8 bits that is near the original."""
    dense = tiny_folder(tmp_path / "dense", architecture)
    how = FAST | {"bits": 8}
    smidgen.quantize(str(dense), tmp_path / "packed", to="gptq", **how)
    loaded = smidgen.load(tmp_path / "packed", compute_dtype="float32").base
    for name, linear in loaded.linears.items():
        assert isinstance(linear.weight, GroupedMatrix) == (name != loaded.head_name)
    in_memory = smidgen.load(dense, quantize="none", compute_dtype="float32").base
    with torch.no_grad():
        close = in_memory.model(IDS).logits
        errors = quantise_base(in_memory, _builtin_rows(4, 32), GptqSettings(bits=8, group_size=32))
        assert in_memory.storage == "gptq" and all(linear.error < 0.01 for linear in errors)
        ours = in_memory.model(IDS).logits
        assert torch.equal(loaded.model(IDS).logits, ours)
    assert float((ours - close).norm() / close.norm()) < 0.03
    result = smidgen.quantize(str(dense), tmp_path / "four", to="gptq", **FAST | {"perplexity": True})
    assert result["mean_error"]["gptq"] < result["mean_error"]["rtn"]
    assert set(result["perplexity"]) == {"tokens", "before", "gptq", "rtn", "nf4"}


def test_groups_that_do_not_divide_the_inputs_are_told_of(tmp_path: Path) -> None:
    """64 and 96 inputs: vLLM opens no file whose last group is shorter."""
    dense = tiny_folder(tmp_path / "dense")
    for size, told in ((64, True), (32, False), (-1, False)):
        said: list[Any] = []
        smidgen.quantize(
            str(dense), tmp_path / f"in {size}", to="gptq", report=said.append, **FAST | {"group_size": size}
        )
        notes = [event.text for event in said if isinstance(event, Note) and "vLLM" in event.text]
        expected = "groups of 64 do not divide 96 inputs: a layer's last group is shorter, which vLLM refuses;"
        assert notes == ([f"{expected} --group-size 32, -1 would do"] if told else [])


def _builtin_rows(count: int, length: int) -> torch.Tensor:
    return torch.tensor(byte_tokenizer()(builtin_text()).input_ids[: count * length]).view(count, length)


def test_perplexity_before_and_after_is_that_of_the_models(tmp_path: Path) -> None:
    """It is taken layer by layer; the whole models give the same."""
    dense = tiny_folder(tmp_path / "dense")
    text = tmp_path / "text.txt"
    text.write_text("".join(f"the {index} of {index * 7919 % 1000}, " for index in range(200)))
    how = FAST | {"perplexity": True, "calibration": str(text), "calibration_rows": 20}
    result = smidgen.quantize(str(dense), tmp_path / "packed", to="gptq", **how)
    ids = torch.tensor(byte_tokenizer()(text.read_text()).input_ids)
    held_out = ids[: len(ids) // 32 * 32].view(-1, 32)[[7, 15]]
    for key, model in (
        ("before", smidgen.load(dense, quantize="none", compute_dtype="float32")),
        ("gptq", smidgen.load(tmp_path / "packed", compute_dtype="float32")),
        ("nf4", smidgen.load(dense, quantize="nf4", compute_dtype="float32")),
    ):
        with torch.no_grad():
            logits = model.base.model(held_out).logits[:, :-1]
        loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), held_out[:, 1:].flatten())
        assert result["perplexity"][key] == pytest.approx(float(loss.exp()), rel=1e-4)
    assert result["perplexity"]["tokens"] == 64


def test_the_first_layer_is_rounded_to_nearest_as_reported(tmp_path: Path) -> None:
    dense = tiny_folder(tmp_path / "dense")
    result = smidgen.quantize(str(dense), tmp_path / "packed", to="gptq", **FAST)
    loaded = smidgen.load(dense, quantize="none", compute_dtype="float32")
    seen: list[torch.Tensor] = []
    ids = _builtin_rows(4, 32)
    layer = loaded.base.backbone.layers[0]
    handle = layer.original.self_attn.q_proj.register_forward_pre_hook(lambda _m, args: seen.append(args[0]))
    with torch.no_grad():
        hidden = loaded.base.backbone.embed_tokens(ids)
        layer.original(hidden, position_embeddings=loaded.base.backbone.rotary_emb(hidden, torch.arange(32)[None]))
    handle.remove()
    weight = load_file(dense / "model.safetensors")[f"{PROJECTION}.weight"]
    nearest = round_to_nearest(weight, GptqSettings(group_size=32)).rows(0, 64, torch.float32)
    seen[0][:, 0] *= 3**0.5  # a row's first token counts as a sixteenth of the row more
    exact = float((seen[0] @ (weight - nearest).t()).norm() / (seen[0] @ weight.t()).norm())
    assert next(e["rtn"] for e in result["errors"] if e["layer"] == PROJECTION) == pytest.approx(exact, rel=1e-3)


@pytest.mark.parametrize("to", ["nf4-dq", "gptq"])
def test_the_result_is_trained_on(to: str, tmp_path: Path) -> None:
    dense = tiny_folder(tmp_path / "dense")
    smidgen.quantize(str(dense), tmp_path / "packed", to=to, **(FAST if to == "gptq" else {}))
    rows = write_rows(tmp_path / "rows.jsonl")
    run = smidgen.finetune(
        str(tmp_path / "packed"), str(rows), tmp_path / "run", learning_rate=5e-3, compute_dtype="float32"
    )
    assert run.summary["base_format"] == to
    assert run.summary["loss_after"] < run.summary["loss_before"] - 0.3


def test_finetune_quantises_on_the_way(tmp_path: Path) -> None:
    """Into a folder beside the run, on its rows; loading, going on and merging find it there."""
    dense, rows = tiny_folder(tmp_path / "dense"), write_rows(tmp_path / "rows.jsonl")
    said: list[Any] = []
    how: dict[str, Any] = {"quantize": "gptq", "learning_rate": 5e-3, "compute_dtype": "float32"}
    run = smidgen.finetune(str(dense), str(rows), tmp_path / "run", report=said.append, **how)
    assert run.summary["base_format"] == "gptq"
    assert run.summary["loss_after"] < run.summary["loss_before"] - 0.3
    assert any("from the training rows" in event.text for event in said if isinstance(event, Note))
    packed = json.loads((tmp_path / "run-gptq" / "config.json").read_text())["quantization_config"]
    assert packed["desc_act"], "in act order"
    loaded = smidgen.load(run.path)
    assert loaded.base.storage == "gptq" and loaded.base.checkpoint.path.name == "run-gptq"
    assert smidgen.merge(run.path, tmp_path / "merged", dtype="float32")["max_logit_difference"] < 1e-3
    assert smidgen.resume(run.path).summary == run.summary
    with pytest.raises(RunError, match=r"run-gptq holds something already.*Train on it: smidgen finetune .*run-gptq"):
        shutil.rmtree(run.path)
        smidgen.finetune(str(dense), str(rows), tmp_path / "run", **how)
    again = smidgen.finetune(str(tmp_path / "run-gptq"), str(rows), tmp_path / "again", **how | {"quantize": "auto"})
    assert again.summary["loss_after"] == run.summary["loss_after"]


@pytest.mark.parametrize("to", ["nf4", "gptq"])
def test_a_gguf_file_is_decoded_and_it_is_said(to: str, tmp_path: Path) -> None:
    model = tmp_path / "tiny.gguf"
    write_gguf(tiny_folder(tmp_path / "dense"), model, {"attn_q": "Q4_0"})
    said: list[Any] = []
    smidgen.quantize(str(model), tmp_path / "packed", to=to, report=said.append, **(FAST if to == "gptq" else {}))
    assert any("decoded and quantised again" in event.text for event in said if isinstance(event, Note))
    config = json.loads((tmp_path / "packed" / "config.json").read_text())
    assert config["dtype"] == "float16"
    close = _logits(model)
    assert float((_logits(tmp_path / "packed") - close).norm() / close.norm()) < 0.4


def test_a_merged_adapter_is_packed_too(tmp_path: Path) -> None:
    base = build(tiny_folder(tmp_path / "dense", "llama-tied"), "none")
    names, _ = select_targets("q,down,head", base.linears, base.head_name)
    for layer in attach_lora(base.model, names, rank=4, alpha=8, dropout=0, seed=0).values():
        with torch.no_grad():
            layer.lora_B.normal_(generator=torch.Generator().manual_seed(1)).mul_(0.1)
    (tmp_path / "packed").mkdir()
    save_packed(base, tmp_path / "packed", "int8", torch.float32, byte_tokenizer())
    tensors = load_file(tmp_path / "packed" / "model.safetensors")
    assert tensors["lm_head.weight"].dtype == torch.float32  # with an adapter it is no longer tied
    ours, theirs = _logits(tmp_path / "packed"), base.model(IDS).logits.detach()
    assert float((ours - theirs).norm() / theirs.norm()) < 0.02


@pytest.mark.parametrize("to", ["nf4", "gptq"])
def test_shards_and_events(to: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    dense = tiny_folder(tmp_path / "dense", dtype=torch.bfloat16)
    said: list[Any] = []
    monkeypatch.setattr(conversion, "LARGEST_SHARD", 30_000)
    smidgen.quantize(str(dense), tmp_path / "many", to=to, report=said.append, **(FAST if to == "gptq" else {}))
    monkeypatch.undo()
    smidgen.quantize(str(dense), tmp_path / "one", to=to, **(FAST if to == "gptq" else {}))
    assert len(list((tmp_path / "many").glob("model-*.safetensors"))) > 2
    assert torch.equal(_logits(tmp_path / "many"), _logits(tmp_path / "one"))
    work = [event for event in said if isinstance(event, Progress) and ("gptq" in event.what or "pack" in event.what)]
    assert work[-1].done == work[-1].total and len(work) > 2
    assert {event.path.name for event in said if isinstance(event, Saved)} == {
        file.name for file in (tmp_path / "many").iterdir()
    }
    embedding = load_file(tmp_path / "one" / "model.safetensors")["model.embed_tokens.weight"]
    assert embedding.dtype == torch.bfloat16


def test_nothing_is_left_of_a_quantisation_that_failed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    dense = tiny_folder(tmp_path / "dense")
    monkeypatch.setattr("smidgen.export.packed.gptq_tensors", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        smidgen.quantize(str(dense), tmp_path / "packed", to="gptq", **FAST)
    assert [path.name for path in tmp_path.iterdir()] == ["dense"]


@pytest.mark.parametrize("architecture", ["gpt2", "mixtral"])
@pytest.mark.parametrize("to", ["nf4", "gptq"])
def test_what_the_formats_cannot_hold_is_refused(architecture: str, to: str, tmp_path: Path) -> None:
    dense = tiny_folder(tmp_path / "dense", architecture)
    says = f"cannot be written as {to}, expected a model of plain linear layers.*--quantize nf4-dq"
    with pytest.raises(ModelError, match=says):
        smidgen.quantize(str(dense), tmp_path / "packed", to=to)
    assert not (tmp_path / "packed").exists()


def test_a_quantised_base_is_refused(tmp_path: Path) -> None:
    dense = tiny_folder(tmp_path / "dense")
    smidgen.quantize(str(dense), tmp_path / "packed", to="gptq", **FAST)
    with pytest.raises(
        ModelError, match=r"is stored as gptq already, expected a 16-bit model or.*Take the 16-bit model"
    ):
        smidgen.quantize(str(tmp_path / "packed"), tmp_path / "again", to="nf4")


def test_an_existing_folder_is_never_overwritten(tmp_path: Path) -> None:
    (tmp_path / "packed").mkdir()
    (tmp_path / "packed" / "mine.txt").write_text("mine")
    with pytest.raises(RunError, match="holds something already"):
        smidgen.quantize(str(tiny_folder(tmp_path / "dense")), tmp_path / "packed", to="nf4")


@pytest.mark.parametrize(
    ("how", "says"),
    [
        ({"to": "awq"}, "to: expected one of nf4-dq, nf4, fp4, int8, gptq, found 'awq'"),
        ({"to": "gptq", "bits": 5}, "bits: expected one of 2, 3, 4, 8, found 5"),
        ({"to": "gptq", "group_size": 100}, "group_size: expected one of 32, 64, 128, -1, found 100"),
        ({"to": "gptq", "damp": 0}, "damp: expected more than 0"),
        ({"to": "gptq", "calibration_rows": 0}, "calibration_rows: expected 1 or more"),
    ],
)
def test_settings_that_make_no_sense(how: dict[str, Any], says: str, tmp_path: Path) -> None:
    with pytest.raises(SettingsError) as refused:
        smidgen.quantize("nowhere", tmp_path / "packed", **how)
    assert says in str(refused.value)


@pytest.mark.parametrize(
    "setting",
    [{"bits": 3}, {"group_size": 32}, {"sym": False}, {"act_order": True}, {"damp": 0.1}, {"calibration": "text.txt"},
     {"calibration_rows": 4}, {"calibration_len": 64}, {"perplexity": False}],
)  # fmt: skip
def test_settings_that_would_have_no_effect_are_refused(setting: dict[str, Any], tmp_path: Path) -> None:
    with pytest.raises(SettingsError, match=f"{next(iter(setting))}: only to='gptq' has this"):
        smidgen.quantize(str(tiny_folder(tmp_path / "dense")), tmp_path / "packed", to="nf4", **setting)
