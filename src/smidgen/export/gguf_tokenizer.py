"""A tokenizer as GGUF metadata: the reverse of model/tokenizer_gguf.py, and checked against it.

Which of the known rules cuts a byte-level tokenizer's text is found by trying: the metadata is read back, and must give
the same tokens for texts with contractions, digits, blanks, code and other scripts. Normalisation (NFC) is not
compared: GGUF has no word for it, and llama.cpp does none.
"""

import json
from pathlib import Path
from typing import Any

from smidgen.checkpoint.gguf_header import Metadata
from smidgen.errors import ModelError, RunError
from smidgen.model.tokenizer_gguf import (
    BYTE,
    CONTROL,
    NORMAL,
    PRE_TOKENIZERS,
    UNKNOWN,
    UNUSED,
    USER_DEFINED,
    tokenizer_from_metadata,
)

__all__ = ["tokenizer_metadata"]

_PROBES = (
    "Hello world! I'll say it's 12345 o'clock, isn't it? WE'RE 3.14159 and 1,000,000 late.",
    "  two  spaces\ttabs\t\t and\n\nnew lines \r\n  \n end   ",
    'def f(x_1):\n    return {"a": [1, 22, 333, 4444]}  # ok?!\n\n\n',
    "naïve café Ünïcode, 你好世界 2024年, Привет мир 42, مرحبا, ひらがな123, 🙂🙃",
    "https://example.org/a?b=c&d=%20 foo_bar-baz CamelCaseWord ... --- ''' \"\"\" $100 #1 @you",
)


def tokenizer_metadata(tokenizer: Any, vocab_size: int) -> dict[str, Any]:
    """Keys and values under tokenizer.*; padded with unused tokens up to vocab_size, the rows of the embedding.

    Raises RunError for a tokenizer that GGUF's readers could not follow.
    """
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:
        raise RunError(f"{type(tokenizer).__name__} is no fast tokenizer, which GGUF's metadata is made from")
    content = json.loads(backend.to_str())
    model = content["model"]
    if model["type"] != "BPE":
        raise RunError("the tokenizer cannot be written as GGUF", expected="BPE", found=str(model["type"]))
    values = _vocabulary(tokenizer, content, vocab_size)
    for key, token in (
        ("bos", tokenizer.bos_token_id), ("eos", tokenizer.eos_token_id), ("unknown", tokenizer.unk_token_id),
        ("padding", tokenizer.pad_token_id),
    ):  # fmt: skip
        if token is not None:
            values[f"tokenizer.ggml.{key}_token_id"] = int(token)
    starts = tokenizer("a").input_ids[:1] == [tokenizer.bos_token_id] and tokenizer.bos_token_id is not None
    ends = tokenizer("a").input_ids[-1:] == [tokenizer.eos_token_id] and tokenizer.eos_token_id is not None
    values |= {"tokenizer.ggml.add_bos_token": starts, "tokenizer.ggml.add_eos_token": ends}
    template = tokenizer.chat_template
    if isinstance(template, dict):
        template = template.get("default")
    if template:
        values["tokenizer.chat_template"] = template
    merges = [pair if isinstance(pair, str) else " ".join(pair) for pair in model["merges"]]
    if model.get("byte_fallback"):
        values |= _sentencepiece(content, values, merges)
        rules = [None]
    else:
        values |= {"tokenizer.ggml.model": "gpt2", "tokenizer.ggml.merges": merges}
        alike = {rule: name for name, rule in reversed(PRE_TOKENIZERS.items())}  # the first name of each
        rules = [name for name, rule in PRE_TOKENIZERS.items() if name == alike[rule] != "default"]
    expected = [tokenizer(text).input_ids for text in _PROBES]
    for rule in rules:
        tried = values if rule is None else values | {"tokenizer.ggml.pre": rule}
        try:
            again = tokenizer_from_metadata(Metadata(Path("tokenizer"), _as_read(tried)))
        except ModelError:
            continue
        if [again(text).input_ids for text in _PROBES] == expected:
            return tried
    raise RunError(
        "the tokenizer cuts text by a rule that GGUF has no name for here", expected=", ".join(PRE_TOKENIZERS),
        cure="use --to hf, then llama.cpp's convert_hf_to_gguf.py",
    )  # fmt: skip


def _as_read(values: dict[str, Any]) -> dict[str, Any]:
    """As gguf_header would read them: arrays of numbers are tuples."""
    return {k: tuple(v) if isinstance(v, list) and v and not isinstance(v[0], str) else v for k, v in values.items()}


def _vocabulary(tokenizer: Any, content: dict[str, Any], vocab_size: int) -> dict[str, Any]:
    tokens = [f"[PAD{number}]" for number in range(max(vocab_size, len(tokenizer)))]
    types = [UNUSED] * len(tokens)
    for token, number in tokenizer.get_vocab().items():
        tokens[number], types[number] = token, NORMAL
    if content["model"].get("byte_fallback"):
        for number, token in enumerate(tokens):
            if len(token) == 6 and token.startswith("<0x") and token.endswith(">"):
                types[number] = BYTE
    for added in content.get("added_tokens", ()):
        types[added["id"]] = CONTROL if added["special"] else USER_DEFINED
    if tokenizer.unk_token_id is not None:
        types[tokenizer.unk_token_id] = UNKNOWN
    return {"tokenizer.ggml.tokens": tokens, "tokenizer.ggml.token_type": types}


def _sentencepiece(content: dict[str, Any], values: dict[str, Any], merges: list[str]) -> dict[str, Any]:
    """SentencePiece merges the best scores first: the earliest merge of a piece gives its score."""
    rank: dict[str, int] = {}
    for number, merge in enumerate(merges):
        rank.setdefault(merge.replace(" ", "", 1), number)
    scores = [-float(rank.get(token, 0)) for token in values["tokenizer.ggml.tokens"]]
    steps = json.dumps([content.get("normalizer"), content.get("pre_tokenizer")])
    prefix = '"Prepend"' in steps or '"prepend_scheme": "first"' in steps or '"prepend_scheme": "always"' in steps
    return {
        "tokenizer.ggml.model": "llama",
        "tokenizer.ggml.scores": scores,
        "tokenizer.ggml.add_space_prefix": prefix,
    }
