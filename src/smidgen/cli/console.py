"""The only place that prints.

Results go to standard output; what is told on the way (notes, warnings, progress) goes to standard error. With --json
standard output carries one JSON object as its last line and everything else goes to standard error.
"""

import json
import math
import os
import shlex
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

import rich.console
from rich.padding import Padding
from rich.text import Text

from smidgen.cli import views
from smidgen.cli.progress import Bars
from smidgen.events import Answers, Evaluated, Event, Note, Progress, RowShown, Saved, Step, Warned

if TYPE_CHECKING:
    from smidgen.data.report import DataReport

__all__ = ["Console", "command", "print_error", "print_line"]


def print_line(text: str) -> None:
    """A line on standard output, outside any run: --version."""
    print(text)


def print_error(text: str) -> None:
    """'smidgen: error: ...' on standard error."""
    print(f"smidgen: error: {views.printable(text)}", file=sys.stderr)


def command(*words: str | Path) -> str:
    """A command line that can be pasted into a shell."""
    return " ".join(word if isinstance(word, _Raw) else shlex.quote(str(word)) for word in ("smidgen", *words))


class _Raw(str):
    """A word of a command that is already quoted."""


class Console:
    """Draws events and results. `report` is what the library's functions take."""

    def __init__(self, *, as_json: bool = False) -> None:
        self.as_json = as_json
        self._tell = _console(sys.stderr)
        self._result = self._tell if as_json else _console(sys.stdout)
        self._bars = Bars(self._tell, self._tell.is_terminal, self._say)
        self._answers: dict[str, Answers] = {}
        self._saved: list[Saved] = []

    def report(self, event: Event) -> None:
        match event:
            case Note(text):
                self.note(text)
            case Warned(text):
                self.warn(text)
            case Progress():
                self._bars.progress(event)
            case Step():
                self._bars.step(event)
            case RowShown(pieces):
                self._row(pieces)
            case Evaluated(step, loss, rows, tokens, measures):
                self._bars.close(but_training=True)
                when = f"after {step:,} steps" if step else "before training"
                answers = f"; answers: {_measured(measures)}" if measures else ""
                self._say(f"held-out loss {when}: {loss:.4f} ({rows:,} rows, {tokens:,} tokens){answers}")
            case Answers():
                self._bars.close(but_training=True)
                self._answers[event.when] = event
                self._say(f"{_answers_when(event.when)}: {_measured(event.measures)} ({len(event.rows):,} rows)")
            case Saved():
                self._saved.append(event)

    def note(self, text: str) -> None:
        self._paragraph(Text(text, "dim"), "· ", "dim")

    def warn(self, text: str) -> None:
        self._paragraph(Text(text, "yellow"), "warning: ", "bold yellow")

    def line(self, text: str = "", style: str = "") -> None:
        """A line of the result."""
        self._result.print(Text(views.printable(text), style), soft_wrap=not self._result.is_terminal)

    def title(self, text: str) -> None:
        self.line()
        self.line(text, "bold")

    def show(self, renderable: rich.console.RenderableType) -> None:
        """A table of the result."""
        indented = Padding(renderable, (0, 0, 0, 2), expand=False)
        if self._result.is_terminal:
            self._result.print(indented)
            return
        with self._result.capture() as capture:
            self._result.print(indented)
        for line in capture.get().splitlines():  # rich fills its tables with blanks, which logs need not have
            self._result.print(Text(line.rstrip()), soft_wrap=True)

    def json(self, result: Mapping[str, Any]) -> None:
        """The one JSON object of --json, on one line."""
        print(json.dumps(_finite(result), ensure_ascii=False, default=str, allow_nan=False), flush=True)

    def plan(self, text: str) -> None:
        """What will happen, before it does."""
        self._tell.print(Text(text), soft_wrap=True)

    def results(self, result: Mapping[str, Any]) -> None:
        """Names and values."""
        self.line()
        self.show(views.facts(result))

    def quantised(self, result: Mapping[str, Any]) -> None:
        """What `smidgen quantize` measured."""
        self.results({key: value for key, value in result.items() if key not in ("errors", "perplexity")})
        for title, renderable in views.quantisation(result):
            self.title(title)
            self.show(renderable)

    def forecast(self, result: Mapping[str, Any]) -> None:
        """What `smidgen plan` found."""
        for title, renderable in views.forecast(result, plain=not self._result.is_terminal):
            self.title(title)
            self.show(renderable)

    def evaluation(self, result: Mapping[str, Any]) -> None:
        """What `smidgen evaluate` measured, a table for each file, and what became worse."""
        for title, renderable in views.evaluation(result):
            self.title(title)
            self.show(renderable)
        for line in views.worse(result):
            self.line()
            self.line(line, "bold")

    def data_report(self, report: "DataReport") -> None:
        """What `smidgen data` found."""
        for title, renderable in views.data_report(report, plain=not self._result.is_terminal):
            self.title(title)
            self.show(renderable)

    def some_answers(self) -> None:
        """A few answers of the last comparison, those before training above them."""
        last = next((self._answers[when] for when in reversed(self._answers) if when != "before"), None)
        if last is not None:
            self.title("Answers to held-out rows (✓ as the data has it)")
            self.show(views.comparison(self._answers.get("before"), last))

    def finished(self, summary: Mapping[str, Any], run: Path, flags: Sequence[str] = ()) -> None:
        """The end of a run: before and after, answers, files, figures, and how to go on, which needs `flags`."""
        self._bars.close()
        compared = views.before_after(summary)
        if compared.row_count:
            self.title("Before and after")
            self.show(compared)
        self.some_answers()
        prompts = [row.prompt for answers in self._answers.values() for row in answers.rows]
        asked = min(prompts, key=len, default=_Raw('"Hello!"'))
        self.files()
        self.line()
        self.line(views.run_figures(summary))
        self.next(
            command("generate", run, *flags, asked),
            command("chat", run, *flags),
            command("merge", run, "--out", f"{run}-merged", *flags),
        )

    def files(self) -> None:
        """What was written since the start."""
        if self._saved:
            self.title("Files written")
            self.show(views.files(self._saved))

    def next(self, *commands: str) -> None:
        """Commands to type, unwrapped: they get copied."""
        self.title("Next")
        for each in commands:
            self._result.print(Text(f"  {views.printable(each)}", "cyan"), soft_wrap=True)

    def stream(self, answer: Callable[[], Iterable[str]]) -> tuple[str, bool]:
        """Writes an answer to standard output piece by piece as it comes. Ctrl-C ends it, or its preparation.

        Returns what was said, and whether it came to its end.
        """
        self._bars.close()
        out = sys.stderr if self.as_json else sys.stdout
        clean = views.printable if out.isatty() else str
        said: list[str] = []
        complete = True
        try:
            for piece in answer():
                said.append(piece)
                print(clean(piece), end="", file=out, flush=True)
        except KeyboardInterrupt:
            complete = False
        print(file=out, flush=True)
        return "".join(said), complete

    def ask(self, prompt: str) -> str:
        """A line typed by the user, with line editing and history where the terminal has it. EOFError at its end."""
        self._bars.close()
        with suppress(ImportError):
            import readline  # noqa: F401  (its import is what gives input() its line editing)
        if self.as_json or not sys.stdin.isatty():
            print(prompt, end="", file=sys.stderr, flush=True)
            return input()
        return input(prompt)

    def close(self) -> None:
        self._bars.close()

    def _row(self, pieces: tuple[tuple[str, bool], ...]) -> None:
        how = "green, underlined" if self._tell.is_terminal else "in [[ ]]"
        self._say(f"one training row; the loss counts what is {how}:", "bold")
        row = views.marked_row(pieces, plain=not self._tell.is_terminal)
        if self._tell.is_terminal:
            self._tell.print(Padding(row, (0, 0, 1, 2), expand=False))
            return
        for line in row.split("\n"):  # unpadded and unwrapped, for logs
            self._tell.print(Text.assemble("  ", line), soft_wrap=True)

    def _say(self, text: str, style: str = "") -> None:
        self._paragraph(Text(views.printable(text), style), "", "")

    def _paragraph(self, text: Text, mark: str, mark_style: str) -> None:
        """A paragraph on standard error, wrapped under its mark in a terminal and left on one line elsewhere."""
        text.plain = views.printable(text.plain)
        line = Text.assemble((mark, mark_style), text)
        if not self._tell.is_terminal:
            self._tell.print(line, soft_wrap=True)
            return
        for number, part in enumerate(text.wrap(self._tell, max(20, self._tell.width - len(mark)))):
            self._tell.print(Text.assemble((mark if number == 0 else " " * len(mark), mark_style), part), no_wrap=True)


def _console(stream: Any) -> rich.console.Console:
    """A rich console that takes no liberties with text, and only a real terminal for one."""
    terminal = stream.isatty() and os.environ.get("TERM") not in {"dumb", "unknown"}
    return rich.console.Console(
        file=stream,
        force_terminal=terminal,
        width=None if terminal else 120,
        highlight=False,
        markup=False,
        emoji=False,
    )


def _measured(measures: Mapping[str, float]) -> str:
    return ", ".join(f"{views.TITLES[name]} {views.percent(value)}" for name, value in measures.items())


def _answers_when(when: str) -> str:
    return f"answers {when} training" if when in {"before", "after"} else "answers"


def _finite(value: Any) -> Any:
    """NaN and infinities as null: JSON has no words for them."""
    if isinstance(value, float) and not math.isfinite(value):
        return None
    if isinstance(value, Mapping):
        return {str(key): _finite(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_finite(item) for item in value]
    return value
