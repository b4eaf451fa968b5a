"""Reads a GGUF file as a Hugging Face model: config and tensors under the names and in the order of transformers.

Block types are decoded to float32 by the reference code of the gguf package (numpy); F32, F16 and BF16 are views of
the mapped file. Llama files hold the rows of q and k in pairs (0, 1), (2, 3), ... that rotate together; transformers
rotates row i with row i + head_dim / 2. `read` gives the second order.
"""

import math
from pathlib import Path
from typing import TYPE_CHECKING, Any

from smidgen.errors import ModelError

from .architectures import Architecture, architecture_of, make_config, tensor_name
from .base import MappedFile, TensorInfo, fingerprint_of
from .gguf_header import GgufHeader, read_header

if TYPE_CHECKING:
    import torch

__all__ = ["GgufCheckpoint"]

# transformers computes Llama 3's slow-down of low frequencies from these; GGUF holds its result as a tensor.
_LLAMA3_ROPE = {"low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 8192}


class GgufCheckpoint:
    """A `Checkpoint` over one .gguf file; `header` holds its metadata for the tokenizer."""

    format = "gguf"

    def __init__(self, path: Path) -> None:
        self.path = path
        self._file = MappedFile(path)
        self.header: GgufHeader = read_header(path, self._file.data)
        self.architecture, self._row = architecture_of(self.header)
        self.config: dict[str, Any] = make_config(self.header)
        self._gguf_names: dict[str, str] = {}
        self.tensors: dict[str, TensorInfo] = {}
        self._name_tensors()
        if "rope_freqs.weight" in self.header.tensors:
            self.config["rope_parameters"] |= self._llama3_rope()

    def _name_tensors(self) -> None:
        layers = self.config["num_hidden_layers"]
        for name, tensor in self.header.tensors.items():
            if name in self._row.ignored:
                continue
            ours = tensor_name(self._row, name, layers)
            if ours is None:
                raise ModelError(f"{self.path}: architecture {self.architecture} has no tensor {name!r}")
            self._gguf_names[ours] = name
            info = TensorInfo(ours, tensor.dtype, tensor.shape, tensor.nbytes, self.path, tensor.offset)
            self.tensors[ours] = info
        # A layer count from the metadata is not to be believed: stop at the first layer that is not there.
        for layer in range(layers):
            for part in self._row.layer_tensors:
                if f"blk.{layer}.{part}.weight" not in self.header.tensors:
                    expected = f"{layers} layers"
                    raise ModelError(f"{self.path} has no tensor blk.{layer}.{part}.weight", expected=expected)
        if "output_norm.weight" not in self.header.tensors:
            raise ModelError(f"{self.path} has no tensor output_norm.weight")
        for name, heads in _permuted(self._row, self.config, self._gguf_names):
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
        tensor = self._decode(info)
        part = self._gguf_names[name].split(".")[-2]
        if part in self._row.permuted:
            heads = self.config[self._row.permuted[part]]
            tensor = unpermute(tensor, heads)
        return tensor

    def _decode(self, info: TensorInfo) -> "torch.Tensor":
        if info.dtype in ("F32", "F16", "BF16"):
            return self._file.tensor(info.dtype, info.shape, info.offset)
        import numpy as np
        import torch
        from gguf.constants import GGMLQuantizationType
        from gguf.quants import dequantize

        raw = np.frombuffer(self._file.data, dtype=np.uint8, count=info.nbytes, offset=info.offset)
        with np.errstate(all="ignore"):  # a scale may be inf or nan in a damaged file; training's checks see that
            values = dequantize(raw.reshape(math.prod(info.shape[:-1]), -1), GGMLQuantizationType[info.dtype])
        return torch.from_numpy(values.reshape(info.shape))

    def raw(self, name: str) -> "torch.Tensor":
        """The tensor's bytes as they lie in the file: a view, uint8 [bytes]."""
        info = self.tensors[name]
        return self._file.tensor("U8", (info.nbytes,), info.offset)

    def pair_width(self, name: str) -> int:
        """Half the head width where the rows of the tensor are kept in rotating pairs, else 0."""
        part = self._gguf_names[name].split(".")[-2]
        if part not in self._row.permuted:
            return 0
        return self.tensors[name].shape[0] // self.config[self._row.permuted[part]] // 2

    def release(self) -> None:
        self._file.release()

    def fingerprint(self) -> str:
        """Over the file's own metadata: a config key that is added here later leaves it as it is."""
        prefix = f"{self.architecture}."
        values = self.header.metadata.values
        identity = {key: value for key, value in values.items() if key.startswith(prefix)}
        return fingerprint_of([self.architecture, identity], self.tensors.values(), {self.path: self._file})

    def _llama3_rope(self) -> dict[str, Any]:
        """Llama 3's rotary scaling, found again from the factors that the file has; refused if it is another one."""
        import torch

        info = self.header.tensors["rope_freqs.weight"]
        width = self.config["head_dim"]
        if info.dtype != "F32" or info.shape != (width // 2,):
            raise ModelError(f"{self.path}: rope_freqs.weight is not one float for each of {width // 2} frequencies")
        found = self._file.tensor("F32", info.shape, info.offset).double()
        theta = self.config["rope_parameters"]["rope_theta"]
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


def unpermute(weight: "torch.Tensor", heads: int) -> "torch.Tensor":
    """Rows of q or k, [heads * head_dim, ...], from pairs to halves: a head's row 2i + j goes to j * head_dim/2 + i."""
    rows = weight.shape[0]
    halves = weight.reshape(heads, rows // heads // 2, 2, *weight.shape[1:])
    return halves.transpose(1, 2).reshape(weight.shape)


def _permuted(row: Architecture, config: dict[str, Any], names: dict[str, str]) -> list[tuple[str, int]]:
    parts = {ours: theirs.split(".")[-2] for ours, theirs in names.items()}
    return [(ours, config[row.permuted[part]]) for ours, part in parts.items() if part in row.permuted]
