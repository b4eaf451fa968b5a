"""Whole runs with modules that are trained whole and with new tokens."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

import smidgen
from gguf_models import write_gguf
from runs import adapter_bytes, stop_after
from smidgen.errors import RunError, SettingsError
from smidgen.events import Note
from tiny import tiny_folder

QUICK: dict[str, Any] = {"rank": 4, "alpha": 8, "micro_batch": 4, "learning_rate": 5e-3, "compute_dtype": "float32"}
NEW = {"new_tokens": "<tool>, </tool>"}
ENDS = {"modules_to_save": "embed_tokens,lm_head"}
VOCABULARY = 261  # as many as the tokenizer has: no row is spare


@pytest.fixture(scope="module")
def tied(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_folder(tmp_path_factory.mktemp("tied"), "llama-tied", vocab_size=VOCABULARY)


@pytest.fixture(scope="module")
def calls(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Chats whose answers have the new tokens."""
    path = tmp_path_factory.mktemp("calls") / "rows.jsonl"
    lines = []
    for index in range(24):
        word = ("red", "green", "blue")[index % 3]
        turns = [{"role": "user", "content": f"say {word}"}, {"role": "assistant", "content": f"<tool>{word}</tool>"}]
        lines.append(json.dumps({"messages": turns}))
    path.write_text("\n".join(lines) + "\n")
    return path


def _tensors(run: Path) -> dict[str, torch.Tensor]:
    return {k.removeprefix("base_model.model."): t for k, t in load_file(run / "adapter_model.safetensors").items()}


@pytest.mark.parametrize("how", [NEW, ENDS, {"modules_to_save": "norm"}, {"modules_to_save": "input_layernorm"}])
@pytest.mark.parametrize("compute_dtype", ["float32", "bfloat16"])
def test_a_run_trains_merges_and_answers(
    how: dict[str, Any], compute_dtype: str, tied: Path, calls: Path, tmp_path: Path
) -> None:
    settings = QUICK | how | {"compute_dtype": compute_dtype, "epochs": 8.0, "micro_batch": 8}
    run = smidgen.finetune(str(tied), str(calls), tmp_path / "run", **settings)
    assert run.summary["loss_after"] < run.summary["loss_before"] - 0.5
    tensors = _tensors(run.path)
    counted = sum(t.numel() for name, t in tensors.items() if name != "lm_head.weight")  # the embedding's once more
    assert run.summary["trainable_parameters"] == counted
    loaded = smidgen.load(run.path, compute_dtype="float32")
    merged = smidgen.merge(run.path, tmp_path / "merged", dtype="float32")
    assert merged["max_logit_difference"] < 1e-3 and merged["same_top_token"] == 1.0
    whole = smidgen.load(tmp_path / "merged", quantize="none", compute_dtype="float32")
    answer = loaded.generate("say red", max_new_tokens=12)
    assert whole.generate("say red", max_new_tokens=12).text == answer.text
    if how is NEW:
        assert answer.text.startswith("<tool>")  # shown, though other special tokens are not
    compared = smidgen.evaluate(run.path, str(calls), against="base", limit=4, answers=False)
    assert compared["data"][0]["figures"]["loss"] != compared["against"]


