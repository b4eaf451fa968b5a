"""Reads a GGUF file as a Hugging Face model: config and tensors under the names and in the order of transformers.

Block types are decoded to float32 by the reference code of the gguf package (numpy); F32, F16 and BF16 are views of
the mapped file. Llama files hold the rows of q and k in pairs (0, 1), (2, 3), ... that rotate together; transformers
rotates row i with row i + head_dim / 2. `read` gives the second order.
"""

import math
import re
from collections.abc import Collection
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from smidgen.errors import ModelError

from .architectures import Architecture, architecture_of, make_config, tensor_name
from .base import MappedFile, TensorInfo, fingerprint_of, place_in
from .gguf_header import GgufHeader, read_header

if TYPE_CHECKING:
    import torch

__all__ = ["GgufCheckpoint", "open_parts", "part_names", "permute", "unpermute"]

_MAX_PARTS = 1000

# transformers computes Llama 3's slow-down of low frequencies from these; GGUF holds its result as a tensor.
_LLAMA3_ROPE = {"low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 8192}


class GgufCheckpoint:
    """A `Checkpoint` over one .gguf file; `header` holds its metadata for the tokenizer."""

    format = "gguf"

    def __init__(self, path: Path) -> None:
        self.path = path
        self.header, self._files = open_parts(path)
        self.architecture, self.row = architecture_of(self.header)
        self.config: dict[str, Any] = make_config(self.header)
        self._gguf_names: dict[str, str] = {}
        self.tensors: dict[str, TensorInfo] = {}
        self._name_tensors()
        if "rope_freqs.weight" in self.header.tensors:
            self.config["rope_parameters"] |= self._llama3_rope()
        if "rope_factors_long.weight" in self.header.tensors:
            self.config["rope_parameters"] |= self._longrope()

    def _name_tensors(self) -> None:
        layers = self.config["num_hidden_layers"]
        for name, tensor in self.header.tensors.items():
            if name in self.row.ignored:
                continue
            ours = tensor_name(self.row, name, layers)
            if ours is None:
                raise ModelError(f"{self.path}: architecture {self.architecture} has no tensor {name!r}")
            self._gguf_names[ours] = name
            file = self._files[name].path
            self.tensors[ours] = TensorInfo(ours, tensor.dtype, tensor.shape, tensor.nbytes, file, tensor.offset)
        # A layer count from the metadata is not to be believed: stop at the first layer that is not there.
        for layer in range(layers):
            for part in self.row.layer_tensors:
                if f"blk.{layer}.{part}.weight" not in self.header.tensors:
                    expected = f"{layers} layers"
                    raise ModelError(f"{self.path} has no tensor blk.{layer}.{part}.weight", expected=expected)
        if "output_norm.weight" not in self.header.tensors:
            raise ModelError(f"{self.path} has no tensor output_norm.weight")
        for name, heads in _permuted(self.row, self.config, self._gguf_names):
            if self.tensors[name].shape[0] % (2 * heads):
                raise ModelError(
                    f"{self.path}: wrong shape {self.tensors[name].shape} of {self._gguf_names[name]}",
                    expected=f"rows for {heads} heads of an even width",
                )

    def read(self, name: str) -> "torch.Tensor":
        """float32 for block types, else the stored type: a view of the file unless rows had to be moved."""
        if name not in self.tensors:
            raise ModelError(f"{self.path} has no tensor {name}")
        info = self.tensors[name]
        tensor = self._decode(self._gguf_names[name], info)
        part = self._gguf_names[name].split(".")[-2]
        if part in self.row.permuted:
            heads = self.config[self.row.permuted[part]]
            tensor = unpermute(tensor, heads)
        return tensor - 1 if part in self.row.shifted else tensor

    def _decode(self, name: str, info: TensorInfo) -> "torch.Tensor":
        file = self._files[name]
        if info.dtype in ("F32", "F16", "BF16"):
            return file.tensor(info.dtype, info.shape, info.offset)
        import numpy as np
        import torch
        from gguf.constants import GGMLQuantizationType
        from gguf.quants import dequantize

        raw = np.frombuffer(file.data, dtype=np.uint8, count=info.nbytes, offset=info.offset)
        with np.errstate(all="ignore"):  # a scale may be inf or nan in a damaged file; training's checks see that
            values = dequantize(raw.reshape(math.prod(info.shape[:-1]), -1), GGMLQuantizationType[info.dtype])
        return torch.from_numpy(values.reshape(info.shape))

    def raw(self, name: str) -> "torch.Tensor":
        """The tensor's bytes as they lie in the file: a view, uint8 [bytes]."""
        info = self.tensors[name]
        return self._files[self._gguf_names[name]].tensor("U8", (info.nbytes,), info.offset)

    def pair_width(self, name: str) -> int:
        """Half the head width where the rows of the tensor are kept in rotating pairs, else 0."""
        part = self._gguf_names[name].split(".")[-2]
        if part not in self.row.permuted:
            return 0
        return self.tensors[name].shape[0] // self.config[self.row.permuted[part]] // 2

    @property
    def files(self) -> Collection[MappedFile]:
        return set(self._files.values())

    def place_of(self, tensor: "torch.Tensor") -> tuple[Path, int] | None:
        return place_in(self.files, tensor)

    def release(self, tensor: "torch.Tensor | None" = None) -> None:
        for file in self.files:
            file.release(tensor)

    def check_unchanged(self) -> None:
        for file in self.files:
            file.check_unchanged()

    def fingerprint(self) -> str:
        """Over the file's own metadata: a config key that is added here later leaves it as it is."""
        prefix = f"{self.architecture}."
        values = self.header.metadata.values
        identity = {key: value for key, value in values.items() if key.startswith(prefix)}
        files = {file.path: file for file in self._files.values()}
        return fingerprint_of([self.architecture, identity], self.tensors.values(), files)

    def extra(self, name: str) -> "torch.Tensor":
        """A tensor that is no parameter, by its name in the file: a view."""
        info = self.header.tensors[name]
        return self._files[name].tensor(info.dtype, info.shape, info.offset)

    def _floats(self, name: str, count: int) -> "torch.Tensor":
        """A one-dimensional F32 tensor that is no parameter of the model."""
        info = self.header.tensors.get(name)
        if info is None or info.dtype != "F32" or info.shape != (count,):
            raise ModelError(f"{self.path}: {name} is not one float for each of {count} frequencies")
        return self._files[name].tensor("F32", info.shape, info.offset)

    def _longrope(self) -> dict[str, Any]:
        """Phi-3's two sets of factors, for short and for long texts."""
        rope = self.config["rope_parameters"]
        count = int(self.config["head_dim"] * rope.get("partial_rotary_factor", 1.0)) // 2
        original = self.config["original_max_position_embeddings"]
        short, long = (self._floats(f"rope_factors_{kind}.weight", count).tolist() for kind in ("short", "long"))
        factors: dict[str, Any] = {"short_factor": short, "long_factor": long}
        magnitude = self.header.metadata.number(f"{self.architecture}.rope.scaling.attn_factor", None)
        factors |= {} if magnitude is None else {"attention_factor": float(magnitude)}
        return {"rope_type": "longrope", "original_max_position_embeddings": original, **factors}

    def _llama3_rope(self) -> dict[str, Any]:
        """Llama 3's rotary scaling, found again from the factors that the file has; refused if it is another one."""
        import torch

        width, rope = self.config["head_dim"], self.config["rope_parameters"]
        if rope.get("rope_type") != "default":
            raise ModelError(f"{self.path}: rope_freqs.weight beside a rotary scaling of another type")
        found = self._floats("rope_freqs.weight", width // 2).double()
        theta = rope["rope_theta"]
        factor = round(float(found.max()), 4)
        low, high, length = _LLAMA3_ROPE.values()
        wavelength = 2 * math.pi * theta ** (torch.arange(0, width, 2, dtype=torch.float64) / width)
        smooth = ((length / wavelength - low) / (high - low)).clamp(0, 1)
        expected = 1 / ((1 - smooth) / factor + smooth) if factor > 0 else found * math.nan
        if not torch.allclose(found, expected, rtol=1e-4, atol=0):
            raise ModelError(
                f"{self.path}: rope_freqs.weight holds a rotary scaling that is not Llama 3's",
                cure="use the model's Hugging Face folder instead",
            )
        return {"rope_type": "llama3", "factor": factor, **_LLAMA3_ROPE}


_PART = re.compile(r"-\d{5}-of-(\d{5})\.gguf$")


def part_names(name: str) -> list[str]:
    """The names of all files of the model that the file `name` is a part of: its own alone where it is not split.

    >>> part_names("a-00002-of-00002.gguf")
    ['a-00001-of-00002.gguf', 'a-00002-of-00002.gguf']
    """
    named = _PART.search(name)
    if not named:
        return [name]
    count = int(named[1])
    if not 1 <= count <= _MAX_PARTS:
        raise ModelError(f"{name} is the name of one of {count} parts", expected=f"1 to {_MAX_PARTS}")
    return [f"{name[: named.start()]}-{number:05d}-of-{count:05d}.gguf" for number in range(1, count + 1)]


def open_parts(path: Path) -> tuple[GgufHeader, dict[str, MappedFile]]:
    """The header of a model, and the file that each tensor lies in.

    A model may be split into files NAME-00001-of-0000N.gguf, of which any may be given; the first has the metadata.
    """
    parts = [path.with_name(name) for name in part_names(path.name)]
    count = len(parts)
    header: GgufHeader | None = None
    files: dict[str, MappedFile] = {}
    for number, part in enumerate(parts):
        if count > 1 and not part.exists():
            raise ModelError(f"{part} is missing: part {number + 1} of {count} of {path}", cure="download it too")
        mapped = MappedFile(part)
        found = read_header(part, mapped.data)
        stated = found.metadata.integer("split.count", 1) or 1, found.metadata.integer("split.no", 0)
        if stated != (count, number):
            raise ModelError(
                f"{part} says that it is part {stated[1] + 1} of {stated[0]}", expected=f"part {number + 1} of {count}",
                cure="give its parts the names that they had: NAME-00001-of-0000N.gguf",
            )  # fmt: skip
        for name in found.tensors:
            if name in files:
                raise ModelError(f"tensor {name} is both in {files[name].path} and in {part.name}")
            files[name] = mapped
        header = found if header is None else replace(header, tensors=header.tensors | found.tensors)
    assert header is not None
    promised = header.metadata.integer("split.tensors.count", len(files))
    if promised != len(files):
        cure = "download it again"
        raise ModelError(f"{path} and its parts have {len(files)} tensors", expected=str(promised), cure=cure)
    return header, files


def unpermute(weight: "torch.Tensor", heads: int) -> "torch.Tensor":
    """Rows of q or k, [heads * head_dim, ...], from pairs to halves: a head's row 2i + j goes to j * head_dim/2 + i."""
    rows = weight.shape[0]
    halves = weight.reshape(heads, rows // heads // 2, 2, *weight.shape[1:])
    return halves.transpose(1, 2).reshape(weight.shape)


def permute(weight: "torch.Tensor", heads: int) -> "torch.Tensor":
    """The reverse of unpermute: a head's row j * head_dim/2 + i goes to 2i + j."""
    rows = weight.shape[0]
    halves = weight.reshape(heads, 2, rows // heads // 2, *weight.shape[1:])
    return halves.transpose(1, 2).reshape(weight.shape)


def _permuted(row: Architecture, config: dict[str, Any], names: dict[str, str]) -> list[tuple[str, int]]:
    parts = {ours: theirs.split(".")[-2] for ours, theirs in names.items()}
    return [(ours, config[row.permuted[part]]) for ours, part in parts.items() if part in row.permuted]
