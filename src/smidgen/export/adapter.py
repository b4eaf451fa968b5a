"""Adapters in and out, as PEFT folders (adapter_config.json, adapter_model.safetensors).

Tensor names: base_model.model.<module>.lora_A.weight [r, in_features], .lora_B.weight [out_features, r], and with DoRA
.lora_magnitude_vector [out_features]; of what learns beside them (model/trained.py) <module>.<parameter>, as the module
itself has it, and <module>.token_adapter.trainable_tokens_delta [tokens, hidden_size]; float32.

A weight that embedding and head share is written under both names, with ensure_weight_tying: PEFT wants both, and one
that does not know the word has two of the same numbers.
"""

import json
import re
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from smidgen.bounded import Failed, OutOfBounds, bounded
from smidgen.errors import RunError, first_line
from smidgen.export.files import read_object
from smidgen.export.peft_kinds import check_kind
from smidgen.lora.attach import attach_lora
from smidgen.lora.linear import LoraLinear
from smidgen.lora.targets import LARGEST_ALPHA, match_pattern
from smidgen.model.build import Base
from smidgen.model.trained import (
    DELTA,
    Adapters,
    Part,
    TokenRows,
    TrainedModule,
    attach_modules,
    attach_tokens,
    embedding_name,
    is_tied,
    trainable_names,
)

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
_TOKENS = f".token_adapter.{DELTA}"
_FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
_PIECE = 1 << 20  # numbers that are looked at at once


def is_adapter(path: Path) -> bool:
    """Is it a PEFT adapter folder, such as a run or one of its checkpoints?"""
    return (path / ADAPTER_CONFIG).is_file()


def save_adapter(folder: Path, base: Base, adapters: Adapters, base_name: str) -> None:
    """Write both files into an existing folder. base_name: what `base_model_name_or_path` is to say.

    Raises RunError rather than write a number that is not finite.
    """
    tensors: dict[str, torch.Tensor] = {}
    for name, layer in adapters.items():
        for part, parameter in layer.trainable.items():
            key = f"{_PREFIX}{name}{_TOKENS}" if part == DELTA else f"{_PREFIX}{name}.{part}"
            if isinstance(layer, LoraLinear) and part != _MAGNITUDE:
                key += ".weight"
            tensors[key] = parameter.detach().cpu().contiguous()
    if _shares_trained(base, adapters):
        tensors[f"{_PREFIX}{base.head_name}.weight"] = tensors[f"{_PREFIX}{embedding_name(base)}.weight"].clone()
    broken = [name for name, tensor in tensors.items() if not tensor.isfinite().all()]
    if broken:
        raise RunError(f"{broken[0]} holds numbers that are not finite: not saved", cure="lower --learning-rate")
    save_file(tensors, folder / ADAPTER_WEIGHTS, metadata={"format": "pt"})
    config = _peft_config(base, adapters, base_name)
    (folder / ADAPTER_CONFIG).write_text(json.dumps(config, indent=2, sort_keys=True) + "\n", encoding="utf-8")


def _shares_trained(base: Base, adapters: Adapters) -> bool:
    """Whether embedding and head are trained whole as one weight."""
    return is_tied(base) and isinstance(adapters.get(embedding_name(base)), TrainedModule)


def _peft_config(base: Base, adapters: Adapters, base_name: str) -> dict[str, Any]:
    loras = {name: layer for name, layer in adapters.items() if isinstance(layer, LoraLinear)}
    first = next(iter(loras.values()))
    rank, rank_pattern = _with_exceptions({name: layer.rank for name, layer in loras.items()})
    alpha, alpha_pattern = _with_exceptions({name: _number(layer.alpha) for name, layer in loras.items()})
    return {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base_name,
        "r": rank,
        "lora_alpha": alpha,
        "lora_dropout": first.dropout,
        "target_modules": _target_modules(list(loras), base),
        "fan_in_fan_out": any(layer.base.transposed for layer in loras.values()),
        "bias": "none",
        "use_rslora": first.use_rslora,
        "use_dora": first.use_dora,
        "rank_pattern": rank_pattern,
        "alpha_pattern": alpha_pattern,
        "init_lora_weights": True,
        "inference_mode": True,
    } | _beside_lora(base, adapters)


def _beside_lora(base: Base, adapters: Adapters) -> dict[str, Any]:
    modules = [name for name, part in adapters.items() if isinstance(part, TrainedModule)]
    tokens = {name: part.token_ids.tolist() for name, part in adapters.items() if isinstance(part, TokenRows)}
    said: dict[str, Any] = {"modules_to_save": None}
    if _shares_trained(base, adapters):
        modules.append(base.head_name)
        said["ensure_weight_tying"] = True
    if modules:
        said["modules_to_save"] = _shortest(modules, base, str.endswith)
    if tokens:
        said["trainable_token_indices"] = tokens
    return said


