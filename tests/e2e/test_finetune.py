"""Whole runs on tiny models: what is written, what is equal, what is refused."""

import json
import math
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

import smidgen
import smidgen.errors
from runs import adapter_bytes, stop_after
from smidgen.errors import DataError, ModelError, RunError, SettingsError
from smidgen.events import Evaluated, Event, Note, RowShown, Step
from tiny import tiny_folder

QUICK: dict[str, Any] = {"rank": 4, "alpha": 8, "micro_batch": 4, "learning_rate": 5e-3, "compute_dtype": "float32"}


def test_a_run_leaves_what_it_promises(model: Path, rows: Path, tmp_path: Path) -> None:
    events: list[Event] = []
    run = smidgen.finetune(str(model), str(rows), tmp_path / "run", report=events.append, compare=2, **QUICK)
    files = {file.name for file in run.path.iterdir()}
    assert files >= {
        "adapter_config.json", "adapter_model.safetensors", "tokenizer.json", "settings.yaml", "smidgen.json",
        "metrics.jsonl", "summary.json", "answers.jsonl", "checkpoints",
    }  # fmt: skip
    assert not [name for name in files if name.startswith(".")]
    summary = json.loads((run.path / "summary.json").read_text())
    assert summary == run.summary
    assert set(summary) == {
        "run", "base_format", "loss_before", "loss_after", "perplexity_before", "perplexity_after",
        "exact_match_before", "exact_match_after",
        "valid_json_before", "valid_json_after", "json_f1_before", "json_f1_after",
        "steps", "tokens", "tokens_per_s", "wall_s", "peak_rss_bytes", "forecast_peak_bytes", "forecast_terms",
        "trainable_parameters", "stopped", "recompute", "streamed_layers", "read_bytes", "wait_s",
    }  # fmt: skip
    assert summary["base_format"] == "nf4-dq"
    assert summary["loss_after"] < summary["loss_before"] - 0.3
    assert sum(summary["forecast_terms"].values()) == summary["forecast_peak_bytes"]
    logged = [json.loads(line) for line in (run.path / "metrics.jsonl").read_text().splitlines()]
    evaluated = [line for line in logged if "held_out_loss" in line]
    for line, when in zip(evaluated, ("before", "after"), strict=True):
        assert line["perplexity"] == pytest.approx(math.exp(line["held_out_loss"]))
        assert line["perplexity"] == summary[f"perplexity_{when}"]
    steps = [event for event in events if isinstance(event, Step)]
    assert [step.step for step in steps] == list(range(1, summary["steps"] + 1))
    assert [type(event) for event in events if isinstance(event, Evaluated | RowShown)] == [
        RowShown,
        Evaluated,
        Evaluated,
    ]
    tensors = load_file(run.path / "adapter_model.safetensors")
    assert summary["trainable_parameters"] == sum(tensor.numel() for tensor in tensors.values())
    assert all(tensor.any() for tensor in tensors.values())


def test_the_same_seed_gives_the_same_bytes_and_another_does_not(model: Path, rows: Path, tmp_path: Path) -> None:
    for name, seed in (("a", 3), ("b", 3), ("c", 4)):
        smidgen.finetune(str(model), str(rows), tmp_path / name, seed=seed, dropout=0.1, max_steps=4, **QUICK)
    assert adapter_bytes(tmp_path / "a") == adapter_bytes(tmp_path / "b") != adapter_bytes(tmp_path / "c")


def test_training_does_not_touch_the_callers_random_numbers(model: Path, rows: Path, tmp_path: Path) -> None:
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    smidgen.finetune(str(model), str(rows), tmp_path / "a", dropout=0.1, max_steps=2, **QUICK)
    assert torch.equal(torch.rand(3), expected)


def test_a_run_is_never_overwritten(model: Path, rows: Path, tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "notes.txt").write_text("mine")
    with pytest.raises(RunError, match="holds something already"):
        smidgen.finetune(str(model), str(rows), tmp_path / "run", **QUICK)
    assert [file.name for file in (tmp_path / "run").iterdir()] == ["notes.txt"]


