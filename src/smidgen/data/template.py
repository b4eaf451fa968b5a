"""A tokenizer's chat template, asked once how it behaves: what ends a turn, whether it takes system messages.

Templates are programs, so two short conversations are rendered, and what comes out says what closes an assistant's
turn; only whether it knows tools is read off its source. A tokenizer without a template gets ChatML, which is put on
the tokenizer, so that it is saved with the adapter and generation uses the same one.

A template may loop without end or ask for all memory, so these conversations are rendered within bounds (bounded.py).
Rows are not: a process for them would cost more than rendering them. A template that waits for some word of theirs is
not found out.
"""

import json
import re
from collections.abc import Sequence
from datetime import date
from functools import lru_cache
from typing import Any

from smidgen.bounded import OutOfBounds, bounded
from smidgen.errors import DataError, ModelError, first_line
from smidgen.events import Note, Report, Warned

__all__ = ["ChatTemplate"]

Message = dict[str, Any]

_PROBE = "smidgenprobe"
_MOST_CHARACTERS = 1 << 20  # of what a template writes by itself
_MOST_REPEATED = 16  # times that it may write the conversation: escaped, or more than once
_DATE_PART = re.compile("%-?[A-Za-z]")
_TURN_END = "<|im_end|>"
_CHATML = (
    "{BOS}{% for message in messages %}"
    "{{ '<|im_start|>' + message['role'] + '\\n' + message['content'] }}{END}{{ '\\n' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)


class ChatTemplate:
    """Renders conversations to text with the tokenizer's template, or with ChatML where it has none.

    end_text, end_id: the token that ends an assistant's turn; None where the template writes no such token, and the
    renderer adds the tokenizer's eos.
    closing: everything that the template writes after the content of a last assistant's turn. said: warnings.
    today: what `strftime_now` tells the template; None: the clock's.
    """

    def __init__(self, tokenizer: Any, report: Report, today: date | None = None) -> None:
        self._tokenizer = tokenizer
        self._report = report
        self.said: set[str] = set()
        if not tokenizer.chat_template:
            self._set_chatml()
        source = str(tokenizer.get_chat_template())
        self._today = today if "strftime_now" in source else None
        if self._today not in (None, date.today()):
            report(Note(f"the chat template writes the date: it stays {today}, when the run was started"))
        self._takes_tools = "tools" in source
        self._takes_calls = "tool_calls" in source
        self._folds_system = False
        with bounded(self._apply) as self._run:
            self._folds_system = not self._renders_system()
            if self._folds_system:
                report(Note("the chat template takes no system messages: they go in front of the first user message"))
            probe = self.render([_user("Hi"), {"role": "assistant", "content": _PROBE}], None, "chat template")
        self._run = self._apply
        self.closing = probe.rpartition(_PROBE)[2]
        self.end_id, self.end_text = self._find_end()

    def render(
        self, messages: Sequence[Message], tools: Sequence[dict[str, Any]] | None, where: str, *, prompt: bool = False
    ) -> str:
        """The conversation as text; prompt: ending where the assistant is to speak. Raises DataError naming `where`."""
        asked = self._adapted(messages), list(tools) if tools and self._takes_tools else None, prompt
        try:
            return self._run(asked)
        except OutOfBounds as error:
            cure = "take the model from a source that you trust, or another chat_template for its tokenizer"
            raise ModelError(f"the model's chat template {error}", cure=cure) from None
        except Exception as error:  # a template is a program: it may divide by zero, recurse or ask for all memory
            reason = first_line(error)
            roles = ", ".join(message["role"] for message in messages)
            raise DataError(
                f"{where}: the model's chat template refuses this conversation ({reason})",
                found=f"turns {roles}",
                cure="change the row to what the model was made for, or drop it",
            ) from None

    def _apply(self, asked: tuple[list[Message], list[dict[str, Any]] | None, bool]) -> str:
        messages, tools, prompt = asked
        template = self._today and _dated(self._tokenizer.get_chat_template(tools=tools), self._today)
        text = str(
            self._tokenizer.apply_chat_template(
                messages, tools=tools, chat_template=template, tokenize=False, add_generation_prompt=prompt
            )
        )
        if len(text) > _MOST_CHARACTERS:  # or it need not be counted what it was given
            most = _MOST_CHARACTERS + _MOST_REPEATED * len(str((messages, tools)))
            if len(text) > most:
                raise ValueError(f"it writes {len(text):,} characters, expected at most {most:,}")
        return text

    def warn_once(self, text: str) -> None:
        if text not in self.said:
            self.said.add(text)
            self._report(Warned(text))

    def _set_chatml(self) -> None:
        tokenizer = self._tokenizer
        if not tokenizer.eos_token:
            raise ModelError("the tokenizer has neither a chat template nor an end-of-text token", cure="add either")
        known = _TURN_END in tokenizer.get_vocab()
        starts_with_bos = tokenizer.bos_token_id is not None and tokenizer("a").input_ids[0] == tokenizer.bos_token_id
        end = f"{{{{ '{_TURN_END}' }}}}" if known else "{{ eos_token }}"
        bos = "{{ bos_token }}" if starts_with_bos else ""
        tokenizer.chat_template = _CHATML.replace("{BOS}", bos).replace("{END}", end)
        ending = _TURN_END if known else tokenizer.eos_token
        self._report(Note(f"the model has no chat template: ChatML is used and saved, {ending} ends a turn"))

    def _renders_system(self) -> bool:
        system = {"role": "system", "content": _PROBE}
        try:
            return _PROBE in self.render([system, _user("Hi")], None, "chat template", prompt=True)
        except DataError:
            return False

    def _find_end(self) -> tuple[int | None, str]:
        """The first added token in what closes a turn, '<|im_end|>' of '<|im_end|>\\n'."""
        tokenizer = self._tokenizer
        added = set(tokenizer.added_tokens_decoder) | set(tokenizer.all_special_ids)
        for token_id in tokenizer(self.closing, add_special_tokens=False).input_ids:
            if token_id in added:
                text = tokenizer.convert_ids_to_tokens(token_id)
                return (token_id, text) if text in self.closing else (None, "")
        return None, ""

    def _adapted(self, messages: Sequence[Message]) -> list[Message]:
        """The messages with system messages folded and tool calls as text where the template takes none."""
        adapted = [dict(message) for message in messages]
        if not self._takes_calls:
            for message in adapted:
                if calls := message.pop("tool_calls", None):
                    text = "\n".join(json.dumps(call["function"], ensure_ascii=False) for call in calls)
                    message["content"] = "\n".join(part for part in (message["content"], text) if part)
                    self.warn_once("the chat template takes no tool calls: they are written as JSON text")
        if self._folds_system and adapted and adapted[0]["role"] == "system":
            system = adapted.pop(0)["content"]
            if adapted and adapted[0]["role"] == "user":
                adapted[0]["content"] = f"{system}\n\n{adapted[0]['content']}"
            else:
                adapted.insert(0, _user(system))
        return adapted

    def check_tools(self, tools: Sequence[dict[str, Any]] | None) -> None:
        """Say once that tools are left out, where rows have some and the template takes none."""
        if tools and not self._takes_tools:
            self.warn_once("the chat template takes no tools: the rows' column tools is left out")


@lru_cache
def _dated(source: str, today: date) -> str:
    """The template with a `strftime_now` of its own: transformers' asks the clock, and gives templates no function."""
    parts = sorted(set(_DATE_PART.findall(source)))
    written = "".join(f"|replace({json.dumps(part)}, {json.dumps(today.strftime(part))})" for part in parts)
    return f"{{% macro strftime_now(format) %}}{{{{ format{written} }}}}{{% endmacro %}}\n{source}"


def _user(content: str) -> Message:
    return {"role": "user", "content": content}
