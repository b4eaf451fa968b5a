"""Adapters in and out, as PEFT folders (adapter_config.json, adapter_model.safetensors).

Tensor names: base_model.model.<module>.lora_A.weight [r, in_features], .lora_B.weight [out_features, r], and with DoRA
.lora_magnitude_vector [out_features]; float32.
"""

import json
import re
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from smidgen.errors import RunError
from smidgen.lora.attach import attach_lora
from smidgen.lora.linear import LoraLinear
from smidgen.lora.targets import match_pattern
from smidgen.model.build import Base

__all__ = [
    "ADAPTER_CONFIG",
    "ADAPTER_WEIGHTS",
    "StoredAdapter",
    "is_adapter",
    "load_adapter",
    "read_adapter",
    "save_adapter",
]

ADAPTER_CONFIG = "adapter_config.json"
ADAPTER_WEIGHTS = "adapter_model.safetensors"
_PREFIX = "base_model.model."
_MAGNITUDE = "lora_magnitude_vector"


def is_adapter(path: Path) -> bool:
    """Is it a PEFT adapter folder, such as a run or one of its checkpoints?"""
    return (path / ADAPTER_CONFIG).is_file()


def save_adapter(folder: Path, base: Base, adapters: dict[str, LoraLinear], base_name: str) -> None:
    """Write both files into an existing folder. base_name: what `base_model_name_or_path` is to say.

    Raises RunError rather than write a number that is not finite.
    """
    tensors: dict[str, torch.Tensor] = {}
    for name, layer in adapters.items():
        for part, parameter in layer.trainable.items():
            suffix = "" if part == _MAGNITUDE else ".weight"
            tensors[f"{_PREFIX}{name}.{part}{suffix}"] = parameter.detach().cpu().contiguous()
    broken = [name for name, tensor in tensors.items() if not tensor.isfinite().all()]
    if broken:
        raise RunError(f"{broken[0]} holds numbers that are not finite: not saved", cure="lower --learning-rate")
    save_file(tensors, folder / ADAPTER_WEIGHTS, metadata={"format": "pt"})
    config = _peft_config(base, adapters, base_name)
    (folder / ADAPTER_CONFIG).write_text(json.dumps(config, indent=2, sort_keys=True) + "\n", encoding="utf-8")


def _peft_config(base: Base, adapters: dict[str, LoraLinear], base_name: str) -> dict[str, Any]:
    first = next(iter(adapters.values()))
    rank, rank_pattern = _with_exceptions({name: layer.rank for name, layer in adapters.items()})
    alpha, alpha_pattern = _with_exceptions({name: _number(layer.alpha) for name, layer in adapters.items()})
    return {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base_name,
        "r": rank,
        "lora_alpha": alpha,
        "lora_dropout": first.dropout,
        "target_modules": _target_modules(list(adapters), base),
        "fan_in_fan_out": any(layer.base.transposed for layer in adapters.values()),
        "bias": "none",
        "use_rslora": first.use_rslora,
        "use_dora": first.use_dora,
        "modules_to_save": None,
        "rank_pattern": rank_pattern,
        "alpha_pattern": alpha_pattern,
        "init_lora_weights": True,
        "inference_mode": True,
    }