@pytest.mark.parametrize("storage", ["nf4", "fp4-dq", "fp4", "int8", "none"])
def test_every_stored_form_trains_merges_and_answers(storage: str, model: Path, rows: Path, tmp_path: Path) -> None:
    run = smidgen.finetune(str(model), str(rows), tmp_path / "run", quantize=storage, **QUICK)
    assert run.summary["base_format"] == storage
    assert run.summary["loss_after"] < run.summary["loss_before"] - 0.3
    (scores,) = smidgen.evaluate(run.path, str(rows), limit=6, max_new_tokens=20)["data"]
    assert set(scores["figures"]) == {"loss", "perplexity", "exact_match", "valid_json", "json_f1"}
    merged = smidgen.merge(run.path, tmp_path / "merged", dtype="float32")
    assert merged["max_logit_difference"] < 1e-3 and merged["same_top_token"] == 1.0
    loaded, whole = (
        smidgen.load(run.path, compute_dtype="float32"),
        smidgen.load(tmp_path / "merged", quantize="none", compute_dtype="float32"),
    )
    prompt = "say blue 1"
    assert loaded.generate(prompt, max_new_tokens=12).text == whole.generate(prompt, max_new_tokens=12).text


OTHERS = ["mistral", "qwen2", "qwen3", "gemma2", "gemma3", "gpt-neox", "gpt2", "mixtral", "qwen2-moe", "phi3"]
OTHERS += ["falcon", "stablelm", "olmo", "olmo2"]


@pytest.mark.parametrize("architecture", OTHERS)
def test_every_architecture_trains_and_merges(architecture: str, rows: Path, tmp_path: Path) -> None:
    folder = tiny_folder(tmp_path / "base", architecture)
    run = smidgen.finetune(str(folder), str(rows), tmp_path / "run", **QUICK)
    assert run.summary["loss_after"] < run.summary["loss_before"] - 0.2
    merged = smidgen.merge(run.path, tmp_path / "merged", dtype="float32")
    assert merged["max_logit_difference"] < 1e-3


def test_a_place_that_cannot_be_written_is_found_before_anything_is_read(rows: Path, tmp_path: Path) -> None:
    """There is no model at all here: what is said first is what was looked at first."""
    (tmp_path / "file").write_text("mine")
    with pytest.raises(RunError, match=r"runs/a cannot be made: .*/file is a file\. Choose another folder"):
        smidgen.finetune(str(tmp_path / "no-model"), str(rows), tmp_path / "file" / "runs" / "a")
    if Path("/proc/self").exists():  # nobody may write there, root neither
        with pytest.raises(RunError, match="/proc/run cannot be written"):
            smidgen.finetune(str(tmp_path / "no-model"), str(rows), "/proc/run")
    with pytest.raises(ModelError, match="no-model"):
        smidgen.finetune(str(tmp_path / "no-model"), str(rows), tmp_path / "new" / "a")
    assert [path.name for path in tmp_path.iterdir()] == ["file"], "nothing is left of the trial"


@pytest.mark.parametrize("verb", ["merge", "export", "quantize", "evaluate", "finetune"])
def test_no_verb_begins_what_it_cannot_write(verb: str, rows: Path, tmp_path: Path) -> None:
    """One line and exit code 2, before the model is looked for: there is none here."""
    (tmp_path / "file").write_text("mine")
    places = [tmp_path / "file" / "a" / "b.gguf", *([Path("/proc/b.gguf")] if Path("/proc/self").exists() else [])]
    words: dict[str, list[str]] = {
        "merge": ["no-model"],
        "export": ["no-model", "--to", "gguf"],
        "quantize": ["no-model", "--to", "nf4"],
        "evaluate": ["no-model", "--questions", str(rows)],
        "finetune": ["no-model", str(rows)],
    }
    for place in places:
        done = subprocess.run(
            [sys.executable, "-m", "smidgen", verb, *words[verb], "--out", str(place)],
            capture_output=True,
            text=True,
            cwd=tmp_path,
            timeout=120,
            check=False,
        )
        assert done.returncode == 2, done.stderr
        (line,) = [line for line in done.stderr.splitlines() if line.strip()]
        assert f"{place} cannot be " in line, line
    assert sorted(path.name for path in tmp_path.iterdir()) == ["file"]


def test_a_run_starts_from_an_existing_adapter(model: Path, rows: Path, tmp_path: Path) -> None:
    """What it starts from is what the first run ended with; a resumed run does not need the first one any more."""
    first = smidgen.finetune(str(model), str(rows), tmp_path / "first", **QUICK)
    how = QUICK | {"init_adapter": str(first.path), "micro_batch": 3, "learning_rate": 1e-3, "schedule": "constant"}
    whole = smidgen.finetune(str(model), str(rows), tmp_path / "whole", **how)
    assert whole.summary["loss_before"] == first.summary["loss_after"]
    assert whole.summary["loss_after"] < whole.summary["loss_before"]
    with pytest.raises(KeyboardInterrupt):
        smidgen.finetune(str(model), str(rows), tmp_path / "cut", report=stop_after(2), **how)
    first.path.rename(tmp_path / "moved")
    assert adapter_bytes(smidgen.resume(tmp_path / "cut").path) == adapter_bytes(whole.path)


