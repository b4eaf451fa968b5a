"""TensorBoard and W&B have what metrics.jsonl has."""

import json
import struct
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

import smidgen
from smidgen.errors import SettingsError
from smidgen.events import Event, Note, Step
from smidgen.train import logs

HOW: dict[str, Any] = {"rank": 2, "max_steps": 4, "compute_dtype": "float32", "save_interval": 2, "eval_interval": 2}


def figures(run: Path) -> dict[str, dict[int, float]]:
    """Of metrics.jsonl: name -> step -> value."""
    found: dict[str, dict[int, float]] = {}
    for line in (json.loads(text) for text in (run / "metrics.jsonl").read_text().splitlines()):
        for name, value in line.items():
            if name != "step" and value is not None:
                found.setdefault(name, {})[line["step"]] = value
    return found


class _Crash(Exception):
    pass


def crash_after(step: int) -> Any:
    def report(event: Event) -> None:
        if isinstance(event, Step) and event.step == step:
            raise _Crash

    return report


def test_tensorboard_has_the_figures_of_the_file_once_also_after_a_crash(
    model: Path, rows: Path, tmp_path: Path
) -> None:
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    with pytest.raises(_Crash):  # step 3 is logged, and done again from the checkpoint of step 2
        smidgen.finetune(
            str(model), str(rows), tmp_path / "run", report=crash_after(3), log_to="file, tensorboard", **HOW
        )
    smidgen.resume(tmp_path / "run")
    read = EventAccumulator(str(tmp_path / "run" / "tensorboard")).Reload()
    expected = figures(tmp_path / "run")
    assert set(read.Tags()["scalars"]) == set(expected)
    for name, values in expected.items():
        events = read.Scalars(name)
        assert [event.step for event in events] == sorted(values)
        # TensorBoard keeps float32
        assert [event.value for event in events] == pytest.approx([values[s] for s in sorted(values)], rel=1e-6)
    assert "learning_rate: 0.0005" in str(read.Tensors("settings/text_summary")[0].tensor_proto)


def wandb_records(run: Path) -> Iterator[Any]:
    """Records of every file that W&B left: LevelDB's log format, blocks of 32 KiB, after 7 bytes of its own."""
    from wandb.proto.wandb_internal_pb2 import Record  # type: ignore[import-not-found]

    for file in sorted(run.glob("wandb/offline-run-*/run-*.wandb")):
        content, at, parts = file.read_bytes(), 7, b""
        while at + 7 <= len(content):
            if (left := 32768 - at % 32768) < 7:
                at += left
                continue
            _, length, kind = struct.unpack("<IHB", content[at : at + 7])
            parts += content[at + 7 : at + 7 + length]
            at += 7 + length
            if kind in (1, 4):  # whole, or the last part
                record = Record()
                record.ParseFromString(parts)
                parts = b""
                yield record


def test_wandb_offline_has_the_figures_of_the_file_and_a_resumed_run_goes_on_in_it(
    model: Path, rows: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("wandb")
    monkeypatch.setenv("WANDB_MODE", "offline")
    notes: list[str] = []

    def report(event: Event) -> None:
        if isinstance(event, Note):
            notes.append(event.text)
        crash_after(3)(event)

    with pytest.raises(_Crash):
        smidgen.finetune(str(model), str(rows), tmp_path / "run", report=report, log_to="wandb", **HOW)
    smidgen.resume(tmp_path / "run")
    assert any(f"wandb sync {tmp_path}/run/wandb/offline-run" in note for note in notes)
    found: dict[str, dict[int, float]] = {}
    runs = []
    for record in wandb_records(tmp_path / "run"):
        if record.HasField("run"):
            runs.append(record.run)
        if record.HasField("history"):
            line = {(i.key or i.nested_key[0]): json.loads(i.value_json) for i in record.history.item}
            for name, value in line.items():
                if name != "step" and not name.startswith("_"):
                    found.setdefault(name, {})[line["step"]] = value
    assert found == figures(tmp_path / "run")
    assert len(runs) == 2 and len({run.run_id for run in runs}) == 1
    assert (runs[0].project, runs[0].display_name) == ("smidgen", "run")
    config = {item.key: json.loads(item.value_json) for item in runs[0].config.update}
    assert config["rank"] == 2 and config["log_to"] == "wandb"


def test_wandb_without_a_key_is_one_line_before_anything_is_written(model: Path, rows: Path, tmp_path: Path) -> None:
    pytest.importorskip("wandb")
    words = [sys.executable, "-m", "smidgen", "finetune", str(model), str(rows), "--out", "run", "--log-to", "wandb"]
    clean = {"HOME": str(tmp_path), "PATH": "/usr/bin:/bin", "PYTHONPATH": ":".join(sys.path), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(words, cwd=tmp_path, env=clean, capture_output=True, text=True, timeout=120, check=False)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr == (
        "smidgen: error: log_to: wandb knows no API key; type `wandb login`, or set WANDB_MODE=offline.\n"
    )
    assert not (tmp_path / "run").exists()


def test_a_package_that_is_missing_is_one_line_before_anything_is_written(
    model: Path, rows: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(logs, "find_spec", lambda name: None)
    with pytest.raises(SettingsError) as refused:
        smidgen.finetune(str(model), str(rows), tmp_path / "run", log_to="wandb,tensorboard")
    assert refused.value.problems == [
        "log_to: wandb is not installed; pip install 'smidgen[wandb]'",
        "log_to: tensorboard is not installed; pip install 'smidgen[tensorboard]'",
    ]
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("wrong", ["", "files", "file,mlflow"])
def test_unknown_places_are_refused(wrong: str) -> None:
    with pytest.raises(SettingsError, match="log_to: expected a comma list of file, tensorboard, wandb"):
        smidgen.finetune("m", "d", "out", log_to=wrong)
