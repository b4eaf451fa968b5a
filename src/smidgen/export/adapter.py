"""Adapters in and out, as PEFT folders (adapter_config.json, adapter_model.safetensors).

Tensor names: base_model.model.<module>.lora_A.weight [r, in_features] and .lora_B.weight [out_features, r], float32.
"""

import json
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from smidgen.errors import RunError
from smidgen.lora.attach import attach_lora
from smidgen.lora.linear import LoraLinear
from smidgen.model.build import Base

__all__ = ["ADAPTER_CONFIG", "ADAPTER_WEIGHTS", "is_adapter", "load_adapter", "read_adapter", "save_adapter"]

ADAPTER_CONFIG = "adapter_config.json"
ADAPTER_WEIGHTS = "adapter_model.safetensors"
_PREFIX = "base_model.model."


def is_adapter(path: Path) -> bool:
    """Is it a PEFT adapter folder, such as a run or one of its checkpoints?"""
    return (path / ADAPTER_CONFIG).is_file()


def save_adapter(folder: Path, base: Base, adapters: dict[str, LoraLinear], base_name: str) -> None:
    """Write both files into an existing folder. base_name: what `base_model_name_or_path` is to say.

    Raises RunError rather than write a number that is not finite.
    """
    tensors: dict[str, torch.Tensor] = {}
    for name, layer in adapters.items():
        tensors[f"{_PREFIX}{name}.lora_A.weight"] = layer.lora_A.detach().cpu().contiguous()
        tensors[f"{_PREFIX}{name}.lora_B.weight"] = layer.lora_B.detach().cpu().contiguous()
    broken = [name for name, tensor in tensors.items() if not tensor.isfinite().all()]
    if broken:
        raise RunError(f"{broken[0]} holds numbers that are not finite: not saved", cure="lower --learning-rate")
    save_file(tensors, folder / ADAPTER_WEIGHTS, metadata={"format": "pt"})
    config = _peft_config(base, adapters, base_name)
    (folder / ADAPTER_CONFIG).write_text(json.dumps(config, indent=2, sort_keys=True) + "\n", encoding="utf-8")


def _peft_config(base: Base, adapters: dict[str, LoraLinear], base_name: str) -> dict[str, Any]:
    first = next(iter(adapters.values()))
    return {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base_name,
        "r": first.rank,
        "lora_alpha": int(first.alpha) if float(first.alpha).is_integer() else first.alpha,
        "lora_dropout": first.dropout,
        "target_modules": _target_modules(list(adapters), base),
        "fan_in_fan_out": any(layer.base.transposed for layer in adapters.values()),
        "bias": "none",
        "use_rslora": first.use_rslora,
        "use_dora": False,
        "modules_to_save": None,
        "rank_pattern": {},
        "alpha_pattern": {},
        "init_lora_weights": True,
        "inference_mode": True,
    }


def _target_modules(names: list[str], base: Base) -> list[str]:
    """Last parts of the names where they pick exactly these layers (PEFT matches by suffix), else the full names."""
    last_parts = sorted({name.rsplit(".", 1)[-1] for name in names})
    matched = {name for name, _ in base.model.named_modules() if name.rsplit(".", 1)[-1] in last_parts}
    inside = {f"{name}.base" for name in names}  # our own wrapping, which PEFT will not see
    return last_parts if matched - inside == set(names) else sorted(names)


def read_adapter(folder: Path) -> tuple[dict[str, Any], dict[str, dict[str, torch.Tensor]]]:
    """(adapter_config, module name -> {'lora_A': [r, in], 'lora_B': [out, r]}).

    Raises RunError for anything that is not plain LoRA: it would be applied wrongly in silence.
    """
    try:
        config = json.loads((folder / ADAPTER_CONFIG).read_text(encoding="utf-8"))
        tensors = load_file(folder / ADAPTER_WEIGHTS)
    except FileNotFoundError as error:
        raise RunError(f"{folder}: {Path(str(error.filename)).name} is missing", cure="copy the whole folder") from None
    except (OSError, ValueError, SafetensorError) as error:
        raise RunError(f"{folder}: the adapter cannot be read ({str(error).splitlines()[0]})") from error
    unsupported = [key for key in ("use_dora", "alpha_pattern", "modules_to_save") if config.get(key)]
    if config.get("bias", "none") != "none":
        unsupported.append("bias")
    if config.get("peft_type") != "LORA" or unsupported:
        what = ", ".join(unsupported) or f"peft_type {config.get('peft_type')!r}"
        raise RunError(f"{folder}/{ADAPTER_CONFIG}: {what} is not supported", expected="plain LoRA")
    layers: dict[str, dict[str, torch.Tensor]] = {}
    for key, tensor in tensors.items():
        name, _, part = key.removesuffix(".weight").rpartition(".")
        if part not in ("lora_A", "lora_B") or not key.startswith(_PREFIX):
            raise RunError(f"{folder}/{ADAPTER_WEIGHTS}: unexpected tensor {key}", expected="lora_A and lora_B only")
        layers.setdefault(name.removeprefix(_PREFIX), {})[part] = tensor.float()
    halves = [name for name, parts in layers.items() if len(parts) != 2]
    if halves or not layers:
        raise RunError(f"{folder}/{ADAPTER_WEIGHTS}: lora_A or lora_B of {(halves or ['every layer'])[0]} is missing")
    return config, layers


def load_adapter(base: Base, folder: Path) -> dict[str, LoraLinear]:
    """Put the adapter of `folder` on the base. Raises RunError where it does not fit or would change nothing."""
    config, layers = read_adapter(folder)
    linears = base.linears
    foreign = [name for name in layers if name not in linears]
    if foreign:
        raise RunError(f"{folder}: the adapter is for another model, this one has no layer {foreign[0]}")
    for name, parts in layers.items():
        layer, rank = linears[name], parts["lora_A"].shape[0]
        expected = {"lora_A": (rank, layer.in_features), "lora_B": (layer.out_features, rank)}
        for part, shape in expected.items():
            if tuple(parts[part].shape) != shape:
                found = str(list(parts[part].shape))
                raise RunError(f"{folder}: {part} of {name}", expected=f"shape {list(shape)}", found=found)
    if not any(parts["lora_B"].any() for parts in layers.values()):
        raise RunError(f"{folder}: every lora_B is zero, the adapter would change nothing", cure="train it first")
    names = [name for name in linears if name in layers]
    attached: dict[str, LoraLinear] = {}
    for name in names:
        attached |= attach_lora(
            base.model,
            [name],
            rank=layers[name]["lora_A"].shape[0],
            alpha=float(config["lora_alpha"]),
            dropout=float(config.get("lora_dropout", 0)),
            seed=0,
            use_rslora=bool(config.get("use_rslora")),
        )
        with torch.no_grad():
            attached[name].lora_A.copy_(layers[name]["lora_A"])
            attached[name].lora_B.copy_(layers[name]["lora_B"])
    base.model.requires_grad_(False)
    return attached
