"""How a text becomes rows to calibrate with, and which of them are held out."""

from typing import Any

import pytest
import torch

from smidgen.errors import DataError
from smidgen.model.calibration import builtin_text, cut_rows, tokens_of
from tiny import byte_tokenizer


def _cut(count: int, **how: Any) -> Any:
    return cut_rows(list(range(count)), **{"rows": 128, "length": 32, "held_out": True, "source": "text", **how})


def test_every_eighth_row_is_held_out_and_in_no_other() -> None:
    text = _cut(32 * 20 + 5)
    assert text.rows.shape == (18, 32) and text.held_out.shape == (2, 32)
    assert text.held_out[:, 0].tolist() == [7 * 32, 15 * 32]
    whole = torch.cat([text.rows, text.held_out]).flatten().sort().values
    assert torch.equal(whole, torch.arange(32 * 20))


def test_no_more_rows_than_asked_for() -> None:
    text = _cut(100_000, rows=16)
    assert text.rows.shape == (16, 32) and text.held_out.shape == (2, 32)
    text = _cut(100_000, rows=2000)
    assert text.rows.shape == (2000, 32) and text.held_out.shape == (8, 32)
    text = _cut(100_000, rows=16, held_out=False)
    assert text.rows.shape == (16, 32) and text.held_out is None


@pytest.mark.parametrize(("count", "shape"), [(64, (7, 8)), (1000, (7, 125))])
def test_small_text_is_cut_into_shorter_rows(count: int, shape: tuple[int, int]) -> None:
    text = _cut(count, length=512)
    assert text.rows.shape == shape and text.held_out.shape == (1, shape[1])


def test_two_rows_are_one_to_learn_from_and_one_held_out() -> None:
    text = _cut(64)
    assert text.rows.shape == text.held_out.shape == (1, 32)


def test_too_little_text_is_refused() -> None:
    with pytest.raises(
        DataError, match="text: too little text to calibrate with, expected 64 tokens or more, found 63"
    ):
        _cut(63)


def test_the_sample_is_plain_text_of_some_length() -> None:
    text = builtin_text()
    assert text.isascii() and len(text.splitlines()) == len(set(text.splitlines())) > 200
    tokenizer = byte_tokenizer()
    assert len(tokens_of(text, tokenizer, 10**6)) == len(text)
    assert 100 <= len(tokens_of(text, tokenizer, 100)) < len(text)
