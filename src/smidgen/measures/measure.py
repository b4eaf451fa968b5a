"""A figure over the rows of a file, with its 95 % confidence interval.

A measure keeps what each row adds (its loss and tokens, its right answers, its matching n-grams) and says how the sums
become the figure. So one resampling of rows serves every measure: rows are drawn with replacement, 1,000 times, and
the middle 95 % of the figures are the interval (the percentile bootstrap, Efron 1979). Two models measured on the same
rows are resampled together, which takes out what the rows themselves add to the spread. Shares of rows have Wilson's
interval (1927), and their differences Newcombe's for pairs (1998, method 10), which is made of it: these hold for few
rows too, and where none or all are right, which gives a resampling nothing to vary.

The intervals tell what other rows of the same kind might give, not what another seed of the training would.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import ArrayLike

__all__ = ["Measure", "compare", "cross_entropy", "mean", "newcombe", "perplexity", "ratio", "share", "wilson"]

_Z = 1.959963984540054  # the normal distribution has 95 % within
_RESAMPLES = 1000
_FEWEST_ROWS = 10  # with fewer, a resampling says too little to be shown
_AT_ONCE = 1 << 22  # numbers of a block of resampled weights


@dataclass(frozen=True)
class Measure:
    """counts: float64 [rows, k], what each row adds. value_of: their sums, [..., k] -> figures [...].

    is_share: counts are [right, 1] with right 0 or 1. lower_is_better: a loss.
    """

    counts: np.ndarray
    value_of: Callable[[np.ndarray], np.ndarray]
    is_share: bool = False
    lower_is_better: bool = False

    @property
    def value(self) -> float:
        return float(self.value_of(self.counts.sum(axis=0)))

    @property
    def interval(self) -> tuple[float, float] | None:
        """(low, high), 95 %; None for too few rows, except of a share."""
        if self.is_share:
            return wilson(int(self.counts[:, 0].sum()), len(self.counts))
        return _middle(self.value_of(_resampled(self.counts)))


def ratio(sums: np.ndarray) -> np.ndarray:
    """[..., 2] -> the first over the second."""
    return sums[..., 0] / np.maximum(sums[..., 1], 1e-300)


def share(right: Sequence[bool]) -> Measure:
    """How many of the rows are right."""
    return Measure(_with_ones(right), ratio, is_share=True)


def mean(values: Sequence[float]) -> Measure:
    """The mean over rows."""
    return Measure(_with_ones(values), ratio)


def cross_entropy(losses: ArrayLike, tokens: ArrayLike) -> Measure:
    """The mean loss over all tokens (not over rows), from each row's summed loss and number of tokens."""
    return Measure(np.stack([np.asarray(losses, float), np.asarray(tokens, float)], axis=1), ratio, False, True)


def perplexity(loss: Measure) -> Measure:
    """exp of a mean loss, natural logarithm."""
    return Measure(loss.counts, lambda sums: np.exp(np.minimum(ratio(sums), 700.0)), False, True)


def wilson(right: int, rows: int) -> tuple[float, float]:
    """The 95 % score interval of a share: all p for which |right / rows - p| is within z standard errors of p."""
    if not rows:
        return 0.0, 1.0
    observed, spread = right / rows, _Z * _Z / rows
    centre = (observed + spread / 2) / (1 + spread)
    half = _Z * math.sqrt(observed * (1 - observed) / rows + spread / rows / 4) / (1 + spread)
    return (centre - half if right else 0.0), (centre + half if right < rows else 1.0)  # exact where rounding is not


def newcombe(right: np.ndarray, other: np.ndarray) -> tuple[float, float]:
    """The 95 % interval of share(right) - share(other) over the same rows, 0 or 1 each, [rows]."""
    rows = len(right)
    (low_a, high_a), (low_b, high_b) = wilson(int(right.sum()), rows), wilson(int(other.sum()), rows)
    a, b = right.mean(), other.mean()
    both, neither = (right * other).sum(), ((1 - right) * (1 - other)).sum()
    only_a, only_b = right.sum() - both, other.sum() - both
    together = both * neither - only_a * only_b
    if together > 0:
        together = max(together - rows / 2, 0.0)  # Newcombe's continuity correction
    spread = math.sqrt(right.sum() * other.sum() * (rows - right.sum()) * (rows - other.sum()))
    phi = together / spread if spread else 0.0  # how much the two go together, -1 to 1

    def distance(one: float, two: float) -> float:
        return math.sqrt(max(0.0, one * one - 2 * phi * one * two + two * two))

    return float(a - b - distance(a - low_a, high_b - b)), float(a - b + distance(high_a - a, b - low_b))


def compare(measured: Mapping[str, Measure], against: Mapping[str, Measure] | None = None) -> dict[str, dict[str, Any]]:
    """Each measure as {"value", "low", "high"}, with those of `against`, the same rows by another model, beside it.

    Then also {"against": {...}, "difference": {...}, "worse"}: measured minus against, over the same rows; worse is
    True where the whole interval of the difference lies on the bad side. low and high are None for too few rows. A loss
    over other tokens has no difference: two tokenizers cut the same text into more or fewer. Nor have answers to more
    rows: a prompt may be too long for one of the models.
    """
    figures: dict[str, dict[str, Any]] = {}
    for name, measure in measured.items():
        figures[name] = _figure(measure.value, measure.interval)
        if against is None or name not in against:
            continue
        other = against[name]
        figures[name]["against"] = _figure(other.value, other.interval)
        if len(measure.counts) != len(other.counts):
            continue
        if measure.lower_is_better and not np.array_equal(measure.counts[:, 1], other.counts[:, 1]):
            continue
        interval = _difference(measure, other)
        figures[name] |= {
            "difference": _figure(measure.value - other.value, interval),
            "worse": interval is not None and (interval[0] > 0 if measure.lower_is_better else interval[1] < 0),
        }
    return figures


def _with_ones(values: Sequence[float]) -> np.ndarray:
    return np.stack([np.asarray(values, float), np.ones(len(values))], axis=1)


def _figure(value: float, interval: tuple[float, float] | None) -> dict[str, Any]:
    low, high = interval or (None, None)
    return {"value": value, "low": low, "high": high}


def _difference(measure: Measure, other: Measure) -> tuple[float, float] | None:
    if measure.is_share:
        return newcombe(measure.counts[:, 0], other.counts[:, 0])
    width = measure.counts.shape[1]
    sums = _resampled(np.concatenate([measure.counts, other.counts], axis=1))
    return _middle(measure.value_of(sums[:, :width]) - other.value_of(sums[:, width:]))


def _resampled(counts: np.ndarray) -> np.ndarray:
    """counts [rows, k] -> sums over rows drawn with replacement, [resamples, k]; the same draws every time."""
    rows = len(counts)
    if rows < _FEWEST_ROWS:
        return np.empty((0, counts.shape[1]))
    generator = np.random.default_rng(0)
    block = max(1, min(_RESAMPLES, _AT_ONCE // rows))
    sums = [
        generator.multinomial(rows, np.full(rows, 1 / rows), size=min(block, _RESAMPLES - start)) @ counts
        for start in range(0, _RESAMPLES, block)
    ]
    return np.concatenate(sums)


def _middle(values: np.ndarray) -> tuple[float, float] | None:
    if not len(values):
        return None
    low, high = np.quantile(values, [0.025, 0.975])
    return float(low), float(high)
