"""Examples to tensors, and the order in which an epoch takes them."""

import random
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from smidgen.data.render import IGNORED, Example

__all__ = ["Batch", "epoch_order", "make_batch"]


@dataclass(frozen=True)
class Batch:
    """input_ids, labels: int64 [B, T], padded on the right (ids with 0, labels with -100). lengths: int64 [B].

    There is no attention mask: attention is causal, so padding behind a row changes nothing before it, and padded
    positions have no label.
    """

    input_ids: torch.Tensor
    labels: torch.Tensor
    lengths: torch.Tensor

    @property
    def num_tokens(self) -> int:
        """Tokens of the rows, padding not counted."""
        return int(self.lengths.sum())

    @property
    def num_labels(self) -> int:
        """Labels that a loss can count: a row's first token has nothing before it to be predicted from."""
        return int((self.labels[:, 1:] != IGNORED).sum())


def make_batch(examples: Sequence[Example]) -> Batch:
    """Pad B examples to the longest, T tokens."""
    lengths = torch.tensor([len(example.input_ids) for example in examples])
    shape = (len(examples), int(lengths.max()))
    input_ids = torch.zeros(shape, dtype=torch.int64)
    labels = torch.full(shape, IGNORED, dtype=torch.int64)
    for index, example in enumerate(examples):
        input_ids[index, : len(example.input_ids)] = torch.tensor(example.input_ids)
        labels[index, : len(example.labels)] = torch.tensor(example.labels)
    return Batch(input_ids, labels, lengths)


def epoch_order(num_rows: int, seed: int, epoch: int) -> list[int]:
    """The order of rows in an epoch: a function of its arguments alone, so a resumed run needs no saved state."""
    order = list(range(num_rows))
    random.Random(f"{seed} {epoch}").shuffle(order)
    return order
