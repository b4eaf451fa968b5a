"""How good is it: held-out loss, answers compared with the data's, perplexity of a text."""

import json
import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch

from smidgen.data.batch import make_batch
from smidgen.data.records import Row
from smidgen.data.render import Example, Renderer
from smidgen.errors import DataError
from smidgen.events import Answer, Answers, Progress, Report, silent
from smidgen.model.build import Base
from smidgen.model.generate import Sampling, generate_batch
from smidgen.train.loss import batch_loss, chunked_cross_entropy

__all__ = ["PROTOCOLS", "HeldOut", "answer_rows", "held_out_loss", "rouge_l", "text_perplexity"]

_CACHE_TOKENS = 1 << 14  # keys and values of all rows of a batch of answers
PROTOCOLS = {"gptq": (2048, 0), "llama.cpp": (512, 256)}  # window, first position that counts


@dataclass(frozen=True)
class HeldOut:
    """loss: mean over labelled tokens (not over rows or batches), natural logarithm."""

    loss: float
    rows: int
    tokens: int

    @property
    def perplexity(self) -> float:
        return math.exp(min(self.loss, 700.0))

    def as_dict(self) -> dict[str, Any]:
        """Plain values for JSON."""
        return asdict(self) | {"perplexity": self.perplexity}


@torch.no_grad()
def held_out_loss(base: Base, examples: Sequence[Example], batch_size: int, report: Report = silent) -> HeldOut:
    """The mean loss over all labelled tokens; rows of similar length share a batch."""
    ordered = sorted(examples, key=lambda example: len(example.input_ids))
    total, tokens = 0.0, 0
    for start in range(0, len(ordered), batch_size):
        batch = make_batch(ordered[start : start + batch_size])
        if batch.num_labels:
            total += float(batch_loss(base, batch))
            tokens += batch.num_labels
        report(Progress("held-out loss", min(start + batch_size, len(ordered)), len(ordered)))
    if not tokens:
        raise DataError("none of the held-out rows has a labelled token")
    return HeldOut(total / tokens, len(ordered), tokens)


def answer_rows(
    base: Base,
    renderer: Renderer,
    rows: Sequence[Row],
    *,
    when: str,
    max_new_tokens: int | None = None,
    batch_size: int = 128,
    report: Report = silent,
) -> Answers:
    """Greedy answers to the last turn of each row, compared with the data's answers.

    max_new_tokens: default is what the longest expected answer of the rows needs and a little more.
    valid_json: share of answers that parse, where every expected answer is JSON; else None.
    """
    rows = [row for row in rows if row.messages]
    tokenizer = renderer.tokenizer
    expected = [renderer.answer_text(row).strip() for row in rows]
    if max_new_tokens is None:
        lengths = [len(tokenizer(text, add_special_tokens=False).input_ids) for text in expected]
        max_new_tokens = max(lengths, default=0) + 8
    sampling = Sampling(max_new_tokens=max_new_tokens)
    prompts = [renderer.prompt_ids(row) for row in rows]
    longest = max((len(prompt) for prompt in prompts), default=0)
    batch_size = max(1, min(batch_size, _CACHE_TOKENS // (longest + max_new_tokens)))
    order = sorted(range(len(rows)), key=lambda index: len(prompts[index]))
    answers = [""] * len(rows)
    for start in range(0, len(order), batch_size):
        chosen = order[start : start + batch_size]
        new = generate_batch(base, [prompts[i] for i in chosen], renderer.end_ids, sampling, len(tokenizer))
        for index, ids in zip(chosen, new, strict=True):
            answers[index] = tokenizer.decode(ids, skip_special_tokens=True).strip()
        report(Progress(f"answers {when}", min(start + batch_size, len(order)), len(order)))
    pairs = tuple(Answer(_question(row), want, got) for row, want, got in zip(rows, expected, answers, strict=True))
    matches = sum(answer.answer == answer.expected for answer in pairs)
    asked_json = bool(pairs) and all(_is_json(answer.expected) for answer in pairs)
    return Answers(
        when=when,
        rows=pairs,
        exact_match=matches / max(1, len(pairs)),
        valid_json=sum(_is_json(answer.answer) for answer in pairs) / len(pairs) if asked_json else None,
    )


def _question(row: Row) -> str:
    """What the user said last before the answer."""
    asked = [message["content"] for message in row.messages[: row.last_assistant] if message["role"] == "user"]
    return str(asked[-1]) if asked else ""


def _is_json(text: str) -> bool:
    """One JSON object or array and nothing else."""
    try:
        return isinstance(json.loads(text), dict | list)
    except (ValueError, RecursionError):
        return False


def rouge_l(answers: Sequence[Answer]) -> float:
    """Mean ROUGE-L F1 (Lin 2004) by rouge-score with its stemmer. Raises ImportError where that is missing."""
    from rouge_score.rouge_scorer import RougeScorer

    scorer = RougeScorer(["rougeL"], use_stemmer=True)
    return sum(scorer.score(a.expected, a.answer)["rougeL"].fmeasure for a in answers) / max(1, len(answers))


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
    total, tokens, windows = 0.0, 0, len(ids) // window
    windows = min(windows, limit or windows)
    for index in range(windows):
        part = torch.tensor(ids[index * window : (index + 1) * window], device=base.device)
        seen = part.clone()
        if bos is not None:
            seen[0] = bos
        hidden = base.hidden_of(seen[None])[0, first:-1]
        total += float(chunked_cross_entropy(base, hidden, part[first + 1 :]))
        tokens += window - first - 1
        report(Progress("perplexity", index + 1, windows))
    return HeldOut(total / tokens, windows, tokens)
