"""Model folders of an exact shape with random packed weights, for measuring memory: no 16-bit copy is ever made.

Codes are random bytes; scales are such that weights have a deviation of about 0.02, as trained models have, so that
activations stay finite. One layer is in memory at a time, and what was written is dropped from the page cache: the
first read comes from the disk.
"""

import json
import math
import os
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import save_file
from torch import nn

from smidgen.errors import RunError
from smidgen.events import Progress, Report, silent
from smidgen.export.files import new_folder
from smidgen.export.packed import bitsandbytes_tensors, quantisation_config
from smidgen.model.build import read_config, skeleton
from smidgen.model.inventory import inventory_of
from smidgen.model.stream import layer_of
from smidgen.planning.inventory import Inventory, grouped_bytes
from smidgen.quant.fourbit import NestedScales
from smidgen.quant.gptq import GptqSettings
from smidgen.quant.matrix import FourBitMatrix, Int8Matrix
from smidgen.units import format_bytes

__all__ = ["drop_page_cache", "packed_inventory", "write_packed_model"]

_STD = 0.02
_SCALE = 0.03  # of a 4-bit block: codes drawn evenly from NF4 have a deviation of 0.63
_GROUP = 128


def packed_inventory(config: dict[str, Any], storage: str, *, name: str = "", itemsize: int = 4) -> Inventory:
    """What `write_packed_model` makes, before it is made; GPTQ's groups are in order there."""
    found = inventory_of(None, config, storage, name=name, itemsize=itemsize)
    if storage != "gptq":
        return found
    linears = (replace(each, nbytes=grouped_bytes(each.out_features, each.in_features)) for each in found.linears)
    return replace(found, linears=tuple(linears), ordered=False)


def write_packed_model(config: dict[str, Any], folder: Path, storage: str, report: Report = silent) -> Path:
    """config: as config.json. storage: 'nf4-dq', 'nf4', 'int8', 'gptq' or 'none'. Returns the folder, which appears
    whole or not at all.

    Raises RunError where the disk has no room for it, or fails.
    """
    size = packed_inventory(config, storage, name=folder.name)
    needed = size.packed_bytes + size.embedding_bytes + size.head_bytes
    with new_folder(folder) as staging:
        free = shutil.disk_usage(staging).free
        if free < 1.05 * needed:
            raise RunError(
                f"{folder}: too little room for the model", expected=format_bytes(needed), found=format_bytes(free)
            )
        _write(config, staging, storage, needed, report)
    return folder


def _write(config: dict[str, Any], folder: Path, storage: str, nbytes: int, report: Report) -> None:
    model = skeleton(read_config(config, folder.name), torch.bfloat16)
    random = np.random.default_rng(0)
    weight_map: dict[str, str] = {}
    pending: dict[str, torch.Tensor] = {}
    modules = [(n, m) for n, m in model.named_modules() if list(m.parameters(recurse=False))]
    tied = bool(model.config.get_text_config().tie_word_embeddings)
    at: int | None = -1
    for done, (name, module) in enumerate(modules):
        report(Progress(f"writing random {storage} weights", done, len(modules)))
        if layer_of(f"{name}.") != at:
            _flush(pending, folder, weight_map)
            at = layer_of(f"{name}.")
        if module is model.get_output_embeddings() and tied:
            continue
        plain = isinstance(module, nn.Embedding) or module is model.get_output_embeddings()
        pending.update(_tensors(name, module, "none" if plain else storage, random))
    _flush(pending, folder, weight_map)
    report(Progress(f"writing random {storage} weights", len(modules), len(modules)))
    index = {"metadata": {"total_size": nbytes}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index), encoding="utf-8")
    head = next(name for name, module in model.named_modules() if module is model.get_output_embeddings())
    how: dict[str, Any] = {}
    if storage != "none":
        how["quantization_config"] = quantisation_config(storage, head, torch.bfloat16, GptqSettings(4, _GROUP))
    (folder / "config.json").write_text(json.dumps(config | how), encoding="utf-8")


def _flush(pending: dict[str, torch.Tensor], folder: Path, weight_map: dict[str, str]) -> None:
    if not pending:
        return
    file = f"model-{len(set(weight_map.values())) + 1:05d}.safetensors"
    save_file(pending, folder / file, metadata={"format": "pt"})
    weight_map.update(dict.fromkeys(pending, file))
    pending.clear()
    drop_page_cache(folder / file)


def drop_page_cache(file: Path) -> None:
    """The file's pages leave the memory; the next read comes from the disk."""
    descriptor = os.open(file, os.O_RDONLY)
    os.fdatasync(descriptor)
    os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
    os.close(descriptor)


def _tensors(name: str, module: nn.Module, storage: str, random: np.random.Generator) -> dict[str, torch.Tensor]:
    """The tensors of one module."""
    packs = isinstance(module, nn.Linear) and storage != "none"
    shapes = {key: tuple(parameter.shape) for key, parameter in module.named_parameters(recurse=False)}
    packed = {}
    if packs:
        n, k = shapes.pop("weight")
        packed = _packed(name, n, k, storage, random)
    return {f"{name}.{key}": _plain(key, shape, random) for key, shape in shapes.items()} | packed


def _plain(key: str, shape: tuple[int, ...], random: np.random.Generator) -> torch.Tensor:
    """A parameter as bfloat16: matrices random, weights of norms one, biases zero."""
    if len(shape) == 1:
        return torch.full(shape, float(key == "weight"), dtype=torch.bfloat16)
    values = torch.empty(shape, dtype=torch.bfloat16)
    for row in range(0, shape[0], 1024):
        part = random.standard_normal((min(1024, shape[0] - row), *shape[1:]), dtype=np.float32)
        values[row : row + 1024] = torch.from_numpy(part).mul_(_STD)
    return values


def _bytes(random: np.random.Generator, *shape: int) -> torch.Tensor:
    count = math.prod(shape)
    words = random.integers(1 << 64, size=-(-count // 8), dtype=np.uint64)  # far faster than byte by byte
    return torch.from_numpy(words.view(np.uint8)[:count]).view(shape)


def _packed(name: str, n: int, k: int, storage: str, random: np.random.Generator) -> dict[str, torch.Tensor]:
    """A packed linear layer [n, k]."""
    if storage == "gptq":
        groups = -(-k // _GROUP)
        return {
            f"{name}.qweight": _bytes(random, k // 8, 4 * n).view(torch.int32),
            f"{name}.qzeros": torch.full((groups, n // 8), 0x77777777, dtype=torch.int32),
            f"{name}.scales": torch.full((groups, n), _STD / 4.6, dtype=torch.float16),
            f"{name}.g_idx": torch.arange(k, dtype=torch.int32) // _GROUP,
        }
    if storage == "int8":
        codes = _bytes(random, n, k).view(torch.int8)
        return bitsandbytes_tensors(name, Int8Matrix(codes, torch.full((n,), _STD / 0.58)), torch.bfloat16)
    quant_type, _, nested = storage.partition("-")
    blocks = -(-n * k // 64)
    scales: torch.Tensor | NestedScales = torch.full((blocks,), _SCALE)
    if nested:
        outer = torch.full((-(-blocks // 256),), _SCALE / 8)
        scales = NestedScales(_bytes(random, blocks), outer, torch.tensor(_SCALE))
    packed = _bytes(random, (n * k + 1) // 2)
    return bitsandbytes_tensors(name, FourBitMatrix((n, k), packed, scales, quant_type), torch.bfloat16)
