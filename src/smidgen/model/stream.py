"""Decoder layers that come and go: frozen weights that are read from disk for each use instead of kept in memory.

A base is read-only, so it need not be in memory. The large buffers of a streamed layer lie in a file: where the model
file holds them as they are used (GGUF blocks, bitsandbytes' folders), in that file; otherwise in an unnamed temporary
file, which is written while the model is loaded and is gone when the stream is closed or dropped. Two slots of memory,
each as large as the largest layer, take turns: while the computation uses one, a thread reads the layer that comes next
into the other, forwards and then backwards, so that the turn at either end costs no read. Pages are dropped from the
page cache behind the reader: memory is what was planned, and a truncated file is an error rather than a SIGBUS.

A matrix asks for its layer when it is used (FrozenMatrix.streamed), so nothing above it knows of streaming. No buffer
of a streamed layer may be kept beyond the operation that uses it; a layer that has gone is on the meta device, where
any use fails.
"""

import os
import re
import tempfile
import time
import weakref
from collections.abc import Collection, Iterable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from math import ceil
from pathlib import Path

import torch

from smidgen.checkpoint.base import Checkpoint, changed_file
from smidgen.errors import RunError
from smidgen.quant.matrix import FrozenMatrix

__all__ = ["LayerStream", "layer_of"]

_ALIGNMENT = 64  # of each buffer in a slot, for the kernels' loads
_SMALL = 1 << 16  # bytes; smaller buffers stay in memory
_READ = 1 << 23  # bytes read at once, before their pages are dropped


def layer_of(name: str) -> int | None:
    """'model.layers.7.mlp.up_proj' -> 7; None for what lies outside the decoder layers."""
    found = re.search(r"\.(\d+)\.", name)
    return int(found[1]) if found else None


@dataclass(frozen=True)
class _File:
    """An open file, with what it was when it was opened."""

    path: Path
    descriptor: int
    size: int
    modified_ns: int

    @classmethod
    def open(cls, path: Path) -> "_File":
        descriptor = os.open(path, os.O_RDONLY)
        status = os.fstat(descriptor)
        return cls(path, descriptor, status.st_size, status.st_mtime_ns)

    def read_into(self, target: memoryview, offset: int) -> None:
        """Fill `target` from `offset` on; pages are dropped behind. Raises RunError if the file is not what it was."""
        done = 0
        while done < len(target):
            part = target[done : done + _READ]
            try:
                count = os.preadv(self.descriptor, [part], offset + done)
            except OSError as error:
                raise RunError(f"{self.path} cannot be read: {error}", cure="look after the disk") from error
            if count == 0:
                raise changed_file(self.path, "it ends too early")
            os.posix_fadvise(self.descriptor, offset + done, count, os.POSIX_FADV_DONTNEED)
            done += count

    def check(self) -> None:
        """Raises RunError if the file was written to since it was opened."""
        status = os.fstat(self.descriptor)
        if self.modified_ns and (status.st_size, status.st_mtime_ns) != (self.size, self.modified_ns):
            raise changed_file(self.path, "it was written to")


@dataclass(frozen=True)
class _Piece:
    """One buffer of a matrix: where it lies in a file, and where in a slot."""

    matrix: FrozenMatrix
    name: str
    file: _File
    offset: int
    place: int
    gone: torch.Tensor  # on the meta device

    @property
    def nbytes(self) -> int:
        return self.gone.numel() * self.gone.element_size()


@dataclass(eq=False)
class _Layer:
    """A streamed layer; what its matrices ask when they are used."""

    stream: "LayerStream"
    index: int
    pieces: list[_Piece] = field(default_factory=list)
    nbytes: int = 0

    def acquire(self) -> None:
        self.stream.acquire(self)


@dataclass(eq=False)
class _Slot:
    """Memory of one layer. ready: of the read in progress or done."""

    storage: torch.Tensor
    layer: _Layer | None = None
    ready: "Future[None] | None" = None


