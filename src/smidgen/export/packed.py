"""Packed models as the folders that transformers opens: bitsandbytes' 4 and 8 bits, and GPTQ.

    bitsandbytes, 4 bits    X.weight uint8 [N K / 2, 1], X.weight.absmax, .quant_map, .nested_absmax, .nested_quant_map
                            and .quant_state.bitsandbytes__nf4 (JSON as bytes)
    bitsandbytes, 8 bits    X.weight int8 [N, K], X.SCB float32 [N], X.weight_format uint8 [] (0: by rows)
    GPTQ ("gptq", v1)       X.qweight int32 [ceil(K bits / 32), N], X.qzeros int32 [G, ceil(N bits / 32)] (zero points
                            less one), X.scales float16 [G, N], X.g_idx int32 [K]

They are what model/stored_bitsandbytes.py and model/stored_groups.py read. All linear layers of the decoder are packed;
embedding, head, norms and biases are written in a plain type, and a tied head is left out, as transformers does it.
"""

import json
import math
from collections.abc import Iterable, Iterator
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

from smidgen.events import Progress, Report, silent
from smidgen.export.merge import merged_parameters, write_model
from smidgen.model.build import Base
from smidgen.model.gptq import QuantisedLinear, check_plain_layers
from smidgen.planning.conversion import LARGEST_SHARD
from smidgen.quant.codebooks import dynamic_map, four_bit_code
from smidgen.quant.fourbit import NESTED_BLOCKSIZE
from smidgen.quant.gptq import GptqSettings
from smidgen.quant.grouped import GroupedMatrix, pack, unpack
from smidgen.quant.matrix import FourBitMatrix, Int8Matrix, quantise

__all__ = ["BNB_STORAGES", "bitsandbytes_tensors", "gptq_tensors", "quantisation_config", "save_gptq", "save_packed"]

BNB_STORAGES = ("nf4-dq", "nf4", "fp4-dq", "fp4", "int8")
_ROWS = 256  # repacked at once


def save_packed(
    base: Base,
    folder: Path,
    storage: str,
    dtype: torch.dtype,
    tokenizer: Any,
    report: Report = silent,
    shard_bytes: int = LARGEST_SHARD,
) -> None:
    """Write base + adapters, packed as `storage` (one of BNB_STORAGES), into a folder that is there.

    One linear layer at a time is made dense, in float32, and packed. dtype: of what stays unpacked, and what readers
    are told to de-quantise to. Raises ModelError for mixtures of experts and transposed layers.
    """
    check_plain_layers(base, storage)
    write_model(
        base,
        folder,
        _packed_tensors(base, storage, dtype, report),
        dtype,
        tokenizer,
        quantisation_config(storage, base.head_name, dtype),
        shard_bytes,
    )


def _packed_tensors(base: Base, storage: str, dtype: torch.dtype, report: Report) -> Iterator[tuple[str, torch.Tensor]]:
    linears = {f"{name.removesuffix('.base')}.weight" for name in base.linears} - {f"{base.head_name}.weight"}
    parameters = list(merged_parameters(base))
    what = f"pack as {storage}"
    for done, parameter in enumerate(parameters):
        report(Progress(what, done, len(parameters)))
        if parameter.name in linears:
            module = parameter.name.removesuffix(".weight")
            yield from bitsandbytes_tensors(module, quantise(parameter.make(torch.float32), storage), dtype).items()
        else:
            yield parameter.name, parameter.make(dtype)
        base.checkpoint.release()
    report(Progress(what, len(parameters), len(parameters)))


def bitsandbytes_tensors(module: str, matrix: Any, dtype: torch.dtype) -> dict[str, torch.Tensor]:
    """A FourBitMatrix or Int8Matrix as the tensors of linear layer `module`. dtype: see save_packed."""
    weight = f"{module}.weight"
    if isinstance(matrix, Int8Matrix):
        form = torch.tensor(0, dtype=torch.uint8)
        return {weight: matrix.codes, f"{module}.SCB": matrix.scale, f"{module}.weight_format": form}
    assert isinstance(matrix, FourBitMatrix)
    state: dict[str, Any] = {
        "quant_type": matrix.quant_type,
        "blocksize": matrix.blocksize,
        "dtype": str(dtype).removeprefix("torch."),
        "shape": [matrix.out_features, matrix.in_features],
    }
    tensors = {
        weight: matrix.packed.view(-1, 1),
        f"{weight}.absmax": matrix.absmax,
        f"{weight}.quant_map": four_bit_code(matrix.quant_type).clone(),  # safetensors refuses shared memory
    }
    if matrix.nested:
        tensors |= {
            f"{weight}.nested_absmax": matrix.nested_absmax,
            f"{weight}.nested_quant_map": dynamic_map().clone(),
        }
        state |= {
            "nested_blocksize": NESTED_BLOCKSIZE,
            "nested_dtype": "float32",
            "nested_offset": float(matrix.nested_offset),
        }
    said = torch.frombuffer(bytearray(json.dumps(state).encode()), dtype=torch.uint8)
    return tensors | {f"{weight}.quant_state.bitsandbytes__{matrix.quant_type}": said}


