"""NEFTune (arXiv 2310.05914): in training, uniform noise on the embeddings of a row of L tokens,
in +-alpha / sqrt(L hidden_size).

It comes from torch's CPU generator, whose state a checkpoint keeps: a resumed run draws the same noise.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch

from smidgen.model.build import Base

__all__ = ["embedding_noise"]


@contextmanager
def embedding_noise(base: Base, alpha: float) -> Iterator[Callable[[torch.Tensor], None]]:
    """Yields a function that is told the lengths, int64 [B], of a batch before the model computes it.

    Embeddings come as [B, T, hidden_size] or, where rows are packed, as [..., tokens, hidden_size]. Outside the block
    and in evaluation there is no noise.
    """
    lengths = torch.empty(0)

    def of_batch(given: torch.Tensor) -> None:
        nonlocal lengths
        lengths = given

    def add(module: torch.nn.Module, arguments: Any, embedded: torch.Tensor) -> torch.Tensor:
        if not module.training:
            return embedded
        bound = alpha / (lengths * embedded.shape[-1]).sqrt()  # of each row
        noise = torch.rand(embedded.shape) * 2 - 1
        if base.packed is None:
            noise *= bound[:, None, None]
        else:
            of_token = torch.zeros(embedded.shape[:-1].numel())
            of_token[base.packed.places] = bound.repeat_interleave(lengths)
            noise *= of_token.view(*embedded.shape[:-1], 1)
        return embedded + noise.to(embedded.device, embedded.dtype)

    if not alpha:
        yield of_batch
        return
    hook = base.model.get_input_embeddings().register_forward_hook(add)
    try:
        yield of_batch
    finally:
        hook.remove()
