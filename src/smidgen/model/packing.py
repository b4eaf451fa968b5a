"""The rows of a batch as one sequence of tokens: no padding, and what rows begin with alike only once."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

from smidgen.kernels.attention import Segments
from smidgen.kernels.sizes import TILE_TOKENS

__all__ = ["PackedRows", "pack_rows"]


@dataclass(frozen=True)
class PackedRows:
    """ids, positions: int64 [tokens], of the tokens that are computed. segments: what they see of each other.

    places: int64 [sum of lengths], where the tokens of the first row are, then of the second, and so on.
    """

    ids: torch.Tensor
    positions: torch.Tensor
    segments: Segments
    places: torch.Tensor


def pack_rows(
    input_ids: torch.Tensor,
    lengths: torch.Tensor,
    groups: Sequence[tuple[Sequence[int], int]] = (),
    padded: Callable[[int], int] = int,
    tile_tokens: int = TILE_TOKENS,
) -> PackedRows:
    """input_ids int64 [B, T], padded on the right; lengths int64 [B].

    groups: (rows, how many tokens all of them begin with alike), each row once; none: nothing is shared. A tile ends
    before the group that would make it longer than tile_tokens. padded: how many tokens are to be computed for so many
    of a tile; what is too few becomes a row of its own, which no place points to.
    """
    row_lengths = lengths.tolist()
    pieces: list[tuple[int, int, int]] = []  # row (-1: padding), its first token, behind its last one
    prefixes: list[int] = []
    starts: dict[tuple[int, int], int] = {}  # (row, its first token) of a piece -> where that is computed
    tile_ends: list[int] = []
    tokens = tile_start = 0

    def add(row: int, start: int, stop: int, prefix: int) -> None:
        nonlocal tokens
        starts[row, start] = tokens
        pieces.append((row, start, stop))
        prefixes.append(prefix)
        tokens += stop - start

    def end_tile() -> None:
        nonlocal tile_start
        if more := padded(tokens - tile_start) - (tokens - tile_start):
            add(-1, 0, more, -1)
        tile_ends.append(len(pieces))
        tile_start = tokens

    shared: dict[int, tuple[int, int]] = {}  # row -> where its prefix is computed, tokens of that
    for rows, prefix_tokens in groups or [((row,), 0) for row in range(len(row_lengths))]:
        count = sum(row_lengths[row] for row in rows) - prefix_tokens * (len(rows) - 1)
        if tokens > tile_start and tokens - tile_start + count > tile_tokens:
            end_tile()
        before = -1
        if prefix_tokens:
            shared |= {row: (tokens, prefix_tokens) for row in rows}
            before = len(pieces)
            add(rows[0], 0, prefix_tokens, -1)
        for row in rows:
            add(row, prefix_tokens, row_lengths[row], before)
    end_tile()

    places = []
    for row, length in enumerate(row_lengths):
        first, prefix_tokens = shared.get(row, (0, 0))
        places += [torch.arange(first, first + prefix_tokens)]
        places += [torch.arange(length - prefix_tokens) + starts[row, prefix_tokens]]
    return PackedRows(
        ids=torch.cat(
            [input_ids.new_zeros(stop) if row < 0 else input_ids[row, start:stop] for row, start, stop in pieces]
        ),
        positions=torch.cat([torch.arange(start, stop) for _, start, stop in pieces]),
        segments=Segments([stop - start for _, start, stop in pieces], prefixes, tile_ends),
        places=torch.cat(places),
    )
