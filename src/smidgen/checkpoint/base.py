"""What every model file looks like to the rest of the package: named tensors that lie in mapped files.

A reader (safetensors.py, gguf.py) checks the whole header of its file when it is opened and then offers one
`Checkpoint`. The bytes stay on disk until they are read: files are mapped private and copy-on-write, so that a tensor
of a stored type is a view of the file, costs no memory before it is used, and can never write back to the file.
"""

import hashlib
import json
import math
import mmap
import os
import stat
import sys
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from smidgen.errors import ModelError, RunError

if TYPE_CHECKING:
    import torch

__all__ = ["DTYPES", "PICKLES", "Checkpoint", "MappedFile", "TensorInfo", "changed_file", "fingerprint_of", "place_in"]

# Stored type -> (torch's name, bytes of one element). The names are those of the safetensors format.
DTYPES: Mapping[str, tuple[str, int]] = {
    "BOOL": ("bool", 1),
    "U8": ("uint8", 1),
    "I8": ("int8", 1),
    "F8_E4M3": ("float8_e4m3fn", 1),
    "F8_E5M2": ("float8_e5m2", 1),
    "F8_E8M0": ("float8_e8m0fnu", 1),
    "U16": ("uint16", 2),
    "I16": ("int16", 2),
    "F16": ("float16", 2),
    "BF16": ("bfloat16", 2),
    "U32": ("uint32", 4),
    "I32": ("int32", 4),
    "F32": ("float32", 4),
    "U64": ("uint64", 8),
    "I64": ("int64", 8),
    "F64": ("float64", 8),
    "C64": ("complex64", 8),
}

PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl")
_FINGERPRINT_BYTES = 4096  # of each end of a tensor
_MAP_NORESERVE = 0x4000  # Linux; Python names it from 3.13 on


@dataclass(frozen=True)
class TensorInfo:
    """Where a tensor lies: `nbytes` bytes at `offset` of `file`; shape row-major, as torch has it."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    nbytes: int
    file: Path
    offset: int


class Checkpoint(Protocol):
    """A model on disk. Opening one reads headers only; every tensor is checked to lie inside its file."""

    @property
    def path(self) -> Path:
        """The folder, or the .gguf file."""
        ...

    @property
    def format(self) -> str:
        """'safetensors' or 'gguf'."""
        ...

    @property
    def config(self) -> dict[str, Any]:
        """What config.json holds; for GGUF the same keys, made from its metadata."""
        ...

    @property
    def files(self) -> "Collection[MappedFile]":
        """All that it is read from."""
        ...

    @property
    def tensors(self) -> Mapping[str, TensorInfo]:
        """Name -> place, by the names that Hugging Face models use, for GGUF too."""
        ...

    def read(self, name: str) -> "torch.Tensor":
        """The tensor: a view of the file where its stored type is one of torch's, else decoded to float32."""
        ...

    def place_of(self, tensor: "torch.Tensor") -> tuple[Path, int] | None:
        """(file, offset in bytes) of a contiguous tensor that is a view of the files; None for any other."""
        ...

    def release(self, tensor: "torch.Tensor | None" = None) -> None:
        """Give the memory of pages read so far back to the system; they are read again when they are touched.

        tensor: only those of this one, where it is a view of the files.
        """
        ...

    def check_unchanged(self) -> None:
        """Raise RunError if a file was shortened or written to since it was opened: its pages are no longer its own."""
        ...

    def fingerprint(self) -> str:
        """'sha256:...', the same for every copy of the same weights, however they are split into files."""
        ...


