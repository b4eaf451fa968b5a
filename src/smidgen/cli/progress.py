"""Progress of long work: live bars in a terminal, a line now and then elsewhere."""

import time
from collections.abc import Callable

import rich.console
from rich.progress import BarColumn, TaskID, TextColumn
from rich.progress import Progress as LiveBars

from smidgen.events import Progress, Step
from smidgen.units import format_bytes, format_duration

__all__ = ["Bars", "Smoothed", "step_line"]

PLAIN_INTERVAL_S = 10.0
_TRAINING = "training"


class Smoothed:
    """Exponential moving mean, corrected for its start as Adam's moments are: single losses jump too much to read."""

    def __init__(self, keep: float = 0.9) -> None:
        self.keep, self._sum, self._weight = keep, 0.0, 0.0

    def add(self, value: float) -> float:
        self._sum = self.keep * self._sum + (1 - self.keep) * value
        self._weight = self.keep * self._weight + (1 - self.keep)
        return self._sum / self._weight


def step_line(event: Step, loss: float) -> str:
    """'12/75 loss 1.234 86 tok/s 2m10s left 1.2 GB': under 60 characters, so that a bar has room in 80 columns."""
    left = f"{format_duration(event.remaining_s)} left " if event.step < event.total_steps else ""
    return (
        f"{event.step}/{event.total_steps} loss {loss:.3f} {event.tokens_per_s:.0f} tok/s "
        f"{left}{format_bytes(event.rss_bytes)}"
    )


def _amount(done: int, total: int | None) -> str:
    """'128/210'; large totals are bytes, where a share says more."""
    if total is None:
        return f"{done:,}"
    return f"{done:,}/{total:,}" if total < 1_000_000 else f"{100 * done / total:.0f} %"


class Bars:
    """Bars for `Progress` and `Step` events. live: a terminal that can move its cursor; else `say` gets plain lines."""

    def __init__(self, console: rich.console.Console, live: bool, say: Callable[[str], None]) -> None:
        self._console, self._live, self._say = console, live, say
        self._bars: LiveBars | None = None
        self._tasks: dict[str, TaskID] = {}
        self._started_s: dict[str, float] = {}
        self._said_s: dict[str, float] = {}
        self._loss = Smoothed()

    def step(self, event: Step) -> None:
        if event.step == 1:
            self._loss = Smoothed()
        last = event.step >= event.total_steps
        line = step_line(event, self._loss.add(event.loss))
        self._update(_TRAINING, event.step, event.total_steps, line)
        if last:
            self._forget(_TRAINING, keep=True)

    def progress(self, event: Progress) -> None:
        now = time.monotonic()
        elapsed = now - self._started_s.setdefault(event.what, now)
        done = event.total is not None and event.done >= event.total
        tail = _amount(event.done, event.total)
        if event.total and not done and event.done and elapsed > 2:
            tail += f" {format_duration(elapsed * (event.total - event.done) / event.done)} left"
        if not done:
            self._update(event.what, event.done, event.total, tail)
            return
        self._forget(event.what, keep=False)
        if elapsed >= 1:  # shorter work needs no line
            self._say(f"{event.what}: {tail} in {format_duration(elapsed)}")

    def close(self, *, but_training: bool = False) -> None:
        """Takes the bars away; the training bar's last state stays, or the bar itself. Safe to call twice."""
        for what in {*self._tasks, *self._started_s, *self._said_s}:
            if what != _TRAINING or not but_training:
                self._forget(what, keep=what == _TRAINING)

    def _update(self, what: str, done: int, total: int | None, tail: str) -> None:
        if not self._live:
            now = time.monotonic()
            # Training tells at once and at its end, other work only when it takes long.
            first = now if what != _TRAINING else now - PLAIN_INTERVAL_S
            last = what == _TRAINING and done == total
            if last or now - self._said_s.setdefault(what, first) >= PLAIN_INTERVAL_S:
                self._said_s[what] = now
                self._say(f"{what} {tail}")
            return
        if self._bars is None:
            columns = (TextColumn("{task.description}"), BarColumn(None), TextColumn("{task.fields[tail]}"))
            self._bars = LiveBars(*columns, console=self._console, expand=True, refresh_per_second=4)
            self._bars.start()
        if what not in self._tasks:
            self._tasks[what] = self._bars.add_task(what, total=total, tail=tail)
        self._bars.update(self._tasks[what], completed=done, total=total, tail=tail)

    def _forget(self, what: str, *, keep: bool) -> None:
        """Ends one bar. keep: its last state stays on the screen."""
        self._started_s.pop(what, None)
        self._said_s.pop(what, None)
        task = self._tasks.pop(what, None)
        if self._bars is None or task is None:
            return
        if not keep:
            self._bars.remove_task(task)
        if not self._tasks:
            self._bars.live.transient = not self._bars.tasks  # an empty frame would leave a blank line
            self._bars.stop()
            self._bars = None
