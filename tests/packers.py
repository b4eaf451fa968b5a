"""Packed checkpoints made without any code of the package: GPTQ and AWQ bit by bit from the formats' descriptions, with
random integers, scales and zero points; and by bitsandbytes' own functions.

The dense folder beside one holds the very values that it stands for.
"""

import json
import random
import shutil
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

__all__ = ["pack_folder", "pack_with_bitsandbytes"]

_OLD_AWQ = {"zero_point": True, "version": "GEMM"}  # beside w_bit and q_group_size
_AWQ_ORDER = [0, 2, 4, 6, 1, 3, 5, 7]  # which output lies in field i of a word


def _words(fields: list[int], bits: int) -> list[int]:
    """A stream of fields as signed 32-bit words, lowest bits first."""
    number = sum(field << (index * bits) for index, field in enumerate(fields))
    count = -(-len(fields) * bits // 32)
    return [((number >> (32 * i)) & 0xFFFFFFFF) - ((number >> (32 * i + 31)) & 1) * (1 << 32) for i in range(count)]


def _gptq(
    codes: list[list[int]], zeros: list[list[int]], scales: torch.Tensor, group_of: list[int], bits: int, version: str
) -> dict[str, torch.Tensor]:
    """codes [N][K], zeros [N][G], scales [N, G]."""
    outputs, groups = len(codes), len(zeros[0])
    less = 1 if version == "gptq" else 0
    stored = [[(zeros[n][g] - less) % (1 << bits) for n in range(outputs)] for g in range(groups)]
    return {
        "qweight": torch.tensor([_words(row, bits) for row in codes], dtype=torch.int32).t().contiguous(),
        "qzeros": torch.tensor([_words(row, bits) for row in stored], dtype=torch.int32),
        "scales": scales.t().contiguous(),
        "g_idx": torch.tensor(group_of, dtype=torch.int32),
    }


def _awq(codes: list[list[int]], zeros: list[list[int]], scales: torch.Tensor) -> dict[str, torch.Tensor]:
    def packed(columns: list[list[int]]) -> torch.Tensor:  # [n][N] -> int32 [n, N / 8]
        rows = []
        for column in columns:
            fields = [column[8 * (i // 8) + _AWQ_ORDER[i % 8]] for i in range(len(column))]
            rows.append(_words(fields, 4))
        return torch.tensor(rows, dtype=torch.int32)

    return {
        "qweight": packed([list(column) for column in zip(*codes, strict=True)]),
        "qzeros": packed([list(column) for column in zip(*zeros, strict=True)]),
        "scales": scales.t().contiguous(),
    }


def pack_folder(
    dense: Path,
    out: Path,
    *,
    method: str = "gptq",
    bits: int = 4,
    group_size: int = 32,
    symmetric: bool = True,
    act_order: bool = False,
    version: str = "gptq",
    label: str | None = None,
    legacy: bool = False,
    seed: int = 0,
) -> Path:
    """Writes `out`, packed; returns a folder beside it with the same numbers, dense. label: what the config says."""
    generator = random.Random(seed)
    tensors = load_file(dense / "model.safetensors")
    packed: dict[str, torch.Tensor] = {}
    plain: dict[str, torch.Tensor] = {}
    for name, weight in tensors.items():
        if "_proj.weight" not in name and ".experts." not in name:
            packed[name] = plain[name] = weight
            continue
        outputs, inputs = weight.shape
        size = inputs if group_size == -1 else group_size
        groups = -(-inputs // size)
        group_of = [k // size for k in range(inputs)]
        if act_order:
            generator.shuffle(group_of)
        middle = 1 << (bits - 1)
        codes = [[generator.randrange(1 << bits) for _ in range(inputs)] for _ in range(outputs)]
        zeros = [[middle if symmetric else generator.randrange(1 << bits) for _ in range(groups)] for _ in codes]
        scales = torch.tensor([[generator.uniform(0.5, 2) * 0.2 / (1 << bits) for _ in range(groups)] for _ in codes])
        scales = scales.half()
        prefix = name.removesuffix(".weight")
        parts = _awq(codes, zeros, scales) if method == "awq" else _gptq(codes, zeros, scales, group_of, bits, version)
        packed |= {f"{prefix}.{part}": tensor for part, tensor in parts.items()}
        values = [
            [float(scales[n][group_of[k]]) * (codes[n][k] - zeros[n][group_of[k]]) for k in range(inputs)]
            for n in range(outputs)
        ]
        plain[name] = torch.tensor(values, dtype=torch.float32)
    how: dict[str, Any] = {"bits": bits, "group_size": group_size}
    if method == "awq":
        how |= {"quant_method": "awq", "zero_point": True, "version": "gemm"}
    else:
        how |= {"desc_act": act_order, "sym": symmetric, "checkpoint_format": label or version}
    if legacy:
        twin = _write(dense, out, packed, plain)
        name = "quantize_config.json"
        if method == "awq":
            name, how = "quant_config.json", _OLD_AWQ | {"w_bit": bits, "q_group_size": group_size}
        (out / name).write_text(json.dumps(how))
        return twin
    return _write(dense, out, packed, plain, {"quant_method": method, **how})


def pack_with_bitsandbytes(
    dense: Path, out: Path, kind: str, blocksize: int = 64, quant_storage: torch.dtype = torch.uint8
) -> Path:
    """As pack_folder: every matrix but embedding and head. kind: 'nf4', 'nf4-dq', 'fp4', 'fp4-dq' or 'int8'.

    blocksize, quant_storage: of 4 bits; the bytes are stored as numbers of type quant_storage.
    """
    import bitsandbytes.functional as bnb

    quant_type, _, nested = kind.partition("-")
    packed: dict[str, torch.Tensor] = {}
    plain: dict[str, torch.Tensor] = {}
    for name, weight in load_file(dense / "model.safetensors").items():
        if weight.dim() != 2 or "embed" in name or "lm_head" in name:
            packed[name] = plain[name] = weight
        elif kind == "int8":
            codes, scale, _ = bnb.int8_vectorwise_quant(weight)
            packed |= {name: codes, f"{name.removesuffix('weight')}SCB": scale}
            plain[name] = codes * scale[:, None] / 127
        else:
            codes, state = bnb.quantize_4bit(
                weight, blocksize=blocksize, quant_type=quant_type, compress_statistics=bool(nested),
                quant_storage=quant_storage,
            )  # fmt: skip
            parts = state.as_dict(packed=True)
            packed |= {name: codes} | {
                f"{name}.{key}": part.clone() for key, part in parts.items()
            }  # tables are shared
            # as one long row: of rows that end within a block, bitsandbytes' AVX-512 kernel takes wrong scales
            state.shape = torch.Size([weight.numel()])
            plain[name] = bnb.dequantize_4bit(codes, state).view(weight.shape)
    four_bits = kind != "int8"
    how = {"quant_method": "bitsandbytes", "load_in_4bit": four_bits, "load_in_8bit": not four_bits}
    if four_bits:
        how |= {"bnb_4bit_quant_type": quant_type, "bnb_4bit_use_double_quant": bool(nested)}
        how |= {"bnb_4bit_quant_storage": str(quant_storage).removeprefix("torch.")}
    return _write(dense, out, packed, plain, how)


def _write(
    dense: Path,
    out: Path,
    packed: dict[str, torch.Tensor],
    plain: dict[str, torch.Tensor],
    quantised: dict[str, Any] | None = None,
) -> Path:
    twin = out.with_name(f"{out.name}-dense")
    for folder, content in ((out, packed), (twin, plain)):
        shutil.copytree(dense, folder)
        save_file(content, folder / "model.safetensors", metadata={"format": "pt"})
    if quantised is not None:
        config = json.loads((out / "config.json").read_text())
        (out / "config.json").write_text(json.dumps(config | {"quantization_config": quantised}))
    return twin
