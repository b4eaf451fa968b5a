"""What other settings than those of a plan would need, one change at a time."""

import math
from collections.abc import Callable, Iterator
from dataclasses import replace

from smidgen.checkpoint.base import Checkpoint
from smidgen.errors import ModelError
from smidgen.model.load import choose_storage
from smidgen.planning.inventory import Inventory
from smidgen.planning.planner import Choice, Forecast, Machine, forecast
from smidgen.planning.work import Work
from smidgen.train.config import Settings
from smidgen.train.memory import work_of

__all__ = ["what_if"]

_FORMS = {"nf4-dq": "base in nf4-dq", "int8": "base in int8", "none": "16-bit base"}


def what_if(
    model: Inventory,
    work: Work,
    machine: Machine,
    choice: Choice,
    settings: Settings,
    checkpoint: Checkpoint | None,
    inventory: Callable[[str], Inventory],
    *,
    can_stream: bool,
) -> list[tuple[str, Forecast]]:
    """(the change, its forecast). inventory: of the same model stored in another form."""
    found = [
        *((name, model, work, other) for name, other in _choices(model, work, choice, can_stream=can_stream)),
        *((name, model, other, choice) for name, other in _works(model, work, settings)),
        *((name, inventory(form), work, choice) for form, name in _FORMS.items() if _can_be(form, model, checkpoint)),
    ]
    return [(name, forecast(shape, job, machine, other)) for name, shape, job, other in found]


def _choices(model: Inventory, work: Work, choice: Choice, *, can_stream: bool) -> Iterator[tuple[str, Choice]]:
    layers = model.num_layers
    if choice.pack is not None:
        if choice.pack > work.rows.longest:
            half = max(work.rows.longest, choice.pack // 2)
            yield f"pack {half}", replace(choice, pack=half)
    elif choice.micro_batch > 1:
        half = math.ceil(choice.micro_batch / 2)
        yield (
            f"micro-batch {half}",
            replace(choice, micro_batch=half, accumulation=math.ceil(work.rows_per_step / half)),
        )
    for mode in ("none", "full"):
        if set(choice.recompute) != {mode}:
            yield f"recompute {mode}", replace(choice, recompute=(mode,) * layers)
    for streamed in (tuple(range(0, layers, 2)), tuple(range(layers))) if can_stream else ():
        if len(streamed) != len(choice.streamed):
            yield f"{len(streamed)} of {layers} layers streamed", replace(choice, streamed=streamed)


def _works(model: Inventory, work: Work, settings: Settings) -> Iterator[tuple[str, Work]]:
    if settings.rank != 8:
        yield "rank 8", work_of(model, replace(settings, rank=8), work.rows, work.itemsize)
    halved = work.rows.halved()
    yield f"rows of {halved.longest} tokens", replace(work, rows=halved)


def _can_be(form: str, model: Inventory, checkpoint: Checkpoint | None) -> bool:
    """Whether the base can be stored so, which is another way than now."""
    try:
        return form != model.storage and (checkpoint is None or choose_storage(form, checkpoint)[0] == form)
    except ModelError:
        return False
