"""Where a measurement puts its weights: a folder that goes with it, or with the next one if it was killed."""

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory

from smidgen.checkpoint.hub import cache_folder
from smidgen.export.files import disk_errors
from smidgen.train.lock import is_abandoned, locked

__all__ = ["passing_folder"]


@contextmanager
def passing_folder(name: str) -> Iterator[Path]:
    """A new folder in the cache until the block ends: a disk; the usual place for temporary files may be memory.

    Those that processes of before left behind go first.
    """
    parent = cache_folder() / "bench"
    with disk_errors(parent):
        parent.mkdir(parents=True, exist_ok=True)
        for left in parent.glob(f"{name}-*"):
            if is_abandoned(left):
                shutil.rmtree(left, ignore_errors=True)
        place = TemporaryDirectory(prefix=f"{name}-", dir=parent)
    with place, locked(Path(place.name)):
        yield Path(place.name)
