"""What layers keep for the backward pass, and what they compute again."""

from collections.abc import Sequence
from functools import partial

import torch
from transformers.modeling_layers import GradientCheckpointingLayer

from smidgen.model.build import Base
from smidgen.model.fused import FusedLayer
from smidgen.model.segments import as_before
from smidgen.planning.estimate import RECOMPUTE

__all__ = ["set_recompute"]


def set_recompute(base: Base, modes: str | Sequence[str], activation_dtype: str = "auto") -> None:
    """'none', 'cheap' or 'full' for every layer, or one for each (model/fused.py).

    Layers that are not fused take 'cheap' as 'none', and 'full' only together. activation_dtype: of what fused layers
    keep; auto: that of the computation.
    """
    layers = [module for module in base.model.modules() if isinstance(module, FusedLayer)]
    each = [modes] * max(1, len(layers)) if isinstance(modes, str) else list(modes)
    assert set(each) <= set(RECOMPUTE)
    kept_dtype = None if activation_dtype == "auto" else getattr(torch, activation_dtype)
    for layer, mode in zip(layers, each, strict=False):
        layer.recompute, layer.kept_dtype = mode, kept_dtype
    if not any(isinstance(module, GradientCheckpointingLayer) for module in base.model.modules()):
        return
    if "full" in each and not layers:
        attends = partial(as_before, base.model.config.get_text_config())
        base.model.activation_checkpointing_enable(
            activation_checkpointing_kwargs={"use_reentrant": False, "context_fn": attends}
        )
    else:
        base.model.activation_checkpointing_disable()
