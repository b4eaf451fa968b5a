"""How likely a model finds texts that may follow: multiple choice and last words.

The text before and each continuation are tokenised together, as the model would see them; a continuation's tokens are
those that end behind the context. Only they go through the output head, a chunk at a time. The last token is never fed
in, so choices of one token, such as the letters of MMLU, share a single pass over their question; longer choices
repeat it.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from smidgen.data.tasks import Task
from smidgen.errors import DataError
from smidgen.events import Progress, Report, silent
from smidgen.measures.measure import Measure, cross_entropy, perplexity, share
from smidgen.model.build import Base
from smidgen.train.loss import token_losses

__all__ = ["measure_choices", "measure_last_words", "score_tasks"]


@dataclass(frozen=True)
class _Continuation:
    """targets: its token ids; the first is predicted from position `at` of the tokens that are fed in."""

    task: int
    choice: int
    at: int
    targets: tuple[int, ...]


@torch.no_grad()
def score_tasks(
    base: Base, tokenizer: Any, tasks: Sequence[Task], *, batch_size: int, what: str, report: Report = silent
) -> list[list[tuple[float, bool]]]:
    """For each continuation of each task: (its summed log-likelihood, whether each of its tokens is the likeliest one).

    A text beyond the model's positions loses its beginning. Raises DataError where a continuation alone is too long.
    """
    scores = [[(0.0, False)] * len(task.continuations) for task in tasks]
    wanted: dict[tuple[int, ...], list[_Continuation]] = {}  # what is fed in -> what is looked up in it
    for number, task in enumerate(tasks):
        for inputs, continuation in _encoded(base, tokenizer, number, task):
            wanted.setdefault(inputs, []).append(continuation)
    order = sorted(wanted, key=len)
    for start in range(0, len(order), batch_size):
        chosen = order[start : start + batch_size]
        lengths = torch.tensor([len(inputs) for inputs in chosen])
        padded = torch.zeros(len(chosen), int(lengths.max()), dtype=torch.int64)
        for row, inputs in enumerate(chosen):
            padded[row, : len(inputs)] = torch.tensor(inputs)
        hidden, of_tokens = base.hidden_of_rows(padded, lengths)
        firsts = (lengths.cumsum(0) - lengths).tolist()
        looked_up = [(first, one) for first, inputs in zip(firsts, chosen, strict=True) for one in wanted[inputs]]
        places = [first + one.at + step for first, one in looked_up for step in range(len(one.targets))]
        targets = torch.tensor([target for _, one in looked_up for target in one.targets], device=base.device)
        losses, likeliest = token_losses(base, hidden[of_tokens[torch.tensor(places, device=base.device)]], targets)
        sizes = [len(one.targets) for _, one in looked_up]
        for (_, one), loss, top in zip(looked_up, losses.cpu().split(sizes), likeliest.cpu().split(sizes), strict=True):
            scores[one.task][one.choice] = -float(loss.double().sum()), bool(top.all())
        report(Progress(what, start + len(chosen), len(order)))
    return scores


def _encoded(base: Base, tokenizer: Any, number: int, task: Task) -> list[tuple[tuple[int, ...], _Continuation]]:
    texts = [task.context + continuation for continuation in task.continuations]
    encoded = tokenizer(texts, return_offsets_mapping=True, return_attention_mask=False, verbose=False)
    found = []
    for choice, (ids, offsets) in enumerate(zip(encoded["input_ids"], encoded["offset_mapping"], strict=True)):
        own = [place for place, (_, end) in enumerate(offsets) if end > len(task.context)]
        first, ids = own[0], ids[: own[-1] + 1]  # without an end token that the tokenizer has put behind
        if first == 0:  # nothing stands before it
            start = tokenizer.bos_token_id if tokenizer.bos_token_id is not None else tokenizer.eos_token_id
            first, ids = 1, [start, *ids]
        cut = max(0, len(ids) - 1 - base.max_positions)
        if cut >= first:
            expected = f"at most the model's {base.max_positions} positions"
            raise DataError(f"{task.where}: a choice alone is too long", expected=expected, found=f"{len(own)} tokens")
        found.append((tuple(ids[cut:-1]), _Continuation(number, choice, first - 1 - cut, tuple(ids[first:]))))
    return found


def measure_choices(tasks: Sequence[Task], scores: Sequence[Sequence[tuple[float, bool]]]) -> dict[str, Measure]:
    """accuracy: the likeliest choice is the right one. accuracy_norm: the likeliest for its length in characters, left
    out where the choices of each task are equally long, which makes both the same.
    """
    likelihoods = [[likelihood for likelihood, _ in row] for row in scores]
    measures = {"accuracy": share([_best(row) == task.right for row, task in zip(likelihoods, tasks, strict=True)])}
    if any(len(set(task.lengths)) > 1 for task in tasks):
        normed = [
            [likelihood / length for likelihood, length in zip(row, task.lengths, strict=True)]
            for row, task in zip(likelihoods, tasks, strict=True)
        ]
        right = [_best(row) == task.right for row, task in zip(normed, tasks, strict=True)]
        measures["accuracy_norm"] = share(right)
    return measures


def measure_last_words(scores: Sequence[Sequence[tuple[float, bool]]]) -> dict[str, Measure]:
    """accuracy: greedy decoding would write the word. perplexity: of a word, not of a token."""
    words = [row[0] for row in scores]
    loss = cross_entropy([-likelihood for likelihood, _ in words], [1] * len(words))
    return {"accuracy": share([likeliest for _, likeliest in words]), "perplexity": perplexity(loss)}


def _best(values: Sequence[float]) -> int:
    return max(range(len(values)), key=lambda place: values[place])
