"""What a weight means: shares of an epoch, rows in laps, the same again for the same seed."""

from collections import Counter
from pathlib import Path
from typing import Any

import pytest

import smidgen
from runs import adapter_bytes, stop_after
from smidgen.data.mixture import Mixture, mix
from smidgen.errors import SettingsError
from smidgen.events import Note
from tiny import write_rows

QUICK: dict[str, Any] = {"rank": 4, "micro_batch": 4, "learning_rate": 5e-3, "compute_dtype": "float32"}


def test_an_epoch_has_all_rows_together_in_number_and_each_part_its_share() -> None:
    assert mix((100, 200), (2, 1)).quotas == (200, 100)
    assert mix((100, 200), (1, 1)).quotas == (150, 150)
    assert mix((10, 10, 10), (1, 1, 1)).quotas == (10, 10, 10)
    assert sum(mix((7, 5, 3), (0.3, 0.3, 0.4)).quotas) == 15
    assert mix((1000, 1), (1000, 0.001)).quotas == (1001, 1)  # none is left out


def test_no_row_comes_again_before_all_of_its_data_set_have_come() -> None:
    mixture = mix((5, 20), (4, 1))
    assert mixture.quotas == (20, 5)
    epochs = [list(mixture.rows(3, epoch)) for epoch in range(4)]
    assert all(set(Counter(row for row in epoch if row < 5).values()) == {4} for epoch in epochs)
    seen = [row for epoch in epochs for row in epoch if row >= 5]
    assert sorted(seen) == list(range(5, 25))  # a quarter an epoch: whole after four
    uneven = Mixture((7,), (3,))
    laps = [row for epoch in range(7) for row in uneven.rows(0, epoch)]
    assert [sorted(laps[start : start + 7]) for start in (0, 7, 14)] == [list(range(7))] * 3


def test_a_mixture_depends_on_seed_and_epoch_alone() -> None:
    mixture = mix((50, 50), (3, 1))
    assert list(mixture.rows(1, 2)) == list(mixture.rows(1, 2))
    orders = {tuple(mixture.rows(seed, epoch)) for seed in range(3) for epoch in range(3)}
    assert len(orders) == 9


@pytest.fixture
def two(tmp_path: Path) -> list[str]:
    first, second = write_rows(tmp_path / "a.jsonl", 24), tmp_path / "b.jsonl"
    second.write_text(write_rows(tmp_path / "c.jsonl", 8).read_text().replace("say", "sing"))
    return [str(first), str(second)]


def test_several_data_sets_are_trained_on_and_weights_change_the_share(model: Path, two: list[str]) -> None:
    notes: list[str] = []

    def report(event: Any) -> None:
        notes.extend([event.text] if isinstance(event, Note) else [])

    plain = smidgen.inspect_data(str(model), two, report=report)
    assert plain.rows == 24 + 8 and plain.mix == ""
    assert not any(note.startswith("mix:") for note in notes)
    weighed = smidgen.inspect_data(str(model), two, mix="1,3", report=report)
    assert (weighed.rows, weighed.tokens) == (plain.rows, plain.tokens)
    # a holds out one row of 24, b has too few: 23 + 8 rows, of which three quarters are b's
    assert (
        weighed.mix == "a.jsonl 26% (8 rows an epoch, each 0.35 times), b.jsonl 74% (23 rows an epoch, each 2.88 times)"
    )
    assert f"mix: {weighed.mix}" in notes
    assert smidgen.plan(str(model), two, mix="1,3")["steps"] == smidgen.plan(str(model), two)["steps"]


@pytest.mark.parametrize(
    ("weights", "data", "says"),
    [
        ("1", slice(0, 2), "mix: expected 2 weights, one for each data set, found '1'"),
        ("1,2,3", slice(0, 2), "mix: expected 2 weights"),
        ("1,2", slice(0, 1), "mix: expected two data sets or more"),
        ("1,0", slice(0, 2), "mix: expected a comma list of numbers above 0"),
        ("1,-1", slice(0, 2), "mix: expected a comma list of numbers above 0"),
        ("1,inf", slice(0, 2), "mix: expected a comma list of numbers above 0"),
        ("a,b", slice(0, 2), "mix: expected a comma list of numbers above 0"),
    ],
)
def test_weights_that_make_no_sense_are_one_line(
    weights: str, data: slice, says: str, model: Path, two: list[str], tmp_path: Path
) -> None:
    with pytest.raises(SettingsError, match=says):
        smidgen.finetune(str(model), two[data], tmp_path / "run", mix=weights)
    assert not (tmp_path / "run").exists()


def test_a_mixed_run_resumes_bit_for_bit_and_its_weights_matter(model: Path, two: list[str], tmp_path: Path) -> None:
    settings = QUICK | {"epochs": 2.0}
    whole = smidgen.finetune(str(model), two, tmp_path / "whole", mix="1,3", **settings)
    with pytest.raises(KeyboardInterrupt):
        smidgen.finetune(str(model), two, tmp_path / "cut", mix="1,3", report=stop_after(9), **settings)
    resumed = smidgen.resume(tmp_path / "cut")  # the ninth step lies in the second epoch
    assert adapter_bytes(resumed.path) == adapter_bytes(whole.path)
    other = smidgen.finetune(str(model), two, tmp_path / "other", mix="3,1", **settings)
    assert adapter_bytes(other.path) != adapter_bytes(whole.path)
    repeated = smidgen.finetune(str(model), two, tmp_path / "again", mix="1,3", **settings)
    assert adapter_bytes(repeated.path) == adapter_bytes(whole.path)
    assert "b.jsonl" in (whole.path / "report.html").read_text()
