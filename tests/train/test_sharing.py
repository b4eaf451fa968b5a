"""The forecast of shared prefixes, and what `auto` makes of it."""

import json
from pathlib import Path
from typing import Any

import pytest

import smidgen
from smidgen.data.batch import Batching
from smidgen.data.render import Example
from smidgen.errors import SettingsError
from smidgen.events import Event, Note, silent
from smidgen.model.load import open_source
from smidgen.train.config import Settings
from smidgen.train.evaluate import held_out_loss
from smidgen.train.loop import Schedule
from smidgen.train.rows import read_rows
from smidgen.train.sharing import choose_batching, estimate_sharing, planned_rows
from tiny import build, tiny_folder, write_rows

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


@pytest.mark.parametrize(
    "how",
    [
        {}, {"group_by_length": True, "epochs": 2.5}, {"max_steps": 3}, {"mix": "3,1", "share_prefix": "off"},
        {"accumulation": 2, "train_on_prompt": True}, {"share_prefix": "off", "accumulation": 3},
    ],
)  # fmt: skip
def test_a_plan_knows_the_largest_micro_batch_that_comes(how: dict[str, Any], tmp_path: Path) -> None:
    """Counted from the batches themselves, with what rows begin with alike computed once where a run does that."""
    words = ["red", "green", "blue", "grey", "white", "black", "pink"]
    for number in range(2):
        pairs = [("Say a colour: " * (n % 3) + str(n % 5), " ".join(words[: n * n % 7 + 1])) for n in range(40)]
        rows = [{"prompt": prompt, "completion": answer} for prompt, answer in pairs]
        (tmp_path / f"{number}.jsonl").write_text("".join(json.dumps(row | {"n": number}) + "\n" for row in rows))
    settings = Settings(**{"micro_batch": 4, "accumulation": 2} | how)
    data = [str(tmp_path / f"{number}.jsonl") for number in range(2)]
    found = read_rows(open_source(str(tiny_folder(tmp_path / "model"))), data, settings, silent)
    schedule = Schedule(found.train.lengths, settings, found.mixture)
    plan = planned_rows(found.train, found.held_out, schedule)
    assert plan.longest == max(found.train.lengths.max(), found.held_out.lengths.max())
    for size in (4, 2, 1):
        shared = plan.shared(size)
        assert (shared is None) == (size == 1 or settings.share_prefix == "off")
        batching = Batching(size, share_prefix=shared is not None)
        tokens, labels = [], []
        for step in range(schedule.total_steps):
            taken = [found.train[row] for row in schedule.rows_of(step)]
            for part in batching.split(taken):
                tokens.append(batching.tokens_of([taken[index].input_ids for index in part]))
                labels.append(sum(label != -100 for index in part for label in taken[index].labels))
        load = shared or plan.load(size)
        assert load.tokens == max(tokens) and load.least_tokens <= min(tokens)
        assert load.labels >= max(labels) or load.labels == load.tokens + size
        assert shared or load.labels == max(labels)


def test_data_forecasts_the_saving_of_a_file(tmp_path: Path) -> None:
    model, rows = tiny_folder(tmp_path / "model"), write_rows(tmp_path / "rows.jsonl")
    few, many = (smidgen.inspect_data(str(model), str(rows), micro_batch=size).sharing for size in (4, 8))
    assert few is not None and many is not None
    assert 0.05 < few.saved < many.saved < 0.5
    with pytest.raises(SettingsError, match="pack"):
        smidgen.inspect_data(str(model), str(rows), pack=0)


def test_the_forecast_says_what_keeps_a_run_from_sharing(tmp_path: Path) -> None:
    model, rows = tiny_folder(tmp_path / "model"), write_rows(tmp_path / "rows.jsonl")

    def forecast(**settings: Any) -> Any:
        return smidgen.inspect_data(str(model), str(rows), **{"micro_batch": 8} | settings).sharing

    shared = forecast()
    assert shared.off == "" and shared.saved > 0.05
    for settings, why in (
        ({"share_prefix": "off"}, "share_prefix is off"),
        ({"dropout": 0.1}, "each row has dropout of its own"),
        ({"neftune_alpha": 5.0}, "each row has noise of its own"),
        ({"micro_batch": 1}, "rows computed at once begin alike in 0% of their tokens"),
    ):
        found = forecast(**settings)
        assert (found.saved, found.computed_tokens, found.off) == (0, shared.tokens, why)
    assert forecast(group_by_length=True).computed_tokens != shared.computed_tokens, "other rows meet"


@pytest.mark.parametrize(
    ("architecture", "settings", "packs", "shares", "said"),
    [
        ("llama", {}, True, True, ["share_prefix: rows computed at once begin alike, that saves 60%"]),
        ("llama", {"dropout": 0.1}, True, False, ["share_prefix off: each row has dropout of its own"]),
        ("llama", {"neftune_alpha": 5.0}, True, False, ["share_prefix off: each row has noise of its own"]),
        ("gemma2", {}, True, True, ["rows are packed, without padding", "share_prefix: rows computed at once"]),
        ("gemma2", {"share_prefix": "off"}, True, False, ["rows are packed, without padding"]),
        ("gemma2", {"micro_batch": 1}, False, False, ["share_prefix off: rows computed at once begin alike in 0%"]),
        ("gemma2", {"micro_batch": 1, "pack": 9}, True, False, ["rows are packed", "share_prefix off"]),
        ("falcon", {}, False, False, ["rows are padded to the longest of their batch: Falcon", "share_prefix off: "]),
        ("falcon", {"share_prefix": "off", "pack": 99}, False, False, ["rows are padded"]),
    ],
)  # fmt: skip
def test_what_is_chosen_is_said(
    architecture: str, settings: dict[str, Any], packs: bool, shares: bool, said: list[str], tmp_path: Path
) -> None:
    base, notes = build(tiny_folder(tmp_path, architecture)), list[Event]()
    examples = _examples(16)
    schedule = Schedule([len(row.input_ids) for row in examples], Settings(**{"dropout": 0.0} | settings))
    batching = choose_batching(base, examples, schedule, 70, notes.append)
    assert (base.packs, batching.pads, batching.share_prefix) == (packs, not packs, shares)
    most = None if packs or settings.get("micro_batch") == 1 else 70  # what memory was planned for
    assert batching.pack == settings.get("pack", most)
    if batching.pack:
        rows = [row.input_ids for row in examples]
        parts = [[rows[index] for index in part] for part in batching.split(examples)]
        assert all(len(part) == 1 or batching.tokens_of(part) <= batching.pack for part in parts)
    texts = [note.text for note in notes if isinstance(note, Note)]
    assert [text[: len(start)] for text, start in zip(texts, said, strict=True)] == said


@pytest.mark.parametrize("architecture", ["qwen3", "gemma2"])
def test_the_held_out_loss_of_each_row_is_the_same_padded_packed_and_shared(architecture: str, tmp_path: Path) -> None:
    """float32, sums in another order: 1e-5 of a loss of 50 labels."""
    base, examples = build(tiny_folder(tmp_path, architecture)), _examples(10)[::-1]
    plain = held_out_loss(base, examples, 4)
    base.packs = True
    for share in (False, True):
        found = held_out_loss(base, examples, 4, share_prefix=share)
        assert found.row_tokens.tolist() == plain.row_tokens.tolist()
        assert found.losses == pytest.approx(plain.losses, rel=1e-5)
