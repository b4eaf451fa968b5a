"""Intervals: against published examples, and against what they promise: to hold the truth 95 times in 100."""

import math

import numpy as np
import pytest

from smidgen.measures.measure import Measure, compare, cross_entropy, mean, newcombe, perplexity, ratio, share, wilson


@pytest.mark.parametrize(
    ("right", "rows", "expected"),
    [(81, 263, (0.2553, 0.3662)), (15, 148, (0.0624, 0.1605)), (0, 20, (0.0, 0.1611)), (1, 29, (0.0061, 0.1718))],
)
def test_shares_have_wilsons_interval(right: int, rows: int, expected: tuple[float, float]) -> None:
    """Newcombe, Statistics in Medicine 17 (1998) 857, table I, method 3."""
    assert wilson(right, rows) == pytest.approx(expected, abs=5e-5)


def test_a_share_of_nothing_may_be_anything() -> None:
    assert wilson(0, 0) == (0.0, 1.0)


def test_differences_of_shares_have_newcombes_interval() -> None:
    """Newcombe, Statistics in Medicine 17 (1998) 2635, the example with 36, 12, 2 and 0 pairs, method 10."""
    one = np.repeat([1.0, 1.0, 0.0], [36, 12, 2])
    other = np.repeat([1.0, 0.0, 1.0], [36, 12, 2])
    assert newcombe(one, other) == pytest.approx((0.0569, 0.3404), abs=5e-5)
    assert newcombe(other, one) == pytest.approx((-0.3404, -0.0569), abs=5e-5)


def test_few_rows_leave_room_even_where_all_agree() -> None:
    low, high = newcombe(np.ones(12), np.zeros(12))
    assert 0.6 < low < 0.7 and high == 1.0
    low, high = newcombe(np.zeros(12), np.zeros(12))
    assert low == pytest.approx(-high) and high > 0.2


@pytest.mark.parametrize("kind", ["mean", "loss"])
def test_a_resampled_interval_holds_the_truth_about_95_times_in_100(kind: str) -> None:
    draws = np.random.default_rng(1)
    held = 0
    for _ in range(200):
        tokens = draws.integers(5, 50, size=60)
        values = draws.exponential(2.0, size=60)
        measure = (
            mean(values.tolist()) if kind == "mean" else cross_entropy((values * tokens).tolist(), tokens.tolist())
        )
        assert measure.interval is not None
        low, high = measure.interval
        held += low <= 2.0 <= high
    assert 176 <= held <= 199  # percentile intervals of 60 skewed values hold 92 to 94 in 100; 3 standard deviations


def test_a_loss_counts_tokens_not_rows_and_perplexity_is_its_exponential() -> None:
    loss = cross_entropy([10.0, 1.0], [100, 1])
    assert loss.value == pytest.approx(11 / 101)
    assert perplexity(loss).value == pytest.approx(math.exp(11 / 101))
    assert perplexity(cross_entropy([1e9], [1])).value == pytest.approx(math.exp(700))


def test_intervals_are_the_same_every_time_and_absent_for_few_rows() -> None:
    values = [float(value) for value in range(30)]
    assert mean(values).interval == mean(values).interval
    assert mean(values[:9]).interval is None
    assert mean(values[:10]).interval is not None


def test_blocks_of_resamples_give_what_one_block_gives(monkeypatch: pytest.MonkeyPatch) -> None:
    from smidgen.measures import measure

    values = [float(value) for value in range(30)]
    whole = mean(values).interval
    monkeypatch.setattr(measure, "_AT_ONCE", 70 * 30)
    assert mean(values).interval == whole


def test_two_models_are_compared_on_the_same_rows() -> None:
    """Rows differ by far more than the models do: only pairs can tell."""
    rows = np.random.default_rng(0).normal(10, 5, size=100)
    one, other = mean((rows - 0.1).tolist()), mean(rows.tolist())
    figure = compare({"x": one}, {"x": other})["x"]
    assert figure["difference"]["high"] < 0 and figure["worse"]
    assert figure["high"] > figure["against"]["low"], "the single intervals overlap"


def test_worse_follows_the_direction_of_the_measure_and_needs_the_whole_interval() -> None:
    low, high = [1.0] * 20, [2.0] * 20
    ones = [1.0] * 20
    assert compare({"x": mean(low)}, {"x": mean(high)})["x"]["worse"]
    assert not compare({"x": mean(high)}, {"x": mean(low)})["x"]["worse"]
    assert compare({"x": cross_entropy(high, ones)}, {"x": cross_entropy(low, ones)})["x"]["worse"]
    assert not compare({"x": cross_entropy(low, ones)}, {"x": cross_entropy(high, ones)})["x"]["worse"]
    noise = np.random.default_rng(0).normal(0, 1, size=(2, 50))
    assert not compare({"x": mean(noise[0].tolist())}, {"x": mean(noise[1].tolist())})["x"]["worse"]
    assert not compare({"x": mean(low[:5])}, {"x": mean(high[:5])})["x"]["worse"], "too few rows to say"


def test_losses_over_other_tokens_are_shown_and_not_subtracted() -> None:
    figure = compare({"x": cross_entropy([1.0] * 10, [5] * 10)}, {"x": cross_entropy([1.0] * 10, [4] * 10)})["x"]
    assert figure["against"]["value"] == pytest.approx(0.25)
    assert "difference" not in figure and "worse" not in figure


def test_a_share_is_a_mean_with_another_interval() -> None:
    right = [True] * 7 + [False] * 5
    assert share(right).value == mean([float(r) for r in right]).value == pytest.approx(7 / 12)
    assert share(right).interval == wilson(7, 12)
    assert Measure(np.zeros((12, 2)), ratio).value == 0.0
