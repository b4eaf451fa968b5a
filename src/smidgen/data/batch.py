"""Examples to tensors, the order in which an epoch takes them, and which of a step are computed at once."""

import random
from array import array
from bisect import bisect_right
from collections.abc import MutableSequence, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray

from smidgen.data.prefix import Group, computed_tokens, group_rows
from smidgen.data.render import IGNORED, Example
from smidgen.kernels.sizes import TILE_TOKENS

__all__ = ["Batch", "Batching", "epoch_order", "grouped_order", "make_batch"]

_POOL_STEPS = 50  # of rows that are sorted by length together


@dataclass(frozen=True)
class Batch:
    """input_ids, labels: int64 [B, T], padded on the right (ids with 0, labels with -100). lengths: int64 [B].

    There is no attention mask: attention is causal, so padding behind a row changes nothing before it, and padded
    positions have no label. groups: rows whose beginning is computed once, each row in one of them; none: no sharing.
    where: of each row, its place in the data.
    """

    input_ids: torch.Tensor
    labels: torch.Tensor
    lengths: torch.Tensor
    groups: tuple[Group, ...] = ()
    where: tuple[str, ...] = ()

    @property
    def num_tokens(self) -> int:
        """Tokens of the rows, padding not counted."""
        return int(self.lengths.sum())

    @property
    def num_labels(self) -> int:
        """Labels that a loss can count: a row's first token has nothing before it to be predicted from."""
        return int((self.labels[:, 1:] != IGNORED).sum())


def make_batch(examples: Sequence[Example], *, share_prefix: bool = False, tile_tokens: int = TILE_TOKENS) -> Batch:
    """Pad B examples to the longest, T tokens. share_prefix: what they begin with alike is to be computed once, as far
    as such rows fit into one tile together.
    """
    lengths = torch.tensor([len(example.input_ids) for example in examples])
    shape = (len(examples), int(lengths.max()))
    input_ids = torch.zeros(shape, dtype=torch.int64)
    labels = torch.full(shape, IGNORED, dtype=torch.int64)
    for index, example in enumerate(examples):
        input_ids[index, : len(example.input_ids)] = torch.tensor(example.input_ids)
        labels[index, : len(example.labels)] = torch.tensor(example.labels)
    groups = group_rows([example.input_ids for example in examples], tile_tokens) if share_prefix else []
    return Batch(input_ids, labels, lengths, tuple(groups), tuple(example.where for example in examples))


@dataclass(frozen=True)
class Batching:
    """How the rows of an optimizer step are computed; the step is the same whatever is chosen, but for rounding.

    micro_batch: rows at once. pack: instead, as many rows as have at most so many tokens; a longer row comes alone.
    share_prefix: what rows begin with alike is computed once a batch, as far as they fit into one tile. pads: rows are
    padded to the longest of their batch, so that is what `pack` counts.
    """

    micro_batch: int
    pack: int | None = None
    share_prefix: bool = False
    pads: bool = False
    tile_tokens: int = TILE_TOKENS

    def split(self, examples: Sequence[Example]) -> list[list[int]]:
        """The batches of a step, as indices of its rows: rows that begin alike (or are as long) come together."""
        rows = [example.input_ids for example in examples]
        order = list(range(len(rows)))
        if self.share_prefix:
            order.sort(key=lambda index: rows[index])
        elif self.pack and self.pads:
            order.sort(key=lambda index: len(rows[index]))
        batches = []
        while order:
            taken = [rows[index] for index in order]
            count = self.micro_batch if not self.pack else max(1, self._fitting(taken, self.pack))
            batches.append(order[:count])
            order = order[count:]
        return batches

    def batches(self, examples: Sequence[Example]) -> list[Batch]:
        """The batches of a step."""
        chosen = ([examples[index] for index in part] for part in self.split(examples))
        return [make_batch(part, share_prefix=self.share_prefix, tile_tokens=self.tile_tokens) for part in chosen]

    def tokens_of(self, rows: Sequence[list[int]]) -> int:
        """How many tokens are computed for these rows at once."""
        if self.pads:
            return len(rows) * max(map(len, rows))
        return computed_tokens(rows, self.tile_tokens) if self.share_prefix else sum(map(len, rows))

    def _fitting(self, rows: Sequence[list[int]], most: int) -> int:
        """How many rows from the first on have at most so many tokens; more rows never have fewer."""
        return bisect_right(range(1, len(rows) + 1), most, key=lambda count: self.tokens_of(rows[:count]))


def epoch_order(num_rows: int, seed: int | str, epoch: int) -> MutableSequence[int]:
    """The order of rows in an epoch: a function of its arguments alone, so a resumed run needs no saved state."""
    order = array("i", range(num_rows))  # 4 bytes a row, where a list takes 36
    random.Random(f"{seed} {epoch}").shuffle(order)
    return order


def grouped_order(
    lengths: Sequence[int] | NDArray[np.integer], seed: int, epoch: int, step_rows: int
) -> MutableSequence[int]:
    """An epoch's order whose steps of step_rows rows have rows of about the same length; steps come in random order.

    A function of its arguments alone too. Rows are sorted within 50 steps of the plain order, so epochs differ.
    """
    order, pool = epoch_order(len(lengths), seed, epoch), _POOL_STEPS * step_rows
    rows, tokens = np.asarray(order), np.asarray(lengths)  # the same memory
    for start in range(0, len(rows), pool):
        part = rows[start : start + pool]
        part[:] = part[np.argsort(tokens[part], kind="stable")]
    full = len(rows) // step_rows  # a step that is not full stays the last one
    steps = array("i", range(full))
    random.Random(f"{seed} {epoch} steps").shuffle(steps)
    taken = rows[: full * step_rows].reshape(full, step_rows)
    taken[:] = taken[np.asarray(steps)]
    return order
