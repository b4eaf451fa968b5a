"""Put adapters on the chosen linear layers of a model."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from smidgen.lora.linear import LoraLinear
from smidgen.lora.targets import match_pattern

__all__ = ["adapters", "attach_lora"]


def attach_lora(
    model: nn.Module,
    names: list[str],
    *,
    rank: int,
    alpha: float,
    dropout: float,
    seed: int,
    use_rslora: bool = False,
    use_dora: bool = False,
    rank_pattern: Mapping[str, int] | None = None,
    alpha_pattern: Mapping[str, float] | None = None,
) -> dict[str, LoraLinear]:
    """Replace each named layer by a LoraLinear over it; returns name -> adapter in the given order.

    rank_pattern, alpha_pattern: for the layers that they match (targets.match_pattern) instead of rank and alpha.
    A is drawn from `seed` in the order of `names`, so the same settings give the same adapter. Parameters of the base
    that still require a gradient are frozen.
    """
    model.requires_grad_(False)
    generator = torch.Generator().manual_seed(seed)
    device = next(model.parameters()).device  # of norms: packed weights may be away for the time being
    attached: dict[str, LoraLinear] = {}
    for name in names:
        layer = LoraLinear(
            model.get_submodule(name),
            _value(rank_pattern or {}, name, rank),
            _value(alpha_pattern or {}, name, alpha),
            dropout,
            device=device,
            use_rslora=use_rslora,
            use_dora=use_dora,
        )
        layer.initialise(generator)
        model.set_submodule(name, layer)
        attached[name] = layer
    return attached


def _value(patterns: Mapping[str, Any], name: str, default: Any) -> Any:
    key = match_pattern(patterns, name)
    return default if key is None else patterns[key]


def adapters(model: nn.Module) -> dict[str, LoraLinear]:
    """Name -> adapter of every LoraLinear in the model, in its order."""
    return {name: module for name, module in model.named_modules() if isinstance(module, LoraLinear)}
