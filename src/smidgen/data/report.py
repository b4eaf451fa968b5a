"""What `smidgen data` tells about rows before anything is trained on them."""

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from itertools import groupby
from typing import Any

import numpy as np

from smidgen.data.layouts import Row
from smidgen.data.render import IGNORED, Example
from smidgen.data.rows import first_alike
from smidgen.data.tokens import Examples
from smidgen.events import RowShown

__all__ = ["DataReport", "Sharing", "build_report", "find_odd", "show_row"]

_BOUNDS = (32, 64, 128, 256, 512, 1024, 2048, 4096, 8192)
_SUSPICIOUS_SHOWN = 50


@dataclass(frozen=True)
class Sharing:
    """A forecast of what a run saves by computing once what rows of a micro-batch begin with alike.

    tokens: of the rows that were looked at; computed_tokens: what is left of them. off: why all are computed, ""
    where prefixes are shared. The rest are settings of the run.
    """

    micro_batch: int
    accumulation: int
    pack: int | None
    tokens: int
    computed_tokens: int
    off: str = ""

    @property
    def saved(self) -> float:
        """Share of the tokens that need not be computed."""
        return 1 - self.computed_tokens / self.tokens if self.tokens else 0.0


@dataclass(frozen=True)
class DataReport:
    """Counts over all rows.

    lengths: histogram of tokens a row before cutting: (upper bound, rows), the last bound is the longest row.
    truncated: rows longer than seq_len, lost_tokens: what they lost. suspicious: (where, why) of the first 50;
    suspicious_rows counts all of them. mix: what an epoch takes of each data set, "" where it takes every row once.
    shown: the first row in pieces, each with whether the loss counts it. sharing: of the training rows.
    """

    layout: str
    rows: int
    tokens: int
    trained_tokens: int
    longest_tokens: int
    lengths: tuple[tuple[int, int], ...]
    truncated: int
    suspicious: tuple[tuple[str, str], ...]
    suspicious_rows: int
    shown: RowShown
    sharing: Sharing | None = None
    lost_tokens: int = 0
    mix: str = ""

    @property
    def share(self) -> float:
        """Trained tokens / tokens."""
        return self.trained_tokens / self.tokens if self.tokens else 0.0

    def as_dict(self) -> dict[str, Any]:
        """Plain values for JSON."""
        more = {"share": self.share, "shown": [list(piece) for piece in self.shown.pieces]}
        if self.sharing is not None:
            more["sharing"] = asdict(self.sharing) | {"saved": self.sharing.saved}
        return asdict(self) | more


def build_report(
    examples: Sequence[Examples], tokenizer: Any, *, layout: str = "", sharing: Sharing | None = None, mix: str = ""
) -> DataReport:
    """Look at tokenised rows; the remarks are those of `find_odd`."""
    lengths = np.concatenate([part.lengths + part.cut_tokens for part in examples])
    suspicious, suspicious_rows = _suspicious(examples)
    first = next((part[0] for part in examples if len(part)), None)
    return DataReport(
        layout=layout,
        rows=len(lengths),
        tokens=sum(int(part.lengths.sum()) for part in examples),
        trained_tokens=sum(int(part.trained_tokens.sum()) for part in examples),
        longest_tokens=int(lengths.max(initial=0)),
        lengths=_histogram(lengths),
        truncated=sum(int((part.cut_tokens > 0).sum()) for part in examples),
        lost_tokens=sum(int(part.cut_tokens.sum()) for part in examples),
        suspicious=tuple(suspicious),
        suspicious_rows=suspicious_rows,
        shown=show_row(first, tokenizer) if first else RowShown(()),
        sharing=sharing,
        mix=mix,
    )


def find_odd(tokenizer: Any) -> Callable[[Row], str]:
    """What is remarkable about a row's text, "" if nothing is."""
    specials = [token.content for token in tokenizer.added_tokens_decoder.values() if token.special]

    def odd(row: Row) -> str:
        text = "\n".join([message["content"] for message in row.messages] or [row.text or ""])
        found = [f"holds the special token {special} in its text" for special in specials if special in text]
        if "\ufffd" in text:
            found.append("holds U+FFFD, the mark of text that was decoded wrongly")
        if row.last_assistant is not None and row.last_assistant < len(row.messages) - 1:
            found.append("turns after the last answer are left out")
        return "; ".join(found)

    return odd


def show_row(example: Example, tokenizer: Any) -> RowShown:
    """The example's text in pieces, trained and not."""
    pieces = []
    marked = zip(example.input_ids, example.labels, strict=True)
    for trained, group in groupby(marked, key=lambda pair: pair[1] != IGNORED):
        ids = [token_id for token_id, _ in group]
        text = tokenizer.decode(ids, skip_special_tokens=False, clean_up_tokenization_spaces=False)
        pieces.append((text, trained))
    return RowShown(tuple(pieces))


def _histogram(lengths: np.ndarray) -> tuple[tuple[int, int], ...]:
    if not len(lengths):
        return ()
    longest = int(lengths.max())
    bounds = [*(bound for bound in _BOUNDS if bound < longest), longest]
    counts = np.bincount(np.searchsorted(bounds, lengths), minlength=len(bounds))
    return tuple(zip(bounds, counts.tolist(), strict=True))


def _suspicious(examples: Sequence[Examples]) -> tuple[list[tuple[str, str]], int]:
    """((where, why) of the first 50 suspicious rows, how many there are in all)."""
    first = first_alike(np.concatenate([part.hashes() for part in examples]))
    starts = np.cumsum([0, *(len(part) for part in examples)])
    found: list[tuple[str, str]] = []
    shown = rows = 0
    for part, start in zip(examples, starts, strict=False):
        cut, trained, remarks = part.cut_tokens, part.trained_tokens, dict(part.remarks())
        earlier = first[start : start + len(part)]
        copies = earlier < np.arange(start, start + len(part))
        flagged = np.flatnonzero(part.odd | (cut > 0) | (trained == 0) | copies)
        rows += len(flagged)
        for number in flagged[: _SUSPICIOUS_SHOWN - shown].tolist():
            shown += 1
            where = part.where(number)
            if not part.lengths[number]:
                found.append((where, f"dropped: {cut[number]} tokens"))
            elif not trained[number]:
                found.append((where, "no token is trained: the prompt alone fills the row"))
            elif cut[number]:
                found.append((where, f"cut off: {cut[number]} tokens too long"))
            if number in remarks:
                found.append((where, remarks[number]))
            if copies[number]:
                other = int(np.searchsorted(starts, earlier[number], side="right")) - 1
                found.append((where, f"the same as {examples[other].where(int(earlier[number] - starts[other]))}"))
    return found, rows
