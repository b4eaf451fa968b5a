"""How far two models are apart: the same text through both."""

from typing import Any

import torch

from smidgen.model.build import Base

__all__ = ["compare_models"]

# Ordinary prose; any text of some length will do, it only has to be the same for both.
_TEXT = (
    "The lighthouse keeper wrote down the weather every morning: wind from the north-west, light rain, 12 degrees. "
    'He sent it as {"wind": "NW", "rain": true, "temperature": 12} to the harbour office, and then he made tea.'
)


@torch.no_grad()
def compare_models(first: Base, second: Base, tokenizer: Any) -> dict[str, float]:
    """Logits over a short text: the largest difference, mean KL divergence in nats, how often the top token agrees."""
    ids = torch.tensor([tokenizer(_TEXT).input_ids])
    ours = first.logits_of(first.hidden_of(ids.to(first.device)))[0].float().cpu()
    theirs = second.logits_of(second.hidden_of(ids.to(second.device)))[0].float().cpu()
    log_p, log_q = ours.log_softmax(-1), theirs.log_softmax(-1)
    return {
        "max_logit_difference": float((ours - theirs).abs().max()),
        "mean_kl": float((log_p.exp() * (log_p - log_q)).sum(-1).mean().clamp(min=0)),
        "same_top_token": float((ours.argmax(-1) == theirs.argmax(-1)).float().mean()),
    }