class MappedFile:
    """A regular file, mapped. `data` supports slicing and the buffer protocol; len(data) is the file's size."""

    def __init__(self, path: Path) -> None:
        self.path = path
        try:
            # A FIFO would block in open(), a device would never end: look before opening.
            status = os.stat(path)
            if not stat.S_ISREG(status.st_mode):
                raise ModelError(f"{path} is not a regular file")
            if status.st_size == 0:
                raise ModelError(f"{path} is empty", cure="download or copy it again")
            with open(path, "rb") as file:
                self.data = _map_private(file.fileno())
                self._opened = os.fstat(file.fileno())
        except (OSError, ValueError) as error:
            raise ModelError(f"{path} cannot be read: {error}") from error

    def __len__(self) -> int:
        return len(self.data)

    def release(self, tensor: "torch.Tensor | None" = None) -> None:
        """Drop the pages that have been read from this process's memory; nothing is ever written to them.

        tensor: see Checkpoint.release.
        """
        start = 0 if tensor is None else self.offset_of(tensor)
        if start is not None and hasattr(mmap, "MADV_DONTNEED"):
            end = len(self) if tensor is None else start + tensor.nbytes
            start -= start % mmap.PAGESIZE
            self.data.madvise(mmap.MADV_DONTNEED, start, end - start)

    def check_unchanged(self) -> None:
        """See Checkpoint.check_unchanged. A file that was removed or replaced leaves what is mapped as it was."""
        try:
            now = os.stat(self.path)
        except OSError:
            return
        then = self._opened
        if (now.st_dev, now.st_ino) != (then.st_dev, then.st_ino):
            return
        if (now.st_size, now.st_mtime_ns) != (then.st_size, then.st_mtime_ns):
            raise changed_file(self.path, "it was shortened" if now.st_size < then.st_size else "it was written to")

    @property
    def address(self) -> int:
        """Where it begins in this process's memory."""
        import torch

        return torch.frombuffer(self.data, dtype=torch.uint8).data_ptr()

    def offset_of(self, tensor: "torch.Tensor") -> int | None:
        """Where in the file a contiguous CPU tensor lies that is a view of it; None for any other."""
        offset = tensor.data_ptr() - self.address
        nbytes = tensor.numel() * tensor.element_size()
        return offset if 0 <= offset <= len(self) - nbytes and tensor.is_contiguous() else None

    def tensor(self, dtype: str, shape: tuple[int, ...], offset: int) -> "torch.Tensor":
        """A view of the file's bytes as a tensor of a stored type of DTYPES."""
        import torch

        torch_dtype = getattr(torch, DTYPES[dtype][0], None)
        if torch_dtype is None:
            raise ModelError(f"{self.path}: type {dtype} is unknown to torch {torch.__version__}", cure="update torch")
        count = math.prod(shape)
        if count == 0:
            return torch.empty(shape, dtype=torch_dtype)
        if offset % DTYPES[dtype][1]:  # legal in a file, but not for every kernel: this one tensor is copied
            raw = torch.frombuffer(self.data, dtype=torch.uint8, count=count * DTYPES[dtype][1], offset=offset)
            return raw.clone().view(torch_dtype).reshape(shape)
        return torch.frombuffer(self.data, dtype=torch_dtype, count=count, offset=offset).reshape(shape)


def changed_file(path: Path, how: str) -> RunError:
    """The error for a model file that is not what it was when it was opened."""
    return RunError(
        f"{path} changed while it was in use: {how}",
        cure="put the file back, then go on from the last checkpoint with --resume",
    )


def _map_private(fileno: int) -> mmap.mmap:
    """Copy-on-write: torch gets a writable buffer, the file stays as it is.

    Without NORESERVE Linux would count the whole file as memory that may be needed, and refuse a file larger than RAM.
    """
    if sys.platform == "linux":
        flags = mmap.MAP_PRIVATE | _MAP_NORESERVE
        return mmap.mmap(fileno, 0, flags=flags, prot=mmap.PROT_READ | mmap.PROT_WRITE)
    return mmap.mmap(fileno, 0, access=mmap.ACCESS_COPY)


def place_in(files: Iterable[MappedFile], tensor: "torch.Tensor") -> tuple[Path, int] | None:
    """See Checkpoint.place_of."""
    if tensor.device.type != "cpu":
        return None
    places = ((file.path, file.offset_of(tensor)) for file in files)
    return next(((path, offset) for path, offset in places if offset is not None), None)


def fingerprint_of(identity: Any, tensors: Iterable[TensorInfo], files: Mapping[Path, MappedFile]) -> str:
    """sha256 over `identity` (JSON) and, by name, every tensor's type, shape and the bytes at both of its ends.

    Two ends of 4 KiB tell fine-tunes of one model apart in milliseconds; they do not prove that no byte differs.
    """
    digest = hashlib.sha256(json.dumps(identity, sort_keys=True, default=str).encode())
    for info in sorted(tensors, key=lambda info: info.name):
        digest.update(json.dumps([info.name, info.dtype, info.shape]).encode())
        data = files[info.file].data
        end = info.offset + info.nbytes
        digest.update(data[info.offset : min(info.offset + _FINGERPRINT_BYTES, end)])
        digest.update(data[max(end - _FINGERPRINT_BYTES, info.offset) : end])
    for file in files.values():
        file.release()  # the ends of every tensor, and the pages around them
    return f"sha256:{digest.hexdigest()}"
