"""Every setting of a fine-tuning run, in one place.

The command line's flags, the keys of `--config FILE.yaml`, the keyword arguments of `smidgen.finetune` and the keys of
`RUN/settings.yaml` are all these fields. A test freezes the list, and each field has a test that it changes something.
"""

import math
import re
from dataclasses import dataclass, field, fields
from types import NoneType
from typing import Any, get_args, get_origin, get_type_hints

from smidgen.data.render import TOO_LONG
from smidgen.errors import SettingsError
from smidgen.kernels.sizes import TILE_TOKENS
from smidgen.lora.targets import LARGEST_ALPHA
from smidgen.planning.estimate import RECOMPUTE
from smidgen.units import parse_bytes, parse_duration

__all__ = ["COMPUTE_DTYPES", "LOGS", "OPTIMIZERS", "QUANTIZE", "Settings", "settings_from"]

QUANTIZE = ("auto", "keep", "nf4-dq", "nf4", "fp4-dq", "fp4", "int8", "gptq", "none")
OPTIMIZERS = ("adamw", "adamw8bit", "paged-adamw8bit", "sgd", "adafactor")
LOGS = ("file", "tensorboard", "wandb")
COMPUTE_DTYPES = ("auto", "float32", "bfloat16", "float16")

# LitGPT's spellings of --quantize and of --precision, and what they become here.
_LITGPT_QUANTIZE = {
    "bnb.nf4": "nf4",
    "bnb.nf4-dq": "nf4-dq",
    "bnb.fp4": "fp4",
    "bnb.fp4-dq": "fp4-dq",
    "bnb.int8": "int8",
    "bnb.int8-training": "int8",
}
_LITGPT_PRECISION = {
    "bf16-true": "bfloat16",
    "bf16-mixed": "bfloat16",
    "16-true": "float16",
    "16-mixed": "float16",
    "32-true": "float32",
    "32-full": "float32",
    "bf16": "bfloat16",
    "fp16": "float16",
    "fp32": "float32",
}


def _setting(default: Any, group: str, text: str, **more: Any) -> Any:
    return field(default=default, metadata={"group": group, "help": text, **more})


