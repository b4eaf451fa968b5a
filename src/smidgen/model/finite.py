"""Which tensor of a model holds numbers that are not finite.

Packed weights are not decoded to find that out when all is well: a pass through the model touches every one of them and
ends in logits that are not finite, and only then is looked for the tensor. Rows of an embedding that the pass does not
look up are not seen by it; see BlockMatrix.has_finite_scales.
"""

import torch
from torch import nn

from smidgen.quant.matrix import FrozenMatrix

__all__ = ["find_not_finite"]

_PANEL_WEIGHTS = 1 << 20


@torch.no_grad()
def find_not_finite(model: nn.Module) -> str | None:
    """The name of the first such parameter, in the order of the model; None if all numbers are finite."""
    for name, module in model.named_modules():
        if isinstance(module, FrozenMatrix):
            if not _is_finite(module):
                return name
            continue
        for key, tensor in (*module.named_parameters(recurse=False), *module.named_buffers(recurse=False)):
            if tensor.is_floating_point() and not bool(tensor.isfinite().all()):
                return f"{name}.{key}"
    return None


def _is_finite(matrix: FrozenMatrix) -> bool:
    rows, height = matrix.out_features, max(1, _PANEL_WEIGHTS // matrix.in_features)
    panels = ((start, min(start + height, rows)) for start in range(0, rows, height))
    return all(bool(matrix.rows(start, stop, torch.float32).isfinite().all()) for start, stop in panels)