class LayerStream:
    """Streams the decoder layers `layers` (indices) of one model: `take` each matrix while loading, then `start`.

    folder: for the temporary file; a disk with room for what the model file does not hold as it is used. read_bytes and
    wait_s count up: bytes read from disk, and the seconds that the computation waited for them. Its files are closed
    with it, or when nothing refers to it any more.
    """

    def __init__(self, layers: Collection[int], checkpoint: Checkpoint, folder: Path) -> None:
        self.layers = frozenset(layers)
        self.read_bytes, self.wait_s = 0, 0.0
        self._checkpoint, self._folder = checkpoint, folder
        self._by_index: dict[int, _Layer] = {}
        self._files: dict[Path, _File] = {}
        self._spill: _File | None = None
        self._spilled = 0
        self._descriptors: list[int] = []
        self._close_files = weakref.finalize(self, _close, self._descriptors)
        self._slots: list[_Slot] = []
        self._reader = ThreadPoolExecutor(1, thread_name_prefix="smidgen-layers")
        self._order: list[_Layer] = []
        self._at = -1  # position in _order of the layer in use
        self._wraps = False  # whether the first layer followed the last one the last time, as it does without gradients

    def take(self, index: int, matrix: FrozenMatrix) -> None:
        """Move the large buffers of a matrix of layer `index` to disk, if they are not in a file already."""
        layer = self._by_index.setdefault(index, _Layer(self, index))
        for name, buffer in list(matrix.named_buffers(recurse=False)):
            nbytes = buffer.numel() * buffer.element_size()
            if nbytes < _SMALL:
                continue
            where = self._checkpoint.place_of(buffer)
            file, offset = (self._open(where[0]), where[1]) if where else self._write(buffer)
            gone = torch.empty(buffer.shape, dtype=buffer.dtype, device="meta")
            layer.pieces.append(_Piece(matrix, name, file, offset, layer.nbytes, gone))
            layer.nbytes += ceil(nbytes / _ALIGNMENT) * _ALIGNMENT
            matrix._buffers[name] = gone
            matrix.streamed = layer

    def _open(self, path: Path) -> _File:
        if path not in self._files:
            self._files[path] = _File.open(path)
            self._descriptors.append(self._files[path].descriptor)
        return self._files[path]

    def _write(self, buffer: torch.Tensor) -> tuple[_File, int]:
        if self._spill is None:
            self._folder.mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryFile(dir=self._folder) as file:
                self._spill = _File(self._folder / "temporary file", os.dup(file.fileno()), 0, 0)
                self._descriptors.append(self._spill.descriptor)
        raw = buffer.contiguous().view(-1).view(torch.uint8).numpy().data
        start = self._spilled
        try:
            while raw:
                written = os.pwrite(self._spill.descriptor, raw[: 1 << 26], self._spilled)
                self._spilled += written
                raw = raw[written:]
            os.fdatasync(self._spill.descriptor)  # only clean pages can be dropped
        except OSError as error:
            raise RunError(
                f"{self._folder}: the packed weights cannot be put down there ({error.strerror})",
                cure="make room on that disk, or set SMIDGEN_CACHE to a folder on another one",
            ) from error
        os.posix_fadvise(self._spill.descriptor, start, self._spilled - start, os.POSIX_FADV_DONTNEED)
        return self._spill, start

    def start(self) -> None:
        """All matrices have been taken: get the slots' memory."""
        self._order = [self._by_index[index] for index in sorted(self._by_index) if self._by_index[index].pieces]
        largest = max((layer.nbytes for layer in self._order), default=0)
        self._slots = [_Slot(torch.empty(largest, dtype=torch.uint8)) for _ in range(min(2, len(self._order)))]

    def acquire(self, layer: _Layer) -> None:
        """Wait until the layer's buffers are in memory, and begin to read the layer that comes next."""
        if self._at >= 0 and self._order[self._at] is layer:
            return
        slot = self._slot_of(layer) or self._begin(layer)
        assert slot.ready is not None
        started = time.perf_counter()
        try:
            slot.ready.result()
        except BaseException:
            slot.layer = None
            raise
        self.wait_s += time.perf_counter() - started
        for piece in layer.pieces:
            view = slot.storage[piece.place : piece.place + piece.nbytes].view(piece.gone.dtype)
            piece.matrix._buffers[piece.name] = view.view(piece.gone.shape)
        before, self._at = self._at, self._order.index(layer)
        following = self._following(before)
        if following is not None and self._slot_of(following) is None:
            self._begin(following)

    def _following(self, before: int) -> _Layer | None:
        """The layer that will be wanted next: on in the same direction; at an end, back where it came from."""
        last = len(self._order) - 1
        if before == last and self._at in (0, last - 1):
            self._wraps = self._at == 0
        position = self._at - 1 if self._at == before - 1 else self._at + 1
        if position > last:
            return self._order[0] if self._wraps else None
        return self._order[position] if position >= 0 else None

    def _slot_of(self, layer: _Layer) -> _Slot | None:
        return next((slot for slot in self._slots if slot.layer is layer), None)

    def _begin(self, layer: _Layer) -> _Slot:
        """Start to read a layer into the slot that is not in use."""
        in_use = self._order[self._at] if self._at >= 0 else None
        slot = next(slot for slot in self._slots if slot.layer is None or slot.layer is not in_use)
        if slot.ready is not None:
            slot.ready.exception()  # wait: two reads never fill one slot
        if slot.layer is not None:
            for piece in slot.layer.pieces:
                piece.matrix._buffers[piece.name] = piece.gone
        slot.layer = layer
        slot.ready = self._reader.submit(self._read, layer, slot.storage)
        return slot

    def _read(self, layer: _Layer, storage: torch.Tensor) -> None:
        raw = storage.numpy().data
        for piece in layer.pieces:
            piece.file.check()
            piece.file.read_into(raw[piece.place : piece.place + piece.nbytes], piece.offset)
            self.read_bytes += piece.nbytes

    def close(self) -> None:
        """End the reader and close the files; the layers cannot be used any more. Safe to call twice."""
        self._reader.shutdown(wait=True, cancel_futures=True)
        self._close_files()


def _close(descriptors: Iterable[int]) -> None:
    for descriptor in descriptors:
        os.close(descriptor)
