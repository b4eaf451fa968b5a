"""A Modelfile for Ollama beside a GGUF model (Ollama's documentation, modelfile.md).

Ollama writes prompts by a template in Go's language. It knows the common ones by the Jinja template inside the GGUF
file; for the families below the Modelfile says it too, found by rendering a probe, so that nothing depends on guessing.
"""

from typing import Any

from smidgen.bounded import Failed, OutOfBounds, bounded

__all__ = ["modelfile"]

_PROBE = [{"role": "system", "content": "SYS"}, {"role": "user", "content": "USR"}]
_AS_PROMPT = {"tokenize": False, "add_generation_prompt": True}
# What the probe renders to (a begin-of-text token before it aside) -> template, stop.
_FAMILIES: dict[str, tuple[str, str]] = {
    "<|im_start|>system\nSYS<|im_end|>\n<|im_start|>user\nUSR<|im_end|>\n<|im_start|>assistant\n": (
        "{{- range .Messages }}<|im_start|>{{ .Role }}\n{{ .Content }}<|im_end|>\n{{ end }}<|im_start|>assistant\n",
        "<|im_end|>",
    ),
    "<|start_header_id|>system<|end_header_id|>\n\nSYS<|eot_id|><|start_header_id|>user<|end_header_id|>\n\nUSR<|eot_id|>"
    "<|start_header_id|>assistant<|end_header_id|>\n\n": (
        "{{- range .Messages }}<|start_header_id|>{{ .Role }}<|end_header_id|>\n\n{{ .Content }}<|eot_id|>{{ end }}"
        "<|start_header_id|>assistant<|end_header_id|>\n\n",
        "<|eot_id|>",
    ),
    "<|system|>\nSYS<|end|>\n<|user|>\nUSR<|end|>\n<|assistant|>\n": (
        "{{- range .Messages }}<|{{ .Role }}|>\n{{ .Content }}<|end|>\n{{ end }}<|assistant|>\n",
        "<|end|>",
    ),
}


def modelfile(file: str, tokenizer: Any, system: str, context: int) -> str:
    """The text of a Modelfile for `file`, a GGUF model beside it. system: the training rows' system message, or ""."""
    lines = [f"FROM ./{file}", f"PARAMETER num_ctx {context}"]
    family = _family(tokenizer)
    if family:
        template, stop = family
        lines += [f'TEMPLATE """{template}"""', f"PARAMETER stop {stop}"]
    if system and '"""' not in system:  # which the format cannot quote
        lines.append(f'SYSTEM """{system}"""')
    return "\n".join(lines) + "\n"


def _family(tokenizer: Any) -> tuple[str, str] | None:
    if not tokenizer.chat_template:
        return None
    try:
        with bounded(lambda chat: str(tokenizer.apply_chat_template(chat, **_AS_PROMPT))) as render:
            rendered = render(_PROBE)
    except (Failed, OutOfBounds):  # a template may refuse a system message
        return None
    return _FAMILIES.get(rendered) or _FAMILIES.get(rendered.removeprefix(tokenizer.bos_token or ""))
