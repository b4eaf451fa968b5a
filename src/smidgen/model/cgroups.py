"""Memory cgroups, versions 1 and 2: what this process may have, and groups of a size of their own.

Version 1 has a tree for memory alone below /sys/fs/cgroup/memory, version 2 one tree for everything.
"""

import os
import uuid
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

__all__ = ["MemoryGroup", "cgroup_limits", "memory_group"]

_ROOT = Path("/sys/fs/cgroup")


@dataclass(frozen=True)
class _Version:
    """Names of files. tree: below the root. unused: key of memory.stat, page cache that has not been used lately.
    swap: what is to stand in which file so that nothing is swapped.
    """

    tree: str
    limit: str
    used: str
    unused: str
    peak: str
    swap: tuple[str, str]


_V1 = _Version(
    "memory", "memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file", "memory.max_usage_in_bytes",
    ("memory.swappiness", "0"),
)  # fmt: skip
_V2 = _Version("", "memory.max", "memory.current", "inactive_file", "memory.peak", ("memory.swap.max", "0"))


@dataclass(frozen=True)
class MemoryGroup:
    """A group that was made. A process enters when its id is written to `path / "cgroup.procs"`."""

    path: Path
    version: _Version
    limit_bytes: int

    @property
    def peak_bytes(self) -> int | None:
        """The largest use so far, page cache included; None where the kernel does not tell (version 2 before 5.19)."""
        try:
            return int((self.path / self.version.peak).read_text())
        except (OSError, ValueError):
            return None


@contextmanager
def memory_group(name: str, limit_bytes: int, root: Path = _ROOT) -> Iterator[MemoryGroup]:
    """A group of this size, without swap, that is gone afterwards. Those of this name that killed processes left behind
    go first. Raises OSError where none can be made.
    """
    version = _V1 if (root / _V1.tree).is_dir() else _V2
    top = root / version.tree
    if version is _V2 and "memory" not in (top / "cgroup.subtree_control").read_text().split():
        (top / "cgroup.subtree_control").write_text("+memory")
    for left in top.glob(f"{name}-*-*"):
        if not Path("/proc", left.name.split("-")[-2]).exists():  # the process that made it
            with suppress(OSError):
                left.rmdir()
    group = top / f"{name}-{os.getpid()}-{uuid.uuid4().hex[:8]}"  # a number comes again, to another process
    group.mkdir()
    try:
        (group / version.limit).write_text(str(limit_bytes))
        file, content = version.swap
        if version is _V1 or (group / file).exists():  # not in a kernel that knows no swap
            (group / file).write_text(content)
        yield MemoryGroup(group, version, limit_bytes)
    finally:
        with suppress(OSError):
            group.rmdir()


def cgroup_limits(membership: Path = Path("/proc/self/cgroup"), root: Path = _ROOT) -> list[tuple[int, int]]:
    """(limit, bytes used that cannot be given up) of this process's memory cgroup and of each that it lies in.

    In a container the process's own path is often not mounted; the root then is its group. Page cache that has not been
    used lately (inactive_file of memory.stat) counts as free.
    """
    try:
        lines = [line.split(":", 2) for line in membership.read_text().splitlines()]
    except OSError:
        return []
    found = []
    for _, controllers, path in (line for line in lines if len(line) == 3):
        if controllers and "memory" not in controllers.split(","):
            continue
        version = _V1 if controllers else _V2
        top = root / version.tree
        group = top / path.strip("/")
        for folder in dict.fromkeys([group, *group.parents]):
            if folder != top and top not in folder.parents:
                continue
            try:
                limit, used = (int((folder / name).read_text()) for name in (version.limit, version.used))
                statistics = dict(line.split() for line in (folder / "memory.stat").read_text().splitlines())
                found.append((limit, used - int(statistics.get(version.unused, 0))))
            except (OSError, ValueError):  # no such group, or "max"
                continue
    return found
