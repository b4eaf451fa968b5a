"""A fast tokenizer out of the metadata of a GGUF file.

Two models are known: "gpt2", byte-level BPE, whose way of cutting text into words stands in PRE_TOKENIZERS by the
name that the file gives it; and "llama", SentencePiece's BPE with bytes as the fallback, whose merges follow from the
scores. Lengths and ids are checked here, so that no special id can be outside the vocabulary.
"""

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from smidgen.checkpoint.gguf_header import Metadata
from smidgen.errors import ModelError

if TYPE_CHECKING:
    from tokenizers import Tokenizer
    from transformers import PreTrainedTokenizerFast

__all__ = [
    "BYTE",
    "CONTROL",
    "NORMAL",
    "PRE_TOKENIZERS",
    "UNKNOWN",
    "UNUSED",
    "USER_DEFINED",
    "WordRule",
    "is_reading_error",
    "merges_of",
    "tokenizer_from_metadata",
]

NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = range(1, 7)  # tokenizer.ggml.token_type
_MAX_PIECE = 512  # characters: merges_of tries every cut, and SentencePiece makes none of more than 16 unless asked


@dataclass(frozen=True)
class WordRule:
    """How text is cut before byte-level BPE.

    patterns: regular expressions, applied one after the other to the pieces that are left; each match is a piece.
    gpt2: then GPT-2's own expression. digits: first every digit alone.
    ignore_merges: a word that is a token as a whole is taken as such. add_bos: what holds if the file does not say.
    """

    patterns: tuple[str, ...] = ()
    gpt2: bool = False
    digits: bool = False
    ignore_merges: bool = False
    add_bos: bool = False


_CONTRACTIONS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)"
_LLAMA3 = _CONTRACTIONS + r"|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
_QWEN2 = _LLAMA3.replace(r"\p{N}{1,3}", r"\p{N}")
# Words end where a small letter is followed by a capital one.
_UPPER, _LOWER = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]", r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]"
_CASED = tuple(rf"[^\r\n\p{{L}}\p{{N}}]?{word}" for word in (f"{_UPPER}*{_LOWER}+", f"{_UPPER}+{_LOWER}*"))
_REST = r"| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
_TEKKEN = "|".join((*_CASED, r"\p{N}")) + _REST
_GPT4O = "|".join((*(f"{word}{_CONTRACTIONS}?" for word in _CASED), r"\p{N}{1,3}")) + _REST

_GPT2_RULE = WordRule(gpt2=True)
_DIGITS_RULE = WordRule(gpt2=True, digits=True)
_LLAMA3_RULE = WordRule(patterns=(_LLAMA3,), ignore_merges=True, add_bos=True)
_DBRX_RULE = WordRule(patterns=(_LLAMA3,))
_QWEN2_RULE = WordRule(patterns=(_QWEN2,))

# tokenizer.ggml.pre -> rule, as llama.cpp has them (src/llama-vocab.cpp); expressions as the models' tokenizer.json.
PRE_TOKENIZERS: dict[str, WordRule] = {
    "gpt-2": _GPT2_RULE,
    "phi-2": _GPT2_RULE,
    "mpt": _GPT2_RULE,
    "olmo": _GPT2_RULE,
    "jais": _GPT2_RULE,
    "gigachat": _GPT2_RULE,
    "a.x-4.0": _GPT2_RULE,
    "mellum": _GPT2_RULE,
    "trillion": _GPT2_RULE,
    "smollm": _DIGITS_RULE,
    "starcoder": _DIGITS_RULE,
    "refact": _DIGITS_RULE,
    "command-r": _DIGITS_RULE,
    "codeshell": _DIGITS_RULE,
    "minerva-7b": _DIGITS_RULE,
    "llama-bpe": _LLAMA3_RULE,
    "llama3": _LLAMA3_RULE,
    "llama-v3": _LLAMA3_RULE,
    "falcon3": _LLAMA3_RULE,
    "pixtral": _LLAMA3_RULE,
    "midm-2.0": _LLAMA3_RULE,
    "dbrx": _DBRX_RULE,
    "smaug-bpe": _DBRX_RULE,
    "qwen2": _QWEN2_RULE,
    "stablelm2": _QWEN2_RULE,
    "deepseek-r1-qwen": _QWEN2_RULE,
    "megrez": _QWEN2_RULE,
    "kormo": _QWEN2_RULE,
    "tekken": WordRule(patterns=(_TEKKEN,), ignore_merges=True, add_bos=True),
    "gpt-4o": WordRule(patterns=(_GPT4O,)),
    # What llama.cpp does with a file that names no rule; nobody trained a tokenizer like that.
    "default": WordRule(
        patterns=(
            r"[\p{P}\$\+<=>\^~\|]+",
            r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)",
            r"\p{N}+",
            r"[0-9][0-9][0-9]",
        )
    ),
}


