"""What a process may take: the cgroups that it lies in, as files of a made tree and as a real group."""

import os
import subprocess
import sys
from contextlib import ExitStack
from pathlib import Path

import pytest

from smidgen.model.cgroups import cgroup_limits, memory_group


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
    """And keeps its peak, page cache included."""
    code = (
        "import os, sys; open(sys.argv[1], 'w').write(str(os.getpid()));"
        "from smidgen.model.device import memory_limit_bytes; print(memory_limit_bytes())"
    )
    with ExitStack() as stack:
        try:
            group = stack.enter_context(memory_group("smidgen-test", 3 << 30))
        except OSError:
            pytest.skip("no memory cgroup can be made here")
        words = [sys.executable, "-c", code, str(group.path / "cgroup.procs")]
        done = subprocess.run(words, capture_output=True, text=True, check=True)
        assert int(done.stdout) == 3 << 30
        assert 0 < (group.peak_bytes or 0) <= 3 << 30
    assert not group.path.exists()


def test_a_group_of_version_2_has_its_files(tmp_path: Path) -> None:
    """In a made tree: the controller is switched on for the groups below, the limit is set."""
    (tmp_path / "cgroup.subtree_control").write_text("cpu\n")
    with memory_group("job", 4096, tmp_path) as group:
        assert (tmp_path / "cgroup.subtree_control").read_text() == "+memory"
        assert (group.path / "memory.max").read_text() == "4096"
        assert group.peak_bytes is None  # an older kernel
        (group.path / "memory.peak").write_text("77\n")
        assert group.peak_bytes == 77
        (group.path / "memory.current").write_text("50")
        (group.path / "memory.stat").write_text("inactive_file 20\n")
        (tmp_path / "self").write_text(f"0::/{group.path.name}\n")
        assert cgroup_limits(tmp_path / "self", tmp_path) == [(4096, 30)]


def test_a_group_that_a_killed_process_left_goes_and_its_number_may_come_again(tmp_path: Path) -> None:
    (tmp_path / "cgroup.subtree_control").write_text("memory\n")
    dead = subprocess.Popen([sys.executable, "-c", ""])
    dead.wait()
    left, alive = tmp_path / f"job-{dead.pid}-0123", tmp_path / f"job-{os.getpid()}-0123"
    left.mkdir()
    alive.mkdir()
    with memory_group("job", 4096, tmp_path) as group:
        assert not left.exists() and alive.exists() and group.path.name.startswith(f"job-{os.getpid()}-")


def test_without_a_tree_no_group_can_be_made(tmp_path: Path) -> None:
    with pytest.raises(OSError, match=r"cgroup\.subtree_control"), memory_group("job", 4096, tmp_path):
        pass
