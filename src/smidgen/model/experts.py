"""A mixture's experts, packed one by one.

transformers 5 keeps the experts of a layer as two 3-D parameters, gate_up_proj [E, 2 I, H] and down_proj [E, H, I], not
as linear layers. `PackedExperts` stands in their place with the same arguments and computes the same sum, each expert's
two matrices frozen and packed. Checkpoints that were packed expert by expert have gate and up as two matrices, which
stay two.
"""

import torch
from torch import nn

from smidgen.quant.linear import frozen_matmul
from smidgen.quant.matrix import FrozenMatrix

__all__ = ["PackedExperts", "is_experts"]


def is_experts(module: nn.Module) -> bool:
    """Does the module hold experts in the layout above, and nothing else?"""
    parameters = dict(module.named_parameters(recurse=False))
    return (
        set(parameters) == {"gate_up_proj", "down_proj"}
        and all(parameter.dim() == 3 for parameter in parameters.values())
        and parameters["gate_up_proj"].shape[1] == 2 * parameters["down_proj"].shape[2]
        and isinstance(getattr(module, "act_fn", None), nn.Module)
    )


class PackedExperts(nn.Module):
    """gate_up: for each expert its matrices with together [2 I, H], gate rows first: one, or gate and up apart.

    down: E matrices [H, I]. act_fn: the gate's activation.
    """

    def __init__(self, gate_up: list[list[FrozenMatrix]], down: list[FrozenMatrix], act_fn: nn.Module) -> None:
        super().__init__()
        self.gate_up = nn.ModuleList([nn.ModuleList(parts) for parts in gate_up])
        self.down, self.act_fn = nn.ModuleList(down), act_fn

    def forward(
        self, hidden_states: torch.Tensor, top_k_index: torch.Tensor, top_k_weights: torch.Tensor
    ) -> torch.Tensor:
        """hidden_states [tokens, H], top_k_index and top_k_weights [tokens, k] -> [tokens, H]."""
        output = torch.zeros_like(hidden_states)
        for expert in top_k_index.unique().tolist():
            if not 0 <= expert < len(self.gate_up):
                continue
            tokens, slots = torch.where(top_k_index == expert)
            x, parts = hidden_states[tokens], self.gate_up[expert]
            products = [frozen_matmul(x, part) for part in parts]  # type: ignore[arg-type, attr-defined]
            gate, up = products if len(products) == 2 else products[0].chunk(2, dim=-1)
            expert_output = frozen_matmul(self.act_fn(gate) * up, self.down[expert])  # type: ignore[arg-type]
            weighted = expert_output * top_k_weights[tokens, slots, None].to(output.dtype)
            output = output.index_add(0, tokens, weighted.to(output.dtype))
        return output
