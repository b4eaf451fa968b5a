"""The held-out loss of many rows; answers within the memory there is."""

import weakref
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

from smidgen.data.render import Example, Renderer
from smidgen.events import Event, Progress
from smidgen.model.decoder import FusedDecoder, ModuleDecoder, decoder_for
from smidgen.train import evaluate
from smidgen.train.evaluate import answer_prompts, held_out_loss
from tiny import CONFIGS, build, byte_tokenizer, tiny_folder


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


def test_rows_are_answered_together_as_far_as_there_is_room(model: Path) -> None:
    """Once it was a number of tokens, whatever a token took: 17 GB for a model of 7B."""
    base, renderer = build(model), Renderer(byte_tokenizer())
    prompts = [list(range(10, 20 + index)) for index in range(10)]
    of_row = (19 + 8) * base.key_bytes + 8 * base.model.config.vocab_size

    def answer(room: int) -> tuple[list[tuple[str, bool]], int]:
        seen: list[Event] = []
        how: dict[str, Any] = {"max_new_tokens": 8, "batch_size": 128, "what": "answers"}
        answers = answer_prompts(base, renderer, prompts, **how, room=room, report=seen.append)
        return answers, sum(isinstance(event, Progress) for event in seen)

    together, batches = answer(10 * of_row)
    assert batches == 1
    assert answer(3 * of_row) == (together, 4), "10 rows, 3 at once"
    assert base.cache_dtype == torch.float32
    one_by_one, batches = answer(1)
    assert batches == 10 and base.cache_dtype == torch.float32, "rounded while there is no room for one, not later"
    assert sum(one == other for one, other in zip(one_by_one, together, strict=True)) >= 8, "rounding may change some"


@pytest.mark.parametrize("architecture", CONFIGS)
def test_what_a_token_keeps_is_counted(architecture: str, tmp_path: Path) -> None:
    base = build(tiny_folder(tmp_path / "model", architecture))
    decoder = decoder_for(base)
    with torch.inference_mode():
        decoder.start([list(range(1, 9))] * 3, 1)
    if isinstance(decoder, FusedDecoder):
        kept = [*decoder._keys, *decoder._values]
    else:
        assert isinstance(decoder, ModuleDecoder)
        kept = [part for layer in decoder._cache.layers for part in (layer.keys, layer.values)]
    found = sum(part.nbytes for part in kept)
    assert 0 < found <= 3 * 8 * base.key_bytes
    assert found == 3 * 8 * base.key_bytes or architecture in ("falcon", "gemma3", "mistral", "gemma2"), (
        "one head; windows"
    )
