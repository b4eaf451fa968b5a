"""Cross-entropy over the labelled positions, a chunk of logits at a time.

Logits are the largest thing a small model makes: 49,152 floats a position. The head is therefore applied only where
there is a label, to a chunk of positions at once, and the gradient of the hidden states is taken on the spot, so that
no more than one chunk of logits ever exists. The result equals the loss over full logits.
"""

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch.autograd.function import once_differentiable

from smidgen.data.batch import Batch
from smidgen.kernels.elementwise import cross_entropy_
from smidgen.kernels.pages import empty
from smidgen.model.build import Base
from smidgen.planning.estimate import chunk_positions

__all__ = ["batch_loss", "chunked_cross_entropy", "row_losses", "token_losses"]


class _ChunkedCrossEntropy(torch.autograd.Function):
    """Summed loss; the gradients of hidden states and head parameters are computed in the forward pass."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden: torch.Tensor,
        targets: torch.Tensor,
        logits_of: Callable[[torch.Tensor], torch.Tensor],
        chunk: int,
        smoothing: float,
        weights: torch.Tensor | None,
        *parameters: torch.Tensor,
    ) -> torch.Tensor:
        wants_grad = any(ctx.needs_input_grad)
        total = torch.zeros((), dtype=torch.float32, device=hidden.device)
        grad_hidden = empty(hidden.shape, hidden.dtype, hidden.device) if wants_grad else None
        grads = [torch.zeros_like(parameter) for parameter in parameters]
        for start in range(0, hidden.shape[0], chunk):
            part = hidden[start : start + chunk].detach().requires_grad_(wants_grad)
            with torch.set_grad_enabled(wants_grad):
                logits = logits_of(part)
            # The gradient takes the logits' place: no operation that `logits_of` ends with needs its result again.
            gradient = logits.detach()
            losses = _smoothed_(gradient, targets[start : start + chunk], smoothing, backward=wants_grad)
            if weights is not None:
                losses = losses * weights[start : start + chunk]
                # in the gradient's type: another would be a second chunk of logits
                gradient *= weights[start : start + chunk, None].to(gradient.dtype)
            total += losses.sum()
            if grad_hidden is not None:
                grad_part, *grad_parameters = torch.autograd.grad(logits, [part, *parameters], gradient)
                grad_hidden[start : start + chunk] = grad_part
                for grad, more in zip(grads, grad_parameters, strict=True):
                    grad += more
            del logits, gradient  # or the next chunk's would be a second one
        if grad_hidden is not None:
            ctx.save_for_backward(grad_hidden, *grads)
        return total

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grad_outputs: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        # in place: the gradients are this function's own, and it is called once
        grad_hidden, *grads = (grad.mul_(grad_outputs[0]) for grad in ctx.saved_tensors)
        return grad_hidden, None, None, None, None, None, *grads


class _Selected(torch.autograd.Function):
    """hidden.index_select(0, places): positions may come several times, and the gradient sums them in a fixed order."""

    @staticmethod
    def forward(ctx: Any, hidden: torch.Tensor, places: torch.Tensor) -> torch.Tensor:
        ctx.save_for_backward(places)
        ctx.shape = hidden.shape
        out = empty((len(places), hidden.shape[1]), hidden.dtype, hidden.device)
        return torch.index_select(hidden, 0, places, out=out)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor, None]:
        (places,) = ctx.saved_tensors
        grad_hidden = empty(ctx.shape, grads[0].dtype, grads[0].device).zero_()
        return grad_hidden.index_add_(0, places, grads[0]), None


def _smoothed_(logits: torch.Tensor, targets: torch.Tensor, smoothing: float, *, backward: bool) -> torch.Tensor:
    """cross_entropy_ with labels of which the share `smoothing` lies on all classes alike (arXiv 1512.00567, as
    F.cross_entropy has it): -log p_t + smoothing (z_t - mean of z).
    """
    if not smoothing:
        return cross_entropy_(logits, targets, backward=backward)
    labels = targets[:, None]
    more = smoothing * (logits.gather(1, labels).squeeze(1).float() - logits.mean(dim=1, dtype=torch.float32))
    losses = cross_entropy_(logits, targets, backward=backward) + more
    if backward:
        logits.sub_(smoothing / logits.shape[1])
        logits.scatter_add_(1, labels, logits.new_full(labels.shape, smoothing))
    return losses


def chunked_cross_entropy(
    base: Base,
    hidden: torch.Tensor,
    targets: torch.Tensor,
    chunk: int | None = None,
    smoothing: float = 0.0,
    weights: torch.Tensor | None = None,
) -> torch.Tensor:
    """Last hidden states [M, hidden_size], targets [M] -> the summed loss, a float32 scalar.

    smoothing: share of each label that is spread over all classes. chunk: positions at once; by default the base's, or
    what keeps a chunk of logits below 128 MiB. weights: float32 [M], how often each position counts. A head's adapter
    gets its gradient.
    """
    if more := base.padded(len(hidden)) - len(hidden):
        weights = F.pad(hidden.new_ones(len(hidden), dtype=torch.float32) if weights is None else weights, (0, more))
        hidden, targets = F.pad(hidden, (0, 0, 0, more)), F.pad(targets, (0, more))
    chunk = base.padded(chunk_positions(len(hidden), base.head.out_features, chunk or base.loss_chunk))
    trained = [parameter for parameter in base.head.parameters() if parameter.requires_grad]
    return _ChunkedCrossEntropy.apply(hidden, targets, base.logits_of, chunk, smoothing, weights, *trained)  # type: ignore[return-value]


@torch.no_grad()
def token_losses(base: Base, hidden: torch.Tensor, targets: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Last hidden states [M, hidden_size], targets [M] -> (the loss of each, float32 [M]; whether it is the likeliest
    token, bool [M]), a chunk of logits at a time.
    """
    losses, likeliest = [], []
    chunk = base.padded(chunk_positions(len(hidden), base.head.out_features, base.loss_chunk))
    for part, wanted in zip(hidden.split(chunk), targets.split(chunk), strict=True):
        logits = base.logits_of(F.pad(part, (0, 0, 0, base.padded(len(part)) - len(part))))[: len(part)]
        likeliest.append(logits.argmax(dim=1) == wanted)
        losses.append(cross_entropy_(logits, wanted, backward=False))
    return torch.cat(losses), torch.cat(likeliest)


