"""Rows that begin with the same tokens: which of them share a beginning, and how many tokens are computed then.

A system prompt, a list of tools, a few worked examples: attention is causal, so what rows of a batch begin with alike
is the same computation in each of them. It is done once for a group of rows, and its gradient is the sum over them.
There is one level: rows that share more with one another than with their neighbours make a group of their own where
that saves more.
"""

from collections.abc import Sequence
from itertools import pairwise
from typing import NamedTuple

from smidgen.kernels.sizes import TILE_TOKENS

__all__ = ["Group", "computed_tokens", "group_rows"]

# A seam costs two small products of attention in place of a large one, in each layer; less would hardly pay for it.
_LEAST_PREFIX_TOKENS = 8


class Group(NamedTuple):
    """rows: indices of rows of a batch. Their first prefix_tokens tokens are the same; 0: one row on its own.

    Every row has at least one token behind the prefix.
    """

    rows: tuple[int, ...]
    prefix_tokens: int


def group_rows(rows: Sequence[list[int]], tile_tokens: int = TILE_TOKENS) -> list[Group]:
    """The groups of rows of token ids that leave the fewest tokens to compute; each row is in one of them.

    No group has more than tile_tokens tokens to compute, so that it fits into one tile of a layer's working set. In
    lexical order rows that begin alike are neighbours; how to cut that into runs is found by dynamic programming.
    """
    order = sorted(range(len(rows)), key=lambda index: rows[index])
    alike = [_common_tokens(rows[a], rows[b]) for a, b in pairwise(order)]
    most_saved, starts = [0], []  # tokens saved in the first n rows, and where the last run of those begins
    for last in range(len(order)):
        saved, start, prefix = most_saved[last], last, len(rows[order[last]])
        tokens = prefix
        for first in range(last - 1, -1, -1):
            prefix = min(prefix, alike[first])
            tokens += len(rows[order[first]])
            if prefix < _LEAST_PREFIX_TOKENS or tokens - (last - first) * prefix > tile_tokens:
                break
            if most_saved[first] + (last - first) * prefix > saved:
                saved, start = most_saved[first] + (last - first) * prefix, first
        most_saved.append(saved)
        starts.append(start)
    groups, stop = [], len(order)
    while stop:
        start = starts[stop - 1]
        groups.append(Group(tuple(order[start:stop]), min(alike[start : stop - 1], default=0)))
        stop = start
    return groups[::-1]


def computed_tokens(rows: Sequence[list[int]], tile_tokens: int = TILE_TOKENS) -> int:
    """Tokens of all rows, those of a shared prefix once."""
    return sum(map(len, rows)) - sum(prefix * (len(members) - 1) for members, prefix in group_rows(rows, tile_tokens))


def _common_tokens(a: Sequence[int], b: Sequence[int]) -> int:
    """How many tokens two rows begin with alike; at least one of each is left over."""
    most = min(len(a), len(b)) - 1
    return next((index for index in range(most) if a[index] != b[index]), most)
