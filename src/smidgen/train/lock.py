"""One process at a time in a run folder.

The lock is the kernel's (flock on RUN/lock), so it ends with the process that holds it, however that ends; the file's
text only says who that is. It is never removed: a process that waits for a removed file would lock nothing.
"""

import errno
import os
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from smidgen.errors import RunError
from smidgen.events import Report, Warned, silent

__all__ = ["LOCK", "check_unlocked", "is_abandoned", "locked"]

LOCK = "lock"


@contextmanager
def locked(folder: Path, report: Report = silent) -> Iterator[None]:
    """Hold the folder's lock. It stays with the folder where that is renamed.

    Raises RunError, naming the process, where another one holds it; one that holds it twice is another one too, and
    where nothing can be written. Warns where the file system has no locks.
    """
    try:
        descriptor = os.open(folder / LOCK, os.O_RDWR | os.O_CREAT, 0o644)
    except OSError as error:
        cure = "make it writable, or go on with a copy of it"
        raise RunError(f"{folder} cannot be written: {error.strerror}", cure=cure) from error
    try:
        try:
            _take(descriptor, folder)
        except OSError as error:
            report(Warned(f"{folder} cannot be locked ({error.strerror}): start no second run in it"))
        _say(descriptor, f"process {os.getpid()} since {time.strftime('%Y-%m-%d %H:%M:%S')}")
        yield
        _say(descriptor, "")
    finally:
        os.close(descriptor)


def check_unlocked(folder: Path) -> None:
    """Raise RunError if a process works in this run folder; nothing is raised, or made, where there is none."""
    try:
        descriptor = os.open(folder / LOCK, os.O_RDONLY)
    except OSError:
        return
    try:
        _take(descriptor, folder)
    except OSError:
        return  # no locks here
    finally:
        os.close(descriptor)


def is_abandoned(folder: Path) -> bool:
    """Whether the folder was locked by a process that is gone. False where that cannot be told."""
    try:
        descriptor = os.open(folder / LOCK, os.O_RDONLY)
    except OSError:
        return False
    try:
        _take(descriptor, folder)
    except (OSError, RunError):
        return False
    finally:
        os.close(descriptor)
    return True


def _say(descriptor: int, who: str) -> None:
    with suppress(OSError):  # the lock holds all the same
        os.ftruncate(descriptor, 0)
        os.pwrite(descriptor, who.encode(), 0)


def _take(descriptor: int, folder: Path) -> None:
    """Raises RunError where another process has it, OSError where the file system has no locks."""
    try:
        import fcntl
    except ImportError:
        raise OSError(errno.ENOTSUP, "this system has no flock") from None
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        who = (folder / LOCK).read_text(encoding="utf-8", errors="replace").strip() or "another process"
        raise RunError(f"{folder} is in use by {who}", cure="wait until it ends, or stop it with Ctrl-C") from None