def batch_loss(base: Base, batch: Batch, smoothing: float = 0.0) -> torch.Tensor:
    """The loss summed over a batch's labelled positions (label i is predicted from position i - 1): float32 scalar."""
    hidden, places, targets, _ = _labelled(base, batch)
    times = None
    if batch.groups:
        places, targets, times = _merged(places, targets, base.head.out_features)
    hidden = _Selected.apply(hidden, places)  # type: ignore[assignment]  # what it was selected from is needed no more
    return chunked_cross_entropy(base, hidden, targets, smoothing=smoothing, weights=times)


@torch.no_grad()
def row_losses(base: Base, batch: Batch) -> tuple[torch.Tensor, torch.Tensor]:
    """(the loss summed over each row's labelled positions, float32 [B]; how many they are, int64 [B])."""
    hidden, places, targets, rows = _labelled(base, batch)
    tokens = torch.bincount(rows, minlength=len(batch.lengths))
    sums = torch.zeros(len(batch.lengths), device=base.device)
    if len(targets):
        sums.index_add_(0, rows, token_losses(base, hidden.index_select(0, places), targets)[0])
    return sums.cpu(), tokens.cpu()


def _labelled(base: Base, batch: Batch) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """(hidden states [tokens, hidden_size]; of a batch's M labelled positions: place in them, target, row [M])."""
    hidden, places = base.hidden_of_rows(batch.input_ids, batch.lengths, batch.groups)
    following = F.pad(batch.labels[:, 1:], (0, 1), value=-100)
    real = torch.arange(following.shape[1]) < batch.lengths[:, None]
    targets, rows = following[real].to(base.device), real.nonzero()[:, 0].to(base.device)
    counted = targets != -100
    return hidden, places[counted], targets[counted], rows[counted]


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
