"""Which evaluation was the best, and how many came since: functions of the log, so that a resumed run decides alike."""

import math
from collections.abc import Iterable, Mapping
from typing import Any

__all__ = ["best_step", "evaluations", "since_best"]

Evaluations = list[tuple[int, float]]


def evaluations(lines: Iterable[Mapping[str, Any]], interval: int, last: int | None = None) -> Evaluations:
    """(step, held-out loss) of the evaluation before training, of those in training, and of that at step `last`.

    What else was measured off the interval, where max_time ended a run, an uninterrupted run has not got.
    """
    found = {line["step"]: line["held_out_loss"] for line in lines if "held_out_loss" in line}
    return [(step, loss) for step, loss in sorted(found.items()) if step == last or step % max(interval, 1) == 0]


def best_step(found: Evaluations) -> int | None:
    """The trained step (not 0) with the lowest loss, the first of several; None if there is none."""
    trained = [(loss, step) for step, loss in found if step and not math.isnan(loss)]
    return min(trained)[1] if trained else None


def since_best(found: Evaluations) -> int:
    """How many evaluations came after the lowest loss; one that is not a number has not improved."""
    losses = [math.inf if math.isnan(loss) else loss for _, loss in found]
    return len(losses) - 1 - losses.index(min(losses)) if losses else 0
