"""What is checked before the first step: data that would train to the end and teach nothing, or the wrong thing."""

from collections.abc import Sequence
from typing import Any

import numpy as np

from smidgen.data.render import IGNORED, Example, Renderer
from smidgen.data.tokens import Examples
from smidgen.errors import DataError
from smidgen.events import Report, Warned

__all__ = ["check_examples", "leave_out_untrained"]

_MOST = 0.5  # of the rows


def check_examples(
    examples: Sequence[Example],
    tokenizer: Any,
    vocab_size: int,
    end_ids: Sequence[int],
    *,
    layout: str = "messages",
    too_long: str = "right",
) -> None:
    """Raise DataError, with the reason, for examples that should not be trained on.

    vocab_size: rows of the model's embedding. end_ids: Renderer.end_ids. layout: DataSet.layout; plain text has no
    answers, so cut rows and missing end tokens are fine there. too_long: Renderer.too_long; only "right" cuts answers.
    """
    if not examples:
        raise DataError("there are no rows to train on", expected="one row or more")
    trains, ends, cut, longest = False, False, 0, 0
    first_cut: Example | None = None
    for example in examples:  # once: each is made anew from its tokens
        _check_vocabulary(example, vocab_size)
        _check_bos(example, tokenizer)
        trains = trains or any(label != IGNORED for label in example.labels)
        ends = ends or not set(end_ids).isdisjoint(example.labels)
        longest = max(longest, len(example.input_ids) + example.cut_tokens)
        if example.truncated:
            cut, first_cut = cut + 1, first_cut or example
    if first_cut and layout != "text" and too_long == "right" and cut > _MOST * len(examples):
        raise DataError(
            f"the answers of {cut} of {len(examples)} rows are cut off (first: {first_cut.where})",
            expected=f"rows of at most {len(first_cut.input_ids)} tokens",
            found=f"up to {longest}",
            cure="raise --seq-len, or shorten the rows",
        )
    if not trains:
        raise DataError("no token of the data would be trained", cure="look at the rows with: smidgen data MODEL DATA")
    if layout != "text" and not ends:
        names = " or ".join(str(tokenizer.convert_ids_to_tokens(end)) for end in sorted(end_ids))
        raise DataError(
            "no row trains the token that ends an answer, so the model would never stop",
            expected=names,
            cure="raise --seq-len, or mend the chat template",
        )


def _check_vocabulary(example: Example, vocab_size: int) -> None:
    if example.input_ids and max(example.input_ids) >= vocab_size:
        raise DataError(
            f"{example.where}: the tokenizer does not fit the model",
            expected=f"token ids below {vocab_size}",
            found=str(max(example.input_ids)),
            cure="use the tokenizer that came with the model",
        )


def _check_bos(example: Example, tokenizer: Any) -> None:
    bos = tokenizer.bos_token_id
    if bos is not None and example.input_ids[:2] == [bos, bos]:
        raise DataError(
            f"{example.where} begins with two {tokenizer.bos_token} tokens",
            expected="one",
            cure="take it out of the text or of the chat template; one is added by itself",
        )


def leave_out_untrained(examples: Examples, what: str, renderer: Renderer, report: Report) -> Examples:
    """The rows that have a label: without one a row costs time and teaches nothing. All that have tokens if none has.

    What rows longer than seq_len have lost is said, and how many rows are left out.
    """
    lost, trained = examples.cut_tokens, examples.trained_tokens > 0
    if lost.any():
        long = np.flatnonzero(lost)
        how = {"right": "their ends are cut", "left": "their beginnings are cut", "drop": "they are left out"}
        report(
            Warned(
                f"{len(long):,} of {len(examples):,} {what} are longer than seq_len {renderer.seq_len}:"
                f" {how[renderer.too_long]}, {lost.sum():,} tokens are lost (first: {examples.where(long[0])})"
            )
        )
    here = examples.lengths > 0  # the others have been dropped, and that has been said
    bare = np.flatnonzero(here & ~trained)
    if trained.any() and len(bare):
        report(
            Warned(
                f"{len(bare):,} {what} have no trained token within seq_len and are left out"
                f" (first: {examples.where(bare[0])})"
            )
        )
    return examples.select(trained if trained.any() else here)
