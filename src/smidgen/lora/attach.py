"""Put adapters on the chosen linear layers of a model."""

import torch
from torch import nn

from smidgen.lora.linear import LoraLinear

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
) -> dict[str, LoraLinear]:
    """Replace each named layer by a LoraLinear over it; returns name -> adapter in the given order.

    A is drawn from `seed` in the order of `names`, so the same settings give the same adapter. Parameters of the base
    that still require a gradient are frozen.
    """
    model.requires_grad_(False)
    generator = torch.Generator().manual_seed(seed)
    attached: dict[str, LoraLinear] = {}
    for name in names:
        layer = LoraLinear(model.get_submodule(name), rank, alpha, dropout, use_rslora=use_rslora)
        layer.initialise(generator)
        model.set_submodule(name, layer)
        attached[name] = layer
    return attached


def adapters(model: nn.Module) -> dict[str, LoraLinear]:
    """Name -> adapter of every LoraLinear in the model, in its order."""
    return {name: module for name, module in model.named_modules() if isinstance(module, LoraLinear)}
