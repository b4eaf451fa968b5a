"""Bases that bitsandbytes has packed already: their blocks are used as they lie in the file.

A 4-bit layer has X.weight (uint8 [N K / 2, 1]), X.weight.absmax and, for nested scales, X.weight.nested_absmax; the
JSON in X.weight.quant_state.bitsandbytes__nf4 (or __fp4) says blocksize and shape, and of nested scales their
blocksize and offset. An 8-bit layer has X.weight (int8 [N, K]) and X.SCB (float32 [N]). Everything is checked before
the first product: lengths, tables, scales.
"""

import json
import math
import re
from typing import Any

import torch

from smidgen.checkpoint.base import Checkpoint
from smidgen.errors import ModelError
from smidgen.quant.codebooks import dynamic_map, four_bit_code
from smidgen.quant.fourbit import NESTED_BLOCKSIZE, NestedScales
from smidgen.quant.matrix import FourBitMatrix, FrozenMatrix, Int8Matrix

__all__ = ["BitsandbytesWeights"]

_COMPANION = re.compile(
    r"\.(absmax|quant_map|nested_absmax|nested_quant_map|quant_state\.bitsandbytes__\w+)$|(?<=\.)(SCB|weight_format)$"
)
_MOST_STATE_BYTES = 1 << 16
_FLOATS = (torch.float32, torch.float16, torch.bfloat16)


class BitsandbytesWeights:
    """See StoredWeights. quantised: config.json's quantization_config."""

    def __init__(self, checkpoint: Checkpoint, quantised: dict[str, Any]) -> None:
        self._checkpoint = checkpoint
        self.storage = "int8"
        if quantised.get("load_in_4bit"):
            kind = str(quantised.get("bnb_4bit_quant_type", "fp4"))
            self.storage = kind + ("-dq" if quantised.get("bnb_4bit_use_double_quant") else "")

    def parameter_of(self, tensor: str) -> str | None:
        weight = _COMPANION.sub("", tensor)
        if weight == tensor:
            return tensor
        weight = weight if weight.endswith("weight") else f"{weight}weight"
        return None if weight in self._checkpoint.tensors else tensor

    def matrix(self, name: str, shape: tuple[int, int]) -> FrozenMatrix | None:
        checkpoint, tensors = self._checkpoint, self._checkpoint.tensors
        scale_name = name.removesuffix("weight") + "SCB"
        if scale_name in tensors:
            codes, scale = checkpoint.read(name), checkpoint.read(scale_name)
            _check(checkpoint, name, codes.dtype == torch.int8 and tuple(codes.shape) == shape, f"int8 {list(shape)}")
            fits = tuple(scale.shape) == shape[:1] and scale.dtype in _FLOATS
            _check(checkpoint, scale_name, fits, f"one float scale for each of {shape[0]} rows")
            order = name.removesuffix("weight") + "weight_format"
            rows = order not in tensors or checkpoint.read(order).flatten().tolist() == [0]
            _check(checkpoint, order, rows, "0 (rows)")
            _check(checkpoint, scale_name, bool(scale.isfinite().all()), "finite scales")
            return Int8Matrix(codes, scale.float())
        states = [f"{name}.quant_state.bitsandbytes__{kind}" for kind in ("nf4", "fp4")]
        state_name = next((state for state in states if state in tensors), None)
        return None if state_name is None else _four_bit(checkpoint, name, state_name, shape)


def _four_bit(checkpoint: Checkpoint, name: str, state_name: str, shape: tuple[int, int]) -> FourBitMatrix:
    info = checkpoint.tensors[state_name]
    is_text = info.dtype == "U8" and info.nbytes <= _MOST_STATE_BYTES
    _check(checkpoint, state_name, is_text, "a short JSON text as bytes")
    is_nested = f"{name}.nested_absmax" in checkpoint.tensors
    try:
        state = json.loads(bytes(checkpoint.read(state_name).tolist()).decode())
        quant_type, blocksize, stated_shape = str(state["quant_type"]), int(state["blocksize"]), tuple(state["shape"])
        offset = float(state["nested_offset"]) if is_nested else 0.0
        nested_blocksize = int(state["nested_blocksize"]) if is_nested else NESTED_BLOCKSIZE
    except KeyError as error:
        what = f"{checkpoint.path}: {state_name} does not say {error.args[0]}"
        raise ModelError(what, cure="download it again") from error
    except (ValueError, TypeError, OverflowError, RecursionError) as error:
        raise ModelError(f"{checkpoint.path}: {state_name} cannot be read ({str(error)[:120]})") from error
    _check(checkpoint, state_name, stated_shape == shape, f"shape {list(shape)} by config.json")
    _check(checkpoint, state_name, blocksize in (32, 64, 128, 256, 512, 1024, 2048, 4096), "a known blocksize")
    _check(checkpoint, state_name, quant_type in ("nf4", "fp4"), "nf4 or fp4")
    _check(checkpoint, state_name, math.isfinite(offset), "a finite nested_offset")
    _check(checkpoint, state_name, nested_blocksize == NESTED_BLOCKSIZE, f"nested_blocksize {NESTED_BLOCKSIZE}")
    count = math.prod(shape)
    blocks = math.ceil(count / blocksize)
    stored = checkpoint.read(name)
    _check(checkpoint, name, stored.dtype in (torch.uint8, *_FLOATS), "bytes, or bytes as a float type")
    packed = stored.flatten().view(torch.uint8)
    _check(checkpoint, name, packed.numel() == (count + 1) // 2, f"{(count + 1) // 2} bytes")
    table = checkpoint.read(f"{name}.quant_map")
    _check(
        checkpoint,
        f"{name}.quant_map",
        torch.equal(table.float(), four_bit_code(quant_type)),
        f"the {quant_type} table",
    )
    absmax = checkpoint.read(f"{name}.absmax")
    _check(checkpoint, f"{name}.absmax", absmax.numel() == blocks, f"{blocks} scales")
    kinds = (torch.uint8,) if is_nested else _FLOATS
    _check(checkpoint, f"{name}.absmax", absmax.dtype in kinds, "uint8 if nested, else floats")
    if not is_nested:
        _check(checkpoint, f"{name}.absmax", bool(absmax.isfinite().all()), "finite scales")
        return FourBitMatrix(shape, packed, absmax.float().view(-1), quant_type, blocksize)
    nested, nested_table = checkpoint.read(f"{name}.nested_absmax"), checkpoint.read(f"{name}.nested_quant_map")
    groups = math.ceil(blocks / NESTED_BLOCKSIZE)
    fits = nested.numel() == groups and nested.dtype in _FLOATS
    _check(checkpoint, f"{name}.nested_absmax", fits, f"{groups} float scales")
    _check(checkpoint, f"{name}.nested_absmax", bool(nested.isfinite().all()), "finite scales")
    _check(checkpoint, f"{name}.nested_quant_map", torch.equal(nested_table, dynamic_map()), "the dynamic map")
    scales = NestedScales(absmax.view(-1), nested.float().view(-1), torch.tensor(offset))
    return FourBitMatrix(shape, packed, scales, quant_type, blocksize)


def _check(checkpoint: Checkpoint, name: str, ok: bool, expected: str) -> None:
    if not ok:
        raise ModelError(f"{checkpoint.path}: tensor {name} does not fit", expected=expected, cure="download it again")
