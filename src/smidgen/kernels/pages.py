"""Memory of tensors that a training step makes and lets go again, whose pages stay with the process.

glibc asks the system for each large tensor and gives it back at once, so that every tensor of every layer costs a page
fault and a cleared page for each 4 KiB: a tenth of a step. A `ReusedPages` is a range of addresses in which each tensor
takes the lowest place that it fits into, and what was touched once stays until something else needs it. The pages that
stay are never more than what was in use at once so far: beyond that, free ones go back to the system first. So the
peak is that of memory given back at once, whatever holes the range has.
"""

import math
import mmap
import os
import sys
import threading
import weakref
from bisect import bisect_left
from collections import deque
from typing import Any

import numpy as np
import torch

from smidgen.kernels.sizes import MAPPED_BYTES

__all__ = ["ReusedPages", "converted", "empty"]

_PAGE = mmap.PAGESIZE
_RESERVED = getattr(mmap, "MAP_NORESERVE", 0x4000)  # addresses alone; Python names it from 3.11 on

_entered: "ReusedPages | None" = None  # of the process: autograd may run a step's backward pass in another thread


class ReusedPages:
    """Inside of `with`, `empty` takes large CPU tensors from here. They outlive both, and may be freed in any thread.

    Where there is no such range (elsewhere than on Linux, under a limit on addresses) tensors come from PyTorch, as
    they do outside; so they do with in_use=False: where PyTorch's own operations make most of a step's tensors, what
    stays here would only come on top of theirs.
    """

    def __init__(self, in_use: bool = True) -> None:
        self._lock = threading.Lock()
        self._freed: deque[tuple[int, int]] = deque()  # a finalizer may run while this thread holds the lock
        self._map = _reserve() if in_use else None
        pages = 0 if self._map is None else len(self._map) // _PAGE
        self._holes = [(0, pages)] if pages else []  # free pages, from - to, ascending
        self._touched = np.zeros(pages, bool)
        self._end = 0  # of what was ever touched
        self._used = self._kept = self._most_used = 0  # pages: of tensors; that are touched; of tensors at most
        self._before: ReusedPages | None = None

    def __enter__(self) -> "ReusedPages":
        global _entered
        self._before, _entered = _entered, self
        return self

    def __exit__(self, *_: object) -> None:
        global _entered
        _entered = self._before

    @property
    def kept_bytes(self) -> int:
        """Of the pages that tensors have here or had."""
        return self._kept * _PAGE

    def give_back(self) -> None:
        """All pages that no tensor has go back to the system."""
        with self._lock:
            self._collect()
            self._drop(self._kept)

    def take(self, nbytes: int) -> memoryview | None:
        """Memory of so many bytes, which is free again when nothing refers to it; None where there is no place."""
        with self._lock:
            self._collect()
            pages = math.ceil(nbytes / _PAGE)
            found = next((at for at, (start, stop) in enumerate(self._holes) if stop - start >= pages), None)
            if found is None or self._map is None:
                return None
            start, stop = self._holes[found]
            self._holes[found : found + 1] = [(start + pages, stop)] if start + pages < stop else []
            touched = self._touched[start : start + pages]
            self._used += pages
            self._most_used = max(self._most_used, self._used)
            self._kept += pages - np.count_nonzero(touched)
            touched[:] = True
            self._end = max(self._end, start + pages)
            self._drop(self._kept - self._most_used)
            memory = memoryview(self._map)[start * _PAGE : start * _PAGE + nbytes]
        weakref.finalize(memory, self._freed.append, (start, start + pages)).atexit = False
        return memory

    def _collect(self) -> None:
        """Make holes of what was freed since."""
        while self._freed:
            start, stop = self._freed.popleft()
            self._used -= stop - start
            at = bisect_left(self._holes, (start, stop))
            first, last = at, at
            if at < len(self._holes) and self._holes[at][0] == stop:
                stop, last = self._holes[at][1], at + 1
            if at and self._holes[at - 1][1] == start:
                start, first = self._holes[at - 1][0], at - 1
            self._holes[first:last] = [(start, stop)]

    def _drop(self, pages: int) -> None:
        """Give so many pages of holes back, as far as there are, the highest first: low ones are needed next."""
        for start, stop in reversed(self._holes):
            if pages <= 0 or self._map is None:
                return
            touched = np.flatnonzero(self._touched[start : min(stop, self._end)])[-pages:]
            if len(touched):
                first, end = start + int(touched[0]), start + int(touched[-1]) + 1
                self._map.madvise(mmap.MADV_DONTNEED, first * _PAGE, (end - first) * _PAGE)
                self._touched[first:end] = False
                self._kept -= len(touched)
                pages -= len(touched)


def _reserve() -> mmap.mmap | None:
    """Addresses for twice the machine's memory, none of which is used yet."""
    if sys.platform != "linux":
        return None
    flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | _RESERVED
    try:
        return mmap.mmap(-1, 2 * os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE"), flags=flags)
    except (OSError, ValueError):
        return None


def empty(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    """torch.empty(shape), from the ReusedPages that was entered, if one was and the tensor is large enough for it."""
    count = math.prod(shape)
    if _entered is not None and device.type == "cpu" and count * dtype.itemsize >= MAPPED_BYTES:
        memory: Any = _entered.take(count * dtype.itemsize)
        if memory is not None:
            # resize_: a view would not be let through by autograd where it is written to
            return torch.frombuffer(memory, dtype=dtype).resize_(shape)
    return torch.empty(shape, dtype=dtype, device=device)


def converted(x: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """x.to(dtype), whose memory `empty` gives where it needs any; contiguous then."""
    return x if x.dtype == dtype else empty(tuple(x.shape), dtype, x.device).copy_(x)
