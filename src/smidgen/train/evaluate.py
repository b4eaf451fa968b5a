"""How good is it: held-out loss, answers compared with the data's, perplexity of a text."""

import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import compress
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from smidgen.data.batch import make_batch
from smidgen.data.records import Row
from smidgen.data.render import Example, Renderer
from smidgen.errors import DataError
from smidgen.events import Answer, Answers, Progress, Report, Warned, silent
from smidgen.measures.answers import measure_answers
from smidgen.measures.measure import Measure, cross_entropy, perplexity
from smidgen.model.build import Base
from smidgen.model.device import free_bytes
from smidgen.model.generate import Sampling, generate_batch, room_after
from smidgen.train.loss import row_losses, token_losses

__all__ = ["PROTOCOLS", "HeldOut", "answer_prompts", "answer_rows", "held_out_loss", "text_perplexity"]

_FREE_SHARE = 0.5  # of what is free, for what answers keep, where no more is said
_STRETCH_TOKENS = 1 << 17  # of held-out rows that are put in order together; two stretches are in memory
PROTOCOLS = {"gptq": (2048, 0), "llama.cpp": (512, 256)}  # window, first position that counts


@dataclass(frozen=True)
class HeldOut:
    """losses float64 [rows]: summed over each row's (or window's) labelled tokens, natural logarithm; row_tokens int64
    [rows]: their number.
    """

    losses: NDArray[np.float64]
    row_tokens: NDArray[np.int64]

    @property
    def loss(self) -> float:
        """Mean over labelled tokens, not over rows or batches."""
        return math.fsum(self.losses) / self.tokens

    @property
    def rows(self) -> int:
        return len(self.losses)

    @property
    def tokens(self) -> int:
        return int(self.row_tokens.sum())

    @property
    def perplexity(self) -> float:
        return math.exp(min(self.loss, 700.0))

    @property
    def measures(self) -> dict[str, Measure]:
        """loss and perplexity, with the rows that intervals are resampled from."""
        loss = cross_entropy(self.losses, self.row_tokens)
        return {"loss": loss, "perplexity": perplexity(loss)}


def held_out_loss(
    base: Base, examples: Sequence[Example], batch_size: int, report: Report = silent, *, share_prefix: bool = False
) -> HeldOut:
    """The loss over all labelled tokens, for each row in the order given; rows of similar length share a batch.

    share_prefix: instead rows that begin alike do, and what they begin with is computed once. Rows are taken from
    `examples` a stretch at a time, so that any number of them takes the same memory, but for 16 bytes each.
    """
    losses, tokens = np.zeros(len(examples)), np.zeros(len(examples), np.int64)
    done = 0
    for rows in _stretches(examples):
        ids = [row.input_ids for row in rows]
        keys = ids if share_prefix else [[len(row)] for row in ids]
        order = np.array(sorted(range(len(keys)), key=keys.__getitem__))
        for start in range(0, len(order), batch_size):
            chosen = order[start : start + batch_size]
            taken = [rows[index] for index in chosen]
            batch = make_batch(taken, share_prefix=share_prefix, tile_tokens=base.tile_tokens)
            losses[done + chosen], tokens[done + chosen] = (part.numpy() for part in row_losses(base, batch))
            report(Progress("held-out loss", done + start + len(chosen), len(examples)))
        done += len(rows)
    if not tokens.any():
        raise DataError("none of the held-out rows has a labelled token")
    return HeldOut(losses, tokens)


def _stretches(examples: Iterable[Example]) -> Iterator[list[Example]]:
    """The rows in their order, in lists of hardly more than _STRETCH_TOKENS tokens."""
    rows: list[Example] = []
    tokens = 0
    for example in examples:
        rows.append(example)
        tokens += len(example.input_ids)
        if tokens >= _STRETCH_TOKENS:
            yield rows
            rows, tokens = [], 0
    if rows:
        yield rows


