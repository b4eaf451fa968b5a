"""Tokenizers: from a Hugging Face folder by transformers, from a GGUF file by its metadata."""

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from smidgen.bounded import OutOfBounds, bounded
from smidgen.errors import ModelError, SettingsError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

__all__ = ["add_tokens", "ids_of_tokens", "load_tokenizer", "pieces_of_tokens"]

_PROBE = "Words, 12\n\tnaïve 文 \U0001f600 \ufdd0"  # the last is no character: unknown where anything is
_RUNS = "".join(f"{character * 100}\0" for character in "a Z0\n_-.é文")  # what a hostile expression is slow on


def load_tokenizer(path: Path) -> "PreTrainedTokenizerBase":
    """The tokenizer of a model folder, run folder or GGUF file, with its chat template and special tokens.

    Nothing is fetched and no code of the folder is run. Raises ModelError if there is none or it cannot be read.
    """
    from .tokenizer_gguf import is_reading_error, tokenizer_from_metadata

    if path.is_file():
        from smidgen.checkpoint.gguf import open_parts

        return tokenizer_from_metadata(open_parts(path)[0].metadata)
    from transformers import AutoTokenizer

    try:
        tokenizer = AutoTokenizer.from_pretrained(str(path), local_files_only=True, trust_remote_code=False)
        _try_out(tokenizer, path)
    # transformers raises what it likes, and a panic of the Rust tokenizers is no Exception.
    except BaseException as error:
        if isinstance(error, ModelError) or not is_reading_error(error):
            raise
        raise _unreadable(path, error) from error
    return tokenizer


def _try_out(tokenizer: Any, path: Path) -> None:
    """Some tables that do not fit together are found out only when they are used.

    A regular expression may take exponential time, or a rule make a text a million times as long. Here it shows in
    those that do so on ordinary text, not in one that waits for a word of its own.
    """
    with bounded(lambda text: tokenizer.decode(tokenizer(text).input_ids)[:1]) as call:
        try:
            call(_PROBE)
            call(_RUNS)
        except OutOfBounds as error:
            cure = "take the model, or its tokenizer.json, from a source that you trust"
            raise ModelError(f"{path}: the tokenizer {error} for a line of text", cure=cure) from None


def add_tokens(tokenizer: Any, tokens: Sequence[str], vocab_size: int) -> None:
    """Add `tokens` as they are written: never cut, nor changed by normalisation, and shown when text is decoded.

    vocab_size: rows of the embedding, some of which may be spare. Raises SettingsError for what is a token already.
    """
    if not tokens:
        return
    from tokenizers import AddedToken

    known = tokenizer.get_vocab()
    if there := [token for token in tokens if token in known]:
        raise SettingsError([f"new_tokens: {', '.join(there)} is in the tokenizer already; take it out of the list"])
    if len(tokenizer) > vocab_size:
        raise ModelError(
            "new_tokens: the tokenizer has tokens without a row in the embedding",
            expected=f"at most {vocab_size}",
            found=str(len(tokenizer)),
        )
    tokenizer.add_tokens([AddedToken(token, normalized=False, special=False) for token in tokens])


def ids_of_tokens(tokenizer: Any, tokens: Sequence[str]) -> list[int]:
    """Their ids, once add_tokens has added them, here or in the run that the tokenizer was saved with."""
    return list(tokenizer.convert_tokens_to_ids(list(tokens)))


def pieces_of_tokens(tokenizer: Any, tokens: Sequence[str]) -> list[list[int]]:
    """For each new token the ids of older tokens that spell it, before it was one; some may have none.

    Its last character is cut off first, so that what is found is the same before and after it was added.
    """
    new = set(ids_of_tokens(tokenizer, tokens))
    halves = [[half for half in (token[:-1], token[-1:]) if half] for token in tokens]
    found = [[tokenizer(half, add_special_tokens=False).input_ids for half in each] for each in halves]
    return [[index for half in each for index in half if index not in new] for each in found]


def _unreadable(path: Path, error: BaseException) -> ModelError:
    names = ("tokenizer.json", "tokenizer.model", "vocab.json", "vocab.txt", "tokenizer_config.json")
    if not any((path / name).exists() for name in names):
        cure = "copy tokenizer.json and tokenizer_config.json of the model into the folder"
        return ModelError(f"{path} has no tokenizer", expected="tokenizer.json or tokenizer.model", cure=cure)
    reason = " ".join(str(error).split()) or type(error).__name__
    what = "config.json" if _is_config_at_fault(path) else "the tokenizer"
    return ModelError(f"{path}: {what} cannot be read ({reason[:200].rstrip('.')})")


def _is_config_at_fault(path: Path) -> bool:
    """transformers reads the model's configuration before its tokenizer."""
    from transformers import AutoConfig

    try:
        AutoConfig.from_pretrained(str(path), local_files_only=True, trust_remote_code=False)
    except Exception:
        return (path / "config.json").exists()
    return False
