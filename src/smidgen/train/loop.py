"""The training loop: which rows when, at what rate, and what is told, saved and stopped in between."""

import math
import signal
import threading
import time
from array import array
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property, lru_cache
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from smidgen.data.batch import Batch, Batching, epoch_order, grouped_order
from smidgen.data.mixture import Mixture
from smidgen.data.tokens import Examples
from smidgen.errors import RunError
from smidgen.events import Report, Step
from smidgen.kernels.pages import ReusedPages
from smidgen.model.build import Base
from smidgen.model.device import current_rss_bytes, swapped_bytes
from smidgen.model.fused import is_fused
from smidgen.train.config import Settings
from smidgen.train.loss import batch_loss
from smidgen.train.noise import embedding_noise
from smidgen.train.state import Cursor
from smidgen.train.step import learning_rate_at, optimizer_step
from smidgen.units import parse_duration

__all__ = ["Outcome", "Schedule", "train"]


@dataclass(frozen=True)
class Schedule:
    """Which rows each optimizer step takes: a function of the settings, the mixture and the rows' lengths in tokens."""

    lengths: Sequence[int] | NDArray[np.integer]
    settings: Settings
    mixture: Mixture | None = None

    @property
    def step_rows(self) -> int:
        return self.settings.micro_batch * self.settings.accumulation

    @property
    def steps_per_epoch(self) -> int:
        rows = sum(self.mixture.quotas) if self.mixture else len(self.lengths)
        return math.ceil(rows / self.step_rows)

    @property
    def total_steps(self) -> int:
        steps = math.ceil(self.steps_per_epoch * self.settings.epochs)
        return min(steps, self.settings.max_steps or steps)

    def rows_of(self, step: int) -> Sequence[int]:
        """The rows of a step, as indices."""
        epoch, position = divmod(step, self.steps_per_epoch)
        first = position * self.step_rows
        return self._order_of(epoch)[first : first + self.step_rows]

    def orders(self) -> Iterator[NDArray[np.int32]]:
        """The rows of all steps, an epoch at a time, as indices; -1 fills a step that has fewer."""
        for epoch in range(math.ceil(self.total_steps / self.steps_per_epoch)):
            steps = min(self.steps_per_epoch, self.total_steps - epoch * self.steps_per_epoch)
            order = np.asarray(self._order_of(epoch), np.int32)[: steps * self.step_rows]
            yield np.pad(order, (0, steps * self.step_rows - len(order)), constant_values=-1)

    @cached_property
    def _order_of(self) -> Callable[[int], Sequence[int]]:
        """Epoch -> the order of its rows; the last one is kept, since every step of an epoch asks for it."""

        @lru_cache(maxsize=1)
        def order(epoch: int) -> Sequence[int]:
            seed = self.settings.seed
            rows = self.mixture.rows(seed, epoch) if self.mixture else range(len(self.lengths))
            if self.settings.group_by_length:
                lengths = np.asarray(self.lengths)[np.asarray(rows)] if self.mixture else self.lengths
                places = grouped_order(lengths, seed, epoch, self.step_rows)
            else:
                places = epoch_order(len(rows), seed, epoch)
            return array("i", (rows[place] for place in places)) if self.mixture else places

        return order


@dataclass(frozen=True)
class Outcome:
    """stopped: '' when all steps were done, else why not ('interrupted', 'max_time', 'early_stopping')."""

    cursor: Cursor
    stopped: str