def test_a_run_and_its_base_may_be_moved_together(rows: Path, tmp_path: Path) -> None:
    """Paths in a run are absolute; the base is looked for beside it too, and has to be the same."""
    base = tiny_folder(tmp_path / "here" / "base")
    how = QUICK | {"compare": 0, "max_steps": 3}
    with pytest.raises(KeyboardInterrupt):
        smidgen.finetune(str(base), str(rows), base.parent / "run", report=stop_after(2), **how)
    there = base.parent.rename(tmp_path / "there")
    (checkpoint,) = (there / "run" / "checkpoints").iterdir()
    assert smidgen.load(checkpoint).base.checkpoint.path == there / "base"
    run = smidgen.resume(there / "run").path
    assert smidgen.load(run).generate("say red 0", max_new_tokens=1).new_tokens <= 1
    assert smidgen.merge(run, tmp_path / "merged")["max_logit_difference"] < 1
    (there / "base").rename(tmp_path / "elsewhere")
    with pytest.raises(RunError, match=r"is not there, expected .*/here/base or .*/there/base. Put it back"):
        smidgen.load(run)
    tiny_folder(there / "base", seed=1)
    with pytest.raises(RunError, match="its weights differ"):
        smidgen.load(run)


def test_it_is_said_who_ignores_the_patterns(model: Path, rows: Path, tmp_path: Path) -> None:
    for name, settings in (("plain", {}), ("patterns", {"alpha_pattern": {"down_proj": 2.0}})):
        said: list[Event] = []
        how = QUICK | {"compare": 0, "max_steps": 1} | settings
        smidgen.finetune(str(model), str(rows), tmp_path / name, report=said.append, **how)
        assert any("vLLM ignores" in str(event) for event in said) == (name == "patterns")


def test_an_adapter_that_does_not_fit_is_no_start(model: Path, rows: Path, tmp_path: Path) -> None:
    peft = pytest.importorskip("peft")
    transformers = pytest.importorskip("transformers")
    config = peft.LoraConfig(r=4, lora_alpha=6, use_rslora=True, target_modules=["q_proj"], rank_pattern={"x": 1})
    theirs = peft.get_peft_model(transformers.AutoModelForCausalLM.from_pretrained(model), config)
    theirs.save_pretrained(tmp_path / "peft")
    other = tiny_folder(tmp_path / "other", seed=1)
    small = tiny_folder(tmp_path / "small", hidden_size=32)
    run = smidgen.finetune(str(model), str(rows), tmp_path / "run", max_steps=1, targets="q", **QUICK).path
    peft_own = "the adapter's own: --targets q_proj --rank 4 --alpha 6 --use-rslora, and the rank_pattern of"
    fits = {"targets": "q", "alpha": 6, "use_rslora": True}
    for base, adapter, settings, words in (
        (model, "peft", {}, f"differ in targets. Take {peft_own}"),
        (model, "peft", fits | {"rank": 8, "use_rslora": False}, f"differ in rank, use_rslora. Take {peft_own}"),
        (model, "peft", fits | {"alpha": 5}, "differ in alpha."),
        (small, "peft", fits, "lora_A of model.layers.0.self_attn.q_proj, expected shape [4, 32], found [4, 64]"),
        (other, "run", {"targets": "q"}, "is not the base that"),
        (model, "nowhere", {}, "nowhere is no adapter, expected a PEFT folder or a run"),
        (model, "model-as-adapter", {}, "is no adapter"),
    ):
        how = QUICK | {"init_adapter": str(model if adapter == "model-as-adapter" else tmp_path / adapter)} | settings
        with pytest.raises(RunError) as refused:
            smidgen.finetune(str(base), str(rows), tmp_path / "new", **how)
        assert words in str(refused.value)
        assert not (tmp_path / "new").exists()
    how = QUICK | fits | {"init_adapter": str(tmp_path / "peft"), "max_steps": 1}
    smidgen.finetune(str(model), str(rows), tmp_path / "new", **how)
    assert run.is_dir()


