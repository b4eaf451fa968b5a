"""Which rows share a beginning, what that saves, and how the rows of a step are put together."""

import hashlib
import random
from itertools import combinations, pairwise

import pytest

from smidgen.data.batch import Batching, grouped_order, make_batch
from smidgen.data.prefix import computed_tokens, group_rows
from smidgen.data.render import Example

SYSTEM, TOOLS = list(range(100, 120)), list(range(200, 250))


def _row(*parts: list[int]) -> list[int]:
    return [token for part in parts for token in part]


def _examples(rows: list[list[int]]) -> list[Example]:
    return [Example(row, [-100, *row[1:]], False, "") for row in rows]


def test_rows_that_begin_alike_are_a_group() -> None:
    rows = [_row(SYSTEM, [1, 2]), [5, 6, 7], _row(TOOLS, [3]), _row(SYSTEM, [4]), _row(TOOLS, [8, 9])]
    groups = {frozenset(members): prefix for members, prefix in group_rows(rows)}
    assert groups == {frozenset({0, 3}): 20, frozenset({1}): 0, frozenset({2, 4}): 50}
    assert computed_tokens(rows) == 22 + 3 + 51 + 1 + 2


def test_a_group_within_a_group_is_made_where_it_saves_more() -> None:
    long = _row(SYSTEM, TOOLS)
    rows = [_row(SYSTEM, [1]), _row(long, [2]), _row(long, [3]), _row(SYSTEM, [4])]
    assert computed_tokens(rows) == (20 + 1 + 1) + (70 + 1 + 1)  # not 20 + 1 + 51 + 51 + 1


def test_a_row_keeps_a_token_of_its_own_and_a_short_beginning_is_not_shared() -> None:
    same = [list(range(12))] * 3
    assert [group.prefix_tokens for group in group_rows(same)] == [11]
    assert all(group.prefix_tokens == 0 for group in group_rows([[1, 2, 3, 4, 5], [1, 2, 3, 4, 6]]))
    assert group_rows([]) == []


def test_a_group_is_no_larger_than_a_tile() -> None:
    rows = [_row(SYSTEM, [1, index]) for index in range(20)]
    assert [len(group.rows) for group in group_rows(rows)] == [20]
    groups = group_rows(rows, 30)
    assert max(len(group.rows) for group in groups) == (30 - len(SYSTEM) - 1) // 1 == 9
    assert sorted(index for group in groups for index in group.rows) == list(range(20))


def test_no_other_cut_into_runs_saves_more() -> None:
    """Against all ways to cut, for rows whose beginnings nest at random."""
    for seed in range(20):
        draw = random.Random(seed)
        trunk = [draw.randrange(2) for _ in range(60)]
        rows = [[*trunk[: draw.randrange(5, 55)], 9, index] for index in range(7)]
        ordered = sorted(rows)
        costs = []
        for number in range(len(rows)):
            for cuts in combinations(range(1, len(rows)), number):
                ends = [0, *cuts, len(rows)]
                costs.append(sum(_cost(ordered[a:b]) for a, b in pairwise(ends)))
        assert computed_tokens(rows) == min(costs)


def _cost(rows: list[list[int]]) -> int:
    """Tokens if these rows are a group, or each on its own where they begin alike in less than 8."""
    prefix = 0
    while prefix < min(map(len, rows)) - 1 and len({row[prefix] for row in rows}) == 1:
        prefix += 1
    return sum(map(len, rows)) - (prefix * (len(rows) - 1) if prefix >= 8 else 0)


def test_batches_of_a_step_hold_each_row_once_and_rows_that_begin_alike_together() -> None:
    rows = [_row(part, [index]) for index in range(4) for part in (SYSTEM, TOOLS)]
    examples = _examples(rows)
    apart, together = Batching(4), Batching(4, share_prefix=True)
    assert apart.split(examples) == [[0, 1, 2, 3], [4, 5, 6, 7]]
    assert together.split(examples) == [[0, 2, 4, 6], [1, 3, 5, 7]]
    assert [len(batch.groups) for batch in together.batches(examples)] == [1, 1]
    assert not any(batch.groups for batch in apart.batches(examples))
    assert sum(batch.num_labels for batch in together.batches(examples)) == make_batch(examples).num_labels


@pytest.mark.parametrize(
    ("batching", "counts"),
    [
        (Batching(2, pack=60), [2, 2, 2, 2]),  # 25 tokens a row
        (Batching(2, pack=60, share_prefix=True), [8]),  # 20 + 8 x 5
        (Batching(2, pack=59, share_prefix=True), [7, 1]),
        (Batching(2, pack=10), [1] * 8),  # a row that is longer comes alone
    ],
)
def test_pack_takes_as_many_rows_as_the_tokens_allow(batching: Batching, counts: list[int]) -> None:
    examples = _examples([_row(SYSTEM, [index] * 5) for index in range(8)])
    parts = batching.split(examples)
    assert [len(part) for part in parts] == counts
    assert sorted(index for part in parts for index in part) == list(range(8))


def test_pack_counts_padding_where_it_is_computed() -> None:
    examples = _examples([[1] * length for length in (30, 5, 6, 31, 7)])
    assert Batching(4, pack=62, pads=True).split(examples) == [[1, 2, 4], [0, 3]]  # by length: 3 x 7, 2 x 31
    assert Batching(4, pack=61, pads=True).split(examples) == [[1, 2, 4], [0], [3]]


def test_steps_of_one_length_come_in_random_order() -> None:
    draw = random.Random(0)
    lengths = [draw.randrange(5, 500) for _ in range(211)]
    order = grouped_order(lengths, 0, 0, 8)
    assert sorted(order) == list(range(211))
    steps = [[lengths[row] for row in order[i : i + 8]] for i in range(0, 211, 8)]
    spread = [max(step) - min(step) for step in steps]
    assert max(spread) < 60 and len(steps[-1]) == 3  # at random a step of 8 spans about 385
    assert steps != sorted(steps)
    assert order == grouped_order(lengths, 0, 0, 8)
    assert len({tuple(grouped_order(lengths, seed, epoch, 8)) for seed in range(2) for epoch in range(2)}) == 4


def test_the_order_by_length_is_the_one_that_earlier_runs_had() -> None:
    """A run is resumed in the order that it was started in; this one was written out by lists of Python numbers."""
    lengths = [5 + 37 * row % 11 for row in range(231)]  # two pools and a part, and a step that is not full
    order = list(grouped_order(lengths, 3, 1, 2))
    assert hashlib.sha256(repr(order).encode()).hexdigest().startswith("41b3d1365cd1d7ea")