def _with_exceptions(values: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
    """The most frequent value, and full name -> value of the layers that have another (PEFT's *_pattern)."""
    usual = Counter(values.values()).most_common(1)[0][0]
    return usual, {name: value for name, value in values.items() if value != usual}


def _number(alpha: float) -> float:
    return int(alpha) if float(alpha).is_integer() else alpha


def _target_modules(names: list[str], base: Base) -> list[str]:
    return _shortest(names, base, lambda name, last_part: name.rsplit(".", 1)[-1] == last_part)


def _shortest(names: list[str], base: Base, matches: Callable[[str, str], bool]) -> list[str]:
    """Last parts of the names where PEFT takes exactly these modules for them (rule `matches`), else the names."""
    last_parts = sorted({name.rsplit(".", 1)[-1] for name in names})
    theirs = [
        name for name, _ in base.model.named_modules() if not re.search(r"\.base(\.|$)", name)
    ]  # not our wrapping
    matched = {name for name in theirs if any(matches(name, part) for part in last_parts)}
    return last_parts if matched == set(names) else sorted(names)


@dataclass(frozen=True)
class StoredAdapter:
    """An adapter as its folder holds it. config: adapter_config.json.

    layers: module name -> {'lora_A': [r, in_features], 'lora_B': [out_features, r]}, float32, and with DoRA
    'lora_magnitude_vector': [out_features].
    modules: module name -> its parameters, trained whole, or {'trainable_tokens_delta': [n, hidden_size]}; float32.
    """

    folder: Path
    config: dict[str, Any]
    layers: dict[str, dict[str, torch.Tensor]]
    modules: dict[str, dict[str, torch.Tensor]] = field(default_factory=dict)

    def parts_of(self, name: str) -> dict[str, torch.Tensor]:
        """Everything that is stored for a module; nothing for one that has nothing."""
        return self.layers.get(name) or self.modules.get(name) or {}

    @property
    def nbytes(self) -> int:
        """Of all that it holds."""
        every = [*self.layers.values(), *self.modules.values()]
        return sum(tensor.nbytes for parts in every for tensor in parts.values())

    @property
    def keeps_tied(self) -> bool:
        """Whether a weight that embedding and head share was trained as one."""
        return bool(self.config.get("ensure_weight_tying"))

    @property
    def whole_modules(self) -> list[str]:
        return [name for name, parts in self.modules.items() if DELTA not in parts]

    @property
    def token_ids(self) -> dict[str, list[int]]:
        """Of the tokens whose rows were trained, by the modules whose rows they are. Raises RunError if unreadable."""
        said = self.config.get("trainable_token_indices")
        found: dict[str, list[int]] = {}
        for name, parts in self.modules.items():
            if DELTA not in parts:
                continue
            by_key = {name: said} if isinstance(said, list) else said  # a list means the embedding's
            ids = (
                next((by_key[key] for key in by_key if name.endswith(key)), None) if isinstance(by_key, dict) else None
            )
            count = len(parts[DELTA])
            if not isinstance(ids, list) or not all(map(_is_id, ids)) or not len(set(ids)) == len(ids) == count:
                raise RunError(
                    f"{self.folder}/{ADAPTER_CONFIG}: wrong trainable_token_indices",
                    expected=f"{count} different token ids for {name}",
                    found=str(said)[:60],
                )
            found[name] = ids
        return found

    @property
    def dropout(self) -> float:
        dropout = float(self.config.get("lora_dropout") or 0.0)
        if not 0.0 <= dropout < 1.0:
            raise ValueError(f"lora_dropout is {dropout}")
        return dropout

    def kind_of(self, name: str) -> dict[str, Any]:
        """What a layer's adapter is made with, as the arguments of LoraLinear: rank, alpha, use_rslora, use_dora."""
        alphas = self.config.get("alpha_pattern") or {}
        key = match_pattern(alphas, name)
        alpha = float(self.config["lora_alpha"] if key is None else alphas[key])
        if not abs(alpha) <= LARGEST_ALPHA:
            raise ValueError(f"alpha is {alpha:g}, beyond float32")
        return {
            "rank": self.layers[name]["lora_A"].shape[0],
            "alpha": alpha,
            "use_rslora": bool(self.config.get("use_rslora")),
            "use_dora": bool(self.config.get("use_dora")),
        }

    def kinds(self) -> str:
        """Of all layers, to look at; raises whatever comes of a config that cannot be read."""
        return str([self.dropout, *map(self.kind_of, self.layers)])

    def check_base(self, base: Base, *, is_start: bool = False) -> None:
        """Raises RunError where a layer is missing from the bare base, or has another shape there; where training is to
        start from it, also if it parted embedding and head.
        """
        linears, trainable = base.linears, trainable_names(base.model)
        foreign = [name for name in self.layers if name not in linears]
        foreign += [name for name in self.modules if name not in {name for name, _ in base.model.named_modules()}]
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

        if unknown := [name for name in self.modules if name not in trainable]:
            raise RunError(
                f"{self.folder}: {unknown[0]} is trained whole, which is not known here",
                expected="embeddings, head and norms",
            )
        parted = {base.head_name, embedding_name(base)} & set(self.whole_modules) and not self.keeps_tied
        if is_start and parted and is_tied(base):
            raise RunError(f"{self.folder}: embedding and head of this model are one, the adapter trained them as two")
        rows = {name: (len(ids), base.head.in_features) for name, ids in self.token_ids.items()}
        for name, parts in self.modules.items():
            module: Any = base.model.get_submodule(name)
            for part, tensor in parts.items():
                shape = rows.get(name) or _shape_of(module, part)
                if tuple(tensor.shape) != shape:
                    raise RunError(
                        f"{self.folder}: {part} of {name}",
                        expected=f"shape {list(shape)}",
                        found=str(list(tensor.shape)),
                    )

    @torch.no_grad()
    def copy_into(self, adapters: Adapters) -> None:
        """Its numbers into adapters that are there. Raises RunError where those are on other layers or of another kind
        (rank, alpha, ...); the line says what to set.
        """
        loras = {name: layer for name, layer in adapters.items() if isinstance(layer, LoraLinear)}
        wrong = [] if self.layers.keys() == loras.keys() else ["targets"]
        if not wrong:
            kinds = [(layer, self.kind_of(name)) for name, layer in loras.items()]
            wrong = [key for key in kinds[0][1] if any(getattr(layer, key) != kind[key] for layer, kind in kinds)]
        wrong += self._differing_modules(adapters)
        if wrong:
            cure = f"take the adapter's own: {self._flags()}"
            raise RunError(f"{self.folder}: the adapter and the settings differ in {', '.join(wrong)}", cure=cure)
        for name, layer in adapters.items():
            for part, parameter in layer.trainable.items():
                parameter.copy_(self.parts_of(name)[part])

    def _differing_modules(self, adapters: Adapters) -> list[str]:
        """'modules_to_save', 'new_tokens': which of them the settings have otherwise."""
        wrong = []
        whole = {name for name, part in adapters.items() if isinstance(part, TrainedModule)}
        extra = set(self.whole_modules) - whole  # a tied head is stored too
        if not whole <= set(self.whole_modules) or (extra and not (self.keeps_tied and len(extra) == 1)):
            wrong.append("modules_to_save")
        tokens = {name: part.token_ids.tolist() for name, part in adapters.items() if isinstance(part, TokenRows)}
        if tokens != self.token_ids:
            wrong.append("new_tokens")
        return wrong

    def _flags(self) -> str:
        """The flags of `smidgen finetune` that make the same adapters, shortened where there are patterns."""
        targets = self.config.get("target_modules")
        names = targets if isinstance(targets, list) else list(self.layers)
        flags = [f"--targets {','.join(map(str, names))}", f"--rank {self.config.get('r')}"]
        flags.append(f"--alpha {self.config['lora_alpha']}")
        flags += [f"--{key.replace('_', '-')}" for key in ("use_rslora", "use_dora") if self.config.get(key)]
        flags += [f"--modules-to-save {','.join(self.whole_modules)}"] if self.whole_modules else []
        tokens = max(map(len, self.token_ids.values()), default=0)
        flags += [f"--new-tokens with its {tokens} tokens"] if tokens else []
        patterns = [key for key in ("rank_pattern", "alpha_pattern") if self.config.get(key)]
        return " ".join(flags) + (f", and the {' and '.join(patterns)} of its {ADAPTER_CONFIG}" if patterns else "")


def read_adapter(folder: Path) -> StoredAdapter:
    """Raises RunError for anything that is not LoRA of a kind known here: it would be applied wrongly in silence."""
    try:
        config = read_object(folder / ADAPTER_CONFIG)
        tensors = load_file(folder / ADAPTER_WEIGHTS)
    except FileNotFoundError as error:
        raise RunError(f"{folder}: {Path(str(error.filename)).name} is missing", cure="copy the whole folder") from None
    except (OSError, ValueError, SafetensorError) as error:
        raise RunError(f"{folder}: the adapter cannot be read ({first_line(error)})") from error
    check_kind(config, f"{folder}/{ADAPTER_CONFIG}")
    parts = ("lora_A", "lora_B", _MAGNITUDE) if config.get("use_dora") else ("lora_A", "lora_B")
    layers: dict[str, dict[str, torch.Tensor]] = {}
    modules: dict[str, dict[str, torch.Tensor]] = {}
    for key, tensor in tensors.items():
        name, _, part = key.removesuffix(".weight").rpartition(".")
        _check_tensor(f"{folder}/{ADAPTER_WEIGHTS}: {key}", tensor, is_matrix=part in ("lora_A", "lora_B", DELTA))
        if not key.startswith(_PREFIX):
            known = False
        elif known := part in parts:
            layers.setdefault(name.removeprefix(_PREFIX), {})[part] = tensor.float()
        elif known := key.endswith(_TOKENS) and bool(config.get("trainable_token_indices")):
            modules.setdefault(key.removeprefix(_PREFIX).removesuffix(_TOKENS), {})[DELTA] = tensor.float()
        elif known := bool(config.get("modules_to_save")) and "lora_" not in key:
            name, _, part = key.removeprefix(_PREFIX).rpartition(".")
            modules.setdefault(name, {})[part] = tensor.float()
        if not known:
            raise RunError(f"{folder}/{ADAPTER_WEIGHTS}: unexpected tensor {key}", expected=f"{', '.join(parts)} only")
    halves = [name for name, found in layers.items() if len(found) != len(parts)]
    if halves or not layers:
        first = (halves or ["every layer"])[0]
        raise RunError(f"{folder}/{ADAPTER_WEIGHTS}: {' or '.join(parts)} of {first} is missing")
    stored = StoredAdapter(folder, config, layers, modules)
    try:
        if config.get("alpha_pattern"):  # its keys are regular expressions, which may take exponential time
            with bounded(lambda _: stored.kinds()) as try_out:
                try_out(None)
        stored.kinds()
    except (Failed, OutOfBounds, KeyError, TypeError, ValueError, AttributeError, OverflowError) as error:
        what = f"{folder}/{ADAPTER_CONFIG}: lora_alpha, alpha_pattern or lora_dropout cannot be read ({error})"
        raise RunError(what) from error
    return stored


def _check_tensor(what: str, tensor: torch.Tensor, *, is_matrix: bool) -> None:
    if is_matrix and (tensor.dim() != 2 or not tensor.numel()):
        raise RunError(what, expected="a matrix, of rank 1 at least", found=f"shape {list(tensor.shape)}")
    if tensor.dtype not in _FLOATS:
        raise RunError(what, expected="floats of 16 to 64 bits", found=str(tensor.dtype).removeprefix("torch."))
    if not all(bool(piece.isfinite().all()) for piece in tensor.flatten().split(_PIECE)):
        raise RunError(f"{what} holds numbers that are not finite", cure="take an earlier checkpoint, or copy it again")


def _is_id(number: Any) -> bool:
    return type(number) is int and number >= 0


def _shape_of(module: Any, part: str) -> tuple[int, ...]:
    """Of a parameter of a bare base's embedding, head or norm; () where there is none of that name."""
    parameter = getattr(module, part, None)
    if part == "weight" and not isinstance(parameter, torch.Tensor):
        return (parameter.out_features, parameter.in_features)  # type: ignore[union-attr]
    return tuple(parameter.shape) if isinstance(parameter, torch.Tensor) else ()


def load_adapter(base: Base, folder: Path) -> Adapters:
    """Put the adapter of `folder` on the base. Raises RunError where it does not fit or would change nothing."""
    stored = read_adapter(folder)
    stored.check_base(base)
    token_ids = stored.token_ids
    attached: dict[str, Part] = {}
    for name in [name for name in base.linears if name in stored.layers]:
        attached |= attach_lora(base.model, [name], dropout=stored.dropout, seed=0, **stored.kind_of(name))
    attached |= attach_modules(base, stored.whole_modules, keep_tied=stored.keeps_tied)
    attached |= attach_tokens(base, token_ids) if token_ids else {}
    stored.copy_into(attached)
    if all(isinstance(part, LoraLinear) and part.changes_nothing() for part in attached.values()):
        what = f"{folder}: the adapter would change nothing, lora_A, lora_B or alpha of every layer is zero"
        raise RunError(what, cure="train it first")
    base.model.requires_grad_(False)
    return attached