def is_reading_error(error: BaseException) -> bool:
    """Whether the Rust library failed on its input: it raises plain Exception, and a panic is not even that."""
    return isinstance(error, Exception) or type(error).__name__ == "PanicException"


def tokenizer_from_metadata(metadata: Metadata) -> "PreTrainedTokenizerFast":
    """Tokens, merges, special tokens and chat template as the file has them. Raises ModelError."""
    model = metadata.text("tokenizer.ggml.model")
    tokens: list[str] = metadata.strings("tokenizer.ggml.tokens")
    path = metadata.path
    if len(set(tokens)) != len(tokens):
        seen: set[str] = set()
        twice = next(token for token in tokens if token in seen or seen.add(token))
        raise ModelError(f"{path}: token {twice[:40]!r} is twice in the vocabulary")
    types = metadata.numbers("tokenizer.ggml.token_type", (NORMAL,) * len(tokens))
    if len(types) != len(tokens):
        raise ModelError(f"{path}: tokenizer.ggml.token_type", expected=f"{len(tokens)} entries", found=str(len(types)))
    special = {
        name: tokens[number]
        for name, key in (("bos", "bos"), ("eos", "eos"), ("unk", "unknown"), ("pad", "padding"))
        if (number := metadata.integer(f"tokenizer.ggml.{key}_token_id", None, high=len(tokens) - 1)) is not None
    }
    build = {"gpt2": _byte_level, "llama": _sentencepiece}.get(model)
    if build is None:
        raise ModelError(f"{path}: unknown tokenizer.ggml.model", expected="gpt2 or llama", found=model[:40])
    try:
        tokenizer, add_bos = build(metadata, tokens, types, special)
        _add_tokens(tokenizer, tokens, types, special)
    except BaseException as error:
        if isinstance(error, ModelError) or not is_reading_error(error):
            raise
        raise ModelError(f"{path}: the tokenizer's tables do not fit together ({str(error)[:150]})") from error
    _add_ends(tokenizer, metadata, special, add_bos)
    return _wrap(tokenizer, metadata, special)


def _byte_level(metadata: Metadata, tokens: list[str], types: Any, special: dict[str, str]) -> tuple["Tokenizer", bool]:
    from tokenizers import Regex, Tokenizer, decoders, pre_tokenizers
    from tokenizers.models import BPE

    name = metadata.text("tokenizer.ggml.pre", "default")
    if name not in PRE_TOKENIZERS:
        known = ", ".join(PRE_TOKENIZERS)
        cure = "use the model's Hugging Face folder instead"
        raise ModelError(f"{metadata.path}: unknown tokenizer.ggml.pre", expected=known, found=name[:40], cure=cure)
    rule = PRE_TOKENIZERS[name]
    merges = [tuple(merge.split(" ", 1)) for merge in metadata.strings("tokenizer.ggml.merges", [])]
    if any(len(merge) != 2 for merge in merges):
        raise ModelError(f"{metadata.path}: an entry of tokenizer.ggml.merges is not two tokens with a space between")
    vocab = {token: number for number, token in enumerate(tokens)}
    tokenizer = Tokenizer(BPE(vocab, merges, ignore_merges=rule.ignore_merges))  # type: ignore[arg-type]
    steps: list[Any] = [pre_tokenizers.Digits(individual_digits=True)] if rule.digits else []
    steps += [pre_tokenizers.Split(Regex(pattern), "isolated") for pattern in rule.patterns]
    steps += [pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=rule.gpt2)]
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(steps)
    tokenizer.decoder = decoders.ByteLevel()
    return tokenizer, rule.add_bos