@dataclass(frozen=True)
class Settings:
    """The settings of a run. `max_time` is written as '90s', '15m' or '1h30m'."""

    quantize: str = _setting(
        "auto",
        "Base model",
        "How the frozen base is stored. auto: keep the blocks of a base that is already quantised where they can be"
        " trained on, else nf4-dq (4-bit NormalFloat, double quantisation). gptq: 4-bit integers, chosen on the"
        " training rows (elsewhere on a built-in sample) in some minutes. none: in its stored 16-bit type.",
        choices=QUANTIZE,
        aliases=_LITGPT_QUANTIZE,
    )
    compute_dtype: str = _setting(
        "auto",
        "Base model",
        "Number type of the computation. auto: float32, or bfloat16 where this machine is much faster at it; measured.",
        choices=COMPUTE_DTYPES,
        aliases=_LITGPT_PRECISION,
    )
    device: str = _setting("auto", "Base model", "auto, cpu, cuda, cuda:1, mps.")
    trust_remote_code: bool = _setting(
        False, "Base model", "Run Python code that comes with the model folder. Only for sources you trust."
    )

    rank: int = _setting(16, "LoRA", "Rank r of the adapters.")
    alpha: float = _setting(32.0, "LoRA", "Scale: the adapter's output is multiplied by alpha / rank.")
    rank_pattern: dict[str, int] | None = _setting(
        None,
        "LoRA",
        "Another rank for some layers, repeatable. PATTERN is a regular expression for the end of a layer's name, such"
        " as down_proj or 'layers.(0|1).*'; the first that matches counts.",
        metavar="PATTERN=N",
    )
    alpha_pattern: dict[str, float] | None = _setting(
        None, "LoRA", "Another alpha for some layers, in the same way.", metavar="PATTERN=X"
    )
    use_rslora: bool = _setting(
        False, "LoRA", "Rank-stabilised LoRA: multiply by alpha / sqrt(rank); large ranks learn as fast as small ones."
    )
    use_dora: bool = _setting(
        False, "LoRA", "DoRA: learn the length of each row of the adapted weights too. Steps take longer."
    )
    dropout: float = _setting(0.0, "LoRA", "Dropout on the adapter's input, 0 to 1.")
    targets: str = _setting(
        "all",
        "LoRA",
        "Layers that get an adapter: all (every linear layer of the decoder), or a comma list of"
        " q, k, v, o, gate, up, down, head or module names. q,v is LitGPT's default. A mixture's experts get none.",
    )
    modules_to_save: str | None = _setting(
        None,
        "LoRA",
        "Modules that are trained whole beside the adapters, in float32: a comma list of names of embeddings, the head"
        " or norms, such as embed_tokens,lm_head. Where embedding and head are one weight they stay one.",
        metavar="NAMES",
    )
    new_tokens: str | None = _setting(
        None,
        "LoRA",
        "Tokens to add to the tokenizer, a comma list such as '<tool>,</tool>'. Of embedding and head only their rows"
        " are trained.",
        metavar="TOKENS",
    )
    init_adapter: str | None = _setting(
        None,
        "LoRA",
        "Start from this adapter, a PEFT folder or a run, made with the same targets, rank and so on.",
        metavar="DIR",
    )

    optimizer: str = _setting(
        "adamw",
        "Training",
        "adamw8bit keeps its states in bitsandbytes' 8-bit blocks; paged-adamw8bit, on CUDA, in memory that may move to"
        " the CPU; sgd has momentum 0.9. A rate that suits adamw is far too low for sgd.",
        choices=OPTIMIZERS,
    )
    learning_rate: float = _setting(5e-4, "Training", "Peak learning rate.")
    lora_plus_ratio: float = _setting(
        1.0, "Training", "LoRA+: B learns at this many times the rate of A. 16 is its authors' advice."
    )
    schedule: str = _setting(
        "cosine", "Training", "Learning rate after the warm-up.", choices=("cosine", "linear", "constant")
    )
    warmup: float = _setting(0.05, "Training", "Warm-up as a fraction of all steps.")
    weight_decay: float = _setting(0.0, "Training", "Weight decay; sgd adds it to the gradient.")
    clip: float = _setting(1.0, "Training", "Largest norm of the gradient; 0: never clipped.")
    label_smoothing: float = _setting(
        0.0, "Training", "Share of each label that the training loss spreads over all tokens; held-out loss has none."
    )
    neftune_alpha: float = _setting(
        0.0, "Training", "Noise on the embeddings in training (NEFTune), alpha / sqrt(tokens x hidden size); 0: none."
    )
    epochs: float = _setting(1.0, "Training", "Passes over the training rows.")
    max_steps: int | None = _setting(None, "Training", "Stop after this many optimizer steps.", metavar="N")
    max_time: str | None = _setting(
        None, "Training", "Stop after this long, e.g. 90s, 15m, 1h30m; the adapter is saved, and --resume goes"
        " on for as long again.", metavar="TIME"
    )  # fmt: skip
    micro_batch: int = _setting(4, "Training", "Rows computed at once; sets the memory of activations.")
    accumulation: int = _setting(1, "Training", "Micro-batches summed into one optimizer step.")
    memory: str | None = _setting(
        None,
        "Training",
        "Memory that the run may take, e.g. 6GiB: the fastest settings that fit are chosen (layers streamed from disk,"
        " recompute, a smaller micro-batch with more accumulation, a smaller pack, tile or loss chunk), or it is"
        " refused. By default what is free.",
        metavar="SIZE",
    )
    pack: int | None = _setting(
        None,
        "Training",
        "Compute as many rows at once as have at most N tokens, instead of --micro-batch rows. A step still takes"
        " micro-batch x accumulation rows. No row sees another.",
        metavar="TOKENS",
    )
    tile_tokens: int = _setting(
        TILE_TOKENS,
        "Training",
        "Most tokens of a batch that go through a layer at once; one longer row goes alone. Fewer need less memory."
        " Layers of the Llama family.",
        metavar="N",
    )
    loss_chunk: int | None = _setting(
        None,
        "Training",
        "Most labelled tokens whose logits are computed at once. By default as many as 128 MiB of logits.",
        metavar="N",
    )
    share_prefix: str = _setting(
        "auto",
        "Training",
        "What rows computed at once begin with alike (a system prompt, a list of tools) is computed once, with the"
        " same gradient. auto: where that saves 5 % of the tokens or more and rows need not be padded.",
        choices=("auto", "off"),
    )
    group_by_length: bool = _setting(
        False, "Training", "Each step takes rows of about the same length, in random order of steps."
    )
    seed: int = _setting(0, "Training", "Seed of the adapters, the order of rows and dropout.")
    recompute: str = _setting(
        "auto",
        "Training",
        "What each layer computes again in the backward pass to save memory. none: nothing; cheap: norms, at hardly"
        " any time, in layers of the Llama family; full: all of it (gradient checkpointing), for about half more time."
        " auto: what the memory allows, layer by layer.",
        choices=("auto", *RECOMPUTE),
    )
    activation_dtype: str = _setting(
        "auto",
        "Training",
        "Number type in which a layer's results wait for the backward pass. auto: that of the computation; bfloat16:"
        " rounded, for half of float32's memory. Layers of the Llama family.",
        choices=("auto", "bfloat16"),
    )

    seq_len: int = _setting(1024, "Data", "Longest row in tokens; see --too-long.")
    too_long: str = _setting(
        "right",
        "Data",
        "What becomes of longer rows, which is said. right: they lose their end; left: their beginning, but for a start"
        " token; drop: they are left out; error: the run is refused.",
        choices=TOO_LONG,
    )
    mix: str | None = _setting(
        None,
        "Data",
        "Weights of several data sets, e.g. 2,1: what share of an epoch's rows comes from each. An epoch has as many"
        " rows as all of them together. By default each row comes once.",
        metavar="W,W,...",
    )
    limit: int | None = _setting(None, "Data", "Only the first N training rows of each data set.", metavar="N")
    system: str | None = _setting(
        None, "Data", "System message of every chat row, in place of its own; '': none.", metavar="TEXT"
    )
    fill: dict[str, str] | None = _setting(
        None, "Data", "Write TEXT where rows, or --system, say {{NAME}}, repeatable.", metavar="NAME=TEXT"
    )
    token_cache: bool = _setting(
        True, "Data", "Keep the tokens of large data sets (1M tokens or more) in the cache folder for later runs."
    )
    train_on_prompt: bool = _setting(False, "Data", "Count the prompt in the loss too, not only the answers.")

    eval_interval: int = _setting(0, "Records", "Held-out loss every N steps; 0: before and after only.", metavar="N")
    eval_answers: int = _setting(
        0,
        "Records",
        "At each of these evaluations, and before and after, also answer N held-out rows and measure the answers: exact"
        " match, and JSON fields or wording.",
        metavar="N",
    )
    early_stopping: int = _setting(
        0, "Records", "Stop after N evaluations in a row without a new lowest held-out loss; 0: never.", metavar="N"
    )
    keep_best: bool = _setting(
        False, "Records", "Keep the checkpoint with the lowest held-out loss, and give its adapter as the result."
    )
    save_interval: int = _setting(100, "Records", "Checkpoint every N steps; 0: only at the end.", metavar="N")
    keep_checkpoints: int = _setting(
        2, "Records", "The newest N checkpoints stay; older ones go when a newer one has been verified. 0: all stay.",
        metavar="N",
    )  # fmt: skip
    compare: int = _setting(
        0, "Records", "Answer N held-out rows before and after and compare them with the data's answers.", metavar="N"
    )
    log_to: str = _setting(
        "file", "Records", "Where metrics go: a comma list of file (RUN/metrics.jsonl, which is always written),"
        " tensorboard (RUN/tensorboard) and wandb (Weights & Biases; WANDB_MODE=offline: RUN/wandb).",
    )  # fmt: skip

    def __post_init__(self) -> None:
        problems = [*_wrong_types(self), *_wrong_choices(self)] or _wrong_values(self)
        if problems:
            raise SettingsError(problems)

    @property
    def weights(self) -> tuple[float, ...]:
        """The numbers of `mix`."""
        return tuple(map(float, self.mix.split(","))) if self.mix else ()

    @property
    def logs(self) -> tuple[str, ...]:
        """What `log_to` names, each once."""
        return _parts(self.log_to)

    @property
    def whole_modules(self) -> tuple[str, ...]:
        """What `modules_to_save` names, each once."""
        return _parts(self.modules_to_save)

    @property
    def tokens(self) -> tuple[str, ...]:
        """What `new_tokens` names, each once."""
        return _parts(self.new_tokens)


