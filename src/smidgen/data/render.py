"""Rows to token ids and labels.

A conversation is rendered to text by the tokenizer's chat template and tokenised once, as a whole; the labelled tokens
are those whose characters lie in an assistant's turn. Where a turn's text begins is found by rendering the messages
before it with the generation prompt: that text is a prefix of the whole. So the tokens before the answer are the ones
generation starts from. Tokens are not built up turn by turn, because tokenizers join characters across such seams.

    <|im_start|>user\\nHi<|im_end|>\\n<|im_start|>assistant\\nHello!<|im_end|>\\n
                                                           ^^^^^^^^^^^^^^^^ labelled: the answer and its end token
"""

import hashlib
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from datetime import date
from importlib.metadata import version
from itertools import islice
from typing import Any

from smidgen.data.layouts import Row
from smidgen.data.template import ChatTemplate
from smidgen.errors import DataError, ModelError
from smidgen.events import Progress, Report, silent

__all__ = ["IGNORED", "TOO_LONG", "Example", "Renderer"]

IGNORED = -100  # the label that torch's cross-entropy leaves out
_LABELS_VERSION = 1  # raised where the code here or in template.py comes to make other tokens or labels of a row
_CHUNK_ROWS = 256
TOO_LONG = ("right", "left", "drop", "error")


@dataclass(frozen=True)
class Example:
    """A row as the model sees it.

    labels[i] is input_ids[i] where the loss counts that token, else -100; not shifted. labels[0] is always -100:
    nothing stands before it that could predict it. cut_tokens: how many tokens a row longer than seq_len lost; a row
    that was dropped has lost all of them, and has no tokens.
    """

    input_ids: list[int]
    labels: list[int]
    truncated: bool
    where: str
    cut_tokens: int = 0


@dataclass(frozen=True)
class _Rendered:
    """Text of a row. spans: labelled ranges of characters. add_eos: the text has no end token of its own."""

    text: str
    spans: tuple[tuple[int, int], ...]
    add_eos: bool