def _with_exceptions(values: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
    """The most frequent value, and full name -> value of the layers that have another (PEFT's *_pattern)."""
    usual = Counter(values.values()).most_common(1)[0][0]
    return usual, {name: value for name, value in values.items() if value != usual}


def _number(alpha: float) -> float:
    return int(alpha) if float(alpha).is_integer() else alpha


def _target_modules(names: list[str], base: Base) -> list[str]:
    """Last parts of the names where they pick exactly these layers (PEFT matches by suffix), else the full names."""
    last_parts = sorted({name.rsplit(".", 1)[-1] for name in names})
    matched = {name for name, _ in base.model.named_modules() if name.rsplit(".", 1)[-1] in last_parts}
    inside = {f"{name}.base" for name in names}  # our own wrapping, which PEFT will not see
    return last_parts if matched - inside == set(names) else sorted(names)


@dataclass(frozen=True)
class StoredAdapter:
    """An adapter as its folder holds it. config: adapter_config.json.

    layers: module name -> {'lora_A': [r, in_features], 'lora_B': [out_features, r]}, float32, and with DoRA
    'lora_magnitude_vector': [out_features].
    """

    folder: Path
    config: dict[str, Any]
    layers: dict[str, dict[str, torch.Tensor]]

    def kind_of(self, name: str) -> dict[str, Any]:
        """What a layer's adapter is made with, as the arguments of LoraLinear: rank, alpha, use_rslora, use_dora."""
        alphas = self.config.get("alpha_pattern") or {}
        key = match_pattern(alphas, name)
        return {
            "rank": self.layers[name]["lora_A"].shape[0],
            "alpha": float(self.config["lora_alpha"] if key is None else alphas[key]),
            "use_rslora": bool(self.config.get("use_rslora")),
            "use_dora": bool(self.config.get("use_dora")),
        }

    def check_base(self, base: Base) -> None:
        """Raises RunError where a layer is missing from the bare base, or has another shape there."""
        linears = base.linears
        foreign = [name for name in self.layers if name not in linears]
        if foreign:
            raise RunError(f"{self.folder}: the adapter is for another model, this one has no layer {foreign[0]}")
        for name, parts in self.layers.items():
            layer, rank = linears[name], parts["lora_A"].shape[0]
            expected = {
                "lora_A": (rank, layer.in_features),
                "lora_B": (layer.out_features, rank),
                _MAGNITUDE: (layer.out_features,),
            }
            for part, tensor in parts.items():
                shape = expected[part]
                if tuple(tensor.shape) != shape:
                    found = str(list(tensor.shape))
                    raise RunError(f"{self.folder}: {part} of {name}", expected=f"shape {list(shape)}", found=found)

    @torch.no_grad()
    def copy_into(self, adapters: dict[str, LoraLinear]) -> None:
        """Its numbers into adapters that are there. Raises RunError where those are on other layers or of another kind
        (rank, alpha, ...); the line says what to set.
        """
        wrong = [] if self.layers.keys() == adapters.keys() else ["targets"]
        if not wrong:
            kinds = [(layer, self.kind_of(name)) for name, layer in adapters.items()]
            wrong = [key for key in kinds[0][1] if any(getattr(layer, key) != kind[key] for layer, kind in kinds)]
        if wrong:
            cure = f"take the adapter's own: {self._flags()}"
            raise RunError(f"{self.folder}: the adapter and the settings differ in {', '.join(wrong)}", cure=cure)
        for name, layer in adapters.items():
            for part, tensor in self.layers[name].items():
                getattr(layer, part).copy_(tensor)

    def _flags(self) -> str:
        """The flags of `smidgen finetune` that make the same adapters, shortened where there are patterns."""
        targets = self.config.get("target_modules")
        names = targets if isinstance(targets, list) else list(self.layers)
        flags = [f"--targets {','.join(map(str, names))}", f"--rank {self.config.get('r')}"]
        flags.append(f"--alpha {self.config['lora_alpha']}")
        flags += [f"--{key.replace('_', '-')}" for key in ("use_rslora", "use_dora") if self.config.get(key)]
        patterns = [key for key in ("rank_pattern", "alpha_pattern") if self.config.get(key)]
        return " ".join(flags) + (f", and the {' and '.join(patterns)} of its {ADAPTER_CONFIG}" if patterns else "")


def read_adapter(folder: Path) -> StoredAdapter:
    """Raises RunError for anything that is not LoRA of a kind known here: it would be applied wrongly in silence."""
    try:
        config = json.loads((folder / ADAPTER_CONFIG).read_text(encoding="utf-8"))
        tensors = load_file(folder / ADAPTER_WEIGHTS)
    except FileNotFoundError as error:
        raise RunError(f"{folder}: {Path(str(error.filename)).name} is missing", cure="copy the whole folder") from None
    except (OSError, ValueError, SafetensorError) as error:
        raise RunError(f"{folder}: the adapter cannot be read ({str(error).splitlines()[0]})") from error
    unsupported = [key for key in ("modules_to_save",) if config.get(key)]
    if config.get("bias", "none") != "none":
        unsupported.append("bias")
    if config.get("peft_type") != "LORA" or unsupported:
        what = ", ".join(unsupported) or f"peft_type {config.get('peft_type')!r}"
        raise RunError(f"{folder}/{ADAPTER_CONFIG}: {what} is not supported", expected="LoRA, rsLoRA or DoRA")
    parts = ("lora_A", "lora_B", _MAGNITUDE) if config.get("use_dora") else ("lora_A", "lora_B")
    layers: dict[str, dict[str, torch.Tensor]] = {}
    for key, tensor in tensors.items():
        name, _, part = key.removesuffix(".weight").rpartition(".")
        if part not in parts or not key.startswith(_PREFIX):
            raise RunError(f"{folder}/{ADAPTER_WEIGHTS}: unexpected tensor {key}", expected=f"{', '.join(parts)} only")
        layers.setdefault(name.removeprefix(_PREFIX), {})[part] = tensor.float()
    halves = [name for name, found in layers.items() if len(found) != len(parts)]
    if halves or not layers:
        first = (halves or ["every layer"])[0]
        raise RunError(f"{folder}/{ADAPTER_WEIGHTS}: {' or '.join(parts)} of {first} is missing")
    stored = StoredAdapter(folder, config, layers)
    try:
        for name in layers:
            stored.kind_of(name)
    except (KeyError, TypeError, ValueError, AttributeError, re.error) as error:
        raise RunError(f"{folder}/{ADAPTER_CONFIG}: lora_alpha or alpha_pattern cannot be read ({error})") from error
    return stored


def load_adapter(base: Base, folder: Path) -> dict[str, LoraLinear]:
    """Put the adapter of `folder` on the base. Raises RunError where it does not fit or would change nothing."""
    stored = read_adapter(folder)
    stored.check_base(base)
    if not stored.config.get("use_dora") and not any(parts["lora_B"].any() for parts in stored.layers.values()):
        raise RunError(f"{folder}: every lora_B is zero, the adapter would change nothing", cure="train it first")
    dropout = float(stored.config.get("lora_dropout", 0))
    attached: dict[str, LoraLinear] = {}
    for name in [name for name in base.linears if name in stored.layers]:
        attached |= attach_lora(base.model, [name], dropout=dropout, seed=0, **stored.kind_of(name))
    stored.copy_into(attached)
    base.model.requires_grad_(False)
    return attached