def test_only_what_is_named_learns(tied: Path, calls: Path, tmp_path: Path) -> None:
    """The plain run's tensors, and beside them those of the setting alone; all have left their start."""
    runs = {}
    head, norm = {"modules_to_save": "lm_head"}, {"modules_to_save": "norm"}
    for name, how in {"plain": {}, "ends": ENDS, "head": head, "norm": norm, "new": NEW}.items():
        runs[name] = _tensors(smidgen.finetune(str(tied), str(calls), tmp_path / name, max_steps=3, **QUICK | how).path)
    lora = runs["plain"].keys()
    both = {"model.embed_tokens.weight", "lm_head.weight"}  # one weight, whichever is named
    delta = "model.embed_tokens.token_adapter.trainable_tokens_delta"
    extra = {"plain": set(), "ends": both, "head": both, "norm": {"model.norm.weight"}, "new": {delta}}
    for name, expected in extra.items():
        assert runs[name].keys() - lora == expected
    stored = load_file(tied / "model.safetensors")
    assert torch.equal(runs["ends"]["model.embed_tokens.weight"], runs["head"]["lm_head.weight"])
    moved = runs["ends"]["model.embed_tokens.weight"] - stored["model.embed_tokens.weight"]
    assert bool(moved.any(1).all())  # the head's gradient reaches every row
    assert bool((runs["norm"]["model.norm.weight"] != stored["model.norm.weight"]).all())
    pieces = stored["model.embed_tokens.weight"]
    tokenizer = smidgen.load(tied).tokenizer
    start = torch.stack([pieces[tokenizer(token).input_ids].mean(0) for token in ("<tool>", "</tool>")])
    assert bool((runs["new"][delta] != start).all())
    # three steps of at most 5e-3 each
    assert float((runs["new"][delta] - start).abs().max()) < 0.02


def test_an_untied_head_has_rows_of_its_own(calls: Path, tmp_path: Path) -> None:
    model = tiny_folder(tmp_path / "model")  # 272 rows for 261 tokens: two of the spare ones are taken
    run = smidgen.finetune(str(model), str(calls), tmp_path / "run", max_steps=2, **QUICK | NEW).path
    found = {name: tensor for name, tensor in _tensors(run).items() if "delta" in name}
    assert {name.split(".token_adapter")[0] for name in found} == {"model.embed_tokens", "lm_head"}
    config = json.loads((run / "adapter_config.json").read_text())
    assert config["trainable_token_indices"] == {"model.embed_tokens": [261, 262], "lm_head": [261, 262]}
    assert smidgen.load(run).base.head.out_features == 272


@pytest.mark.parametrize("how", [NEW, ENDS, {"modules_to_save": "norm,embed_tokens,input_layernorm"}])
def test_resumed_equals_uninterrupted_bit_for_bit(how: dict, tied: Path, calls: Path, tmp_path: Path) -> None:
    settings = QUICK | {"micro_batch": 3, "accumulation": 2, "epochs": 2.0, "neftune_alpha": 1.0} | how
    whole = smidgen.finetune(str(tied), str(calls), tmp_path / "whole", **settings)
    with pytest.raises(KeyboardInterrupt):
        smidgen.finetune(str(tied), str(calls), tmp_path / "cut", report=stop_after(2), **settings)
    resumed = smidgen.resume(tmp_path / "cut")
    assert adapter_bytes(whole.path) == adapter_bytes(resumed.path)
    first = smidgen.finetune(str(tied), str(calls), tmp_path / "none", **settings | {"max_steps": 2, "epochs": 1.0})
    for checkpoint in (first.path / "checkpoints").iterdir():  # one that was stopped before its first checkpoint
        checkpoint.rename(tmp_path / "away")
    for name in ("summary.json", "adapter_config.json"):
        (first.path / name).unlink()
    again = smidgen.resume(first.path)
    assert adapter_bytes(again.path) == (tmp_path / "away" / "adapter_model.safetensors").read_bytes()


@pytest.mark.parametrize("how", [NEW, ENDS])
def test_a_run_starts_from_such_an_adapter(how: dict, tied: Path, calls: Path, tmp_path: Path) -> None:
    first = smidgen.finetune(str(tied), str(calls), tmp_path / "first", max_steps=3, **QUICK | how)
    start = {"init_adapter": str(first.path), "max_steps": 2}
    second = smidgen.finetune(str(tied), str(calls), tmp_path / "second", **QUICK | how | start)
    assert second.summary["loss_before"] == first.summary["loss_after"]
    (name,) = how
    flags = {
        "modules_to_save": "--modules-to-save lm_head,model.embed_tokens",
        "new_tokens": "--new-tokens with its 2 tokens",
    }
    with pytest.raises(RunError, match=f"differ in {name}.*{flags[name]}"):
        smidgen.finetune(str(tied), str(calls), tmp_path / "third", **QUICK | start)
    assert not (tmp_path / "third").exists()


