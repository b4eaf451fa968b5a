"""The base's files under a run: written to, shortened, replaced, unreadable; and the memory that others take."""

import errno
import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

import smidgen
import smidgen.model.stream as stream_module
import smidgen.train.loop as loop_module
import smidgen.train.memory as memory_module
import smidgen.train.prepare as prepare_module
from runs import adapter_bytes
from smidgen.cli.views import run_figures
from smidgen.errors import RunError
from smidgen.events import Event, Step, Warned
from smidgen.kernels.library import native_library
from smidgen.train.state import latest_checkpoint
from tiny import tiny_folder, write_rows

HERE = Path(__file__).parent
# none: the weights are views of the mapped file all the time
HOW: dict[str, Any] = {"rank": 2, "compute_dtype": "float32", "quantize": "none", "micro_batch": 3, "max_steps": 4}
HOW |= {"save_interval": 1, "targets": "q,v"}


@pytest.fixture
def model(tmp_path: Path) -> Path:
    return tiny_folder(tmp_path / "model")


@pytest.fixture
def rows(tmp_path: Path) -> Path:
    return write_rows(tmp_path / "rows.jsonl")


def _shorten(file: Path) -> None:
    os.truncate(file, file.stat().st_size // 2)


def _write_to(file: Path) -> None:
    with open(file, "r+b") as stream:
        stream.seek(-1, os.SEEK_END)
        stream.write(b"\x01")


@pytest.mark.parametrize(("change", "said"), [(_shorten, "shortened"), (_write_to, "written to")])
def test_a_base_that_changes_is_named_and_nothing_of_it_is_saved(
    change: Any, said: str, model: Path, rows: Path, tmp_path: Path
) -> None:
    def report(event: Event) -> None:
        if isinstance(event, Step) and event.step == 2:  # before the save after this step
            change(model / "model.safetensors")

    with pytest.raises(RunError, match=rf"model\.safetensors changed while it was in use: it was {said}"):
        smidgen.finetune(str(model), str(rows), tmp_path / "run", report=report, **HOW)
    newest = latest_checkpoint(tmp_path / "run")
    assert newest is not None and newest.name == "step-1"
    assert not (tmp_path / "run" / "adapter_config.json").exists()


def test_a_base_that_changes_between_saves_ends_the_run_before_the_next_step(
    model: Path, rows: Path, tmp_path: Path
) -> None:
    steps: list[int] = []

    def report(event: Event) -> None:
        if isinstance(event, Step):
            steps.append(event.step)
            _shorten(model / "model.safetensors")

    with pytest.raises(RunError, match="it was shortened"):
        smidgen.finetune(str(model), str(rows), tmp_path / "run", report=report, **HOW | {"save_interval": 0})
    assert steps == [1]


SHORTENED = """
import json, os, sys
import smidgen
from smidgen.events import Step
from smidgen.model.fused import FusedLayer

model, rows, run, how = sys.argv[1:]
steps, run_layer = [], FusedLayer.run

def run_and_shorten(self, *arguments):  # the third step has begun when it is called
    if len(steps) == 2:
        os.truncate(model + "/model.safetensors", 4096)
    return run_layer(self, *arguments)

FusedLayer.run = run_and_shorten
smidgen.finetune(model, rows, run, report=lambda event: isinstance(event, Step) and steps.append(1), **json.loads(how))
"""


def test_a_base_that_is_shortened_while_a_step_reads_it_is_named(model: Path, rows: Path, tmp_path: Path) -> None:
    """Its pages are gone: without a handler of its own the process would die of SIGBUS and say nothing."""
    if native_library() is None:
        pytest.skip("no native library here")
    shutil.copytree(model, tmp_path / "copy")
    whole = smidgen.finetune(str(tmp_path / "copy"), str(rows), tmp_path / "whole", device="cpu", **HOW)
    words = [str(model), str(rows), str(tmp_path / "run"), json.dumps(HOW | {"device": "cpu"})]
    done = subprocess.run([sys.executable, "-c", SHORTENED, *words], capture_output=True, text=True)
    assert done.returncode == 2, done.stderr
    line = done.stderr.splitlines()[-1]
    assert line.startswith(f"smidgen: error: {model / 'model.safetensors'} changed while it was in use: it was shorten")
    newest = latest_checkpoint(tmp_path / "run")
    assert newest is not None and newest.name in ("step-1", "step-2")
    shutil.copytree(tmp_path / "copy", model, dirs_exist_ok=True)
    assert adapter_bytes(smidgen.resume(tmp_path / "run").path) == adapter_bytes(whole.path)


def test_a_bus_error_elsewhere_is_left_as_it_was(model: Path, tmp_path: Path) -> None:
    if native_library() is None:
        pytest.skip("no native library here")
    other = tmp_path / "other"
    other.write_bytes(bytes(8192))
    code = (
        "import mmap, os, sys, smidgen\n"
        "smidgen.load(sys.argv[1], quantize='none', compute_dtype='float32', device='cpu')\n"
        "file = open(sys.argv[2], 'r+b'); data = mmap.mmap(file.fileno(), 8192)\n"
        "os.truncate(sys.argv[2], 0); data[0]\n"
    )
    done = subprocess.run([sys.executable, "-c", code, str(model), str(other)], capture_output=True, text=True)
    assert done.returncode == -signal.SIGBUS and "smidgen: error" not in done.stderr


def test_a_base_that_is_replaced_or_removed_stays_as_it_was_mapped(model: Path, rows: Path, tmp_path: Path) -> None:
    def report(event: Event) -> None:
        file = model / "model.safetensors"
        if isinstance(event, Step) and event.step == 1:
            (model / "new").write_bytes(b"another model")
            (model / "new").replace(file)
        elif isinstance(event, Step) and event.step == 2:
            file.unlink()

    shutil.copytree(model, tmp_path / "copy")
    run = smidgen.finetune(str(model), str(rows), tmp_path / "run", report=report, **HOW)
    other = smidgen.finetune(str(tmp_path / "copy"), str(rows), tmp_path / "other", **HOW)
    assert adapter_bytes(run.path) == adapter_bytes(other.path)


UNREADABLE = """
import ctypes, json, os, sys
import smidgen
import smidgen.model.stream as stream_module
import smidgen.train.memory as memory_module
from smidgen.errors import RunError
from smidgen.events import Step

model, rows, run, how, error = sys.argv[1:]
how = json.loads(how)
memory_module.resident_bytes = lambda: (0, 0)  # so that the budget has to choose
stream_module._SMALL = 64
shim = ctypes.CDLL(None)

def report(event):
    if isinstance(event, Step) and event.step == 2:
        shim.faults_arm(model.encode(), 1, int(error))

memory = str(smidgen.plan(model, rows, **how)["smallest_bytes"])
try:
    smidgen.finetune(model, rows, run, memory=memory, report=report, **how)
except RunError as error:
    shim.faults_disarm()
    print(json.dumps(str(error)))
"""


def test_a_disk_that_cannot_be_read_while_layers_are_streamed_is_named(
    rows: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    compiler = shutil.which("cc") or shutil.which("gcc")
    if compiler is None or not sys.platform.startswith("linux"):
        pytest.skip("needs a C compiler and LD_PRELOAD")
    model = tiny_folder(tmp_path / "model", num_hidden_layers=6)
    shim = tmp_path / "faults.so"
    subprocess.run([compiler, "-shared", "-fPIC", "-O1", "-o", shim, HERE / "faults.c", "-ldl"], check=True)
    how = HOW | {"micro_batch": 1, "accumulation": 3}
    words = [model, rows, tmp_path / "run", json.dumps(how), errno.EIO]
    done = subprocess.run(
        [sys.executable, "-c", UNREADABLE, *map(str, words)],
        env=os.environ | {"LD_PRELOAD": str(shim)}, capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0 and done.stdout, done.stderr
    said = json.loads(done.stdout)
    assert "model.safetensors cannot be read" in said and "Input/output error" in said, said
    newest = latest_checkpoint(tmp_path / "run")
    assert newest is not None and newest.name in ("step-1", "step-2")
    whole = smidgen.finetune(str(model), str(rows), tmp_path / "whole", **how)
    monkeypatch.setattr(memory_module, "resident_bytes", lambda: (0, 0))
    monkeypatch.setattr(stream_module, "_SMALL", 64)
    assert adapter_bytes(smidgen.resume(tmp_path / "run").path) == adapter_bytes(whole.path)


def test_a_budget_that_others_have_taken_already_is_said(
    model: Path, rows: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def warnings(name: str) -> list[str]:
        told: list[Event] = []
        smidgen.finetune(str(model), str(rows), tmp_path / name, memory="4GiB", report=told.append, **HOW)
        return [event.text for event in told if isinstance(event, Warned) and "other processes" in event.text]

    assert warnings("free") == []
    monkeypatch.setattr(prepare_module, "current_rss_bytes", lambda: 1 << 20)
    monkeypatch.setattr(prepare_module, "free_memory_bytes", lambda: 1 << 20)
    (said,) = warnings("full")
    assert "other processes leave it 2.1 MB" in said


def test_what_lay_in_swap_is_in_the_summary(
    model: Path, rows: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = smidgen.finetune(str(model), str(rows), tmp_path / "dry", **HOW)
    assert "swapped_bytes" not in run.summary
    sizes = iter([0, 5_000_000, 3_000_000, 0])
    monkeypatch.setattr(loop_module, "swapped_bytes", lambda: next(sizes))
    run = smidgen.finetune(str(model), str(rows), tmp_path / "run", **HOW)
    assert run.summary["swapped_bytes"] == 5_000_000
    assert "Up to 5.0 MB of it lay in swap" in run_figures(run.summary)
