"""The forecast of shared prefixes, and what `auto` makes of it."""

from pathlib import Path

import pytest

import smidgen
from smidgen.data.render import Example
from smidgen.errors import SettingsError
from smidgen.train.config import Settings
from smidgen.train.loop import Schedule
from smidgen.train.sharing import estimate_sharing
from tiny import tiny_folder, write_rows

SYSTEM = list(range(100, 140))


def _examples(count: int) -> list[Example]:
    rows = [[*SYSTEM, *[number] * 10] for number in range(count)]
    return [Example(row, [-100, *row[1:]], False, "") for row in rows]


@pytest.mark.parametrize(
    ("settings", "computed"),
    [
        (Settings(micro_batch=1), 16 * 50),
        (Settings(micro_batch=4), 4 * (40 + 4 * 10)),
        (Settings(micro_batch=4, accumulation=4), 4 * (40 + 4 * 10)),
        (Settings(micro_batch=16), 40 + 16 * 10),
        (Settings(micro_batch=4, accumulation=4, pack=120), 2 * (40 + 8 * 10)),
    ],
)
def test_the_forecast_is_what_a_run_computes(settings: Settings, computed: int) -> None:
    sharing = estimate_sharing(_examples(16), Schedule([50] * 16, settings))
    assert (sharing.tokens, sharing.computed_tokens) == (16 * 50, computed)
    assert sharing.saved == 1 - computed / (16 * 50)


def test_the_forecast_looks_at_a_hundred_steps() -> None:
    assert estimate_sharing(_examples(300), Schedule([50] * 300, Settings(micro_batch=2))).tokens == 200 * 50


def test_data_forecasts_the_saving_of_a_file(tmp_path: Path) -> None:
    model, rows = tiny_folder(tmp_path / "model"), write_rows(tmp_path / "rows.jsonl")
    few, many = (smidgen.inspect_data(str(model), str(rows), micro_batch=size).sharing for size in (4, 8))
    assert few is not None and many is not None
    assert 0.05 < few.saved < many.saved < 0.5
    with pytest.raises(SettingsError, match="pack"):
        smidgen.inspect_data(str(model), str(rows), pack=0)
