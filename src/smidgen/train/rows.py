"""The rows of a run as tokens, the same for the run itself, its plan and `smidgen data`."""

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import date
from typing import Any

from smidgen.checkpoint.hub import cache_folder
from smidgen.data.edits import Edits
from smidgen.data.gate import leave_out_untrained
from smidgen.data.mixture import Mixture, mix
from smidgen.data.records import DataSet, as_specs, read_data
from smidgen.data.render import Renderer
from smidgen.data.report import find_odd
from smidgen.data.rows import Rows
from smidgen.data.tokens import Examples, tokenise
from smidgen.errors import DataError, SettingsError
from smidgen.events import Note, Report, silent
from smidgen.model.load import Source
from smidgen.train.config import Settings

__all__ = ["RunRows", "check_mix", "edits_of", "read_rows", "renderer_of", "seq_len_within"]


@dataclass(frozen=True)
class RunRows:
    """rendered: each split that was asked for, of data.train and so on, all rows. train, held_out: those with a label,
    all of them if none has. mixture: of the rows of `train`; None: an epoch takes each once.
    """

    data: DataSet
    renderer: Renderer
    rendered: tuple[Examples, ...]
    train: Examples
    held_out: Examples
    mixture: Mixture | None

    @property
    def mix(self) -> str:
        """What an epoch takes of each data set, in words; "" without --mix."""
        return self.mixture.describe(self.data.names) if self.mixture else ""


def check_mix(data: str | Sequence[str], settings: Settings) -> None:
    """Raise SettingsError where there is not one weight for each data set."""
    specs = as_specs(data)
    if settings.mix is not None and len(settings.weights) != len(specs):
        expected = f"{len(specs)} weights, one for each data set" if len(specs) > 1 else "two data sets or more"
        raise SettingsError([f"mix: expected {expected}, found {settings.mix!r}"])


def edits_of(settings: Settings) -> Edits:
    """What the settings change in rows before they are rendered."""
    return Edits(settings.system, settings.fill or {})


def seq_len_within(max_positions: int, settings: Settings, report: Report = silent) -> int:
    """The most tokens that a row can have."""
    seq_len = min(settings.seq_len, max_positions)
    if seq_len < settings.seq_len:
        report(Note(f"seq_len {seq_len}: the model has no more positions"))
    return seq_len


def renderer_of(
    settings: Settings, tokenizer: Any, max_positions: int, report: Report = silent, today: date | None = None
) -> Renderer:
    """How the settings make tokens of rows, for a model with so many positions: the same in a run and after it. today:
    as Renderer takes it.
    """
    return Renderer(
        tokenizer,
        train_on_prompt=settings.train_on_prompt,
        seq_len=seq_len_within(max_positions, settings, report),
        too_long=settings.too_long,
        today=today,
        report=report,
    )


def read_rows(
    source: Source,
    data: str | Sequence[str],
    settings: Settings,
    report: Report,
    *,
    test: bool = False,
    today: date | None = None,
) -> RunRows:
    """Read and tokenise a run's rows. test: the test rows too. today: when the run was started; None: now. Raises
    DataError for rows that cannot be used.
    """
    check_mix(data, settings)
    edits = edits_of(settings)
    rows = read_data(data, limit=settings.limit, edits=edits, report=report)
    edits.check_fill(rows.placeholders)
    renderer = renderer_of(settings, source.tokenizer, source.max_positions, report, today or date.today())
    cache = cache_folder() / "tokens" if settings.token_cache else None
    odd, chat = find_odd(source.tokenizer), rows.layout != "text"

    def tokens(split: Rows) -> Examples:
        return tokenise(split, renderer, chat=chat, edits=edits.key(), odd=odd, cache=cache, report=report)

    rendered = tuple(tokens(split) for split in (rows.train, rows.validation, *([rows.test] if test else [])))
    train = leave_out_untrained(rendered[0], "rows", renderer, report)
    held_out = leave_out_untrained(rendered[1], "held-out rows", renderer, report)
    mixture = _mixture(rows, train, settings)
    found = RunRows(rows, renderer, rendered, train, held_out, mixture)
    if mixture:
        report(Note(f"mix: {found.mix}"))
    return found


def _mixture(rows: DataSet, train: Examples, settings: Settings) -> Mixture | None:
    if settings.mix is None:
        return None
    sizes = train.counts_in(rows.parts)
    for name, size in zip(rows.names, sizes, strict=True):
        if not size:
            raise DataError(f"{name}: none of its rows is left to train on", cure="raise --seq-len, or leave it out")
    return mix(sizes, settings.weights)
