"""Reads a Hugging Face folder: config.json, and weights in one or more safetensors files.

Layout of a file: u64 n; n bytes of JSON {name: {"dtype", "shape", "data_offsets": [begin, end]}, ...}, where the name
"__metadata__" is no tensor; then the data, without holes, that the offsets count from. The whole header is checked
before the first tensor is read. Shards are found by model.safetensors.index.json, whose names may only mean files of
the folder itself. Pickles (.bin, .pt) are never opened.
"""

import json
import math
import os
from collections.abc import Collection
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeGuard

from smidgen.errors import ModelError
from smidgen.events import Report, Warned, silent

from .base import DTYPES, PICKLES, MappedFile, TensorInfo, fingerprint_of, place_in

if TYPE_CHECKING:
    import torch

__all__ = ["SafetensorsCheckpoint", "read_config", "read_safetensors_header"]

_MAX_HEADER_BYTES = 100_000_000
_MAX_JSON_BYTES = 100_000_000  # config and index
_MAX_DIMENSIONS = 16

_LEGACY = {"quantize_config.json": "gptq", "quant_config.json": "awq"}  # before config.json had a place for it

# What the same weights may differ in without computing anything else: not part of a fingerprint.
_IDLE_KEYS = frozenset(
    {"transformers_version", "torch_dtype", "dtype", "_name_or_path", "architectures", "use_cache", "auto_map",
     "_attn_implementation", "_attn_implementation_autoset", "output_attentions", "output_hidden_states",
     "return_dict", "return_dict_in_generate", "gradient_checkpointing"}
)  # fmt: skip


class SafetensorsCheckpoint:
    """A `Checkpoint` over a folder."""

    format = "safetensors"

    def __init__(self, path: Path, report: Report = silent) -> None:
        self.path = path
        self.config: dict[str, Any] = read_config(path)
        quantised = self.config.get("quantization_config")
        if quantised and not isinstance(quantised, dict):
            found = repr(quantised)[:40]
            raise ModelError(f"{path}/config.json: wrong quantization_config", expected="a JSON object", found=found)
        for name, method in _LEGACY.items():
            if not self.config.get("quantization_config") and (path / name).exists():
                self.config["quantization_config"] = {"quant_method": method, **_read_json_object(path / name)}
        if self.config.get("auto_map"):
            report(Warned(f"{path} brings its own code (auto_map): it is not run unless you trust it"))
        self._files: dict[Path, MappedFile] = {}
        self.tensors: dict[str, TensorInfo] = {}
        promised = _read_index(path)
        for name in sorted(set(promised.values())) if promised else [_single_file(path)]:
            self._add_file(path / name)
        for tensor, name in promised.items():
            if tensor not in self.tensors or self.tensors[tensor].file.name != name:
                cure = "the shard and the index do not belong together: download both again"
                raise ModelError(f"{path / name} lacks tensor {tensor[:100]!r} that the index promises", cure=cure)

    def _add_file(self, file: Path) -> None:
        mapped = MappedFile(file)
        for name, info in read_safetensors_header(file, mapped).items():
            if name in self.tensors:
                raise ModelError(f"tensor {name} is both in {self.tensors[name].file} and in {file.name}")
            self.tensors[name] = info
        self._files[file] = mapped

    def read(self, name: str) -> "torch.Tensor":
        """A view of the mapped file in its stored type; writing into it changes this process's memory only."""
        if name not in self.tensors:
            raise ModelError(f"{self.path} has no tensor {name}")
        info = self.tensors[name]
        return self._files[info.file].tensor(info.dtype, info.shape, info.offset)

    @property
    def files(self) -> Collection[MappedFile]:
        return self._files.values()

    def place_of(self, tensor: "torch.Tensor") -> tuple[Path, int] | None:
        return place_in(self.files, tensor)

    def release(self, tensor: "torch.Tensor | None" = None) -> None:
        for file in self.files:
            file.release(tensor)

    def check_unchanged(self) -> None:
        for file in self.files:
            file.check_unchanged()

    def fingerprint(self) -> str:
        identity = {key: value for key, value in self.config.items() if key not in _IDLE_KEYS and value is not None}
        return fingerprint_of(identity, self.tensors.values(), self._files)


def read_config(folder: Path) -> dict[str, Any]:
    """config.json of a model folder; it must be an object that says its model_type. Raises ModelError."""
    path = folder / "config.json"
    if not path.exists():
        cure = "give the folder that holds config.json and the .safetensors files"
        if (folder / "adapter_config.json").exists():
            cure = "it holds an adapter: give the model that the adapter was trained on"
        elif list(folder.glob("*.gguf")):
            cure = "it holds GGUF: give the path of the .gguf file itself"
        raise ModelError(f"{folder} has no config.json", cure=cure)
    config = _read_json_object(path)
    if not isinstance(config.get("model_type"), str):
        found = repr(config.get("model_type", "none"))[:40]
        raise ModelError(f"{path}: wrong model_type", expected="a string such as 'llama'", found=found)
    return config


def _read_json_object(path: Path) -> dict[str, Any]:
    mapped = MappedFile(path)
    if len(mapped) > _MAX_JSON_BYTES:
        raise ModelError(f"{path} is too long", expected=f"at most {_MAX_JSON_BYTES} bytes", found=str(len(mapped)))
    return _parse_object(path, bytes(mapped.data[:]))


