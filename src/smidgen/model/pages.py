"""Pages of a mapped checkpoint, which a pass through the model need not hold all at once."""

from collections.abc import Iterator
from contextlib import contextmanager
from itertools import chain
from typing import Any

from torch import nn

from smidgen.checkpoint.base import Checkpoint

__all__ = ["give_lookups_back", "pages_given_back"]


def give_lookups_back(embedding: nn.Module, checkpoint: Checkpoint) -> None:
    """Mapped pages of an embedding leave the memory behind each look-up, or a run would hold all of it in the end: a
    row is on a page or two, but the system maps sixteen at a time.
    """
    mapped = [part for part in chain(embedding.parameters(), embedding.buffers()) if checkpoint.place_of(part)]

    def give_back(*_: Any) -> None:
        for part in mapped:
            checkpoint.release(part)

    if mapped:
        embedding.register_forward_hook(give_back)


@contextmanager
def pages_given_back(model: nn.Module, checkpoint: Checkpoint) -> Iterator[None]:
    """Mapped pages leave the memory behind each decoder layer, so that a pass through a model needs those of one."""

    def give_back(*_: Any) -> None:
        checkpoint.release()

    lists = [module for module in model.modules() if isinstance(module, nn.ModuleList)]
    hooks = [layer.register_forward_hook(give_back) for layers in lists for layer in layers]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()
        checkpoint.release()
