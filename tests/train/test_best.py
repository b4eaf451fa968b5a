"""What the log says of the best evaluation."""

import math

from smidgen.train.best import best_step, evaluations, since_best

LINES = [
    {"step": 0, "held_out_loss": 0.5},
    {"step": 1, "loss": 0.1},
    {"step": 2, "held_out_loss": 0.9, "held_out_tokens": 8},
    {"step": 3, "held_out_loss": 0.2},  # where max_time ended the run
    {"step": 4, "held_out_loss": 0.7},
    {"step": 4, "exact_match": 0.0},
    {"step": 6, "held_out_loss": 0.7},
    {"step": 7, "held_out_loss": 0.6},
]


def test_evaluations_are_those_of_the_interval_and_the_last() -> None:
    assert evaluations(LINES, 2) == [(0, 0.5), (2, 0.9), (4, 0.7), (6, 0.7)]
    assert evaluations(LINES, 2, last=7)[-1] == (7, 0.6)
    assert evaluations([], 2) == []


def test_the_best_is_the_first_of_the_lowest_and_never_the_untrained_model() -> None:
    assert best_step(evaluations(LINES, 2)) == 4
    assert best_step(evaluations(LINES, 2, last=7)) == 7
    assert best_step([(0, 0.1)]) is None
    assert best_step([(0, 0.1), (2, math.nan)]) is None
    assert best_step([(2, math.nan), (4, 9.0)]) == 4


def test_evaluations_since_the_lowest_are_counted_from_the_untrained_model_on() -> None:
    assert since_best(evaluations(LINES, 2)) == 3
    assert since_best([(0, 1.0)]) == since_best([]) == 0
    assert since_best([(0, 1.0), (2, 0.9), (4, 0.9)]) == 1  # the same is no improvement
    assert since_best([(0, 1.0), (2, math.nan), (4, math.nan)]) == 2
