"""What layers keep for the backward pass, and what they compute again."""

from collections.abc import Sequence
from functools import partial

import torch
from torch.utils.checkpoint import checkpoint
from transformers.modeling_layers import GradientCheckpointingLayer

from smidgen.model.build import Base
from smidgen.model.fused import FusedLayer
from smidgen.model.segments import as_before
from smidgen.model.stream import layer_of
from smidgen.planning.estimate import RECOMPUTE

__all__ = ["set_recompute"]


def set_recompute(base: Base, modes: str | Sequence[str], activation_dtype: str = "auto") -> None:
    """'none', 'cheap' or 'full' for every layer, or one for each (model/fused.py).

    transformers' own layers take 'cheap' as 'none'. activation_dtype: of what fused layers keep; auto: that of the
    computation.
    """
    config = base.model.config.get_text_config()
    each = [modes] * config.num_hidden_layers if isinstance(modes, str) else list(modes)
    assert set(each) <= set(RECOMPUTE)
    kept_dtype = None if activation_dtype == "auto" else getattr(torch, activation_dtype)
    # set here, not by transformers' activation_checkpointing_enable: that knows no choice of layers, and has the
    # embedding's output want a gradient from then on
    again = partial(checkpoint, use_reentrant=False, context_fn=partial(as_before, config))
    for name, layer in base.model.named_modules():
        index = layer_of(f"{name}.")
        if index is None or index >= len(each):  # a tower that sees, beside the decoder
            continue
        if isinstance(layer, FusedLayer):
            layer.recompute, layer.kept_dtype = each[index], kept_dtype
        elif isinstance(layer, GradientCheckpointingLayer):
            layer.gradient_checkpointing = each[index] == "full"
            layer._gradient_checkpointing_func = again  # type: ignore[assignment]
