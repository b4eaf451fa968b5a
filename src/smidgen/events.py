"""What the library tells while it works; whoever calls it decides what to print.

Long functions take `report`, a function of one event. The command line draws a progress bar from them,
a notebook may collect them, and the default ignores them.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

__all__ = [
    "Answer",
    "Answers",
    "Evaluated",
    "Event",
    "Note",
    "Progress",
    "Report",
    "RowShown",
    "Saved",
    "Step",
    "Warned",
    "silent",
]


@dataclass(frozen=True)
class Note:
    """An automatic choice and its reason."""

    text: str


@dataclass(frozen=True)
class Warned:
    """Something the user should look at, though the work goes on."""

    text: str


@dataclass(frozen=True)
class Progress:
    """Long work other than training: `done` of `total` (None: unknown). done == total ends it."""

    what: str
    done: int
    total: int | None


@dataclass(frozen=True)
class RowShown:
    """One training row as the model sees it: pieces of text, each with whether the loss counts it."""

    pieces: tuple[tuple[str, bool], ...]


@dataclass(frozen=True)
class Step:
    """One optimizer step. loss is the mean over this step's labelled tokens.

    tokens: of all rows so far, each in full; padding does not count, and a prefix that rows share counts in each.
    """

    step: int
    total_steps: int
    loss: float
    learning_rate: float
    grad_norm: float
    tokens: int
    tokens_per_s: float
    remaining_s: float
    rss_bytes: int


@dataclass(frozen=True)
class Evaluated:
    """Held-out loss (mean over labelled tokens) after `step` optimizer steps. measures: of answers, if some were asked
    for, as those of Answers.
    """

    step: int
    loss: float
    rows: int
    tokens: int
    measures: Mapping[str, float] = field(default_factory=dict)


@dataclass(frozen=True)
class Answer:
    """A held-out row: what was asked, what should come, what the model said."""

    prompt: str
    expected: str
    answer: str


@dataclass(frozen=True)
class Answers:
    """Answers to held-out rows, `when` is 'before' or 'after' training.

    measures: exact_match, and valid_json and json_f1, or rouge_1, rouge_2, rouge_l and bleu: each from 0 to 1; none
    where no row could be answered. cut: how many were cut off at `longest_tokens`, or at the model's last position.
    """

    when: str
    rows: tuple[Answer, ...]
    measures: Mapping[str, float]
    cut: int = 0
    longest_tokens: int = 0


@dataclass(frozen=True)
class Saved:
    """A file that was written."""

    path: Path
    nbytes: int


Event = Note | Warned | Progress | RowShown | Step | Evaluated | Answers | Saved
Report = Callable[[Event], None]


def silent(event: Event) -> None:
    """The default report: says nothing."""
