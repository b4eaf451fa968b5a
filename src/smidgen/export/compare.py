"""How far two models are apart: the same text through both."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from smidgen.data.render import IGNORED, Example
from smidgen.errors import RunError
from smidgen.export.adapter import read_adapter
from smidgen.lora.linear import LoraLinear, scaling_of
from smidgen.model.build import Base
from smidgen.model.pages import pages_given_back
from smidgen.model.trained import Adapters, TokenRows, learning_parts

__all__ = [
    "COMPARED_TOKENS",
    "Distance",
    "check_saved_adapter",
    "compare_models",
    "label_logits",
    "plain_example",
    "without_adapters",
]

_PROBED_TOKENS = 8
_MOST_POSITIONS = 256  # of labels that are compared
COMPARED_TOKENS = 64  # of a plain text, at most: all of it but for tokenizers of bytes

# Ordinary prose; any text of some length will do, it only has to be the same for both.
_TEXT = (
    "The lighthouse keeper wrote down the weather every morning: wind from the north-west, light rain, 12 degrees. "
    'He sent it as {"wind": "NW", "rain": true, "temperature": 12} to the harbour office, and then he made tea.'
)


@dataclass(frozen=True)
class Distance:
    """Between two models on the same tokens: mean KL divergence in nats, the largest difference of a logit, how often
    the top token agrees.
    """

    mean_kl: float
    max_logit_difference: float
    same_top_token: float

    @classmethod
    def between(cls, ours: torch.Tensor, theirs: torch.Tensor) -> "Distance":
        """Logits [positions, vocab_size], float32; the divergence is of `theirs` from `ours`."""
        log_p, log_q = ours.log_softmax(-1), theirs.log_softmax(-1)
        return cls(
            float((log_p.exp() * (log_p - log_q)).sum(-1).mean().clamp(min=0)),
            float((ours - theirs).abs().max()),
            float((ours.argmax(-1) == theirs.argmax(-1)).float().mean()),
        )


def plain_example(tokenizer: Any) -> Example:
    """A short text, all of it labels."""
    ids = tokenizer(_TEXT).input_ids
    return Example(ids, [IGNORED, *ids[1:]], truncated=False, where="plain text")


@torch.no_grad()
def label_logits(base: Base, examples: Sequence[Example]) -> torch.Tensor:
    """Logits float32 [positions, vocab_size] where the examples have labels, 256 of these positions at most."""
    found: list[torch.Tensor] = []
    count = 0
    for example in examples:
        labels = torch.tensor(example.labels[1:])
        places = (labels != IGNORED).nonzero().flatten()[: _MOST_POSITIONS - count]
        if len(places):
            hidden = base.hidden_of(torch.tensor([example.input_ids], device=base.device))[0]
            found.append(base.logits_of(hidden[places.to(hidden.device)]).float().cpu())
            count += len(places)
    return torch.cat(found)


@contextmanager
def without_adapters(base: Base) -> Iterator[None]:
    """The bare base for a while: its own layers stand where the adapters stood."""
    layers = learning_parts(base.model)
    try:
        for name, layer in layers.items():
            base.model.set_submodule(name, layer.bare() if isinstance(layer, TokenRows) else layer.base)
        yield
    finally:
        for name, layer in layers.items():
            base.model.set_submodule(name, layer)


@torch.no_grad()
def compare_models(first: Base, second: Base, tokenizer: Any) -> dict[str, float]:
    """Logits over a short text: the largest difference, mean KL divergence in nats, how often the top token agrees.

    Mapped pages leave the memory behind each layer.
    """
    ids = torch.tensor([plain_example(tokenizer).input_ids[:COMPARED_TOKENS]])
    ours, theirs = (_logits(base, ids) for base in (first, second))
    return asdict(Distance.between(ours, theirs))


def _logits(base: Base, ids: torch.Tensor) -> torch.Tensor:
    """ids int64 [1, T] -> float32 [T, vocab_size] on the CPU."""
    with pages_given_back(base.model, base.checkpoint):
        return base.logits_of(base.hidden_of(ids.to(base.device)))[0].float().cpu()


@torch.no_grad()
def check_saved_adapter(base: Base, adapters: Adapters, folder: Path) -> None:
    """Raise RunError unless the PEFT folder computes what the model does: its adapter is read again, put in the place
    of the one in memory for a moment, and the logits of a few tokens are compared.
    """
    stored = read_adapter(folder)
    ids = torch.arange(_PROBED_TOKENS, device=base.device)[None]
    ours = base.logits_of(base.hidden_of(ids)).float()
    scalings = {name: layer.scaling for name, layer in adapters.items() if isinstance(layer, LoraLinear)}
    kept = {name: {k: p.data for k, p in layer.trainable.items()} for name, layer in adapters.items()}
    try:
        for name, layer in adapters.items():
            parts = stored.parts_of(name)  # a layer that is missing adds nothing, as a reader sees it
            for part, parameter in layer.trainable.items():
                parameter.data = parts[part].to(base.device) if part in parts else torch.zeros_like(parameter)
            if parts and isinstance(layer, LoraLinear):
                kind = stored.kind_of(name)
                layer.scaling = scaling_of(kind["rank"], kind["alpha"], use_rslora=kind["use_rslora"])
            layer.train(layer.training)  # norms that were kept are of other numbers
        theirs = base.logits_of(base.hidden_of(ids)).float()
    finally:
        for name, layer in adapters.items():
            if isinstance(layer, LoraLinear):
                layer.scaling = scalings[name]
            for part, parameter in layer.trainable.items():
                parameter.data = kept[name][part]
            layer.train(layer.training)
    if not ours.isfinite().all():
        raise RunError("the model's logits are not finite: the adapter is not saved", cure="lower --learning-rate")
    # The numbers are the same, so are the operations; the room is for devices that sum in another order each time.
    if not torch.allclose(ours, theirs, rtol=1e-4, atol=1e-4 * float(ours.abs().max())):
        apart = f"logits {float((ours - theirs).abs().max()):.3g} apart"
        raise RunError(f"{folder}: the saved adapter computes something else than the model", found=apart)
