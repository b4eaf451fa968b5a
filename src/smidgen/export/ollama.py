"""A Modelfile for Ollama beside a GGUF model (Ollama's documentation, modelfile.md).

Ollama writes prompts by a template in Go's language. It knows the common ones by the Jinja template inside the GGUF
file; for the families below the Modelfile says it too, found by rendering a conversation with and without a system
message, so that nothing depends on guessing. To a conversation without one Ollama adds SYSTEM, which therefore says
what the template writes by itself then. In front comes the begin-of-text token where the GGUF file says so.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from smidgen.bounded import Failed, OutOfBounds, bounded
from smidgen.events import Note, Report, Warned, silent

__all__ = ["modelfile"]

_SYSTEM = "SYS"
_CHAT = [
    {"role": role, "content": content}
    for role, content in (("system", _SYSTEM), ("user", "USR"), ("assistant", "ANS"), ("user", "AGAIN"))
]
_AS_PROMPT = {"tokenize": False, "add_generation_prompt": True}


@dataclass(frozen=True)
class _Family:
    """turn: a message, {role} and {content} in it. answer: where the assistant is to speak. stop: what ends a turn."""

    turn: str
    answer: str
    stop: str

    def prompt(self, chat: Sequence[dict[str, str]]) -> str:
        return "".join(self.turn.format(**message) for message in chat) + self.answer

    @property
    def template(self) -> str:
        turn = self.turn.format(role="{{ .Role }}", content="{{ .Content }}")
        return f"{{{{- range .Messages }}}}{turn}{{{{ end }}}}{self.answer}"


_FAMILIES = (
    _Family("<|im_start|>{role}\n{content}<|im_end|>\n", "<|im_start|>assistant\n", "<|im_end|>"),
    _Family(
        "<|start_header_id|>{role}<|end_header_id|>\n\n{content}<|eot_id|>",
        "<|start_header_id|>assistant<|end_header_id|>\n\n",
        "<|eot_id|>",
    ),
    _Family("<|{role}|>\n{content}<|end|>\n", "<|assistant|>\n", "<|end|>"),
)


def modelfile(file: str, tokenizer: Any, system: str, context: int, report: Report = silent) -> str:
    """The text of a Modelfile for `file`, a GGUF model beside it. system: the training rows' system message, or ""."""
    lines = [f"FROM ./{file}", f"PARAMETER num_ctx {context}"]
    found = _family(tokenizer)
    if found:
        family, default = found
        system = system or default
        lines += [f'TEMPLATE """{family.template}"""', f"PARAMETER stop {family.stop}"]
    else:
        report(
            Note(
                "Modelfile: the chat template is of no family that is written for Ollama, so there is no TEMPLATE and"
                " Ollama takes what it guesses from the GGUF file: compare its answers with the run's"
            )
        )
    if '"""' in system:
        report(Warned('Modelfile: no SYSTEM, for """ cannot be quoted in it: begin each conversation with the message'))
    elif system:
        lines.append(f'SYSTEM """{system}"""')
    return "\n".join(lines) + "\n"


def _family(tokenizer: Any) -> tuple[_Family, str] | None:
    """(the family that the chat template belongs to, the system message that it writes where there is none or "")."""
    if not tokenizer.chat_template:
        return None
    try:
        with bounded(lambda chat: str(tokenizer.apply_chat_template(chat, **_AS_PROMPT))) as render:
            full, bare = render(_CHAT), render(_CHAT[1:])
    except (Failed, OutOfBounds):  # a template may refuse a system message
        return None
    is_added = tokenizer("a").input_ids[:1] == [tokenizer.bos_token_id]
    bos: str = tokenizer.bos_token if is_added else ""
    before, _, after = full.partition(_SYSTEM)
    default = bare.removeprefix(before).removesuffix(after)
    for family in _FAMILIES:
        if full == bos + family.prompt(_CHAT):
            if bare == bos + family.prompt(_CHAT[1:]):
                return family, ""
            if default and bare == before + default + after:
                return family, default
    return None
