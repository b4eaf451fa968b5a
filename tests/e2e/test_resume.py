"""Checkpoints of whole runs, and going on from them after an interruption, bit for bit."""

import json
import shutil
from datetime import date
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

import smidgen
import smidgen.errors
from runs import adapter_bytes, stop_after
from small_tokenizers import CHATML
from smidgen.errors import RunError
from smidgen.events import Event, Warned
from tiny import byte_tokenizer, tiny_folder, write_rows

QUICK: dict[str, Any] = {"rank": 4, "alpha": 8, "micro_batch": 4, "learning_rate": 5e-3, "compute_dtype": "float32"}


@pytest.mark.parametrize(
    "extra",
    [
        {},
        {"recompute": "full", "accumulation": 2, "epochs": 2.0},
        {"use_rslora": True, "rank_pattern": {"q_proj": 2}, "lora_plus_ratio": 4.0},
        {"use_dora": True},
        {"use_dora": True, "dropout": 0.0, "recompute": "full", "accumulation": 2},
        {"dropout": 0.0, "accumulation": 2, "epochs": 2.0, "pack": 150, "group_by_length": True},
    ],
)
def test_resumed_equals_uninterrupted_bit_for_bit(extra: dict, model: Path, rows: Path, tmp_path: Path) -> None:
    settings = QUICK | {"dropout": 0.2, "micro_batch": 3, "epochs": 1.0, "eval_interval": 2} | extra
    whole = smidgen.finetune(str(model), str(rows), tmp_path / "whole", **settings)
    with pytest.raises(KeyboardInterrupt):
        smidgen.finetune(str(model), str(rows), tmp_path / "cut", report=stop_after(3), **settings)
    assert (tmp_path / "cut" / "checkpoints" / "step-3" / "adapter_config.json").is_file()
    assert smidgen.load(tmp_path / "cut").model is not None  # an unfinished run is usable
    resumed = smidgen.resume(tmp_path / "cut")
    assert adapter_bytes(whole.path) == adapter_bytes(resumed.path)
    timing = {"run", "tokens_per_s", "wall_s", "peak_rss_bytes", "forecast_peak_bytes", "forecast_terms"}
    assert {k: v for k, v in whole.summary.items() if k not in timing} == {
        k: v for k, v in resumed.summary.items() if k not in timing
    }
    logged = [json.loads(line) for line in (resumed.path / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in logged if "grad_norm" in line] == list(range(1, whole.summary["steps"] + 1))


@pytest.mark.parametrize("left_out", ["exp_avg", "rng", "cursor"])
def test_a_resume_that_leaves_a_piece_out_would_be_caught(
    left_out: str, model: Path, rows: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The control arm: without the moments, the random state, or the place in the data, the adapter must differ."""
    from safetensors.torch import save_file

    settings = QUICK | {"dropout": 0.2, "micro_batch": 3}
    whole = smidgen.finetune(str(model), str(rows), tmp_path / "whole", **settings)
    with pytest.raises(KeyboardInterrupt):
        smidgen.finetune(str(model), str(rows), tmp_path / "cut", report=stop_after(3), **settings)
    state = tmp_path / "cut" / "checkpoints" / "step-3" / "state.safetensors"
    tensors = load_file(state)
    for name in tensors:
        if name.endswith("exp_avg") and left_out == "exp_avg":
            tensors[name] = torch.zeros_like(tensors[name])
    if left_out == "rng":
        torch.manual_seed(99)
        tensors["rng"] = torch.get_rng_state()
    save_file(tensors, state)
    if left_out == "cursor":
        cursor = state.with_suffix(".json")
        content = json.loads(cursor.read_text())
        cursor.write_text(json.dumps(content | {"step": content["step"] - 1}))
    monkeypatch.setattr("smidgen.train.state.is_whole", lambda folder: True)
    assert adapter_bytes(smidgen.resume(tmp_path / "cut").path) != adapter_bytes(whole.path)


def test_a_damaged_checkpoint_is_passed_over_for_the_one_before(model: Path, rows: Path, tmp_path: Path) -> None:
    settings = QUICK | {"micro_batch": 3, "save_interval": 2}
    whole = smidgen.finetune(str(model), str(rows), tmp_path / "whole", **settings)
    with pytest.raises(KeyboardInterrupt):
        smidgen.finetune(str(model), str(rows), tmp_path / "cut", report=stop_after(3), **settings)
    file = tmp_path / "cut" / "checkpoints" / "step-3" / "state.safetensors"
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(content)
    notes: list[str] = []
    resumed = smidgen.resume(tmp_path / "cut", report=lambda event: notes.append(getattr(event, "text", "")))
    assert any("from step 2" in note for note in notes)
    assert adapter_bytes(resumed.path) == adapter_bytes(whole.path)


def test_a_finished_run_is_returned_as_it_is(model: Path, rows: Path, tmp_path: Path) -> None:
    run = smidgen.finetune(str(model), str(rows), tmp_path / "run", max_steps=2, **QUICK)
    before = adapter_bytes(run.path)
    said: list[str] = []
    assert smidgen.resume(run.path, report=lambda event: said.append(getattr(event, "text", ""))).summary == run.summary
    assert adapter_bytes(run.path) == before
    assert said == [f"{run.path} is finished: nothing to do"], "and it is not made ready for nothing"
    (run.path / "summary.json").write_text("{")
    with pytest.raises(RunError, match=r"summary\.json cannot be read .*Remove it, and the run goes on"):
        smidgen.resume(run.path)
    (run.path / "summary.json").unlink()
    assert smidgen.resume(run.path).summary["loss_after"] == run.summary["loss_after"]
    assert adapter_bytes(run.path) == before


def test_changed_data_or_base_is_refused_at_resume(model: Path, tmp_path: Path) -> None:
    base = tiny_folder(tmp_path / "base")
    data = write_rows(tmp_path / "rows.jsonl")
    with pytest.raises(KeyboardInterrupt):
        smidgen.finetune(str(base), str(data), tmp_path / "run", report=stop_after(2), **QUICK)
    original = data.read_text()
    data.write_text(original.replace("grey", "gray"))
    with pytest.raises(RunError, match="is not the data that"):
        smidgen.resume(tmp_path / "run")
    data.write_text(original)
    tiny_folder(base, seed=1)
    with pytest.raises(RunError, match="is not the base that"):
        smidgen.resume(tmp_path / "run")
    with pytest.raises(RunError, match="is not the base that"):
        smidgen.load(tmp_path / "run")


class _NewYear(date):
    @classmethod
    def today(cls) -> date:
        return date(2024, 1, 1)


def test_a_run_goes_on_another_day_with_the_date_of_its_start(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Llama 3.2's template writes the date, so a run could not go on the next day: the data was said to have changed.

    Only the start is told another date: what the template itself asks is the real clock.
    """
    model, rows = tiny_folder(tmp_path / "model"), write_rows(tmp_path / "rows.jsonl")
    tokenizer = byte_tokenizer()
    tokenizer.chat_template = "{{ 'Today is ' + strftime_now('%d %b %Y') + '\n' }}" + CHATML
    tokenizer.save_pretrained(model)
    how = QUICK | {"dropout": 0.2, "token_cache": False}
    with monkeypatch.context() as patch:
        patch.setattr("smidgen.train.finetune.date", _NewYear)
        whole = smidgen.finetune(str(model), str(rows), tmp_path / "whole", **how)
        with pytest.raises(KeyboardInterrupt):
            smidgen.finetune(str(model), str(rows), tmp_path / "cut", report=stop_after(3), **how)
    cut, said = tmp_path / "cut", list[str]()
    shutil.copytree(cut, tmp_path / "older")
    resumed = smidgen.resume(cut, report=lambda event: said.append(getattr(event, "text", "")))
    assert adapter_bytes(resumed.path) == adapter_bytes(whole.path)
    assert any("it stays 2024-01-01" in text for text in said)
    asked = smidgen.load(cut).renderer.prompt_text([{"role": "user", "content": "hi"}])
    assert f"Today is {date.today():%d %b %Y}" in asked, "who talks to it does so now"
    (part,) = smidgen.evaluate(cut, str(rows), answers=False, batch_size=4)["data"]
    assert part["figures"]["loss"]["value"] == pytest.approx(whole.summary["loss_after"], rel=1e-6)

    file = tmp_path / "older" / "smidgen.json"
    record = json.loads(file.read_text())
    assert record.pop("started") == "2024-01-01"
    file.write_text(json.dumps(record))
    with pytest.raises(RunError, match="is not the data that"):
        smidgen.resume(tmp_path / "older")
    file.write_text(json.dumps(record | {"started": "long ago"}))
    with pytest.raises(RunError, match="wrong started"):
        smidgen.resume(tmp_path / "older")


def test_a_resume_under_other_conditions_names_each_of_them_in_one_line(
    model: Path, rows: Path, tmp_path: Path
) -> None:
    with pytest.raises(KeyboardInterrupt):
        smidgen.finetune(str(model), str(rows), tmp_path / "run", report=stop_after(2), **QUICK)
    file = tmp_path / "run" / "smidgen.json"
    record, said = json.loads(file.read_text()), list[Warned]()

    def warned_of(event: Event) -> None:
        if isinstance(event, Warned) and "training rows too" not in event.text:  # the rows are few, and repeat
            said.append(event)

    assert record["processor"] and record["device"] == "cpu"
    shutil.copytree(tmp_path / "run", tmp_path / "same")
    smidgen.resume(tmp_path / "same", report=warned_of)
    assert not said
    then = {"processor": "an abacus", "device": "a slide rule", "kernels": "beads", "threads": 77}
    file.write_text(json.dumps(record | then | {"versions": record["versions"] | {"torch": "0.1"}}))
    smidgen.resume(tmp_path / "run", report=warned_of)
    (warned,) = said
    for thing in ("77 threads", "kernels beads", "an abacus", "a slide rule", "torch 0.1"):
        assert thing in warned.text.split("; now ")[0]
    for thing in (record["processor"], f"torch {torch.__version__.split('+')[0]}", "cpu", "rounding will differ"):
        assert thing in warned.text.split("; now ")[1]
    assert "safetensors" not in warned.text  # it has not changed


def test_a_resume_with_less_memory_tells_of_its_smaller_micro_batch(
    model: Path, rows: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Beside PyTorch a tiny model is nothing; PyTorch is counted as nothing here, so that the budget has to choose."""
    monkeypatch.setattr("smidgen.train.memory.resident_bytes", lambda: (0, 0))
    how = QUICK | {"recompute": "none", "max_steps": 3}
    with pytest.raises(KeyboardInterrupt):
        smidgen.finetune(str(model), str(rows), tmp_path / "run", report=stop_after(1), **how)
    least = smidgen.plan(str(model), str(rows), **how)["smallest_bytes"]
    file = tmp_path / "run" / "settings.yaml"
    file.write_text(file.read_text().replace("memory: null", f"memory: '{least}'"))
    said: list[str] = []
    smidgen.resume(tmp_path / "run", report=lambda event: said.append(getattr(event, "text", "")))
    assert any("started with micro_batch 4, now 1 by the memory there is" in text for text in said)


def test_every_checkpoint_is_a_folder_that_verbs_take(model: Path, rows: Path, tmp_path: Path) -> None:
    run = smidgen.finetune(str(model), str(rows), tmp_path / "run", save_interval=2, **QUICK)
    for checkpoint in (run.path / "checkpoints").iterdir():
        assert smidgen.load(checkpoint).generate("say red 0", max_new_tokens=4).new_tokens <= 4
    assert {c.name for c in (run.path / "checkpoints").iterdir()} == {"step-4", "step-6"}


def _checkpoints(run: Path) -> set[str]:
    return {folder.name for folder in (run / "checkpoints").iterdir()}


def test_checkpoints_are_pruned_only_for_newer_ones_that_read_as_written(
    model: Path, rows: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    how = QUICK | {"save_interval": 1, "max_steps": 4}
    smidgen.finetune(str(model), str(rows), tmp_path / "all", keep_checkpoints=0, **how)
    assert _checkpoints(tmp_path / "all") == {f"step-{step}" for step in range(1, 5)}
    smidgen.finetune(str(model), str(rows), tmp_path / "one", keep_checkpoints=1, **how)
    assert _checkpoints(tmp_path / "one") == {"step-4"}
    from smidgen.train import run, state

    monkeypatch.setattr(run, "is_whole", lambda folder: folder.name != "step-3" and state.is_whole(folder))
    with pytest.raises(RunError, match=r"step-3 reads otherwise than it was written.*older ones stay"):
        smidgen.finetune(str(model), str(rows), tmp_path / "bad", keep_checkpoints=1, **how)
    assert _checkpoints(tmp_path / "bad") == {"step-2", "step-3"}


def test_a_damaged_checkpoint_is_written_anew(model: Path, rows: Path, tmp_path: Path) -> None:
    how = QUICK | {"save_interval": 1, "max_steps": 4, "keep_checkpoints": 0}
    with pytest.raises(KeyboardInterrupt):
        smidgen.finetune(str(model), str(rows), tmp_path / "run", report=stop_after(3), **how)
    file = tmp_path / "run" / "checkpoints" / "step-3" / "state.json"
    whole = file.read_bytes()
    file.write_bytes(b"{}")
    (file.parent.parent / ".tmp-step-9-x").mkdir()  # what a kill in the middle of a save leaves
    smidgen.resume(tmp_path / "run")
    assert json.loads(file.read_bytes())["step"] == json.loads(whole)["step"] == 3
    assert ".tmp-step-9-x" not in _checkpoints(tmp_path / "run")


def test_a_run_that_has_no_checkpoint_yet_starts_from_its_adapter_again(
    model: Path, rows: Path, tmp_path: Path
) -> None:
    first = smidgen.finetune(str(model), str(rows), tmp_path / "first", max_steps=3, **QUICK)
    how = QUICK | {"init_adapter": str(first.path), "max_steps": 2}
    whole = smidgen.finetune(str(model), str(rows), tmp_path / "whole", **how)
    with pytest.raises(KeyboardInterrupt):
        smidgen.finetune(str(model), str(rows), tmp_path / "cut", report=stop_after(1), **how)
    shutil.rmtree(tmp_path / "cut" / "checkpoints")
    assert adapter_bytes(smidgen.resume(tmp_path / "cut").path) == adapter_bytes(whole.path)


@pytest.mark.parametrize("killed", ["before its files are moved", "between them", "in the summary"])
def test_a_run_that_was_killed_while_it_wrote_its_result_writes_it_again(
    killed: str, model: Path, rows: Path, tmp_path: Path
) -> None:
    run = smidgen.finetune(str(model), str(rows), tmp_path / "run", max_steps=2, **QUICK).path
    whole, names = adapter_bytes(run), {file.name for file in run.iterdir()}
    staged = run / ".result"
    (run / "summary.json").unlink()
    if killed == "in the summary":
        (run / ".tmp-summary.json-12345678").write_text("{")
    else:
        staged.mkdir()
        (run / "adapter_config.json").rename(staged / "adapter_config.json")
    if killed == "before its files are moved":
        (run / "adapter_model.safetensors").rename(staged / "adapter_model.safetensors")
        (run / ".tmp-.result-12345678").mkdir()
    assert adapter_bytes(smidgen.resume(run).path) == whole
    assert {file.name for file in run.iterdir()} == names


def test_a_run_that_goes_on_has_no_result_until_it_ends_again(model: Path, rows: Path, tmp_path: Path) -> None:
    run = smidgen.finetune(str(model), str(rows), tmp_path / "run", max_time="0.01s", epochs=500, **QUICK)
    stopped = smidgen.load(run.path)
    with pytest.raises(KeyboardInterrupt):
        smidgen.resume(run.path, report=stop_after(run.summary["steps"] + 1))
    assert not (run.path / "summary.json").exists() and not (run.path / "adapter_config.json").exists()
    notes: list[str] = []
    newer = smidgen.load(run.path, report=lambda event: notes.append(getattr(event, "text", "")))
    assert any("is not finished: taking step-" in note for note in notes)
    ids = torch.arange(8)[None]
    assert not torch.equal(newer.base.hidden_of(ids), stopped.base.hidden_of(ids))


def test_a_result_without_a_checkpoint_is_not_thrown_away(model: Path, rows: Path, tmp_path: Path) -> None:
    run = smidgen.finetune(str(model), str(rows), tmp_path / "run", max_time="0.01s", epochs=500, **QUICK).path
    before = adapter_bytes(run)
    shutil.rmtree(run / "checkpoints")
    with pytest.raises(RunError, match=r"no whole checkpoint to go on from\. Start from the result: .*--init-adapter"):
        smidgen.resume(run)
    assert adapter_bytes(run) == before


def test_max_time_stops_and_keeps_the_adapter(model: Path, rows: Path, tmp_path: Path) -> None:
    # How many steps fit in the time is the machine's affair; that it stops long before the end is not.
    run = smidgen.finetune(str(model), str(rows), tmp_path / "run", max_time="0.01s", epochs=500, **QUICK)
    assert 1 <= run.summary["steps"] < 100
    assert run.summary["stopped"] == "max_time"
    first = adapter_bytes(run.path)
    again = smidgen.resume(run.path)  # for as long once more
    assert run.summary["steps"] < again.summary["steps"] < 200
    assert run.summary["wall_s"] < again.summary["wall_s"]  # of both
    assert adapter_bytes(run.path) != first


def test_a_log_torn_by_a_crash_does_not_stop_a_resume(model: Path, rows: Path, tmp_path: Path) -> None:
    with pytest.raises(KeyboardInterrupt):
        smidgen.finetune(str(model), str(rows), tmp_path / "run", report=stop_after(2), **QUICK)
    with open(tmp_path / "run" / "metrics.jsonl", "a", encoding="utf-8") as file:
        file.write('{"step": 3, "lo')
    assert smidgen.resume(tmp_path / "run").summary["loss_after"] is not None


def test_settings_of_another_version_are_one_line(model: Path, rows: Path, tmp_path: Path) -> None:
    with pytest.raises(KeyboardInterrupt):
        smidgen.finetune(str(model), str(rows), tmp_path / "run", report=stop_after(2), **QUICK)
    with open(tmp_path / "run" / "settings.yaml", "a", encoding="utf-8") as file:
        file.write("tomorrow: 1\n")
    with pytest.raises(RunError, match="unknown settings tomorrow"):
        smidgen.resume(tmp_path / "run")