def train(
    base: Base,
    optimizer: torch.optim.Optimizer,
    examples: Examples,
    mixture: Mixture | None,
    settings: Settings,
    batching: Batching,
    cursor: Cursor,
    *,
    save: Callable[[Cursor], None],
    evaluate: Callable[[Cursor], bool],
    record: Callable[[dict[str, Any]], None],
    report: Report,
) -> Outcome:
    """Run the steps from `cursor` on. `save` and `evaluate` are called at their intervals, `record` after every step.
    Where `evaluate` says so the loop ends.

    max_time counts from here on, also where a run is resumed. The first Ctrl-C ends the loop after the step in
    progress; a second one at once.
    """
    schedule = Schedule(examples.lengths, settings, mixture)
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    limit_s = parse_duration(settings.max_time) if settings.max_time else math.inf
    total, first = schedule.total_steps, Cursor(cursor.step, cursor.tokens, cursor.train_s)

    def loss_of(batch: Batch) -> torch.Tensor:
        noise_on(batch.lengths)
        return batch_loss(base, batch, settings.label_smoothing)

    pages = ReusedPages(is_fused(base.backbone))
    with _stop_on_interrupt() as interrupted, embedding_noise(base, settings.neftune_alpha) as noise_on:
        while cursor.step < total:
            # Here, not after the step: where Ctrl-C came in between, the resumed run does it.
            if _due(cursor.step, settings.eval_interval):
                pages.give_back()
                if evaluate(cursor):
                    return Outcome(cursor, "early_stopping")
            base.checkpoint.check_unchanged()  # a file that was shortened would end the process (SIGBUS)
            begun, streamed = time.perf_counter(), base.streamed
            rows = [examples[row] for row in schedule.rows_of(cursor.step)]
            batches = batching.batches(rows)
            rate = learning_rate_at(cursor.step, total, settings.learning_rate, settings.warmup, settings.schedule)
            base.model.train()
            try:
                with pages:
                    result = optimizer_step(
                        loss_of, batches, parameters, optimizer, learning_rate=rate, clip=settings.clip
                    )
            except RunError as error:
                what = f"step {cursor.step + 1}: {error.what}"
                raise RunError(what, found=error.found, cure=error.cure) from error
            base.model.eval()

            cursor.step += 1
            cursor.tokens += result.tokens
            cursor.train_s += time.perf_counter() - begun
            elapsed_s = cursor.train_s - first.train_s
            left_s = elapsed_s / (cursor.step - first.step) * (total - cursor.step)
            step = Step(
                step=cursor.step,
                total_steps=total,
                loss=result.loss,
                learning_rate=rate,
                grad_norm=result.grad_norm,
                tokens=cursor.tokens,
                tokens_per_s=(cursor.tokens - first.tokens) / elapsed_s,
                remaining_s=min(left_s, limit_s - elapsed_s),
                rss_bytes=current_rss_bytes(),
            )
            record(
                {
                    "step": step.step,
                    "loss": step.loss,
                    "learning_rate": rate,
                    "grad_norm": step.grad_norm,
                    "tokens": step.tokens,
                    "train_s": round(cursor.train_s, 3),
                    "rss_bytes": step.rss_bytes,
                    **({"swapped_bytes": swapped} if (swapped := swapped_bytes()) else {}),
                    **{key: round(now - streamed[key], 3) for key, now in base.streamed.items()},
                }
            )
            report(step)
            if interrupted.is_set():
                return Outcome(cursor, "interrupted")
            if elapsed_s >= limit_s and cursor.step < total:
                return Outcome(cursor, "max_time")
            if _due(cursor.step, settings.save_interval) and cursor.step < total:
                pages.give_back()
                save(cursor)
    return Outcome(cursor, "")


def _due(step: int, interval: int) -> bool:
    return bool(interval) and step > 0 and step % interval == 0


@contextmanager
def _stop_on_interrupt() -> Iterator[threading.Event]:
    """An event that the first Ctrl-C sets. Only the main thread can listen; elsewhere it is never set."""
    event = threading.Event()
    if threading.current_thread() is not threading.main_thread():
        yield event
        return

    def first(signum: int, frame: Any) -> None:
        event.set()
        signal.signal(signal.SIGINT, before)  # a second one interrupts at once

    before = signal.signal(signal.SIGINT, first)
    try:
        yield event
    finally:
        signal.signal(signal.SIGINT, before)