@pytest.mark.parametrize("how", [NEW, ENDS])
@pytest.mark.parametrize("kind", ["hf", "gguf", "bnb-4bit"])
@pytest.mark.parametrize("from_gguf", [False, True])
def test_exports_keep_what_was_learnt(
    how: dict, kind: str, from_gguf: bool, tied: Path, calls: Path, tmp_path: Path
) -> None:
    model = tied
    if from_gguf:  # a packed embedding, and a vocabulary that lies in the file
        model = tmp_path / "tiny.gguf"
        write_gguf(tied, model, {"token_embd.weight": "Q8_0"})
    notes: list[Any] = []
    settings = QUICK | {"epochs": 8.0} | how
    run = smidgen.finetune(str(model), str(calls), tmp_path / "run", report=notes.append, **settings).path
    said = [note.text for note in notes if isinstance(note, Note) and note.text.startswith("modules_to_save")]
    assert [("made dense" in text) == from_gguf for text in said] == ([True] if how is ENDS else [])
    out = tmp_path / ("out.gguf" if kind == "gguf" else "out")
    type_ = {"hf": "float32", "gguf": "F16", "bnb-4bit": "nf4"}[kind]
    result = smidgen.export_run(run, out, to=kind, type=type_)
    assert result["mean_kl"] < result["base_kl"]
    loaded = smidgen.load(out, quantize="auto" if kind == "bnb-4bit" else "none", compute_dtype="float32")
    if kind == "hf":
        trained = smidgen.load(run)
        assert loaded.generate("say red", max_new_tokens=12).text == trained.generate("say red", max_new_tokens=12).text
    ids = loaded.tokenizer("<tool>red</tool>").input_ids
    assert len(ids) == (5 if how is NEW else len("<tool>red</tool>"))
    with pytest.raises(RunError, match=r"llama.cpp's adapters cannot hold"):
        smidgen.export_run(run, tmp_path / "lora.gguf", to="gguf-lora")


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        (
            {"modules_to_save": "embed_tokens,nothing"},
            "modules_to_save: no module matches nothing, there are embed_tok",
        ),
        ({"modules_to_save": " , "}, "modules_to_save: expected a comma list of modules"),
        ({"new_tokens": ","}, "new_tokens: expected a comma list of tokens"),
        ({"new_tokens": "<tool>,<|im_end|>,zq"}, "new_tokens: <|im_end|>, zq is in the tokenizer already"),
        (NEW | ENDS, "new_tokens: model.embed_tokens has an adapter or is trained whole"),
        ({"new_tokens": "<a>", "targets": "q,head"}, "new_tokens: lm_head has an adapter or is trained whole"),
        ({"modules_to_save": "lm_head", "targets": "head"}, "modules_to_save: lm_head has an adapter already"),
    ],
)
def test_what_cannot_be_is_refused_before_anything_is_written(
    settings: dict, words: str, tied: Path, calls: Path, tmp_path: Path
) -> None:
    with pytest.raises(SettingsError) as refused:
        smidgen.finetune(str(tied), str(calls), tmp_path / "run", **QUICK | settings)
    assert words in str(refused.value)
    assert not (tmp_path / "run").exists()


def test_the_forecast_counts_what_is_trained(tied: Path) -> None:
    def terms(**how: Any) -> tuple[int, dict[str, int]]:
        found = smidgen.plan(str(tied), **QUICK | how)
        return found["trainable_parameters"], found["terms"]

    lora, plain = terms()
    embedding = VOCABULARY * 64
    for how, numbers, of_head in (
        (ENDS, embedding, embedding),
        ({"modules_to_save": "lm_head"}, embedding, embedding),
        ({"modules_to_save": "norm,input_layernorm"}, 3 * 64, 0),
        (NEW, 2 * 64, 2 * 64),
    ):
        found, more = terms(**how)
        assert found - lora == numbers
        assert more["optimizer"] - plain["optimizer"] == 8 * numbers
        assert more["loss chunk"] - plain["loss chunk"] == 8 * of_head
    assert terms(modules_to_save="input_layernorm")[1]["scratch"] < plain["scratch"]  # transformers' layers
