"""The Modelfile: what Ollama makes of a conversation by it is the prompt that the model was trained behind."""

import re
from typing import Any

import pytest

from small_tokenizers import CHATML, PLAIN, word_tokenizer
from smidgen.checkpoint.hub import resolve_model
from smidgen.data.render import Renderer
from smidgen.errors import ModelError
from smidgen.events import Note, Warned
from smidgen.export.ollama import modelfile
from smidgen.model.tokenizer import load_tokenizer

DEFAULT = "{% if messages[0]['role'] != 'system' %}<|im_start|>system\nBe kind.<|im_end|>\n{% endif %}" + CHATML
EMPTY = DEFAULT.replace("Be kind.", "")
BOS = "{{ bos_token }}" + DEFAULT
USER = [{"role": "user", "content": "hi"}]
TURNS = [*USER, {"role": "assistant", "content": "hello"}, {"role": "user", "content": "bye"}]
SYSTEM = [{"role": "system", "content": "be brief"}, *USER]


def _ollama(text: str, tokenizer: Any, chat: list[dict[str, str]]) -> str:
    """The prompt by Ollama's rules: SYSTEM in front of a conversation without a system message, then TEMPLATE in Go's
    language, of which `range` and fields are enough here; llama.cpp adds the first token where the tokenizer does.
    """
    system, template = (re.search(rf'{key} """(.*?)"""', text, re.S) for key in ("SYSTEM", "TEMPLATE"))
    assert template
    if system and chat[0]["role"] != "system":
        chat = [{"role": "system", "content": system[1]}, *chat]
    turn, answer = re.fullmatch(r"\{\{- range \.Messages \}\}(.*)\{\{ end \}\}(.*)", template[1], re.S).groups()  # type: ignore[union-attr]
    turns = [turn.replace("{{ .Role }}", one["role"]).replace("{{ .Content }}", one["content"]) for one in chat]
    ids = tokenizer("hi").input_ids
    return (tokenizer.bos_token if ids[0] == tokenizer.bos_token_id else "") + "".join(turns) + answer


@pytest.mark.parametrize("chat", [USER, TURNS, SYSTEM])
@pytest.mark.parametrize(("template", "bos"), [(CHATML, False), (DEFAULT, False), (BOS, True), (None, False)])
def test_the_prompt_is_the_renderers(template: str | None, bos: bool, chat: list[dict[str, str]]) -> None:
    """None: the built-in model's own, which names itself where there is no system message."""
    if template is None:
        try:
            tokenizer: Any = load_tokenizer(resolve_model("smollm2-135m"))
        except ModelError as error:
            pytest.skip(f"SmolLM2 cannot be had here: {error}")
    else:
        tokenizer = word_tokenizer(template, bos=bos)
    text = modelfile("model.gguf", tokenizer, "", 8192)
    assert _ollama(text, tokenizer, chat) == Renderer(tokenizer).prompt_text(chat)
    assert ("SYSTEM" in text) == (template != CHATML)
    named = modelfile("model.gguf", tokenizer, "be brief", 8192)
    assert _ollama(named, tokenizer, USER) == Renderer(tokenizer).prompt_text(SYSTEM)


@pytest.mark.parametrize(("template", "bos"), [(EMPTY, False), (CHATML, True), (BOS, False), (PLAIN, False)])
def test_what_cannot_be_said_is_left_out_with_a_note(template: str, bos: bool) -> None:
    """An empty system turn; a first token that one side writes and the other does not; another family."""
    said: list[Any] = []
    text = modelfile("model.gguf", word_tokenizer(template, bos=bos), "be brief", 8192, said.append)
    assert "TEMPLATE" not in text and 'SYSTEM """be brief"""' in text
    assert len(said) == 1 and isinstance(said[0], Note) and "there is no TEMPLATE" in said[0].text


def test_a_system_message_that_cannot_be_quoted_is_said() -> None:
    said: list[Any] = []
    text = modelfile("model.gguf", word_tokenizer(CHATML), 'say """hi"""', 8192, said.append)
    assert "SYSTEM" not in text and "TEMPLATE" in text
    assert len(said) == 1 and isinstance(said[0], Warned) and "cannot be quoted" in said[0].text
