"""Tokenizers: from a Hugging Face folder by transformers, from a .gguf file by its metadata."""

from pathlib import Path
from typing import TYPE_CHECKING

from smidgen.errors import ModelError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

__all__ = ["load_tokenizer"]


def load_tokenizer(path: Path) -> "PreTrainedTokenizerBase":
    """The tokenizer of a model folder, run folder or .gguf file, with its chat template and special tokens.

    Nothing is fetched and no code of the folder is run. Raises ModelError if there is none or it cannot be read.
    """
    from .tokenizer_gguf import is_reading_error, tokenizer_from_metadata

    if path.suffix == ".gguf" and path.is_file():
        from smidgen.checkpoint.gguf import open_parts

        return tokenizer_from_metadata(open_parts(path)[0].metadata)
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(str(path), local_files_only=True, trust_remote_code=False)
    # transformers raises what it likes, and a panic of the Rust tokenizers is no Exception.
    except BaseException as error:
        if not is_reading_error(error):
            raise
        raise _unreadable(path, error) from error


def _unreadable(path: Path, error: BaseException) -> ModelError:
    names = ("tokenizer.json", "tokenizer.model", "vocab.json", "vocab.txt", "tokenizer_config.json")
    if not any((path / name).exists() for name in names):
        cure = "copy tokenizer.json and tokenizer_config.json of the model into the folder"
        return ModelError(f"{path} has no tokenizer", expected="tokenizer.json or tokenizer.model", cure=cure)
    lines = str(error).strip().splitlines() or [type(error).__name__]
    return ModelError(f"{path}: the tokenizer cannot be read ({lines[0][:200].rstrip('.')})")
