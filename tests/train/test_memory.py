"""A budget of memory in a whole run: refused early, or kept with the same adapter."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

import smidgen
import smidgen.model.stream as stream_module
import smidgen.train.forecast as forecast_module
import smidgen.train.memory as memory_module
import smidgen.train.prepare as prepare_module
from smidgen.cli.views import run_figures
from smidgen.data.records import read_data
from smidgen.errors import SettingsError
from smidgen.events import Event, Note, silent
from smidgen.model.cgroups import memory_group
from smidgen.model.load import open_source
from smidgen.train.config import Settings
from tiny import tiny_folder, write_rows

QUICK: dict[str, Any] = {"rank": 4, "micro_batch": 1, "accumulation": 4, "max_steps": 3, "compute_dtype": "float32"}


@pytest.fixture
def model(tmp_path: Path) -> Path:
    return tiny_folder(tmp_path / "model", num_hidden_layers=6)


def test_too_little_is_refused_before_anything_is_written(model: Path, tmp_path: Path) -> None:
    rows = write_rows(tmp_path / "rows.jsonl")
    with pytest.raises(SettingsError, match=r"100.0 MB \(--memory 100MB\) is too little for model: at least"):
        smidgen.finetune(str(model), str(rows), tmp_path / "run", memory="100MB", **QUICK)
    assert not (tmp_path / "run").exists()


def test_the_smallest_budget_gives_the_same_adapter(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Beside PyTorch a tiny model is nothing; PyTorch is counted as nothing here, so that the budget has to choose."""
    rows = write_rows(tmp_path / "rows.jsonl")
    monkeypatch.setenv("SMIDGEN_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(memory_module, "resident_bytes", lambda: (0, 0))
    monkeypatch.setattr(stream_module, "_SMALL", 64)
    settings = {key: value for key, value in QUICK.items() if key != "max_steps"}
    smallest = smidgen.plan(str(model), str(rows), **settings)["smallest_bytes"]
    notes: list[Event] = []
    free = smidgen.finetune(str(model), str(rows), tmp_path / "free", **QUICK)
    # rows are held out by their content, so that a run's longest may be shorter than the plan's: never longer
    kept = smidgen.finetune(
        str(model), str(rows), tmp_path / "kept", memory=str(smallest), report=notes.append, **QUICK
    )
    said = [note.text for note in notes if isinstance(note, Note)]
    assert any("layers are streamed from disk" in text for text in said)
    one, other = ((run.path / "adapter_model.safetensors").read_bytes() for run in (free, kept))
    assert one == other
    assert kept.summary["forecast_peak_bytes"] <= smallest < free.summary["forecast_peak_bytes"]
    assert kept.summary["streamed_layers"] > 2 and kept.summary["recompute"] == "full"
    logged = [json.loads(line) for line in (kept.path / "metrics.jsonl").read_text().splitlines()]
    steps = [line for line in logged if "loss" in line]
    assert kept.summary["read_bytes"] == sum(line["read_bytes"] for line in steps) > 0
    assert kept.summary["wait_s"] == pytest.approx(sum(line["wait_s"] for line in steps), abs=1e-3)
    assert f"{kept.summary['streamed_layers']} layers streamed: " in run_figures(kept.summary)
    assert free.summary["streamed_layers"] == free.summary["read_bytes"] == 0
    assert "streamed" not in run_figures(free.summary)
    # what was written for them is gone: not after the process, whose notebook may go on for days
    assert not [file for file in _open_files() if str(tmp_path / "cache") in file]


def _open_files() -> list[str]:
    links = [f"/proc/self/fd/{number}" for number in os.listdir("/proc/self/fd")]
    return [os.readlink(link) for link in links if os.path.lexists(link)]


@pytest.mark.parametrize(("setting", "value"), [("activation_dtype", "bfloat16"), ("recompute", "cheap")])
def test_what_only_our_own_layers_do_is_refused_for_others(setting: str, value: str, tmp_path: Path) -> None:
    """Not taken as something else: layers of transformers are computed again whole, and keep what autograd does."""
    rows = write_rows(tmp_path / "rows.jsonl")
    for name, dropout in (("gemma2", 0.0), ("llama", 0.1)):
        folder = tiny_folder(tmp_path / name, name)
        how: dict[str, Any] = {**QUICK, "dropout": dropout, setting: value}
        with pytest.raises(SettingsError, match=f"{setting}: {value} is for layers of the Llama family"):
            smidgen.finetune(str(folder), str(rows), tmp_path / "run", **how)
        with pytest.raises(SettingsError, match=f"{setting}: {value} is for layers of the Llama family"):
            smidgen.plan(str(folder), **how)
    assert not (tmp_path / "run").exists()


def test_the_disk_that_counts_is_the_one_that_layers_are_read_from(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Packed on the way they lie in the cache folder; as they are stored, in the model's file."""
    model, cache = tiny_folder(tmp_path / "model"), tmp_path / "cache"
    monkeypatch.setenv("SMIDGEN_CACHE", str(cache))
    asked: list[Path] = []
    monkeypatch.setattr(memory_module, "measure_disk", lambda file: asked.append(file) or 5e8)
    how: dict[str, Any] = {"compute_dtype": "float32", "seq_len": 64}
    for form in ("none", "nf4-dq"):
        smidgen.plan(str(model), quantize=form, **how)
    assert asked[0] == model / "model.safetensors" and asked[1].parent == cache
    (cache / "streamed").mkdir()
    smidgen.plan(str(model), quantize="nf4-dq", generate=4, **how)
    assert asked[2].parent == cache / "streamed" and not any((cache / "streamed").iterdir())


def test_gptq_has_the_memory_of_the_machine_where_a_card_trains(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """--memory is the card's there, and GPTQ runs on the CPU."""
    budgets: list[int] = []
    plan_quantising = forecast_module.plan_quantising

    def planned(*given: Any, **more: Any) -> Any:
        budgets.append(given[4])
        return plan_quantising(*given, **more)

    monkeypatch.setattr(forecast_module, "plan_quantising", planned)
    how: dict[str, Any] = {"quantize": "gptq", "compute_dtype": "float32", "seq_len": 64, "memory": "3GiB"}
    for device in ("cpu", "cuda"):
        smidgen.plan(str(model), device=device, **how)
    assert budgets[0] == 3 << 30 and budgets[2] not in (3 << 30, 0)

    told: list[int | None] = []
    monkeypatch.setattr(prepare_module, "quantise_model", lambda *_, memory, **__: told.append(memory))
    monkeypatch.setattr(prepare_module, "open_source", lambda *_: None)
    source, settings = open_source(str(model)), Settings(memory="3GiB")
    for device in ("cpu", "cuda"):
        prepare_module._quantised(source, [], tmp_path / "out", settings, torch.device(device), silent)  # type: ignore[arg-type]
    assert told == [3 << 30, None]


def test_a_training_that_cannot_fit_is_refused_before_gptq_begins(tmp_path: Path) -> None:
    """Not after the minutes that it takes: nothing has been quantised, or written, when it is said."""
    model, rows = tiny_folder(tmp_path / "model"), write_rows(tmp_path / "rows.jsonl")
    with pytest.raises(SettingsError, match=r"60.0 MB .* is too little for model: at least .* with micro-batch"):
        smidgen.finetune(str(model), rows, tmp_path / "run", quantize="gptq", memory="60MB", compute_dtype="float32")
    assert {path.name for path in tmp_path.iterdir()} == {"model", "rows.jsonl"}


@pytest.mark.slow
def test_the_forecast_holds_for_answers_too(tmp_path: Path) -> None:
    """Rows one by one leave little room: answering all at once took more than the forecast."""
    _write_toolcalls(tmp_path / "rows", 32)
    words = ["finetune", "smollm2-135m", str(tmp_path / "rows"), "--out", str(tmp_path / "run"), "--compare", "32"]
    words += ["--micro-batch", "1", "--max-steps", "1", "--compute-dtype", "float32", "--json"]
    done = subprocess.run([sys.executable, "-m", "smidgen", *words], stdout=subprocess.PIPE, text=True, check=True)
    summary = json.loads(done.stdout.splitlines()[-1])
    print(f"{summary['peak_rss_bytes'] / 1e6:.0f} MB, forecast {summary['forecast_peak_bytes'] / 1e6:.0f} MB")
    assert summary["peak_rss_bytes"] <= summary["forecast_peak_bytes"]


def _write_toolcalls(folder: Path, held_out: int) -> None:
    folder.mkdir()
    for part, count in (("train", 8), ("valid", held_out)):
        lines = [json.dumps({"messages": row.messages}) for row in read_data("toolcalls").train[:count]]
        (folder / f"{part}.jsonl").write_text("\n".join(lines), encoding="utf-8")


@pytest.mark.slow
def test_a_run_lives_in_a_memory_cgroup_of_its_budget(tmp_path: Path) -> None:
    """Of hardly more than the smallest that would do, page cache included: steps, and answers before and after."""
    _write_toolcalls(tmp_path / "rows", 4)
    words = ["smollm2-135m", str(tmp_path / "rows"), "--compare", "4", "--micro-batch", "1", "--max-steps", "2"]
    words += ["--compute-dtype", "float32", "--json"]
    program = [sys.executable, "-m", "smidgen"]
    planned = subprocess.run([*program, "plan", *words], stdout=subprocess.PIPE, text=True, check=True)
    budget = int(1.02 * json.loads(planned.stdout.splitlines()[-1])["smallest_bytes"])
    try:
        with memory_group("smidgen-test", budget) as group:
            enter = ["sh", "-c", 'echo $$ > "$0" && exec "$@"', str(group.path / "cgroup.procs")]
            run = [*program, "finetune", *words, "--out", str(tmp_path / "run"), "--memory", str(budget)]
            done = subprocess.run([*enter, *run], stdout=subprocess.PIPE, text=True, check=True)
            peak = group.peak_bytes
    except OSError as error:
        pytest.skip(f"no memory cgroup can be made here: {error}")
    summary = json.loads(done.stdout.splitlines()[-1])
    print(f"budget {budget / 1e6:.0f} MB, resident {summary['peak_rss_bytes'] / 1e6:.0f} MB, cgroup {peak}")
    assert summary["streamed_layers"] > 0 and summary["exact_match_after"] is not None
    assert summary["forecast_peak_bytes"] <= budget
    # pages of program files come and go: 604.2 MB were resident once where 604.1 were forecast
    assert summary["peak_rss_bytes"] <= 1.01 * budget
