"""One optimizer step, on one screen."""

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch

from smidgen.data.batch import Batch
from smidgen.errors import RunError

__all__ = ["StepResult", "learning_rate_at", "optimizer_step"]

_MOST_ROWS = 8  # that an error names


@dataclass(frozen=True)
class StepResult:
    """loss: mean over the step's labelled tokens. grad_norm: before clipping. tokens: of all its rows."""

    loss: float
    grad_norm: float
    tokens: int
    labelled_tokens: int


def optimizer_step(
    loss_of: Callable[[Batch], torch.Tensor],
    batches: list[Batch],
    parameters: list[torch.nn.Parameter],
    optimizer: torch.optim.Optimizer,
    *,
    learning_rate: float,
    clip: float,
) -> StepResult:
    """Accumulate the gradients of all `batches`, clip, update.

    loss_of gives a batch's summed loss. The sum is divided once, by all labelled tokens of the step, so that 1 x 4 and
    4 x 1 rows are the same step whatever the lengths. An optimizer group learns at its `lr_ratio` times learning_rate.
    Raises RunError for a loss that is not finite, with the rows of its batch, and for such a gradient, with all rows.
    """
    labelled = sum(batch.num_labels for batch in batches)
    loss = 0.0
    for batch in batches:
        batch_loss = loss_of(batch) / labelled
        added = float(batch_loss.detach())
        if not math.isfinite(added):
            raise _not_finite(f"loss {added}", [batch])
        batch_loss.backward()
        loss += added

    norm = float(torch.nn.utils.clip_grad_norm_(parameters, clip or math.inf))
    if not (math.isfinite(loss) and math.isfinite(norm)):
        raise _not_finite(f"loss {loss} with gradient norm {norm}", batches)
    for group in optimizer.param_groups:
        group["lr"] = learning_rate * group.get("lr_ratio", 1.0)
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    return StepResult(loss, norm, sum(batch.num_tokens for batch in batches), labelled)


def _not_finite(what: str, batches: list[Batch]) -> RunError:
    where = [place for batch in batches for place in batch.where]
    shown = ", ".join(where[:_MOST_ROWS]) + (f" and {len(where) - _MOST_ROWS} more" if len(where) > _MOST_ROWS else "")
    return RunError(what, found=f"rows {shown}", cure="lower --learning-rate; look at these rows")


def learning_rate_at(step: int, total_steps: int, peak: float, warmup: float, schedule: str) -> float:
    """The rate of step `step` (0-based): linear warm-up over warmup x total_steps, then cosine, linear or constant."""
    warmup_steps = math.ceil(warmup * total_steps)
    if step < warmup_steps:
        return peak * (step + 1) / warmup_steps
    if schedule == "constant":
        return peak
    progress = (step - warmup_steps) / max(1, total_steps - warmup_steps)
    return peak * (1 - progress) if schedule == "linear" else peak * 0.5 * (1 + math.cos(math.pi * progress))
