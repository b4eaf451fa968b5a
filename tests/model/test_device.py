"""What a process may take: the cgroups that it lies in, as files of a made tree and as a real group."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from smidgen.model.device import cgroup_limits


def _group(folder: Path, version: int, limit: str, used: int, inactive: int) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    names = ("memory.max", "memory.current") if version == 2 else ("memory.limit_in_bytes", "memory.usage_in_bytes")
    (folder / names[0]).write_text(f"{limit}\n")
    (folder / names[1]).write_text(f"{used}\n")
    key = "inactive_file" if version == 2 else "total_inactive_file"
    (folder / "memory.stat").write_text(f"anon 5\n{key} {inactive}\nfile 9\n")


def test_every_group_above_the_process_counts(tmp_path: Path) -> None:
    _group(tmp_path / "a.slice" / "job", 2, "4000", 900, 200)
    _group(tmp_path / "a.slice", 2, "3000", 2500, 100)
    _group(tmp_path / "b.slice", 2, "10", 10, 0)  # another's
    (tmp_path / "self").write_text("0::/a.slice/job\n")
    assert cgroup_limits(tmp_path / "self", tmp_path) == [(4000, 700), (3000, 2400)]


def test_no_limit_is_none_and_version_1_has_its_own_tree(tmp_path: Path) -> None:
    _group(tmp_path / "job", 2, "max", 900, 200)
    _group(tmp_path / "memory" / "job", 1, "5000", 1000, 400)
    (tmp_path / "self").write_text("9:cpu,cpuacct:/job\n4:memory:/job\n0::/job\n")
    assert cgroup_limits(tmp_path / "self", tmp_path) == [(5000, 600)]


def test_in_a_container_the_root_is_its_group(tmp_path: Path) -> None:
    _group(tmp_path, 2, "7000", 100, 0)
    (tmp_path / "self").write_text("0::/docker/abc\n")
    assert cgroup_limits(tmp_path / "self", tmp_path) == [(7000, 100)]
    assert cgroup_limits(tmp_path / "nothing", tmp_path) == []


def test_a_real_group_is_found() -> None:
    group = Path("/sys/fs/cgroup/memory") / f"smidgen-test-{os.getpid()}"
    try:
        group.mkdir()
        (group / "memory.limit_in_bytes").write_text(str(3 << 30))
    except OSError:
        pytest.skip("no memory cgroup (version 1) can be made here")
    code = (
        f"import os; open('{group}/cgroup.procs', 'w').write(str(os.getpid()));"
        "from smidgen.model.device import memory_limit_bytes; print(memory_limit_bytes())"
    )
    try:
        done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    finally:
        group.rmdir()
    assert int(done.stdout) == 3 << 30
