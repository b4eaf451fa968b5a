"""What layers keep for the backward pass, and what they compute again."""

from transformers.modeling_layers import GradientCheckpointingLayer

from smidgen.model.build import Base
from smidgen.model.fused import FusedLayer
from smidgen.plan.estimate import RECOMPUTE

__all__ = ["set_recompute"]


def set_recompute(base: Base, mode: str) -> None:
    """'none', 'cheap' or 'full' for every layer (model/fused.py). Layers that are not fused take 'cheap' as 'none'."""
    assert mode in RECOMPUTE
    own = False
    for module in base.model.modules():
        if isinstance(module, FusedLayer):
            module.recompute = mode
        own |= isinstance(module, GradientCheckpointingLayer)
    if not own:
        return
    if mode == "full":
        base.model.activation_checkpointing_enable(activation_checkpointing_kwargs={"use_reentrant": False})
    else:
        base.model.activation_checkpointing_disable()
