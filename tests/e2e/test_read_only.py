"""Places that cannot be written: one line, exit code 2, nothing half-written, and what is there stays usable."""

import os
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

import smidgen
from runs import stop_after
from smidgen.cli.main import main

SMIDGEN = [sys.executable, "-m", "smidgen"]


@pytest.fixture(scope="module")
def runs(model: Path, rows: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with two runs: `whole`, and `cut`, which was interrupted."""
    folder = tmp_path_factory.mktemp("runs")
    how = {"rank": 2, "max_steps": 2, "compute_dtype": "float32"}
    smidgen.finetune(str(model), str(rows), folder / "whole", **how)
    with pytest.raises(KeyboardInterrupt):
        smidgen.finetune(str(model), str(rows), folder / "cut", report=stop_after(1), **how)
    return folder


@contextmanager
def mounted(folder: Path) -> Iterator[Path]:
    """A file system of its own, in memory, at `folder`."""
    if os.geteuid() != 0:
        pytest.skip("needs root to mount a file system")
    folder.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=16m", "tmpfs", str(folder)], check=False).returncode:
        pytest.skip("no tmpfs can be mounted here")
    try:
        yield folder
    finally:
        subprocess.run(["umount", str(folder)], check=True)


def read_only(folder: Path) -> None:
    subprocess.run(["mount", "-o", "remount,ro", str(folder)], check=True)


def bound_by_rights() -> list[str]:
    """What a command begins with so that a folder's rights bind it: root is above them, unless it gives that up."""
    if os.geteuid() != 0:
        return []
    if shutil.which("setpriv") is None:
        pytest.skip("root needs setpriv to be bound by rights")
    return ["setpriv", "--bounding-set=-dac_override,-dac_read_search"]


def ended(words: list[str], capsys: pytest.CaptureFixture[str]) -> tuple[int, str]:
    """(exit code, standard error) of a command."""
    capsys.readouterr()
    with pytest.raises(SystemExit) as leaving:
        main(words)
    return int(leaving.value.code or 0), capsys.readouterr().err


def one_line(ending: tuple[int, str]) -> str:
    """The one line that a refused command says, without `smidgen: error: ` before it."""
    code, said = ending
    assert code == 2, said
    (line,) = [line for line in said.splitlines() if line.strip()]
    return line.removeprefix("smidgen: error: ")


def content(folder: Path) -> dict[str, bytes]:
    return {str(file.relative_to(folder)): file.read_bytes() for file in folder.rglob("*") if file.is_file()}


def test_a_new_run_on_a_disk_that_is_mounted_read_only_is_refused(
    model: Path, rows: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with mounted(tmp_path / "disk") as disk:
        read_only(disk)
        for out in (disk / "runs" / "a", disk):
            line = one_line(ended(["finetune", str(model), str(rows), "--out", str(out)], capsys))
            assert line.startswith(f"{out} cannot be written: "), line
            assert line.endswith(". Choose another place."), line
        assert not list(disk.iterdir())
    assert [path.name for path in tmp_path.iterdir()] == ["disk"]


def test_a_new_run_in_a_folder_without_the_right_to_write_is_refused(model: Path, rows: Path, tmp_path: Path) -> None:
    prefix = bound_by_rights()
    (tmp_path / "locked").mkdir(mode=0o555)
    out = tmp_path / "locked" / "a"
    words = [*prefix, *SMIDGEN, "finetune", str(model), str(rows), "--out", str(out)]
    done = subprocess.run(words, capture_output=True, text=True, check=False)
    line = one_line((done.returncode, done.stderr))
    assert line == f"{out} cannot be written: Permission denied. Choose another place."
    assert [path.name for path in tmp_path.rglob("*")] == ["locked"]


def test_a_folder_that_a_disk_is_mounted_on_cannot_become_a_run_but_one_in_it_can(
    model: Path, rows: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """As `docker run --volume` makes them: a run's folder takes the place of the empty one, and that cannot be."""
    with mounted(tmp_path / "disk") as disk:
        line = one_line(ended(["finetune", str(model), str(rows), "--out", str(disk)], capsys))
        assert line.startswith(f"{disk} cannot become the new folder: "), line
        assert line.endswith(f". Give a new folder in it, {disk / 'run'}."), line
        assert not list(disk.iterdir())
        smidgen.finetune(str(model), str(rows), disk / "run", rank=2, max_steps=1, compute_dtype="float32")
        assert [path.name for path in disk.iterdir()] == ["run"]


def test_a_link_to_an_empty_folder_stays_one_and_the_run_is_behind_it(model: Path, rows: Path, tmp_path: Path) -> None:
    (tmp_path / "place").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "place")
    smidgen.finetune(str(model), str(rows), tmp_path / "link", rank=2, max_steps=1, compute_dtype="float32")
    assert (tmp_path / "link").is_symlink() and (tmp_path / "place" / "summary.json").is_file()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["link", "place"]


def test_runs_on_a_disk_that_is_mounted_read_only_can_be_used_but_not_gone_on_with(
    runs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with mounted(tmp_path / "disk") as disk:
        shutil.copytree(runs, disk / "runs")
        read_only(disk)
        before = content(disk)
        code, said = ended(["finetune", "--resume", str(disk / "runs" / "whole")], capsys)
        assert code == 0 and "is finished: nothing to do" in said, said
        assert smidgen.load(disk / "runs" / "whole").generate("say red 0", max_new_tokens=4).new_tokens <= 4
        line = one_line(ended(["finetune", "--resume", str(disk / "runs" / "cut")], capsys))
        assert line.startswith(f"{disk / 'runs' / 'cut'} cannot be written: "), line
        assert line.endswith(". Make it writable, or go on with a copy of it."), line
        line = one_line(ended(["report", str(disk / "runs" / "cut")], capsys))
        assert line.startswith(f"{disk / 'runs' / 'cut' / 'report.html'} cannot be written: "), line
        assert content(disk) == before
    shutil.copytree(runs / "cut", tmp_path / "copy")
    assert smidgen.resume(tmp_path / "copy").summary["steps"] == 2


def test_a_run_that_loses_the_right_to_write_keeps_its_last_checkpoint(model: Path, rows: Path, tmp_path: Path) -> None:
    prefix = bound_by_rights()
    words = ["finetune", str(model), str(rows), "--out", "run", "--epochs", "500", "--save-interval", "1"]
    process = subprocess.Popen([*prefix, *SMIDGEN, *words], cwd=tmp_path, stderr=subprocess.PIPE, text=True)
    checkpoints = tmp_path / "run" / "checkpoints"
    while process.poll() is None and not list(checkpoints.glob("step-*")):
        time.sleep(0.05)
    checkpoints.chmod(0o555)
    try:
        _, errors = process.communicate(timeout=120)
    finally:
        checkpoints.chmod(0o755)
    assert process.returncode == 2, errors
    assert re.search(r"error: run/checkpoints\S* cannot be written: Permission denied\.$", errors), errors
    assert "Traceback" not in errors
    assert smidgen.load(tmp_path / "run").model is not None, "the last checkpoint is whole"
