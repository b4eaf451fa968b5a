"""What is trained on: how much is computed at once, for each size of micro-batch that a solver looks at."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property, lru_cache
from math import ceil

import numpy as np
from numpy.typing import NDArray

from smidgen.kernels.sizes import TILE_TOKENS

__all__ = ["Load", "Rows", "Work"]


@dataclass(frozen=True)
class Load:
    """The most tokens that are computed at once, the most labels among them, and the fewest tokens."""

    tokens: int
    labels: int
    least_tokens: int

    def __or__(self, other: "Load") -> "Load":
        """Of both together."""
        least = min(self.least_tokens, other.least_tokens)
        return Load(max(self.tokens, other.tokens), max(self.labels, other.labels), least)

    def padded(self, multiple: int) -> "Load":
        """As it is computed where products take multiples of so many rows."""
        tokens, labels = (multiple * ceil(count / multiple) for count in (self.tokens, self.labels))
        return Load(tokens, labels, self.least_tokens)


@dataclass(frozen=True, eq=False)
class Rows:
    """Rows as steps take them. lengths int32 [N]: their tokens, step after step; zeros fill a step that has fewer rows.
    labels int32 [N]: those with a label; None: all. held_out, held_out_labels: of rows that are evaluated, each the
    largest first.

    shared: micro-batch -> the load where what rows begin with alike is computed once; None where it is not.
    computed, labelled: shares of the tokens that the layers compute and that the head does. They count for the time.
    """

    lengths: NDArray[np.integer]
    labels: NDArray[np.integer] | None = None
    held_out: NDArray[np.integer] | None = None
    held_out_labels: NDArray[np.integer] | None = None
    shared: Callable[[int], Load | None] = lambda micro_batch: None
    computed: float = 1.0
    labelled: float = 1.0

    @cached_property
    def longest(self) -> int:
        """Tokens of the longest row, of those that are held out too."""
        return max(int(self.lengths.max()), 0 if self.held_out is None else int(self.held_out[0]))

    @cached_property
    def shortest(self) -> int:
        found = [int(self.lengths[self.lengths > 0].min())]
        return min(found if self.held_out is None else [*found, int(self.held_out[-1])])

    def load(self, micro_batch: int) -> Load:
        """Of all micro-batches of so many rows, one after the other; nothing is shared."""
        starts = np.arange(0, len(self.lengths), micro_batch)
        tokens = np.add.reduceat(self.lengths, starts, dtype=np.int64)
        labels = tokens if self.labels is None else np.add.reduceat(self.labels, starts, dtype=np.int64)
        return Load(int(tokens.max()), int(labels.max()), int(tokens[tokens > 0].min()))

    def evaluated(self, micro_batch: int, packs: bool) -> Load | None:
        """Of so many held-out rows, whichever they are; not packed, with padding."""
        if self.held_out is None:
            return None
        labels = self.held_out if self.held_out_labels is None else self.held_out_labels
        longest, most_labels = self.held_out[:micro_batch], int(labels[:micro_batch].sum())
        tokens = int(longest.sum()) if packs else len(longest) * int(longest[0])
        return Load(tokens, most_labels, int(self.held_out[-1]))

    def halved(self) -> "Rows":
        """Rows of half as many tokens."""
        parts = (self.lengths, self.labels, self.held_out, self.held_out_labels)
        lengths, labels, held_out, held_out_labels = (None if part is None else -(-part // 2) for part in parts)
        assert lengths is not None

        def shared(micro_batch: int) -> Load | None:
            found = self.shared(micro_batch)
            return found and Load(-(-found.tokens // 2), -(-found.labels // 2), -(-found.least_tokens // 2))

        return Rows(lengths, labels, held_out, held_out_labels, shared, self.computed, self.labelled)


@dataclass(frozen=True, eq=False)
class Work:
    """rows_per_step: micro-batch times accumulation. parameters: trainable; ranks: of all adapters of one layer
    together. state_bytes: of the optimizer for each parameter. head_parameters: those of `parameters` that the head
    computes with. inputs: numbers a token that one layer of transformers keeps for adapters alone; idle: bytes a token
    that the first of them does not keep. kept_item: bytes of a number that waits for the backward pass; None: itemsize.

    Rows are counted without padding. Where layers turn out to need it, no more tokens are computed at once, padding
    included (train/sharing.py).
    """

    rows: Rows
    rows_per_step: int
    parameters: int
    ranks: int
    itemsize: int = 4
    state_bytes: float = 8
    head_parameters: int = 0
    inputs: int = 0
    idle: int = 0
    kept_item: int | None = None

    @cached_property
    def load(self) -> Callable[[int, int | None, int, bool], Load]:
        """(micro-batch, pack, tile_tokens, whether the layers are known to compute rows without padding) -> what steps
        come to.
        """
        return lru_cache(maxsize=None)(self._load)  # of millions of rows perhaps, and asked for with each choice

    def _load(self, micro_batch: int, pack: int | None, tile_tokens: int, packs: bool) -> Load:
        if pack is not None:
            step = self.rows.load(self.rows_per_step)
            tokens = max(self.rows.longest, min(pack, step.tokens))
            # a label behind a prefix that rows share is each row's own
            found = Load(tokens, min(step.labels, tokens + self.rows_per_step), self.rows.shortest)
        else:
            apart, shared = self.rows.load(micro_batch), self.rows.shared(micro_batch)
            whole = tile_tokens >= TILE_TOKENS  # in smaller tiles fewer rows share a beginning
            found = apart if shared is None else shared if packs and whole else apart | shared
        return found if packs else Load(found.tokens, found.tokens, found.least_tokens)

    def batches(self, micro_batch: int, pack: int | None) -> int:
        """That an optimizer step is computed in, on average rounded up."""
        if pack is not None:
            most = self.load(micro_batch, pack, TILE_TOKENS, True).tokens
            return ceil(self.mean_tokens * self.rows.computed / most)
        return ceil(self.rows_per_step / micro_batch)

    @cached_property
    def mean_tokens(self) -> float:
        """Of one optimizer step."""
        return self.rows_per_step * float(self.rows.lengths.mean())
