"""What scripts rely on: the verbs, their flags and the defaults of a run."""

import subprocess
import sys
from dataclasses import fields
from typing import Any

import click
import pytest

from smidgen.cli.main import VERBS, smidgen
from smidgen.cli.options import Verb
from smidgen.train.config import Settings

# Changing a line here changes what `smidgen finetune` does to people who named no flag, or breaks their scripts.
FROZEN_SETTINGS: dict[str, Any] = {
    "quantize": "auto",
    "compute_dtype": "auto",
    "device": "auto",
    "trust_remote_code": False,
    "rank": 16,
    "alpha": 32.0,
    "rank_pattern": None,
    "alpha_pattern": None,
    "use_rslora": False,
    "use_dora": False,
    "dropout": 0.0,
    "targets": "all",
    "modules_to_save": None,
    "new_tokens": None,
    "optimizer": "adamw",
    "init_adapter": None,
    "learning_rate": 5e-4,
    "lora_plus_ratio": 1.0,
    "schedule": "cosine",
    "warmup": 0.05,
    "weight_decay": 0.0,
    "clip": 1.0,
    "label_smoothing": 0.0,
    "neftune_alpha": 0.0,
    "epochs": 1.0,
    "max_steps": None,
    "max_time": None,
    "micro_batch": 4,
    "accumulation": 1,
    "memory": None,
    "pack": None,
    "tile_tokens": 2048,
    "loss_chunk": None,
    "share_prefix": "auto",
    "group_by_length": False,
    "seed": 0,
    "recompute": "auto",
    "activation_dtype": "auto",
    "seq_len": 1024,
    "too_long": "right",
    "mix": None,
    "limit": None,
    "system": None,
    "fill": None,
    "token_cache": True,
    "train_on_prompt": False,
    "eval_interval": 0,
    "eval_answers": 0,
    "early_stopping": 0,
    "keep_best": False,
    "save_interval": 100,
    "keep_checkpoints": 2,
    "compare": 0,
    "log_to": "file",
}
SAMPLING = {"temperature", "top_p", "top_k", "seed", "max_new_tokens", "system"}
BASE = {"quantize", "compute_dtype", "device", "trust_remote_code"}
FROZEN_FLAGS = {
    "demo": {"out"},
    "plan": {"generate", *FROZEN_SETTINGS},  # what can be run can be planned
    "finetune": {"out", "resume", *FROZEN_SETTINGS},
    "generate": {*SAMPLING, "raw", "memory", *BASE},
    "chat": {*SAMPLING, *BASE},
    "evaluate": {
        "against",
        "protocol",
        "limit",
        "answers",
        "max_new_tokens",
        "batch_size",
        "questions",
        "out",
        *("seq_len", "too_long", "system", "fill", "train_on_prompt"),
        *BASE,
    },
    "report": set(),
    "merge": {"out", "base", "dtype", "memory", "trust_remote_code"},
    "export": {"to", "out", "type", "trust_remote_code"},
    "quantize": {
        "to",
        "out",
        "memory",
        "trust_remote_code",
        "bits",
        "group_size",
        "sym",
        "act_order",
        "damp",
        "calibration",
        "calibration_rows",
        "calibration_len",
        "perplexity",
    },
    "data": {
        *("seq_len", "too_long", "mix", "limit", "system", "fill", "token_cache", "train_on_prompt", "micro_batch"),
        *("accumulation", "pack", "share_prefix", "dropout", "neftune_alpha", "group_by_length"),
    },
    "download": set(),
    "doctor": set(),
    "bench": {
        "shape",
        "seq_len",
        "recompute",
        "compute_dtype",
        "against",
        "against_checkpointing",
        "four_bit_tax",
        *("quantize", "mode", "micro_batch", "layers", "memory", "rank", "targets", "resident"),
        "activation_dtype",
        "new_tokens",
        "keep",
        "repeats",
        "isa",
    },
}
ARGUMENTS = {
    "demo": "",
    "plan": "MODEL DATA",
    "finetune": "MODEL DATA",
    "generate": "MODEL|RUN PROMPT",
    "chat": "MODEL|RUN",
    "evaluate": "MODEL|RUN DATA...",
    "report": "RUN",
    "merge": "RUN",
    "export": "RUN",
    "quantize": "MODEL",
    "data": "MODEL DATA",
    "download": "HUB_ID",
    "doctor": "",
    "bench": "WHAT",
}


def command(name: str) -> Verb:
    found = smidgen.get_command(click.Context(smidgen), name)
    assert isinstance(found, Verb)
    return found


def test_settings_and_their_defaults_are_frozen() -> None:
    assert {f.name: f.default for f in fields(Settings)} == FROZEN_SETTINGS


def test_verbs_are_frozen() -> None:
    assert set(VERBS) == set(FROZEN_FLAGS)


@pytest.mark.parametrize("name", FROZEN_FLAGS)
def test_flags_of_each_verb_are_frozen(name: str) -> None:
    assert {flag.name for flag in command(name).flags} == FROZEN_FLAGS[name]


@pytest.mark.parametrize("name", FROZEN_FLAGS)
def test_help_lists_every_flag_with_arguments_and_an_example(name: str) -> None:
    verb = command(name)
    text = verb.help_page()
    for flag in verb.flags:
        assert flag.spelling in text
    for common in ("--json", "--config FILE.yaml", "--help"):
        assert common in text
    assert f"Usage: smidgen {name} [OPTIONS] {ARGUMENTS[name]}".strip() in text
    assert f"  smidgen {name}" in text.partition("Examples:")[2]
    assert max(map(len, text.splitlines())) <= 100


@pytest.mark.parametrize("name", ["finetune", "generate"])
def test_help_shows_groups_and_defaults(name: str) -> None:
    text = " ".join(command(name).help_page().split())
    assert "Base model:" in text
    assert "[default: auto]" in text


def test_help_of_a_verb_is_quick_and_imports_no_torch() -> None:
    program = (
        "import sys, smidgen.cli.main as m\n"
        "try: m.main(['finetune', '--help'])\n"
        "except SystemExit as e: assert not e.code\n"
        "print([name for name in ('torch', 'transformers', 'numpy') if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=60, check=True)
    assert done.stdout.splitlines()[-1] == "[]"
