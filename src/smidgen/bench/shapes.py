"""Models of known shapes with random weights: what a step costs depends on the shape, not on what was learnt.

The folder is an ordinary Hugging Face folder (config.json and bfloat16 safetensors, random normal), so that smidgen and
its peers read the very same files. Shards are written one after the other; no more than one is in memory.
"""

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from smidgen.events import Progress, Report, silent
from smidgen.export.files import disk_errors
from smidgen.planning.shapes import SHAPES as KNOWN

__all__ = ["SHAPES", "Shape", "random_token_ids", "warm_page_cache", "write_model"]

_SHARD_BYTES = 256_000_000
_STD = 0.02  # what Llama models are initialised with


@dataclass(frozen=True)
class Shape:
    """A Llama: its sizes, and what the formulas need."""

    name: str
    hidden_size: int
    intermediate_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    vocab_size: int
    tied: bool

    @property
    def linears(self) -> dict[str, tuple[int, int]]:
        """Name -> [out_features, in_features] of the linear layers of one decoder layer."""
        kv_size = self.hidden_size // self.num_heads * self.num_kv_heads
        return {
            "self_attn.q_proj": (self.hidden_size, self.hidden_size),
            "self_attn.k_proj": (kv_size, self.hidden_size),
            "self_attn.v_proj": (kv_size, self.hidden_size),
            "self_attn.o_proj": (self.hidden_size, self.hidden_size),
            "mlp.gate_proj": (self.intermediate_size, self.hidden_size),
            "mlp.up_proj": (self.intermediate_size, self.hidden_size),
            "mlp.down_proj": (self.hidden_size, self.intermediate_size),
        }

    @property
    def decoder_parameters(self) -> int:
        """Weights of all linear layers of the decoder, the head left out."""
        return self.num_layers * sum(n * k for n, k in self.linears.values())

    @property
    def head_parameters(self) -> int:
        return self.vocab_size * self.hidden_size

    def lora_parameters(self, rank: int) -> int:
        """Weights of adapters on all linear layers of the decoder."""
        return self.num_layers * sum(rank * (n + k) for n, k in self.linears.values())

    @classmethod
    def of(cls, name: str) -> "Shape":
        """A Llama of planning.shapes."""
        config = KNOWN[name]
        return cls(
            name,
            hidden_size=config["hidden_size"],
            intermediate_size=config["intermediate_size"],
            num_layers=config["num_hidden_layers"],
            num_heads=config["num_attention_heads"],
            num_kv_heads=config["num_key_value_heads"],
            vocab_size=config["vocab_size"],
            tied=config["tie_word_embeddings"],
        )

    def config(self) -> dict[str, Any]:
        """The content of config.json."""
        return KNOWN[self.name]

    def tensors(self) -> Iterator[tuple[str, tuple[int, ...]]]:
        """(name, shape) of every tensor of the checkpoint, in the order of the model."""
        yield "model.embed_tokens.weight", (self.vocab_size, self.hidden_size)
        for layer in range(self.num_layers):
            for name, shape in self.linears.items():
                yield f"model.layers.{layer}.{name}.weight", shape
            for norm in ("input_layernorm", "post_attention_layernorm"):
                yield f"model.layers.{layer}.{norm}.weight", (self.hidden_size,)
        yield "model.norm.weight", (self.hidden_size,)
        if not self.tied:
            yield "lm_head.weight", (self.vocab_size, self.hidden_size)


SHAPES = {name: Shape.of(name) for name in ("smollm2-135m", "tinyllama-1.1b", "tiny")}  # tiny: for the tests


def write_model(shape: Shape, folder: Path, report: Report = silent, *, seed: int = 0) -> Path:
    """Write the model into `folder`; a folder that holds the same shape already is left as it is.

    Raises RunError where the disk fails.
    """
    with disk_errors(folder):
        return _write(shape, folder, report, seed)


def _write(shape: Shape, folder: Path, report: Report, seed: int) -> Path:
    config = json.dumps(shape.config(), indent=2) + "\n"
    config_file = folder / "config.json"
    if config_file.is_file() and config_file.read_text(encoding="utf-8") == config:
        return folder
    folder.mkdir(parents=True, exist_ok=True)
    config_file.unlink(missing_ok=True)
    generator = torch.Generator().manual_seed(seed)
    weight_map: dict[str, str] = {}
    pending: dict[str, torch.Tensor] = {}
    tensors = list(shape.tensors())
    shards = 0

    def flush() -> None:
        nonlocal shards
        shards += 1
        file = f"model-{shards:05d}.safetensors"
        save_file(pending, folder / file, metadata={"format": "pt"})
        weight_map.update(dict.fromkeys(pending, file))
        pending.clear()

    for done, (name, size) in enumerate(tensors):
        report(Progress(f"writing random weights of {shape.name}", done, len(tensors)))
        values = torch.randn(size, generator=generator).mul_(_STD)
        pending[name] = (values + 1 if len(size) == 1 else values).to(torch.bfloat16)  # norms lie around 1
        if sum(tensor.nbytes for tensor in pending.values()) >= _SHARD_BYTES:
            flush()
    if pending:
        flush()
    report(Progress(f"writing random weights of {shape.name}", len(tensors), len(tensors)))
    index = {"metadata": {"total_size": 2 * _numel(tensors)}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")
    config_file.write_text(config, encoding="utf-8")  # the last: a folder with it is whole
    return folder


def _numel(tensors: list[tuple[str, tuple[int, ...]]]) -> int:
    return sum(torch.Size(size).numel() for _, size in tensors)


def random_token_ids(shape: Shape, count: int, seed: int = 1) -> list[int]:
    """Token ids, uniform over the vocabulary."""
    return torch.randint(shape.vocab_size, (count,), generator=torch.Generator().manual_seed(seed)).tolist()


def warm_page_cache(folder: Path) -> None:
    """Read all files once, so that whoever loads them first has no harder start than who comes next."""
    for file in sorted(folder.iterdir()):
        with open(file, "rb") as stream:
            while stream.read(1 << 22):
                pass
