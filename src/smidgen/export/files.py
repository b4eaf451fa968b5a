"""Files and folders that appear whole or not at all.

Everything is written into a staging folder beside its place, each file is flushed to the disk, and one rename makes it
visible: a crash, a full disk or Ctrl-C leaves what was there before. Reasons and order: SQLite's and ALICE's findings
(OSDI 2014) on what a file system may reorder.
"""

import errno
import json
import os
import re
import shutil
import tempfile
import uuid
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from safetensors import SafetensorError

from smidgen.errors import RunError, first_line

__all__ = [
    "check_new",
    "check_vacant",
    "check_writable",
    "disk_errors",
    "folder_bytes",
    "new_file",
    "new_folder",
    "read_object",
    "replace_file",
    "write_json",
]

_FULL = (errno.ENOSPC, errno.EDQUOT)


def read_object(path: Path, cure: str = "") -> dict[str, Any]:
    """What a JSON file of a run or adapter holds. Raises RunError; FileNotFoundError if it is not there."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise
    except (OSError, ValueError, RecursionError) as error:
        raise RunError(f"{path} cannot be read ({first_line(error)})", cure=cure) from error
    if not isinstance(content, dict):
        raise RunError(f"{path} is not a JSON object", found=type(content).__name__, cure=cure)
    return content


def check_vacant(path: Path, cure: str = "choose another folder, or remove this one first") -> None:
    """Raise RunError unless `path` is free to become a folder: nothing there, or an empty folder."""
    if path.exists() and not (path.is_dir() and not any(path.iterdir())):
        raise RunError(f"{path} holds something already", expected="a new or empty folder", cure=cure)


def check_writable(path: Path) -> None:
    """Raise RunError unless `path` can be made, which a folder in the nearest one that exists tells; none is left. An
    empty folder at `path` must let itself be renamed, which one that a disk is mounted on does not.
    """
    place = path.resolve()
    parent = next(parent for parent in place.parents if parent.exists())
    if not parent.is_dir():
        raise RunError(f"{path} cannot be made: {parent} is a file", cure="choose another folder")
    try:  # rights alone do not tell: root has all of them on a disk that is mounted read-only
        trial = Path(tempfile.mkdtemp(prefix=".tmp-", dir=parent))
        trial.rmdir()
        if place.is_dir():
            place.rename(trial)
            trial.rename(place)
    except OSError as error:
        if error.errno in _FULL:
            raise _full_disk(path) from error
        if place.is_dir() and os.access(place, os.W_OK):
            cure = f"give a new folder in it, {path / 'run'}"
            raise RunError(f"{path} cannot become the new folder: {error.strerror}", cure=cure) from error
        raise RunError(f"{path} cannot be written: {error.strerror}", cure="choose another place") from error


@contextmanager
def new_folder(path: Path) -> Iterator[Path]:
    """Yields a staging folder; when the block ends without an error it becomes `path`.

    Raises RunError when `path` holds something already or the disk is full; the staging folder is removed on any error.
    """
    check_vacant(path)
    place = path.resolve()  # a link stays one
    staging = place.parent / f".tmp-{place.name}-{uuid.uuid4().hex[:8]}"
    try:
        with disk_errors(path):
            if place.is_dir():
                place.rmdir()
            staging.mkdir(parents=True)
            yield staging
            for file in [*staging.rglob("*")]:
                if file.is_file():
                    _flush(file)
            _flush(staging)
            staging.rename(place)
            _flush(place.parent)
    finally:
        shutil.rmtree(staging, ignore_errors=True)


def check_new(path: Path) -> None:
    """Raise RunError if there is anything at `path`."""
    if path.exists():
        raise RunError(f"{path} exists already", cure="choose another name, or remove it first")


@contextmanager
def new_file(path: Path) -> Iterator[Path]:
    """As new_folder, for one file: yields a staging path to be written."""
    check_new(path)
    staging = path.parent / f".tmp-{uuid.uuid4().hex[:8]}-{path.name}"
    try:
        with disk_errors(path):
            path.parent.mkdir(parents=True, exist_ok=True)
            yield staging
            _flush(staging)
            staging.rename(path)
            _flush(path.parent)
    finally:
        _discard(staging)


def replace_file(path: Path, content: str) -> None:
    """Write a text file whole or not at all, replacing an older one."""
    staging = path.parent / f".tmp-{path.name}-{uuid.uuid4().hex[:8]}"
    try:
        with disk_errors(path):
            staging.write_text(content, encoding="utf-8")
            _flush(staging)
            staging.replace(path)
            _flush(path.parent)
    finally:
        _discard(staging)


def write_json(path: Path, content: Any) -> None:
    """One JSON document, readable, whole or not at all."""
    replace_file(path, json.dumps(content, indent=2, ensure_ascii=False) + "\n")


def folder_bytes(path: Path) -> int:
    """Bytes of all files below `path`."""
    return sum(file.stat().st_size for file in path.rglob("*") if file.is_file())


@contextmanager
def disk_errors(path: Path) -> Iterator[None]:
    """Errors of the disk as one line; safetensors and tokenizers report them in words, not in an errno."""
    try:
        yield
    except OSError as error:
        if error.errno in _FULL:
            raise _full_disk(path) from error
        raise RunError(f"{path} cannot be written: {error.strerror or error}") from error
    except Exception as error:  # tokenizers raises the bare class
        told = re.search(r"\(os error (\d+)\)", str(error))
        if told and int(told[1]) in _FULL:
            raise _full_disk(path) from error
        if told or isinstance(error, SafetensorError):
            raise RunError(f"{path} cannot be written: {error}") from error
        raise


def _full_disk(path: Path) -> RunError:
    free = shutil.disk_usage(next(parent for parent in [path, *path.parents] if parent.exists())).free
    return RunError(f"{path}: the disk is full", found=f"{free:,} bytes free", cure="free some space and try again")


def _discard(staging: Path) -> None:
    with suppress(OSError):  # where nothing can be written that has been said, and there is no file
        staging.unlink()


def _flush(path: Path) -> None:
    if os.name == "nt" and path.is_dir():
        return  # folders cannot be opened there
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