@pytest.mark.parametrize("architecture", ["llama", "gemma2"])
def test_packing_and_shared_prefixes_change_nothing_but_rounding(architecture: str, rows: Path, tmp_path: Path) -> None:
    """Rows that begin alike, other rows at once: the same steps, on smidgen's layers and on transformers'. AdamW
    divides by the gradient's size, so rounding grows: 1e-3 of a loss that falls by a fifth."""
    model = tiny_folder(tmp_path / "model", architecture)
    losses = {}
    off: dict[str, Any] = {"share_prefix": "off"}
    arms = {"off": off, "shared": {}, "packed": {"pack": 120}, "apart": off | {"pack": 1}}
    for name, how in arms.items():
        notes: list[Event] = []
        settings = QUICK | {"micro_batch": 8, "epochs": 7} | how
        run = smidgen.finetune(str(model), str(rows), tmp_path / name, report=notes.append, **settings)
        logged = [json.loads(line) for line in (run.path / "metrics.jsonl").read_text().splitlines()]
        losses[name] = [line["loss"] for line in logged if "loss" in line]
        said = [note.text for note in notes if isinstance(note, Note) and note.text.startswith("share_prefix")]
        assert [text.partition(" ")[0] for text in said] == ([] if "share_prefix" in how else ["share_prefix:"])
    assert losses["off"][-1] < 0.8 * losses["off"][0]
    for name in ("shared", "packed", "apart"):
        assert losses[name] == pytest.approx(losses["off"], rel=1e-3)


def test_prefixes_are_not_shared_where_it_cannot_be_or_does_not_pay(model: Path, rows: Path, tmp_path: Path) -> None:
    for number, (how, why) in enumerate(
        [({"dropout": 0.1}, "dropout of its own"), ({"micro_batch": 1}, "begin alike in 0%")]
    ):
        notes: list[Event] = []
        settings = QUICK | {"max_steps": 1} | how
        smidgen.finetune(str(model), str(rows), tmp_path / str(number), report=notes.append, **settings)
        assert [why in n.text for n in notes if isinstance(n, Note) and n.text.startswith("share_prefix off")] == [True]


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"targets": "q,nothing"}, "no layer matches nothing"),
        ({"rank": 0, "dropout": 1.0, "schedule": "square"}, "schedule: expected one of"),
        ({"rank_pattern": {"q_proj": 2, "x_proj": 3}}, "rank_pattern: no adapted layer is left for x_proj"),
        ({"alpha_pattern": {".*": 2, "q_proj": 3}}, "alpha_pattern: no adapted layer is left for q_proj"),
        ({"rank_pattern": {"q_(": 2}}, "rank_pattern: expected regular expressions"),
        ({"rank_pattern": {"q_proj": 0}}, "rank_pattern: expected ranks of 1 or more"),
        ({"alpha": 1e39}, "alpha: expected more than 0, within float32, found 1e+39"),
        ({"alpha_pattern": {"q_proj": "much"}}, "alpha_pattern: expected alphas above 0"),
        ({"rank_pattern": "q_proj=2"}, "rank_pattern: expected dict"),
        ({"seq_len": 8}, "cut"),
        ({"quantize": "keep"}, "no blocks to keep"),
    ],
)
def test_the_gate_refuses_before_anything_is_written(
    settings: dict, words: str, model: Path, rows: Path, tmp_path: Path
) -> None:
    with pytest.raises((SettingsError, DataError, smidgen.errors.ModelError)) as refused:
        smidgen.finetune(str(model), str(rows), tmp_path / "run", **QUICK | settings)
    assert words in str(refused.value)
    assert not (tmp_path / "run").exists()