class Renderer:
    """Renders rows for one tokenizer; automatic choices (ChatML, folded system messages) are reported once.

    train_on_prompt: label every token instead of the assistant's turns only.
    seq_len, too_long: what becomes of a longer row: it loses its end ('right') or its beginning ('left', a first BOS
    token stays), all of it ('drop'), or DataError is raised ('error').
    today: the date for templates that write it; None: the clock's, whenever one asks.
    """

    def __init__(
        self,
        tokenizer: Any,
        *,
        train_on_prompt: bool = False,
        seq_len: int = 1024,
        too_long: str = "right",
        today: date | None = None,
        report: Report = silent,
    ) -> None:
        assert too_long in TOO_LONG
        if not getattr(tokenizer, "is_fast", False):
            raise ModelError(
                "the model's tokenizer does not tell where tokens stand in the text", expected="tokenizer.json"
            )
        if tokenizer.eos_token_id is None:
            raise ModelError("the model's tokenizer names no end-of-text token", cure="set eos_token in its files")
        self.tokenizer = tokenizer
        self.train_on_prompt = train_on_prompt
        self.seq_len = seq_len
        self.too_long = too_long
        self._today = today
        self._report = report
        self._template: ChatTemplate | None = None

    @property
    def end_ids(self) -> tuple[int, ...]:
        """Tokens that end an assistant's turn: the template's end-of-turn token and eos."""
        eos = self.tokenizer.eos_token_id
        if self._template is None and not self.tokenizer.chat_template:
            return (eos,)  # plain text on a base model: no template is put on it for this
        end = self._chat.end_id
        return (eos,) if end is None or end == eos else (end, eos)

    def render(self, row: Row) -> Example:
        """One row. Raises DataError where the chat template refuses it."""
        return self._render_chunk([row])[0]

    def render_all(self, rows: Sequence[Row], report: Report | None = None) -> list[Example]:
        """All rows in order, with Progress events."""
        return list(self.render_each(rows, len(rows), report))

    def render_each(self, rows: Iterable[Row], total: int, report: Report | None = None) -> Iterator[Example]:
        """The rows in order, tokenised in batches, as they are asked for; `total` is their number for Progress."""
        report = report or self._report
        taken, done = iter(rows), 0
        while chunk := list(islice(taken, _CHUNK_ROWS)):
            yield from self._render_chunk(chunk)
            done += len(chunk)
            report(Progress("tokenising", done, total))

    def fingerprint(self, *, chat: bool) -> str:
        """Changes with whatever decides which tokens and labels rows become. chat: some rows have turns."""
        template = str(self._chat and self.tokenizer.get_chat_template()) if chat else ""
        today = str(self._today or date.today()) if "strftime_now" in template else ""  # it writes the date
        tokenizer = self.tokenizer
        parts = (
            _LABELS_VERSION, tokenizer.backend_tokenizer.to_str(), template, today,
            tokenizer.bos_token, tokenizer.eos_token, self.train_on_prompt, self.seq_len, self.too_long,
            version("tokenizers"), version("transformers"),
        )  # fmt: skip
        return hashlib.sha256(repr(parts).encode()).hexdigest()

    @property
    def warnings(self) -> list[str]:
        """What has been warned of while rows were rendered, each once."""
        return [] if self._template is None else sorted(self._template.said)

    def warn_again(self, warnings: Iterable[str]) -> None:
        """Say what an earlier rendering of the same rows has warned of."""
        for text in warnings:
            self._chat.warn_once(text)

    def prompt_text(self, messages: Sequence[dict[str, Any]], tools: Sequence[dict[str, Any]] | None = None) -> str:
        """The messages before a closing assistant's turn (all, if they end otherwise), with the generation prompt."""
        if messages and messages[-1]["role"] == "assistant":
            messages = messages[:-1]
        self._chat.check_tools(tools)
        return self._chat.render(messages, tools, "prompt", prompt=True)

    def prompt_ids(
        self, prompt: Row | Sequence[dict[str, Any]] | str, tools: Sequence[dict[str, Any]] | None = None
    ) -> list[int]:
        """The tokens that generation starts from: of a row, all before its last assistant's turn; a str is one user
        message. Equal to the tokens before the first label of the last turn in training."""
        if isinstance(prompt, Row):
            if prompt.last_assistant is None:
                return self.tokenizer(prompt.text or "").input_ids
            prompt, tools = prompt.messages[: prompt.last_assistant], prompt.tools
        messages = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else prompt
        return self._ids(self.prompt_text(messages, tools))

    def answer_text(self, row: Row) -> str:
        """What the model is to write for the row's last turn, as the template has it, without the end token."""
        if row.last_assistant is None:
            return ""
        rendered = self._render_chat(row)
        start, end = rendered.spans[-1]
        answer = rendered.text[start:end]
        return answer if rendered.add_eos else answer.removesuffix(self._chat.end_text)

    @property
    def _chat(self) -> ChatTemplate:
        if self._template is None:
            self._template = ChatTemplate(self.tokenizer, self._report, self._today)
        return self._template

    def _render_chunk(self, rows: Sequence[Row]) -> list[Example]:
        chats = [row for row in rows if row.text is None]
        texts = [row for row in rows if row.text is not None]
        examples = {id(row): example for row, example in zip(chats, self._chat_examples(chats), strict=True)}
        examples |= {id(row): example for row, example in zip(texts, self._text_examples(texts), strict=True)}
        return [examples[id(row)] for row in rows]

    def _text_examples(self, rows: Sequence[Row]) -> list[Example]:
        if not rows:
            return []
        encoded = self.tokenizer([row.text for row in rows], return_attention_mask=False, verbose=False)
        eos = self.tokenizer.eos_token_id
        complete = [ids if ids and ids[-1] == eos else [*ids, eos] for ids in encoded["input_ids"]]
        return [self._example(ids, list(ids), row.where) for row, ids in zip(rows, complete, strict=True)]

    def _chat_examples(self, rows: Sequence[Row]) -> list[Example]:
        if not rows:
            return []
        rendered = [self._render_chat(row) for row in rows]
        # no special tokens are added: the template has written them, as tokenizer.apply_chat_template assumes too
        encoded = self.tokenizer(
            [one.text for one in rendered],
            add_special_tokens=False,
            return_offsets_mapping=True,
            return_attention_mask=False,
            verbose=False,
        )
        pairs = zip(rows, rendered, encoded["input_ids"], encoded["offset_mapping"], strict=True)
        return [self._label(row, one, ids, offsets) for row, one, ids, offsets in pairs]

    def _label(self, row: Row, rendered: _Rendered, ids: list[int], offsets: list[tuple[int, int]]) -> Example:
        last_start = rendered.spans[-1][0]
        if _may_join(rendered.text, last_start, offsets):
            ids, offsets = self._split_at(rendered.text, last_start, ids, offsets)
        labels = [IGNORED] * len(ids)
        for start, end in rendered.spans:
            for position, (token_start, token_end) in enumerate(offsets):
                # by the token's end: some tokenizers leave leading spaces out of a token's offsets
                if token_end > start and token_start < end:
                    labels[position] = ids[position]
        if rendered.add_eos:
            ids, labels = [*ids, self.tokenizer.eos_token_id], [*labels, self.tokenizer.eos_token_id]
        if self.train_on_prompt:
            labels = list(ids)
        return self._example(ids, labels, row.where)

    def _example(self, ids: list[int], labels: list[int], where: str) -> Example:
        cut, kept = max(0, len(ids) - self.seq_len), slice(0, self.seq_len)
        if cut and self.too_long == "error":
            raise DataError(
                f"{where} is too long",
                expected=f"at most {self.seq_len} tokens",
                found=str(len(ids)),
                cure="raise --seq-len, shorten the row, or choose what becomes of such rows: --too-long",
            )
        if cut and self.too_long == "drop":
            return Example([], [], True, where, len(ids))
        if cut and self.too_long == "left":
            first = 1 if ids[0] == self.tokenizer.bos_token_id else 0
            ids, labels = ids[:first] + ids[first + cut :], labels[:first] + labels[first + cut :]
        return Example(ids[kept], [IGNORED, *labels[kept][1:]], cut > 0, where, cut)

    def _render_chat(self, row: Row) -> _Rendered:
        """The row's text up to its last assistant's turn, and the spans of the assistant's turns in it."""
        chat, last = self._chat, row.last_assistant
        assert last is not None, f"{row.where} has no assistant turn"
        chat.check_tools(row.tools)
        messages = row.messages[: last + 1]
        whole = chat.render(messages, row.tools, row.where)
        prompt = chat.render(messages[:last], row.tools, row.where, prompt=True)
        if not whole.startswith(prompt):
            # the template writes a past answer unlike the one it asks for (an opened <think>, say)
            shared = _common_prefix(whole, prompt)
            whole = prompt + whole[shared:]
            chat.warn_once("the chat template writes answers unlike its prompts: rows are trained behind the prompt")
        end, add_eos = self._turn_end(whole, len(prompt))
        whole = whole[:end] if add_eos else whole
        spans = [*self._earlier_spans(row, whole), (len(prompt), end)]
        return _Rendered(whole, tuple(spans), add_eos)

    def _earlier_spans(self, row: Row, whole: str) -> list[tuple[int, int]]:
        spans: list[tuple[int, int]] = []
        for index in range(row.last_assistant or 0):
            if row.messages[index]["role"] != "assistant":
                continue
            prompt = self._chat.render(row.messages[:index], row.tools, row.where, prompt=True)
            turn = self._chat.render(row.messages[: index + 1], row.tools, row.where)
            if not (turn.startswith(prompt) and whole.startswith(turn)):
                self._chat.warn_once(
                    "the chat template rewrites earlier turns: only the last answer of a row is trained"
                )
                return []
            spans.append((len(prompt), self._turn_end(turn, len(prompt))[0]))
        return spans

    def _turn_end(self, text: str, start: int) -> tuple[int, bool]:
        """(where the turn that ends `text` ends, whether it lacks an end token)."""
        chat = self._chat
        found = text.rfind(chat.end_text, start) if chat.end_text else -1
        if found >= 0:
            return found + len(chat.end_text), False
        closed = bool(chat.closing) and text.endswith(chat.closing) and len(text) - len(chat.closing) > start
        return (len(text) - len(chat.closing) if closed else len(text)), True

    def _split_at(
        self, text: str, cut: int, ids: list[int], offsets: list[tuple[int, int]]
    ) -> tuple[list[int], list[tuple[int, int]]]:
        """Tokens of the two sides of `cut`, if the prompt alone would be tokenised otherwise than within the whole."""
        prompt_ids = self._ids(text[:cut])
        before = sum(1 for _, end in offsets if end <= cut)
        if ids[:before] == prompt_ids:
            return ids, offsets
        answer = self.tokenizer(text[cut:], add_special_tokens=False, return_offsets_mapping=True, verbose=False)
        shifted = [(start + cut, end + cut) for start, end in answer["offset_mapping"]]
        return prompt_ids + answer["input_ids"], [(0, 0)] * len(prompt_ids) + shifted

    def _ids(self, text: str) -> list[int]:
        return self.tokenizer(text, add_special_tokens=False, verbose=False).input_ids


def _may_join(text: str, cut: int, offsets: list[tuple[int, int]]) -> bool:
    """Whether a tokenizer may group characters across `cut` that it would not group in text[:cut] alone.

    A token that crosses it does; so may spaces at either side, except one line break between two words.
    """
    if any(start < cut < end for start, end in offsets):
        return True
    before, after = text[max(0, cut - 2) : cut], text[cut : cut + 1]
    if before.endswith("\n") and not before[:1].isspace() and not after.isspace():
        return False
    return before[-1:].isspace() or after.isspace()


def _common_prefix(one: str, other: str) -> int:
    length = 0
    for a, b in zip(one, other, strict=False):
        if a != b:
            break
        length += 1
    return length
