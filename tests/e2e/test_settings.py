"""Each setting changes what it says, and only that: runs that differ in one setting, looked at from all sides."""

import json
from collections.abc import Callable
from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest
import yaml
from safetensors import safe_open

import smidgen
from runs import adapter_bytes
from smidgen.train.config import Settings

# 23 rows to train on and one held out, so 6 steps.
QUICK: dict[str, Any] = {"rank": 4, "alpha": 8, "micro_batch": 4, "learning_rate": 5e-3, "compute_dtype": "float32"}
PEAK, STEPS = QUICK["learning_rate"], 6

Seen = dict[str, Any]


def look(run: smidgen.Run) -> Seen:
    """What a run was and did, in parts. Adapters begin with B = 0: the first loss is the base's, on the first rows."""
    lines = [json.loads(line) for line in (run.path / "metrics.jsonl").read_text().splitlines()]
    steps = [line for line in lines if "grad_norm" in line]
    evaluated = [line for line in lines if "held_out_loss" in line]
    config = json.loads((run.path / "adapter_config.json").read_text())
    with safe_open(run.path / "adapter_model.safetensors", "pt") as file:
        shapes = {name: tuple(file.get_slice(name).get_shape()) for name in file.keys()}  # noqa: SIM118, no mapping
    return {
        "base": run.summary["base_format"],
        "computing": json.loads((run.path / "smidgen.json").read_text())["compute_dtype"],
        "shapes": shapes,
        "scale": [config[name] for name in ("lora_alpha", "alpha_pattern", "use_rslora")],
        "rates": [line["learning_rate"] for line in steps],
        "tokens": [line["tokens"] for line in steps],
        "first loss": steps[0]["loss"],
        "first gradient": steps[0]["grad_norm"],
        "held-out loss before": run.summary["loss_before"],
        "held-out tokens": evaluated[0]["held_out_tokens"],
        "evaluations": [line["step"] for line in evaluated],
        "checkpoints": sorted(folder.name for folder in (run.path / "checkpoints").iterdir()),
        "files": sorted(path.name for path in run.path.iterdir()),
        "adapter": adapter_bytes(run.path),
    }


def modules(seen: Seen) -> set[str]:
    return {name.split(".")[-3] for name in seen["shapes"] if "lora_A" in name}


def ranks(seen: Seen, module: str) -> set[int]:
    return {shape[0] for name, shape in seen["shapes"].items() if f"{module}.lora_A" in name}


# What many settings change.
LEARNING = {"first gradient", "adapter"}
ROWS = {"tokens", "first loss", *LEARNING}  # other rows meet in a step
HELD_OUT = {"held-out loss before", "held-out tokens"}
NUMBERS = {"held-out loss before", "first loss", *LEARNING}
LENGTH = {"rates", "tokens", "adapter", "evaluations", "checkpoints"}  # another number of steps

