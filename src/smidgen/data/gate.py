"""What is checked before the first step: data that would train to the end and teach nothing, or the wrong thing."""

from collections.abc import Sequence
from typing import Any

from smidgen.data.render import IGNORED, Example
from smidgen.errors import DataError

__all__ = ["check_examples"]

_MOST = 0.5  # of the rows


def check_examples(
    examples: Sequence[Example], tokenizer: Any, vocab_size: int, end_ids: Sequence[int], *, layout: str = "messages"
) -> None:
    """Raise DataError, with the reason, for examples that should not be trained on.

    vocab_size: rows of the model's embedding. end_ids: Renderer.end_ids. layout: DataSet.layout; plain text has no
    answers, so cut rows and missing end tokens are fine there.
    """
    if not examples:
        raise DataError("there are no rows to train on", expected="one row or more")
    _check_vocabulary(examples, vocab_size)
    _check_bos(examples, tokenizer)
    if layout != "text":
        _check_cut(examples)
    if not any(_trained(example) for example in examples):
        raise DataError("no token of the data would be trained", cure="look at the rows with: smidgen data MODEL DATA")
    if layout != "text":
        _check_end(examples, tokenizer, set(end_ids))


def _trained(example: Example) -> bool:
    return any(label != IGNORED for label in example.labels)


def _check_vocabulary(examples: Sequence[Example], vocab_size: int) -> None:
    for example in examples:
        if example.input_ids and max(example.input_ids) >= vocab_size:
            raise DataError(
                f"{example.where}: the tokenizer does not fit the model",
                expected=f"token ids below {vocab_size}",
                found=str(max(example.input_ids)),
                cure="use the tokenizer that came with the model",
            )


def _check_bos(examples: Sequence[Example], tokenizer: Any) -> None:
    bos = tokenizer.bos_token_id
    for example in examples:
        if bos is not None and example.input_ids[:2] == [bos, bos]:
            raise DataError(
                f"{example.where} begins with two {tokenizer.bos_token} tokens",
                expected="one",
                cure="take it out of the text or of the chat template; one is added by itself",
            )


def _check_cut(examples: Sequence[Example]) -> None:
    cut = [example for example in examples if example.truncated]
    if len(cut) <= _MOST * len(examples):
        return
    longest = max(len(example.input_ids) + example.cut_tokens for example in examples)
    raise DataError(
        f"the answers of {len(cut)} of {len(examples)} rows are cut off (first: {cut[0].where})",
        expected=f"rows of at most {len(cut[0].input_ids)} tokens",
        found=f"up to {longest}",
        cure="raise --seq-len, or shorten the rows",
    )


def _check_end(examples: Sequence[Example], tokenizer: Any, end_ids: set[int]) -> None:
    if not any(not end_ids.isdisjoint(example.labels) for example in examples):
        names = " or ".join(str(tokenizer.convert_ids_to_tokens(end)) for end in sorted(end_ids))
        raise DataError(
            "no row trains the token that ends an answer, so the model would never stop",
            expected=names,
            cure="raise --seq-len, or mend the chat template",
        )
