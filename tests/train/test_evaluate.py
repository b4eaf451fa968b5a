"""The held-out loss of many rows."""

import weakref
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from smidgen.data.render import Example
from smidgen.train import evaluate
from smidgen.train.evaluate import held_out_loss
from tiny import build


class Counted(Sequence[Example]):
    """Rows that are made when they are asked for, as those of a large file are, and how many there were at once."""

    def __init__(self, count: int) -> None:
        self._count = count
        self._made: list[weakref.ref[Example]] = []
        self.most = 0

    def __len__(self) -> int:
        return self._count

    def __getitem__(self, index: Any) -> Any:
        if index >= self._count:
            raise IndexError
        ids = [1 + index % 7, *range(10, 20 + index * 37 % 11)]
        row = Example(ids, [-100, *ids[1:]], False, "")
        self._made = [made for made in self._made if made() is not None] + [weakref.ref(row)]
        self.most = max(self.most, len(self._made))
        return row


@pytest.mark.parametrize("share_prefix", [False, True])
def test_the_held_out_loss_has_a_stretch_of_the_rows_in_memory_and_gives_each_row_its_own(
    share_prefix: bool, model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A validation file of a million rows once took gigabytes: all rows were lists of numbers at once.

    float32, and rows meet others in their batches: 1e-5 of a loss.
    """
    base, whole, parts = build(model), Counted(200), Counted(200)
    base.packs = True
    expected = held_out_loss(base, whole, 4, share_prefix=share_prefix)
    assert whole.most == 200, "few rows are one stretch"
    monkeypatch.setattr(evaluate, "_STRETCH_TOKENS", 10 * 16)
    found = held_out_loss(base, parts, 4, share_prefix=share_prefix)
    assert parts.most <= 2 * 16, "rows have 11 to 21 tokens"
    assert found.row_tokens.tolist() == [len(row.input_ids) - 1 for row in Counted(200)]
    assert found.losses == pytest.approx(expected.losses, rel=1e-5)