def answer_rows(
    base: Base,
    renderer: Renderer,
    rows: Sequence[Row],
    *,
    when: str,
    max_new_tokens: int | None = None,
    batch_size: int = 128,
    room: int | None = None,
    report: Report = silent,
) -> Answers:
    """Greedy answers to the last turn of each row, compared with the data's answers (measures.answers). Rows whose
    prompt leaves no position for an answer are left out, and named.

    max_new_tokens: default is what the longest expected answer of the rows needs and a little more. room: as
    for answer_prompts.
    """
    rows = [row for row in rows if row.messages]
    prompts = [renderer.prompt_ids(row) for row in rows]
    fits = [len(prompt) < base.max_positions for prompt in prompts]
    if not all(fits):
        first = fits.index(False)
        report(
            Warned(
                f"{fits.count(False):,} of {len(rows):,} rows are not answered: their prompts leave none of the model's"
                f" {base.max_positions:,} positions free (first: {rows[first].where}, {len(prompts[first]):,} tokens)"
            )
        )
        rows, prompts = list(compress(rows, fits)), list(compress(prompts, fits))
    expected = [renderer.answer_text(row).strip() for row in rows]
    if max_new_tokens is None:
        lengths = [len(renderer.tokenizer(text, add_special_tokens=False).input_ids) for text in expected]
        max_new_tokens = max(lengths, default=0) + 8
    answers = answer_prompts(
        base,
        renderer,
        prompts,
        max_new_tokens=max_new_tokens,
        batch_size=batch_size,
        room=room,
        what=f"answers {when}",
        report=report,
    )
    asked = zip(rows, expected, answers, strict=True)
    pairs = tuple(Answer(_question(row), want, text) for row, want, (text, _) in asked)
    measures = {name: measure.value for name, measure in measure_answers(pairs).items()} if pairs else {}
    return Answers(when, pairs, measures, sum(was_cut for _, was_cut in answers), max_new_tokens)


def answer_prompts(
    base: Base,
    renderer: Renderer,
    prompts: Sequence[Sequence[int]],
    *,
    max_new_tokens: int,
    batch_size: int,
    what: str,
    room: int | None = None,
    report: Report = silent,
) -> list[tuple[str, bool]]:
    """Greedy answers to prompts of token ids, in their order, each with whether max_new_tokens, or the end of
    the model's positions, cut it off.

    room: bytes for what rows that are answered at once keep, their keys, values and logits; None: half of what is free.
    Where one row alone needs more, its keys and values wait in bfloat16.
    """
    tokenizer, sampling = renderer.tokenizer, Sampling(max_new_tokens=max_new_tokens)
    room = int(_FREE_SHARE * free_bytes(base.device)) if room is None else room
    longest = max((len(prompt) for prompt in prompts), default=0)
    logits = 2 * base.model.config.get_text_config().vocab_size * torch.float32.itemsize
    of_row = (longest + max_new_tokens) * base.key_bytes + logits
    batch_size = max(1, min(batch_size, room // of_row))
    cache_dtype = base.cache_dtype
    if of_row > room and base.device.type == "cpu":
        base.cache_dtype = torch.bfloat16
    order = sorted(range(len(prompts)), key=lambda index: len(prompts[index]))
    answers = [("", False)] * len(prompts)
    try:
        for start in range(0, len(order), batch_size):
            chosen = order[start : start + batch_size]
            new = generate_batch(base, [prompts[i] for i in chosen], renderer.end_ids, sampling, len(tokenizer))
            for index, ids in zip(chosen, new, strict=True):
                most = room_after(base, len(prompts[index]), sampling)
                answers[index] = tokenizer.decode(ids, skip_special_tokens=True).strip(), len(ids) == most
            report(Progress(what, start + len(chosen), len(order)))
    finally:
        base.cache_dtype = cache_dtype
    return answers


def _question(row: Row) -> str:
    """What the user said last before the answer."""
    asked = [message["content"] for message in row.messages[: row.last_assistant] if message["role"] == "user"]
    return str(asked[-1]) if asked else ""


@torch.no_grad()
def text_perplexity(
    base: Base, tokenizer: Any, text: str, protocol: str, limit: int | None = None, report: Report = silent
) -> HeldOut:
    """Loss over a plain text in windows without overlap, of which at most `limit` are taken.

    'gptq': windows of 2048 tokens, every token but a window's first counts. 'llama.cpp': windows of 512, the second
    half counts, and each begins with BOS where the tokenizer has one. A last shorter window is left out, as both do.
    Raises DataError where the text is shorter than one window.
    """
    window, first = PROTOCOLS[protocol]
    if window > base.max_positions:
        raise DataError(
            f"protocol {protocol} takes windows of {window} tokens",
            expected=f"at most the model's {base.max_positions} positions",
            cure="use --protocol llama.cpp, whose windows have 512 tokens" if window > 512 else "",
        )
    ids = tokenizer(text, verbose=False).input_ids
    if len(ids) < window:
        raise DataError(f"the text has {len(ids)} tokens", expected=f"at least one window of {window} ({protocol})")
    bos = tokenizer.bos_token_id if protocol == "llama.cpp" and ids[0] == tokenizer.bos_token_id else None
    losses: list[float] = []
    windows = min(len(ids) // window, limit or len(ids))
    for index in range(windows):
        part = torch.tensor(ids[index * window : (index + 1) * window], device=base.device)
        seen = part.clone()
        if bos is not None:
            seen[0] = bos
        hidden = base.hidden_of(seen[None])[0, first:-1]
        losses.append(float(token_losses(base, hidden, part[first + 1 :])[0].double().sum()))
        report(Progress("perplexity", index + 1, windows))
    return HeldOut(np.array(losses), np.full(windows, window - first - 1))