def quantisation_config(
    storage: str, head_name: str, dtype: torch.dtype, settings: GptqSettings | None = None
) -> dict[str, Any]:
    """config.json's quantization_config, with the keys that transformers' classes write. settings: of 'gptq'."""
    if storage == "gptq":
        return _gptq(settings or GptqSettings())
    quant_type, _, nested = storage.partition("-")
    four_bits, name = storage != "int8", str(dtype).removeprefix("torch.")
    return {
        "quant_method": "bitsandbytes",
        "load_in_4bit": four_bits,
        "load_in_8bit": not four_bits,
        "_load_in_4bit": four_bits,
        "_load_in_8bit": not four_bits,
        "bnb_4bit_quant_type": quant_type if four_bits else "fp4",
        "bnb_4bit_use_double_quant": bool(nested),
        "bnb_4bit_compute_dtype": name if four_bits else "float32",
        "bnb_4bit_quant_storage": "uint8",
        "llm_int8_enable_fp32_cpu_offload": False,
        "llm_int8_has_fp16_weight": False,
        "llm_int8_skip_modules": [head_name],
        "llm_int8_threshold": 6.0,
    }


def save_gptq(
    base: Base,
    folder: Path,
    layers: Iterable[list[QuantisedLinear]],
    names: Iterable[str],
    settings: GptqSettings,
    dtype: torch.dtype,
    tokenizer: Any,
    shard_bytes: int = LARGEST_SHARD,
) -> list[dict[str, float | str]]:
    """Write a base whose linear layers `names` come quantised from `layers`, into a folder that is there.

    Returns the errors of each, as QuantisedLinear.figures gives them.
    """
    said: list[dict[str, float | str]] = []
    weights = {f"{name}.weight" for name in names}

    def tensors() -> Iterator[tuple[str, torch.Tensor]]:
        for layer in layers:
            for linear in layer:
                yield from gptq_tensors(linear.name, linear.matrix).items()
                said.append(linear.figures())
        for parameter in merged_parameters(base):
            if parameter.name not in weights:
                yield parameter.name, parameter.make(dtype)
                base.checkpoint.release()

    how = quantisation_config("gptq", base.head_name, dtype, settings)
    write_model(base, folder, tensors(), dtype, tokenizer, how, shard_bytes)
    return said


def gptq_tensors(module: str, matrix: GroupedMatrix) -> dict[str, torch.Tensor]:
    """A GroupedMatrix as the tensors of linear layer `module`."""
    inputs, outputs, bits = matrix.in_features, matrix.out_features, matrix.bits
    qweight = torch.empty(math.ceil(inputs * bits / 32), outputs, dtype=torch.int32)
    for start in range(0, outputs, _ROWS):
        codes = unpack(matrix.codes[start : start + _ROWS], bits, inputs)
        if matrix.place is not None:
            codes = codes[:, matrix.place]
        qweight[:, start : start + _ROWS] = _words(codes, bits).t()
    sizes = torch.diff(matrix.ends.long(), prepend=matrix.ends.new_zeros(1))
    groups = torch.arange(len(sizes), dtype=torch.int32).repeat_interleave(sizes)
    stored = matrix.zeros.t().contiguous() - 1 & (1 << bits) - 1
    return {
        f"{module}.qweight": qweight,
        f"{module}.qzeros": _words(stored, bits),
        f"{module}.scales": matrix.scales.t().half().contiguous(),
        f"{module}.g_idx": groups if matrix.place is None else groups[matrix.place],
    }


def _words(codes: torch.Tensor, bits: int) -> torch.Tensor:
    """codes uint8 [n, count] -> int32 [n, ceil(count bits / 32)]: one stream a row, lowest bits first."""
    words = math.ceil(codes.shape[1] * bits / 32)
    stream = pack(codes, bits)
    stream = torch.nn.functional.pad(stream, (0, max(0, 4 * words - stream.shape[1])))[:, : 4 * words]
    return stream.contiguous().view(torch.int32)


def _gptq(settings: GptqSettings) -> dict[str, Any]:
    return {
        "quant_method": "gptq",
        "bits": settings.bits,
        "group_size": settings.group_size,
        "desc_act": settings.act_order,
        "sym": settings.symmetric,
        "damp_percent": settings.damp,
        "true_sequential": True,
        "static_groups": False,
        "lm_head": False,
        "checkpoint_format": "gptq",
        "pack_dtype": "int32",
        "meta": {"quantizer": [f"smidgen:{version('smidgen')}"]},
    }