def _parse_object(path: Path, raw: bytes, what: str = "") -> dict[str, Any]:
    try:
        value = json.loads(raw.decode(), object_pairs_hook=_unique)
    # A number of 5000 digits is a ValueError too, deep nesting a RecursionError.
    except (ValueError, RecursionError) as error:
        raise ModelError(f"{path}{what} is not JSON ({str(error)[:120]})", cure="download or copy it again") from error
    if not isinstance(value, dict):
        raise ModelError(f"{path}{what} is not a JSON object", found=type(value).__name__)
    return value


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    result: dict[str, Any] = {}
    for name, value in pairs:
        if name in result:
            raise ValueError(f"key {name[:60]!r} comes twice")
        result[name] = value
    return result


def _read_index(folder: Path) -> dict[str, str]:
    """Tensor -> file name; empty without an index. Each name is a plain name of a file that is there."""
    path = folder / "model.safetensors.index.json"
    if not path.exists() or (folder / "model.safetensors").exists():
        return {}
    index = _read_json_object(path).get("weight_map")
    if not isinstance(index, dict) or not index:
        raise ModelError(f"{path}: wrong weight_map", expected="an object of tensor names and file names")
    for name in set(map(str, index.values())):
        plain = name == os.path.basename(name) and not set(name) & {"\\", ":", "\0"} and name.endswith(".safetensors")
        if not plain or not name.isprintable():
            expected = "names of .safetensors files in the same folder"
            raise ModelError(f"{path} points outside its folder", expected=expected, found=repr(name)[:80])
        if not (folder / name).exists():
            raise ModelError(f"{folder} lacks the shard {name} that its index names", cure="download the missing file")
    if not all(isinstance(name, str) for name in index.values()):
        raise ModelError(f"{path}: wrong weight_map", expected="an object of tensor names and file names")
    return index


def _single_file(folder: Path) -> str:
    if (folder / "model.safetensors").exists():
        return "model.safetensors"
    files = sorted(file.name for file in folder.glob("*.safetensors"))
    if len(files) == 1:
        return files[0]
    if files:
        cure = "add model.safetensors.index.json, which says what is where"
        raise ModelError(f"{folder} holds {len(files)} .safetensors files and no index", found=files[0], cure=cure)
    pickles = sorted(file.name for file in folder.iterdir() if file.suffix in PICKLES)
    if pickles:
        raise ModelError(
            f"{folder} holds its weights as a pickle ({pickles[0]}), which can run any code when it is read",
            expected="model.safetensors",
            cure="get the model's safetensors version, or convert it on a machine that you can do without: "
            "load it with transformers and call save_pretrained",
        )
    raise ModelError(f"{folder} has no weights", expected="model.safetensors, or shards with an index")


def read_safetensors_header(path: Path, mapped: MappedFile) -> dict[str, TensorInfo]:
    """Name -> place of every tensor of one file, checked against the file's size. Raises ModelError."""
    size = len(mapped)
    length = int.from_bytes(mapped.data[:8], "little")
    if size < 8 or length > min(_MAX_HEADER_BYTES, size - 8):
        raise ModelError(
            f"{path} is not a whole safetensors file",
            expected=f"a header of at most {max(0, min(_MAX_HEADER_BYTES, size - 8))} bytes",
            found=f"{length}",
            cure="it is cut off or something else: download or copy it again",
        )
    start = 8 + length
    header = _parse_object(path, mapped.data[8:start], ": its header")
    metadata = header.pop("__metadata__", {})
    if not isinstance(metadata, dict) or not all(isinstance(value, str) for value in metadata.values()):
        raise ModelError(f"{path}: __metadata__ of its header is not an object of strings")
    tensors = {name: _tensor(path, name, entry, start) for name, entry in header.items()}
    end, before = start, "the header"
    for info in sorted(tensors.values(), key=lambda info: (info.offset, info.nbytes)):
        if info.offset != end:
            what = "overlaps" if info.offset < end else "leaves a hole after"
            raise ModelError(f"{path}: tensor {info.name[:100]} {what} {before[:100]}")
        end, before = info.offset + info.nbytes, info.name
    if end != size:
        cure = "the file is cut off: download or copy it again" if end > size else "it is damaged: get it again"
        raise ModelError(f"{path} has the wrong size", expected=f"{end} bytes", found=f"{size}", cure=cure)
    return tensors


def _tensor(path: Path, name: str, entry: Any, start: int) -> TensorInfo:
    def bad(what: str, expected: str = "", found: Any = "") -> ModelError:
        return ModelError(f"{path}: tensor {name[:100]}: {what}", expected=expected, found=str(found)[:80])

    if not isinstance(entry, dict):
        raise bad("its entry is not an object")
    dtype, shape, offsets = entry.get("dtype"), entry.get("shape"), entry.get("data_offsets")
    if not isinstance(dtype, str) or dtype not in DTYPES:
        raise bad("unknown dtype", ", ".join(DTYPES), dtype)
    if not _are_sizes(shape) or not _are_sizes(offsets):
        raise bad("wrong shape or data_offsets", "lists of integers >= 0", f"{shape!r}, {offsets!r}")
    if len(shape) > _MAX_DIMENSIONS:
        raise bad("wrong shape", f"up to {_MAX_DIMENSIONS} sizes", shape)
    if len(offsets) != 2 or offsets[0] > offsets[1]:
        raise bad("wrong data_offsets", "begin and end", offsets)
    nbytes = math.prod(shape) * DTYPES[dtype][1]
    if offsets[1] - offsets[0] != nbytes:
        raise bad("its size does not fit its shape", f"{nbytes} bytes", offsets[1] - offsets[0])
    return TensorInfo(name, dtype, tuple(shape), nbytes, path, start + offsets[0])


def _are_sizes(value: Any) -> TypeGuard[list[int]]:
    return isinstance(value, list) and all(type(item) is int and 0 <= item < 2**63 for item in value)
