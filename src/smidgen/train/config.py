"""Every setting of a fine-tuning run, in one place.

The command line's flags, the keys of `--config FILE.yaml`, the keyword arguments of `smidgen.finetune` and the keys of
`RUN/settings.yaml` are all these fields. A test freezes the list, and each field has a test that it changes something.
"""

import re
from dataclasses import dataclass, field, fields
from types import NoneType
from typing import Any, get_args, get_type_hints

from smidgen.errors import SettingsError
from smidgen.plan.estimate import RECOMPUTE
from smidgen.units import parse_duration

__all__ = ["COMPUTE_DTYPES", "QUANTIZE", "Settings", "settings_from"]

QUANTIZE = ("auto", "keep", "nf4-dq", "nf4", "fp4-dq", "fp4", "int8", "gptq", "none")
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
    dropout: float = _setting(0.0, "LoRA", "Dropout on the adapter's input, 0 to 1.")
    targets: str = _setting(
        "all",
        "LoRA",
        "Layers that get an adapter: all (every linear layer of the decoder), or a comma list of"
        " q, k, v, o, gate, up, down, head or module names. q,v is LitGPT's default.",
    )

    learning_rate: float = _setting(5e-4, "Training", "Peak learning rate of AdamW.")
    schedule: str = _setting(
        "cosine", "Training", "Learning rate after the warm-up.", choices=("cosine", "linear", "constant")
    )
    warmup: float = _setting(0.05, "Training", "Warm-up as a fraction of all steps.")
    weight_decay: float = _setting(0.0, "Training", "Weight decay of AdamW.")
    clip: float = _setting(1.0, "Training", "Largest norm of the gradient; 0: never clipped.")
    epochs: float = _setting(1.0, "Training", "Passes over the training rows.")
    max_steps: int | None = _setting(None, "Training", "Stop after this many optimizer steps.", metavar="N")
    max_time: str | None = _setting(
        None, "Training", "Stop after this long, e.g. 90s, 15m, 1h30m; the adapter is saved, and --resume goes"
        " on for as long again.", metavar="TIME"
    )  # fmt: skip
    micro_batch: int = _setting(4, "Training", "Rows computed at once; sets the memory of activations.")
    accumulation: int = _setting(1, "Training", "Micro-batches summed into one optimizer step.")
    pack: int | None = _setting(
        None,
        "Training",
        "Compute as many rows at once as have at most N tokens, instead of --micro-batch rows. A step still takes"
        " micro-batch x accumulation rows. No row sees another.",
        metavar="TOKENS",
    )
    share_prefix: str = _setting(
        "auto",
        "Training",
        "What rows computed at once begin with alike (a system prompt, a list of tools) is computed once, with the"
        " same gradient. auto: where that saves 5 % of the tokens or more, on smidgen's own layers.",
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
        " any time; full: all of it (gradient checkpointing), for about a third more time. auto: the first of"
        " the three whose activations fit in half of the free memory; on a GPU, full.",
        choices=("auto", *RECOMPUTE),
    )

    seq_len: int = _setting(1024, "Data", "Longest row in tokens; longer ones are cut at the end, and it is said.")
    train_on_prompt: bool = _setting(False, "Data", "Count the prompt in the loss too, not only the answers.")

    eval_interval: int = _setting(0, "Records", "Held-out loss every N steps; 0: before and after only.", metavar="N")
    save_interval: int = _setting(100, "Records", "Checkpoint every N steps; 0: only at the end.", metavar="N")
    keep_checkpoints: int = _setting(
        2, "Records", "The newest N checkpoints stay; older ones go when a newer one has been verified. 0: all stay.",
        metavar="N",
    )  # fmt: skip
    compare: int = _setting(
        0, "Records", "Answer N held-out rows before and after and compare them with the data's answers.", metavar="N"
    )
    log_to: str = _setting("file", "Records", "Where metrics go: file (RUN/metrics.jsonl).", choices=("file",))

    def __post_init__(self) -> None:
        problems = [*_wrong_types(self), *_wrong_choices(self)] or _wrong_values(self)
        if problems:
            raise SettingsError(problems)


def settings_from(given: dict[str, Any]) -> Settings:
    """Settings from keyword arguments, LitGPT's spellings understood. Raises SettingsError, for unknown names too."""
    unknown = sorted(given.keys() - {f.name for f in fields(Settings)})
    if unknown:
        raise SettingsError([f"{name}: there is no such setting" for name in unknown])
    aliases = {f.name: f.metadata["aliases"] for f in fields(Settings) if "aliases" in f.metadata}
    return Settings(**{name: aliases.get(name, {}).get(value, value) for name, value in given.items()})


def _wrong_types(settings: Settings) -> list[str]:
    problems = []
    for name, hint in get_type_hints(Settings).items():
        value, kinds = getattr(settings, name), get_args(hint) or (hint,)
        allowed = (*kinds, int) if float in kinds else kinds
        if not isinstance(value, allowed) or (isinstance(value, bool) and bool not in kinds):
            expected = " or ".join(kind.__name__ for kind in kinds if kind is not NoneType)
            problems.append(f"{name}: expected {expected}, found {value!r}")
    return problems


def _wrong_choices(settings: Settings) -> list[str]:
    return [
        f"{f.name}: expected one of {', '.join(f.metadata['choices'])}, found {getattr(settings, f.name)!r}"
        for f in fields(settings)
        if f.metadata.get("choices") and getattr(settings, f.name) not in f.metadata["choices"]
    ]


def _wrong_values(s: Settings) -> list[str]:
    problems = []

    def need(ok: bool, name: str, expected: str) -> None:
        if not ok:
            problems.append(f"{name}: expected {expected}, found {getattr(s, name)!r}")

    need(bool(re.fullmatch(r"auto|cpu|mps|cuda(:\d+)?", s.device)), "device", "auto, cpu, cuda, cuda:N or mps")
    need(s.rank >= 1, "rank", "1 or more")
    need(s.alpha > 0, "alpha", "more than 0")
    need(0 <= s.dropout < 1, "dropout", "0 or more and less than 1")
    need(s.learning_rate > 0, "learning_rate", "more than 0")
    need(0 <= s.warmup < 1, "warmup", "a fraction of all steps, 0 or more and less than 1")
    need(s.weight_decay >= 0, "weight_decay", "0 or more")
    need(s.clip >= 0, "clip", "0 or more")
    need(s.epochs > 0, "epochs", "more than 0")
    need(s.max_steps is None or s.max_steps >= 1, "max_steps", "1 or more")
    need(s.micro_batch >= 1, "micro_batch", "1 or more")
    need(s.accumulation >= 1, "accumulation", "1 or more")
    need(s.pack is None or s.pack >= 1, "pack", "1 or more tokens")
    need(0 <= s.seed < 2**63, "seed", "a number from 0 to 2**63 - 1")
    need(s.seq_len >= 8, "seq_len", "8 or more")
    need(bool(s.targets.strip()), "targets", "all or a comma list of layers")
    for name in ("eval_interval", "save_interval", "keep_checkpoints", "compare"):
        need(getattr(s, name) >= 0, name, "0 or more")
    if s.max_time is not None:
        try:
            need(parse_duration(s.max_time) > 0, "max_time", "more than 0")
        except ValueError as error:
            problems.append(f"max_time: {error}")
    return problems
