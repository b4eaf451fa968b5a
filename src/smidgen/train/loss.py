"""Cross-entropy over the labelled positions, a chunk of logits at a time.

Logits are the largest thing a small model makes: 49,152 floats a position. The head is therefore applied only where
there is a label, to a chunk of positions at once, and the gradient of the hidden states is taken on the spot, so that
no more than one chunk of logits ever exists. The result equals the loss over full logits.
"""

import math
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F

from smidgen.data.batch import Batch
from smidgen.kernels.elementwise import cross_entropy_
from smidgen.model.build import Base

__all__ = ["batch_loss", "chunked_cross_entropy"]

_CHUNK_LOGITS = 1 << 25  # 128 MiB of float32: 682 positions of 49,152 classes


class _ChunkedCrossEntropy(torch.autograd.Function):
    """Summed loss; the gradients of hidden states and head parameters are computed in the forward pass."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden: torch.Tensor,
        targets: torch.Tensor,
        logits_of: Callable[[torch.Tensor], torch.Tensor],
        chunk: int,
        weights: torch.Tensor | None,
        *parameters: torch.Tensor,
    ) -> torch.Tensor:
        wants_grad = any(ctx.needs_input_grad)
        total = torch.zeros((), dtype=torch.float32, device=hidden.device)
        grad_hidden = torch.zeros_like(hidden) if wants_grad else None
        grads = [torch.zeros_like(parameter) for parameter in parameters]
        for start in range(0, hidden.shape[0], chunk):
            part = hidden[start : start + chunk].detach().requires_grad_(wants_grad)
            with torch.set_grad_enabled(wants_grad):
                logits = logits_of(part)
            # The gradient takes the logits' place: no operation that `logits_of` ends with needs its result again.
            gradient = logits.detach()
            losses = cross_entropy_(gradient, targets[start : start + chunk], backward=wants_grad)
            if weights is not None:
                losses = losses * weights[start : start + chunk]
                gradient *= weights[start : start + chunk, None]
            total += losses.sum()
            if grad_hidden is not None:
                grad_part, *grad_parameters = torch.autograd.grad(logits, [part, *parameters], gradient)
                grad_hidden[start : start + chunk] = grad_part
                for grad, more in zip(grads, grad_parameters, strict=True):
                    grad += more
        if grad_hidden is not None:
            ctx.save_for_backward(grad_hidden, *grads)
        return total

    @staticmethod
    def backward(ctx: Any, *grad_outputs: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        grad_hidden, *grads = ctx.saved_tensors
        scale = grad_outputs[0]
        return grad_hidden * scale, None, None, None, None, *(grad * scale for grad in grads)


def chunked_cross_entropy(
    base: Base,
    hidden: torch.Tensor,
    targets: torch.Tensor,
    chunk: int | None = None,
    weights: torch.Tensor | None = None,
) -> torch.Tensor:
    """Last hidden states [M, hidden_size], targets [M] -> the summed loss, a float32 scalar.

    chunk: positions at once; by default what keeps a chunk of logits below 128 MiB. weights: float32 [M], how often
    each position counts. A head's adapter gets its gradient.
    """
    most = chunk or max(16, _CHUNK_LOGITS // base.head.out_features)
    chunk = max(1, math.ceil(len(hidden) / max(1, math.ceil(len(hidden) / most))))  # all about as long
    trained = [parameter for parameter in base.head.parameters() if parameter.requires_grad]
    return _ChunkedCrossEntropy.apply(hidden, targets, base.logits_of, chunk, weights, *trained)  # type: ignore[return-value]


def batch_loss(base: Base, batch: Batch) -> torch.Tensor:
    """The loss summed over a batch's labelled positions (label i is predicted from position i - 1): float32 scalar."""
    hidden, places = base.hidden_of_rows(batch.input_ids, batch.lengths, batch.groups)
    following = F.pad(batch.labels[:, 1:], (0, 1), value=-100)
    targets = following[torch.arange(following.shape[1]) < batch.lengths[:, None]].to(base.device)
    counted = targets != -100
    places, targets, times = places[counted], targets[counted], None
    if batch.groups:
        places, targets, times = _merged(places, targets, base.head.out_features)
    # index_select: positions may come several times, and its gradient sums them in a fixed order
    return chunked_cross_entropy(base, hidden.index_select(0, places), targets, weights=times)


def _merged(
    places: torch.Tensor, targets: torch.Tensor, classes: int
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
    """(places, targets, how often each pair comes or None if all come once).

    Rows that share a prefix share the labels in it too: their logits are computed once. The token behind the prefix is
    each row's own, and so its last position may have as many targets as there are rows.
    """
    pairs, times = torch.unique(places * classes + targets, return_counts=True)
    if len(pairs) == len(places):
        return places, targets, None
    return pairs // classes, pairs % classes, times.float()