# Setting -> (changed value, what it changes of a plain run, what is true then).
EFFECTS: dict[str, tuple[Any, set[str], Callable[[Seen], bool]]] = {
    "quantize": ("int8", {"base", *NUMBERS}, lambda s: s["base"] == "int8"),
    "compute_dtype": ("bfloat16", {"computing", *NUMBERS}, lambda s: s["computing"] == "bfloat16"),
    "rank": (2, {"shapes", *LEARNING}, lambda s: ranks(s, "q_proj") == ranks(s, "up_proj") == {2}),
    "rank_pattern": (
        {"up_proj": 2}, {"shapes", *LEARNING}, lambda s: (ranks(s, "q_proj"), ranks(s, "up_proj")) == ({4}, {2})
    ),
    "alpha": (3.0, {"scale", *LEARNING}, lambda s: s["scale"] == [3.0, {}, False]),
    "alpha_pattern": ({"up_proj": 2.0}, {"scale", *LEARNING}, lambda s: set(s["scale"][1].values()) == {2.0}),
    "use_rslora": (True, {"scale", *LEARNING}, lambda s: s["scale"][2]),
    "use_dora": (True, {"shapes", *LEARNING}, lambda s: any("lora_magnitude_vector" in name for name in s["shapes"])),
    "dropout": (0.5, LEARNING, lambda s: True),
    "targets": ("q,v", {"shapes", *LEARNING}, lambda s: modules(s) == {"q_proj", "v_proj"}),
    "modules_to_save": ("norm", {"shapes", *LEARNING}, lambda s: any("model.norm" in name for name in s["shapes"])),
    "new_tokens": ("say", {"shapes", *ROWS, *HELD_OUT}, lambda s: True),
    "optimizer": ("sgd", {"adapter"}, lambda s: True),
    "learning_rate": (1e-3, {"rates", "adapter"}, lambda s: max(s["rates"]) == 1e-3),
    "lora_plus_ratio": (4.0, {"adapter"}, lambda s: True),
    "schedule": ("constant", {"rates", "adapter"}, lambda s: s["rates"] == [PEAK] * STEPS),
    "warmup": (0.5, {"rates", "adapter"}, lambda s: s["rates"][:3] == pytest.approx([PEAK / 3, PEAK * 2 / 3, PEAK])),
    "weight_decay": (0.9, {"adapter"}, lambda s: True),
    "clip": (0.001, {"adapter"}, lambda s: True),
    "label_smoothing": (0.1, {"first loss", *LEARNING}, lambda s: True),
    "neftune_alpha": (5.0, {"first loss", *LEARNING}, lambda s: True),
    "epochs": (2.0, LENGTH, lambda s: len(s["tokens"]) == 2 * STEPS),
    "max_steps": (2, LENGTH, lambda s: len(s["tokens"]) == 2),
    "micro_batch": (2, LENGTH | ROWS, lambda s: len(s["tokens"]) == 12),
    "accumulation": (2, LENGTH | ROWS, lambda s: len(s["tokens"]) == 3),
    "seed": (9, ROWS, lambda s: True),
    "group_by_length": (True, ROWS, lambda s: True),
    "pack": (60, {"adapter"}, lambda s: True),  # rounding alone
    "tile_tokens": (64, {"adapter"}, lambda s: True),
    "loss_chunk": (16, set(), lambda s: True),  # memory alone: cli/test_plan.py, train/test_loss_and_step.py
    "share_prefix": ("off", {"adapter"}, lambda s: True),
    "recompute": ("full", set(), lambda s: True),
    "activation_dtype": ("bfloat16", {"adapter"}, lambda s: True),
    "seq_len": (46, ROWS, lambda s: True),  # the held-out row is short enough
    "limit": (12, LENGTH | ROWS, lambda s: len(s["tokens"]) == 3),
    "system": ("Be brief.", ROWS | {"held-out loss before"}, lambda s: True),
    "train_on_prompt": (True, {"first loss", *LEARNING, *HELD_OUT}, lambda s: True),
    "eval_interval": (2, {"evaluations"}, lambda s: s["evaluations"] == [0, 2, 4, 6]),
    "save_interval": (2, {"checkpoints"}, lambda s: s["checkpoints"] == ["step-4", "step-6"]),
    "compare": (2, {"files"}, lambda s: "answers.jsonl" in s["files"]),
}  # fmt: skip


# Settings that need another one, other rows, or another machine beside them -> the file of tests where each does what
# it says.
ELSEWHERE = {
    "device": "cuda/test_cuda.py", "trust_remote_code": "e2e/test_own_code.py", "memory": "train/test_memory.py",
    "init_adapter": "e2e/test_finetune.py", "max_time": "e2e/test_resume.py", "too_long": "train/test_rows.py",
    "mix": "train/test_rows.py", "fill": "train/test_rows.py", "token_cache": "data/test_tokens.py",
    "early_stopping": "e2e/test_loop.py", "keep_best": "e2e/test_loop.py", "keep_checkpoints": "e2e/test_resume.py",
    "eval_answers": "e2e/test_loop.py", "log_to": "train/test_logs.py",
}  # fmt: skip


def test_every_setting_has_a_test_that_it_changes_something() -> None:
    names = [field.name for field in fields(Settings)]
    assert sorted([*EFFECTS, *ELSEWHERE]) == sorted(names)
    for name, file in ELSEWHERE.items():
        assert name in (Path(__file__).parents[1] / file).read_text(encoding="utf-8"), f"{name} is not in {file}"


@pytest.fixture(scope="module")
def plain(model: Path, rows: Path, tmp_path_factory: pytest.TempPathFactory) -> smidgen.Run:
    return smidgen.finetune(str(model), str(rows), tmp_path_factory.mktemp("plain") / "run", **QUICK)


@pytest.mark.parametrize("name", EFFECTS)
def test_each_setting_changes_what_it_says_and_only_that(
    name: str, plain: smidgen.Run, model: Path, rows: Path, tmp_path: Path
) -> None:
    """Losses and norms of gradients are alike within rounding in float32: 1e-5."""
    value, changes, is_true = EFFECTS[name]
    run = smidgen.finetune(str(model), str(rows), tmp_path / "run", **QUICK | {name: value})
    before, after = look(plain), look(run)
    changed = {
        part
        for part in before
        if (after[part] != pytest.approx(before[part], rel=1e-5) if isinstance(before[part], float) else
            after[part] != before[part])
    }  # fmt: skip
    assert changed == changes
    assert is_true(after)
    kept, set_to = (yaml.safe_load((each.path / "settings.yaml").read_text()) for each in (plain, run))
    assert {key for key in kept if kept[key] != set_to[key]} == {name}
