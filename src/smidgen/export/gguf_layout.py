"""How a model's parameters are named and laid out in GGUF, from the table that reading uses (checkpoint/architectures).

The order of rows in q and k of Llama, and Gemma's norms plus one: what llama.cpp's own converter does.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from smidgen.checkpoint.architectures import ARCHITECTURES, Architecture, architecture_for, gguf_tensor_name
from smidgen.checkpoint.gguf import GgufCheckpoint, permute
from smidgen.errors import RunError
from smidgen.model.build import Base

__all__ = ["GgufLayout", "finish", "write_metadata"]


@dataclass(frozen=True)
class GgufLayout:
    """Of one model. architecture: its name in GGUF."""

    architecture: str
    row: Architecture
    config: Any

    @classmethod
    def of(cls, base: Base) -> "GgufLayout":
        """Raises RunError for a model that GGUF has no place for here."""
        config = base.model.config
        if isinstance(base.checkpoint, GgufCheckpoint):
            return cls(base.checkpoint.architecture, base.checkpoint.row, config)
        found = architecture_for(config.model_type)
        if found is None:
            known = ", ".join(sorted({row.model_type for row in ARCHITECTURES.values()} | {"mistral"}))
            raise RunError(
                f"{type(base.model).__name__} cannot be written as GGUF here", expected=known, found=config.model_type,
                cure="use --to hf, then llama.cpp's convert_hf_to_gguf.py",
            )  # fmt: skip
        return cls(*found, config)

    def name(self, parameter: str) -> str:
        """'model.layers.3.self_attn.q_proj.weight' -> 'blk.3.attn_q.weight'. Raises RunError if there is none."""
        found = gguf_tensor_name(self.row, parameter)
        if found is None:
            raise RunError(f"GGUF's architecture {self.architecture} has no tensor for {parameter}")
        return found

    def stored(self, parameter: str, tensor: torch.Tensor) -> torch.Tensor:
        """The parameter (or a lora_B, whose rows are those of its layer) as GGUF lays it out."""
        part = self.name(parameter).split(".")[-2]
        if part in self.row.permuted:
            tensor = permute(tensor, getattr(self.config, self.row.permuted[part]))
        return tensor + 1 if part in self.row.shifted else tensor


def write_metadata(writer: Any, values: dict[str, Any]) -> None:
    """Into a gguf.GGUFWriter: integers as u32, floats as f32, lists and tuples as arrays of i32, f32 or strings."""
    for key, value in values.items():
        if isinstance(value, bool):
            writer.add_bool(key, value)
        elif isinstance(value, int):
            (writer.add_uint32 if 0 <= value < 1 << 32 else writer.add_int64)(key, value)
        elif isinstance(value, float):
            writer.add_float32(key, value)
        elif isinstance(value, str):
            writer.add_string(key, value)
        elif value:
            writer.add_array(key, list(value))


def finish(writer: Any, path: Path) -> None:
    """The header and all tensors that have been added, into `path`."""
    writer.write_header_to_file(path)
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
