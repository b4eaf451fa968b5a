"""What `smidgen data` tells about rows before anything is trained on them."""

from bisect import bisect_left
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from itertools import groupby
from typing import Any

from smidgen.data.layouts import Row
from smidgen.data.render import IGNORED, Example
from smidgen.events import RowShown

__all__ = ["DataReport", "Sharing", "build_report", "show_row"]

_BOUNDS = (32, 64, 128, 256, 512, 1024, 2048, 4096, 8192)
_SUSPICIOUS_SHOWN = 50


@dataclass(frozen=True)
class Sharing:
    """A forecast of what a run saves by computing once what rows of a micro-batch begin with alike.

    tokens: of the rows that were looked at; computed_tokens: what is left of them. The rest are settings of the run.
    """

    micro_batch: int
    accumulation: int
    pack: int | None
    tokens: int
    computed_tokens: int

    @property
    def saved(self) -> float:
        """Share of the tokens that need not be computed."""
        return 1 - self.computed_tokens / self.tokens if self.tokens else 0.0


@dataclass(frozen=True)
class DataReport:
    """Counts over all rows.

    lengths: histogram of tokens a row before cutting: (upper bound, rows), the last bound is the longest row.
    truncated: rows cut at seq_len. suspicious: (where, why), the first 50; suspicious_rows counts all of them.
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
    examples: Sequence[Example],
    rows: Sequence[Row],
    tokenizer: Any,
    *,
    layout: str = "",
    sharing: Sharing | None = None,
) -> DataReport:
    """Look at rendered rows; examples[i] is rows[i]."""
    lengths = [len(example.input_ids) + example.cut_tokens for example in examples]
    suspicious = _suspicious(examples, rows, tokenizer)
    return DataReport(
        layout=layout,
        rows=len(examples),
        tokens=sum(len(example.input_ids) for example in examples),
        trained_tokens=sum(_count_trained(example) for example in examples),
        longest_tokens=max(lengths, default=0),
        lengths=_histogram(lengths),
        truncated=sum(example.truncated for example in examples),
        suspicious=tuple(suspicious[:_SUSPICIOUS_SHOWN]),
        suspicious_rows=len({where for where, _ in suspicious}),
        shown=show_row(examples[0], tokenizer) if examples else RowShown(()),
        sharing=sharing,
    )


def show_row(example: Example, tokenizer: Any) -> RowShown:
    """The example's text in pieces, trained and not."""
    pieces = []
    marked = zip(example.input_ids, example.labels, strict=True)
    for trained, group in groupby(marked, key=lambda pair: pair[1] != IGNORED):
        ids = [token_id for token_id, _ in group]
        text = tokenizer.decode(ids, skip_special_tokens=False, clean_up_tokenization_spaces=False)
        pieces.append((text, trained))
    return RowShown(tuple(pieces))


def _count_trained(example: Example) -> int:
    return sum(label != IGNORED for label in example.labels)


def _histogram(lengths: Sequence[int]) -> tuple[tuple[int, int], ...]:
    if not lengths:
        return ()
    longest = max(lengths)
    bounds = [*(bound for bound in _BOUNDS if bound < longest), longest]
    counts = [0] * len(bounds)
    for length in lengths:
        counts[bisect_left(bounds, length)] += 1
    return tuple(zip(bounds, counts, strict=True))


def _suspicious(examples: Sequence[Example], rows: Sequence[Row], tokenizer: Any) -> list[tuple[str, str]]:
    specials = [token.content for token in tokenizer.added_tokens_decoder.values() if token.special]
    first_seen: dict[Any, str] = {}
    found: list[tuple[str, str]] = []
    for example, row in zip(examples, rows, strict=True):
        contents = [message["content"] for message in row.messages] or [row.text or ""]
        text = "\n".join(contents)
        if not _count_trained(example):
            found.append((row.where, "no token is trained: the prompt alone fills the row"))
        elif example.truncated:
            found.append((row.where, f"cut off: {example.cut_tokens} tokens too long"))
        for special in specials:
            if special in text:
                found.append((row.where, f"holds the special token {special} in its text"))
        if "\ufffd" in text:
            found.append((row.where, "holds U+FFFD, the mark of text that was decoded wrongly"))
        if row.last_assistant is not None and row.last_assistant < len(row.messages) - 1:
            found.append((row.where, "turns after the last answer are left out"))
        key = (row.text, tuple((message["role"], message["content"]) for message in row.messages))
        if key in first_seen:
            found.append((row.where, f"the same as {first_seen[key]}"))
        first_seen.setdefault(key, row.where)
    return found