def test_ctrl_c_in_the_terminal_saves_and_says_how_to_go_on(model: Path, rows: Path, tmp_path: Path) -> None:
    words = [sys.executable, "-m", "smidgen", "finetune", str(model), str(rows), "--out", "run", "--epochs", "500"]
    process = subprocess.Popen(
        [*words, "--rank", "4"], cwd=tmp_path, stderr=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    metrics, deadline = tmp_path / "run" / "metrics.jsonl", time.monotonic() + 120
    while time.monotonic() < deadline and not (metrics.exists() and "grad_norm" in metrics.read_text()):
        time.sleep(0.1)
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 130
    assert "smidgen finetune --resume run" in errors and "Traceback" not in errors
    assert list((tmp_path / "run" / "checkpoints").glob("step-*/manifest.json"))


def test_a_full_disk_is_one_line_and_leaves_nothing_half_written(model: Path, rows: Path, tmp_path: Path) -> None:
    if os.geteuid() != 0:
        pytest.skip("needs root to mount a small file system")
    small = tmp_path / "small"
    small.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=300k", "tmpfs", str(small)], check=False).returncode:
        pytest.skip("no tmpfs can be mounted here")
    try:
        words = [sys.executable, "-m", "smidgen", "finetune", str(model), str(rows), "--out", str(small / "run")]
        done = subprocess.run([*words, "--rank", "16", "--max-steps", "2"], capture_output=True, text=True, check=False)
        assert done.returncode == 2
        assert "disk is full" in done.stderr and "Traceback" not in done.stderr
        left = [file.name for file in small.rglob("*")]
        assert not [name for name in left if name.startswith(".tmp") or name.startswith("step-")]
    finally:
        subprocess.run(["umount", str(small)], check=True)


def test_a_position_table_is_never_left(tmp_path: Path) -> None:
    """GPT-2's positions are learned: the row after the last one does not exist."""
    model = tiny_folder(tmp_path / "gpt2", "gpt2")  # 256 positions
    long = {"messages": [{"role": "user", "content": "a" * 200}, {"role": "assistant", "content": "b" * 30}]}
    longer = {"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b" * 400}]}
    rows = tmp_path / "rows.jsonl"
    rows.write_text("\n".join(json.dumps(row) for row in [long] * 6 + [longer]) + "\n")
    notes: list[str] = []
    run = smidgen.finetune(
        str(model), str(rows), tmp_path / "run", report=lambda event: notes.append(getattr(event, "text", "")), **QUICK
    )
    assert any("seq_len 256: the model has no more positions" in note for note in notes)
    loaded = smidgen.load(run.path)
    assert loaded.generate("hello", max_new_tokens=400).new_tokens <= 256
    with pytest.raises(DataError, match="fewer than the model's 256 positions"):
        loaded.generate("a" * 300)
    (tmp_path / "text.txt").write_text("words " * 500)
    with pytest.raises(DataError, match="at most the model's 256 positions"):
        smidgen.evaluate(run.path, str(tmp_path / "text.txt"), protocol="llama.cpp")


def test_python_understands_the_same_spellings_and_errors_as_the_command_line(
    model: Path, rows: Path, tmp_path: Path
) -> None:
    run = smidgen.finetune(str(model), str(rows), tmp_path / "run", quantize="bnb.nf4", max_steps=1, rank=2)
    assert run.summary["base_format"] == "nf4"
    for call in (
        lambda: smidgen.finetune(str(model), str(rows), tmp_path / "x", foo=1),
        lambda: smidgen.load(model, quantize="foo"),
        lambda: smidgen.load(model, compute_dtype="foo"),
        lambda: smidgen.load(model, device="gpu"),
        lambda: smidgen.merge(run.path, tmp_path / "m", dtype="foo"),
        lambda: smidgen.evaluate(model, "a.txt", protocol="zz"),
    ):
        with pytest.raises(SettingsError):
            call()


def test_a_run_is_loaded_in_the_types_it_was_trained_in(model: Path, rows: Path, tmp_path: Path) -> None:
    settings = QUICK | {"compute_dtype": "bfloat16", "quantize": "int8", "max_steps": 2}
    loaded = smidgen.load(smidgen.finetune(str(model), str(rows), tmp_path / "run", **settings).path)
    assert (loaded.base.compute_dtype, loaded.base.storage) == (torch.bfloat16, "int8")


def test_a_run_remembers_the_system_message_its_rows_share(model: Path, tmp_path: Path) -> None:
    rows = tmp_path / "rows.jsonl"
    turns = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "ho"}]
    shared = [json.dumps({"messages": [{"role": "system", "content": "Be brief."}, *turns]})] * 12
    for name, lines, expected in (
        ("a", shared, "Be brief."),
        (
            "b",
            shared + [json.dumps({"messages": [{"role": "user", "content": f"hi {n}"}, turns[1]]}) for n in range(9)],
            "",
        ),
    ):
        rows.write_text("\n".join(lines) + "\n")
        loaded = smidgen.load(smidgen.finetune(str(model), str(rows), tmp_path / name, max_steps=2, **QUICK).path)
        assert loaded.system == expected
        asked = loaded.generate("hi", max_new_tokens=1).prompt_tokens
        with_system = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "hi"}]
        assert (asked == loaded.generate(with_system, max_new_tokens=1).prompt_tokens) == bool(expected)


def test_an_empty_folder_may_be_the_place_of_a_run_and_of_a_merge(model: Path, rows: Path, tmp_path: Path) -> None:
    for name in ("run", "merged"):
        (tmp_path / name).mkdir()
    run = smidgen.finetune(str(model), str(rows), tmp_path / "run", max_steps=2, **QUICK)
    assert smidgen.merge(run.path, tmp_path / "merged")["bytes"] > 0