def _sentencepiece(
    metadata: Metadata, tokens: list[str], types: Any, special: dict[str, str]
) -> tuple["Tokenizer", bool]:
    from tokenizers import Tokenizer, decoders, pre_tokenizers
    from tokenizers.models import BPE

    scores = metadata.numbers("tokenizer.ggml.scores")
    if len(scores) != len(tokens):
        raise ModelError(
            f"{metadata.path}: tokenizer.ggml.scores", expected=f"{len(tokens)} entries", found=str(len(scores))
        )
    vocab = {token: number for number, token in enumerate(tokens)}
    pieces = {token for token, kind in zip(tokens, types, strict=True) if kind in (NORMAL, USER_DEFINED)}
    longest = max(map(len, pieces), default=0)
    if longest > _MAX_PIECE:
        raise ModelError(f"{metadata.path}: a token of {longest} characters", expected=f"at most {_MAX_PIECE}")
    unknown = special.get("unk", tokens[types.index(UNKNOWN)] if UNKNOWN in types else None)
    merges = merges_of(pieces, vocab, scores)
    tokenizer = Tokenizer(BPE(vocab, merges, unk_token=unknown, fuse_unk=True, byte_fallback=BYTE in types))
    prefix = metadata.flag("tokenizer.ggml.add_space_prefix", True)
    scheme = "first" if prefix else "never"
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(replacement="▁", prepend_scheme=scheme, split=False)
    steps: list[Any] = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    tokenizer.decoder = decoders.Sequence(steps + ([decoders.Strip(" ", 1, 0)] if prefix else []))
    return tokenizer, True


def merges_of(pieces: set[str], vocab: dict[str, int], scores: Any) -> list[tuple[str, str]]:
    """SentencePiece merges the neighbours whose union has the best score; a list of merges in that order does the same.

    A union is reached by every pair of pieces that it splits into; among these the pair with the smaller ids is first.
    """
    merges = []
    for union in pieces:
        score = scores[vocab[union]]
        for cut in range(1, len(union)):
            left, right = union[:cut], union[cut:]
            if left in pieces and right in pieces:
                merges.append((-score, vocab[union], vocab[left], vocab[right], left, right))
    return [merge[4:] for merge in sorted(merges)]


def _add_tokens(tokenizer: "Tokenizer", tokens: list[str], types: Any, special: dict[str, str]) -> None:
    """Control tokens are left out of decoded text; user-defined ones are only found before words are cut."""
    from tokenizers import AddedToken

    named = set(special.values())
    for token, kind in zip(tokens, types, strict=True):
        if kind in (CONTROL, UNKNOWN) or token in named:
            tokenizer.add_special_tokens([AddedToken(token, special=True, normalized=False)])
        elif kind == USER_DEFINED:
            tokenizer.add_tokens([AddedToken(token, special=False, normalized=False)])


def _add_ends(tokenizer: "Tokenizer", metadata: Metadata, special: dict[str, str], add_bos: bool) -> None:
    from tokenizers.processors import ByteLevel, Sequence, TemplateProcessing

    bos = special.get("bos") if metadata.flag("tokenizer.ggml.add_bos_token", add_bos) else None
    eos = special.get("eos") if metadata.flag("tokenizer.ggml.add_eos_token", False) else None
    if not bos and not eos:
        return
    before, after = [f"{bos}:0"] if bos else [], [f"{eos}:0"] if eos else []
    ends = [(token, tokenizer.token_to_id(token)) for token in dict.fromkeys([bos, eos]) if token]
    single = [*before, "$A:0", *after]
    pair = [*single, *(part.replace("A:0", "B:0").removesuffix("0") + "1" for part in single)]
    template = TemplateProcessing(single=single, pair=pair, special_tokens=ends)
    tokenizer.post_processor = Sequence([ByteLevel(trim_offsets=False), template])


def _wrap(tokenizer: "Tokenizer", metadata: Metadata, special: dict[str, str]) -> "PreTrainedTokenizerFast":
    from transformers import PreTrainedTokenizerFast

    named = {f"{name}_token": token for name, token in special.items()}
    if special.get("pad") == special.get("eos") and special.get("unk") not in (None, special.get("eos")):
        # Trainers that mask the loss on padding would then never train the end of an answer.
        named["pad_token"] = special["unk"]
    template = metadata.text("tokenizer.chat_template", None)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, clean_up_tokenization_spaces=False, chat_template=template, **named
    )
