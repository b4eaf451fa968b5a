"""Two processes and one run folder."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

import smidgen
from smidgen.errors import RunError
from smidgen.events import Event, Step
from smidgen.train.lock import LOCK, check_unlocked, locked
from tiny import tiny_folder, write_rows

_HOLD = """
import sys, time
from pathlib import Path
from smidgen.train.lock import locked
with locked(Path(sys.argv[1])):
    print("held", flush=True)
    time.sleep(120)
"""


def _holder(folder: Path) -> subprocess.Popen:
    process = subprocess.Popen([sys.executable, "-c", _HOLD, str(folder)], stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None and process.stdout.readline() == "held\n"
    return process


def test_a_second_process_is_refused_by_name_until_the_first_is_gone_however_it_went(tmp_path: Path) -> None:
    holder = _holder(tmp_path)
    try:
        for attempt in (lambda: locked(tmp_path).__enter__(), lambda: check_unlocked(tmp_path)):
            with pytest.raises(RunError, match=f"is in use by process {holder.pid} since 2"):
                attempt()
        assert str(holder.pid) in (tmp_path / LOCK).read_text()  # the one refused has not written its own
    finally:
        holder.kill()
        holder.wait()
    check_unlocked(tmp_path)  # nothing is left of a killed process but its name
    with locked(tmp_path):
        assert str(os.getpid()) in (tmp_path / LOCK).read_text()
    assert (tmp_path / LOCK).read_bytes() == b""


def test_a_folder_without_a_lock_stays_without(tmp_path: Path) -> None:
    check_unlocked(tmp_path)
    check_unlocked(tmp_path / "nowhere")
    assert not list(tmp_path.iterdir())


def test_a_run_holds_its_lock_from_the_first_step_and_when_it_is_resumed(tmp_path: Path) -> None:
    model, rows, out = tiny_folder(tmp_path / "base"), write_rows(tmp_path / "rows.jsonl"), tmp_path / "run"
    refused: list[str] = []

    def report(event: Event) -> None:
        if isinstance(event, Step):
            for second in (lambda: smidgen.resume(out), lambda: smidgen.finetune(str(model), str(rows), out)):
                with pytest.raises(RunError, match=f"in use by process {os.getpid()}") as error:
                    second()
                refused.append(str(error.value))
            if event.step == 1:
                os.kill(os.getpid(), signal.SIGINT)

    with pytest.raises(KeyboardInterrupt):
        smidgen.finetune(str(model), str(rows), out, report=report, max_steps=2, rank=2, compute_dtype="float32")
    check_unlocked(out)
    assert smidgen.resume(out, report=report).summary["steps"] == 2
    assert len(refused) == 4
    check_unlocked(out)