def _parts(given: str | None) -> tuple[str, ...]:
    """A comma list's parts, without blanks around them, each once."""
    return tuple(dict.fromkeys(part.strip() for part in (given or "").split(",") if part.strip()))


def settings_from(given: dict[str, Any]) -> Settings:
    """Settings from keyword arguments, LitGPT's spellings understood. Raises SettingsError, for unknown names too."""
    unknown = sorted(given.keys() - {f.name for f in fields(Settings)})
    if unknown:
        raise SettingsError([f"{name}: there is no such setting" for name in unknown])
    aliases = {f.name: f.metadata["aliases"] for f in fields(Settings) if "aliases" in f.metadata}
    return Settings(**{name: _unaliased(aliases.get(name, {}), value) for name, value in given.items()})


def _unaliased(aliases: dict[str, str], value: Any) -> Any:
    return aliases.get(value, value) if isinstance(value, str) else value


def _wrong_types(settings: Settings) -> list[str]:
    problems = []
    for name, hint in get_type_hints(Settings).items():
        value, kinds = getattr(settings, name), get_args(hint) or (hint,)
        kinds = tuple(get_origin(kind) or kind for kind in kinds)
        allowed = (*kinds, int) if float in kinds else kinds
        if not isinstance(value, allowed) or (isinstance(value, bool) and bool not in kinds):
            expected = " or ".join(kind.__name__ for kind in kinds if kind is not NoneType)
            problems.append(f"{name}: expected {expected}, found {value!r}")
        elif isinstance(value, float) and not math.isfinite(value):
            problems.append(f"{name}: expected a finite number, found {value!r}")
    return problems


