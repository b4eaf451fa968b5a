"""Text that GPTQ looks at: token ids cut into rows of one length, some of them held out."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from smidgen.errors import DataError
from smidgen.events import Note, Report, silent
from smidgen.quant.gptq import GptqSettings

__all__ = [
    "GPTQ_ON_THE_WAY",
    "Calibration",
    "builtin_text",
    "calibration_on_the_way",
    "cut_rows",
    "most_tokens_on_the_way",
    "tokens_of",
]

_HELD_OUT_EVERY, _HELD_OUT_MOST = 8, 8
_ROWS_OF_SMALL_TEXT = 8  # a text of less than two rows is cut into about so many shorter ones
_LEAST_TOKENS = 64
# Where a base is quantised on the way to something else.
GPTQ_ON_THE_WAY = GptqSettings(act_order=True)  # better (docs/quality.md)
_ROWS, _TOKENS = 32, 512


@dataclass(frozen=True)
class Calibration:
    """rows int64 [R, T]; held_out int64 [H, T], None if nothing was to be held out. source: where they come from."""

    rows: torch.Tensor
    held_out: torch.Tensor | None
    source: str


def builtin_text() -> str:
    """Some hundred plain English sentences that come with the package."""
    return (Path(__file__).parent / "calibration.txt").read_text(encoding="utf-8")


def cut_rows(
    ids: list[int], *, rows: int, length: int, held_out: bool, source: str, report: Report = silent
) -> Calibration:
    """The first `rows` stretches of `length` tokens, fewer where there are no more. held_out: every eighth stretch, 8
    at most, is kept apart. Raises DataError below 64 tokens.
    """
    if len(ids) < _LEAST_TOKENS:
        raise DataError(
            f"{source}: too little text to calibrate with", expected=f"{_LEAST_TOKENS} tokens or more",
            found=f"{len(ids)}", cure="give more text",
        )  # fmt: skip
    if len(ids) < 2 * length:
        length = len(ids) // _ROWS_OF_SMALL_TEXT
    count = len(ids) // length
    apart = min(_HELD_OUT_MOST, max(1, min(rows, count) // _HELD_OUT_EVERY)) if held_out else 0
    count = min(count, rows + apart)
    table = torch.tensor(ids[: count * length]).view(count, length)
    places = {_HELD_OUT_EVERY * index + min(_HELD_OUT_EVERY, count) - 1 for index in range(apart)}
    places = {place for place in places if place < count} or ({count - 1} if apart else set())
    kept = [place for place in range(count) if place not in places]
    kept_apart = f", {len(places)} more held out" if places else ""
    report(Note(f"calibration: {len(kept)} rows of {length} tokens from {source}{kept_apart}"))
    return Calibration(table[kept], table[sorted(places)] if held_out else None, source)


def tokens_of(text: str, tokenizer: Any, wanted: int) -> list[int]:
    """Token ids of a text, of its beginning where that is enough for `wanted` tokens."""
    return tokenizer(text[: 16 * wanted], verbose=False).input_ids


def most_tokens_on_the_way() -> int:
    """That calibration_on_the_way takes."""
    return _ROWS * _TOKENS


def calibration_on_the_way(
    ids: list[int], name: str, tokenizer: Any, max_positions: int, report: Report = silent
) -> Calibration:
    """32 rows of 512 tokens of `ids`, which come from `name`; filled up with the built-in sample where they are few."""
    length = min(_TOKENS, max_positions)
    wanted = _ROWS * length
    if len(ids) < wanted // 4:
        ids = ids + tokens_of(builtin_text(), tokenizer, wanted)[: wanted - len(ids)]
        name = f"{name} and the built-in sample" if name else "the built-in sample"
    return cut_rows(ids[:wanted], rows=_ROWS, length=length, held_out=False, source=name, report=report)