def _wrong_choices(settings: Settings) -> list[str]:
    return [
        f"{f.name}: expected one of {', '.join(f.metadata['choices'])}, found {getattr(settings, f.name)!r}"
        for f in fields(settings)
        if f.metadata.get("choices") and getattr(settings, f.name) not in f.metadata["choices"]
    ]


def _is_regex(key: Any) -> bool:
    try:
        return bool(key) and bool(re.compile(key))
    except (re.error, TypeError):
        return False


def _are_weights(text: str) -> bool:
    try:
        return all(0 < float(weight) < math.inf for weight in text.split(","))
    except ValueError:
        return False


def _wrong_values(s: Settings) -> list[str]:
    problems = []

    def need(ok: bool, name: str, expected: str) -> None:
        if not ok:
            problems.append(f"{name}: expected {expected}, found {getattr(s, name)!r}")

    need(bool(re.fullmatch(r"auto|cpu|mps|cuda(:\d+)?", s.device)), "device", "auto, cpu, cuda, cuda:N or mps")
    need(s.rank >= 1, "rank", "1 or more")
    need(0 < s.alpha <= LARGEST_ALPHA, "alpha", "more than 0, within float32")
    ranks, alphas = s.rank_pattern or {}, s.alpha_pattern or {}
    need(all(map(_is_regex, ranks)), "rank_pattern", "regular expressions for names of layers")
    need(all(type(rank) is int and rank >= 1 for rank in ranks.values()), "rank_pattern", "ranks of 1 or more")
    need(all(map(_is_regex, alphas)), "alpha_pattern", "regular expressions for names of layers")
    numbers = all(type(alpha) in (int, float) and 0 < alpha <= LARGEST_ALPHA for alpha in alphas.values())
    need(numbers, "alpha_pattern", "alphas above 0, within float32")
    need(0 <= s.dropout < 1, "dropout", "0 or more and less than 1")
    need(s.learning_rate > 0, "learning_rate", "more than 0")
    need(s.lora_plus_ratio > 0, "lora_plus_ratio", "more than 0")
    need(0 <= s.warmup < 1, "warmup", "a fraction of all steps, 0 or more and less than 1")
    need(s.weight_decay >= 0, "weight_decay", "0 or more")
    need(s.clip >= 0, "clip", "0 or more")
    need(0 <= s.label_smoothing < 1, "label_smoothing", "0 or more and less than 1")
    need(s.neftune_alpha >= 0, "neftune_alpha", "0 or more")
    need(s.epochs > 0, "epochs", "more than 0")
    need(s.max_steps is None or s.max_steps >= 1, "max_steps", "1 or more")
    need(s.micro_batch >= 1, "micro_batch", "1 or more")
    need(s.accumulation >= 1, "accumulation", "1 or more")
    need(s.pack is None or s.pack >= 1, "pack", "1 or more tokens")
    need(s.tile_tokens >= 64, "tile_tokens", "64 or more")
    need(s.loss_chunk is None or s.loss_chunk >= 16, "loss_chunk", "16 or more")
    need(0 <= s.seed < 2**63, "seed", "a number from 0 to 2**63 - 1")
    need(s.seq_len >= 8, "seq_len", "8 or more")
    need(s.mix is None or _are_weights(s.mix), "mix", "a comma list of numbers above 0")
    need(s.limit is None or s.limit >= 1, "limit", "1 or more")
    need(all(type(text) is str for text in (s.fill or {}).values()), "fill", "texts")
    need(bool(s.targets.strip()), "targets", "all or a comma list of layers")
    need(s.modules_to_save is None or bool(s.whole_modules), "modules_to_save", "a comma list of modules")
    need(s.new_tokens is None or bool(s.tokens), "new_tokens", "a comma list of tokens")
    need(bool(s.logs) and set(s.logs) <= set(LOGS), "log_to", f"a comma list of {', '.join(LOGS)}")
    for name in ("early_stopping", "keep_best", "eval_answers"):
        if getattr(s, name) and not s.eval_interval:
            problems.append(f"{name}: expected an eval_interval of 1 or more beside it, found 0")
    for name in ("eval_interval", "eval_answers", "early_stopping", "save_interval", "keep_checkpoints", "compare"):
        need(getattr(s, name) >= 0, name, "0 or more")
    if s.memory is not None:
        try:
            need(parse_bytes(s.memory) > 0, "memory", "more than 0")
        except ValueError as error:
            problems.append(f"memory: {error}")
    if s.max_time is not None:
        try:
            need(parse_duration(s.max_time) > 0, "max_time", "more than 0")
        except ValueError as error:
            problems.append(f"max_time: {error}")
    return problems
