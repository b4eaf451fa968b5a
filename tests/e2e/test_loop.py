"""The loop's options in whole runs on a tiny model, and that a resumed run decides as the uninterrupted one did."""

import json
import math
from pathlib import Path
from typing import Any

import pytest

import smidgen
from runs import adapter_bytes, stop_after
from smidgen.errors import DataError, RunError, SettingsError
from smidgen.events import Evaluated, Event, Step
from smidgen.train.state import is_whole
from tiny import write_rows

QUICK: dict[str, Any] = {"rank": 4, "alpha": 8, "micro_batch": 3, "learning_rate": 5e-3, "compute_dtype": "float32"}
DIVERGES = {"learning_rate": 1.0, "schedule": "constant", "clip": 0.0, "warmup": 0.0, "optimizer": "sgd"}


@pytest.fixture(scope="module")
def plain(model: Path, rows: Path, tmp_path_factory: pytest.TempPathFactory) -> smidgen.Run:
    return smidgen.finetune(str(model), str(rows), tmp_path_factory.mktemp("plain") / "run", **QUICK)


def lines_of(run: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


def losses_of(run: Path) -> dict[int, float]:
    return {line["step"]: line["held_out_loss"] for line in lines_of(run) if "held_out_loss" in line}


@pytest.mark.parametrize(
    "settings",
    [
        {"optimizer": "adamw8bit", "rank": 64},  # as many numbers as it takes for 8 bits
        {"optimizer": "sgd", "learning_rate": 0.5},
        {"optimizer": "adafactor"},
        {"neftune_alpha": 5.0, "label_smoothing": 0.1},
        {"eval_interval": 2, "early_stopping": 2, "keep_best": True, "epochs": 3.0, **DIVERGES},
        {"eval_interval": 2, "eval_answers": 2, "dropout": 0.3},
    ],
    ids=lambda settings: "-".join(settings),
)
@pytest.mark.parametrize("stop", [3, 4])  # between two evaluations, and just before one
def test_resumed_equals_uninterrupted_with_each_option(
    settings: dict, stop: int, model: Path, rows: Path, tmp_path: Path
) -> None:
    if settings.get("optimizer") == "adamw8bit":
        pytest.importorskip("bitsandbytes")
    whole = smidgen.finetune(str(model), str(rows), tmp_path / "whole", **QUICK | settings)
    with pytest.raises(KeyboardInterrupt):
        smidgen.finetune(str(model), str(rows), tmp_path / "cut", report=stop_after(stop), **QUICK | settings)
    resumed = smidgen.resume(tmp_path / "cut")
    assert adapter_bytes(resumed.path) == adapter_bytes(whole.path)
    assert losses_of(resumed.path) == losses_of(whole.path)
    logs = [[line for line in lines_of(run.path) if "held_out_loss" in line] for run in (resumed, whole)]
    assert logs[0] == logs[1]
    assert resumed.summary["steps"] == whole.summary["steps"]
    assert resumed.summary["stopped"] == whole.summary["stopped"]


@pytest.mark.parametrize(
    "settings", [{"optimizer": "sgd"}, {"optimizer": "adafactor"}, {"label_smoothing": 0.2}, {"neftune_alpha": 5.0}]
)
def test_each_option_changes_training_and_not_the_held_out_loss(
    settings: dict, plain: smidgen.Run, model: Path, rows: Path, tmp_path: Path
) -> None:
    run = smidgen.finetune(str(model), str(rows), tmp_path / "run", **QUICK | settings)
    assert adapter_bytes(run.path) != adapter_bytes(plain.path)
    assert run.summary["loss_before"] == plain.summary["loss_before"]
    assert run.summary["loss_after"] < run.summary["loss_before"]


def test_early_stopping_ends_a_run_that_no_longer_gets_better(model: Path, rows: Path, tmp_path: Path) -> None:
    how = QUICK | DIVERGES | {"eval_interval": 1, "epochs": 4.0}
    long = smidgen.finetune(str(model), str(rows), tmp_path / "long", **how)
    losses = [loss for _, loss in sorted(losses_of(long.path).items())]
    expected = next(
        at for at in range(len(losses)) if at - losses.index(min(losses[: at + 1])) >= 3
    )  # the first step with three evaluations behind the best so far
    assert 3 <= expected < long.summary["steps"], "the run must be one that stops early"
    short = smidgen.finetune(str(model), str(rows), tmp_path / "short", early_stopping=3, **how)
    assert (short.summary["steps"], short.summary["stopped"]) == (expected, "early_stopping")
    assert lines_of(short.path)[-1]["step"] == expected
    assert smidgen.resume(short.path).summary == short.summary  # nothing is left to do


def test_the_best_checkpoint_is_kept_and_is_the_result(model: Path, rows: Path, tmp_path: Path) -> None:
    how = QUICK | DIVERGES | {"eval_interval": 1, "epochs": 2.0, "save_interval": 1, "keep_checkpoints": 1}
    last = smidgen.finetune(str(model), str(rows), tmp_path / "last", **how)
    run = smidgen.finetune(str(model), str(rows), tmp_path / "best", keep_best=True, **how)
    losses = losses_of(run.path)
    best = min((loss, step) for step, loss in losses.items() if step)[1]
    assert best < run.summary["steps"], "the run must be one whose last step is not its best"
    assert losses == losses_of(last.path)  # training itself is the same
    assert adapter_bytes(run.path) == adapter_bytes(run.path / "checkpoints" / f"step-{best}")
    assert adapter_bytes(run.path) != adapter_bytes(last.path)
    kept = {folder.name for folder in (run.path / "checkpoints").iterdir()}
    assert kept == {f"step-{best}", f"step-{run.summary['steps']}"}
    assert run.summary["result_step"] == best and run.summary["loss_after"] == losses[best]
    assert "result_step" not in last.summary and last.summary["loss_after"] == losses[last.summary["steps"]]


def test_a_best_checkpoint_that_is_damaged_is_not_the_result(model: Path, rows: Path, tmp_path: Path) -> None:
    how = QUICK | DIVERGES | {"eval_interval": 1, "max_steps": 6, "keep_best": True, "save_interval": 0}
    whole = smidgen.finetune(str(model), str(rows), tmp_path / "whole", **how)
    best = whole.summary["result_step"]
    said: list[str] = []

    def report(event: Event) -> None:
        said.append(getattr(event, "text", ""))
        if isinstance(event, Step) and event.step == 6:
            file = tmp_path / "run" / "checkpoints" / f"step-{best}" / "adapter_model.safetensors"
            file.write_bytes(file.read_bytes()[:-1] + b"\xff")

    run = smidgen.finetune(str(model), str(rows), tmp_path / "run", report=report, **how)
    assert any(f"step-{best} is damaged: the result is the adapter of the last step" in text for text in said)
    assert adapter_bytes(run.path) == adapter_bytes(run.path / "checkpoints" / "step-6")


def test_answers_are_measured_at_every_evaluation_and_training_stays_the_same(
    model: Path, rows: Path, tmp_path: Path
) -> None:
    how = QUICK | {"eval_interval": 64, "dropout": 0.1, "epochs": 20.0, "learning_rate": 1e-2}
    plain = smidgen.finetune(str(model), str(rows), tmp_path / "plain", **how)
    events: list[Event] = []
    run = smidgen.finetune(
        str(model), str(rows), tmp_path / "run", eval_answers=2, compare=2, report=events.append, **how
    )
    assert adapter_bytes(run.path) == adapter_bytes(plain.path)
    assert [line["loss"] for line in lines_of(run.path) if "loss" in line] == [
        line["loss"] for line in lines_of(plain.path) if "loss" in line
    ]
    names = ("exact_match", "valid_json", "json_f1")
    found = {
        line["step"]: [line[f"held_out_{name}"] for name in names]
        for line in lines_of(run.path)
        if "held_out_loss" in line
    }
    steps = run.summary["steps"]
    assert sorted(found) == sorted({*range(0, steps, 64), steps})
    assert found[0] == [run.summary[f"{name}_before"] for name in names]  # --compare asks the same rows
    assert found[steps] == [run.summary[f"{name}_after"] for name in names]
    assert found[0] != found[steps], "training must change the answers"
    told = [event.measures for event in events if isinstance(event, Evaluated)]
    assert [list(measures.values()) for measures in told] == [found[step] for step in sorted(found)]
    assert not any(key.startswith("held_out_exact") for line in lines_of(plain.path) for key in line)
    page = (run.path / "report.html").read_text()
    assert page.count("Answers to held-out rows, from step 0") == 2  # exact match beside each of the others
    assert "Answers to held-out rows, from" not in (plain.path / "report.html").read_text()


@pytest.mark.parametrize("how", [{"eval_interval": 1, "eval_answers": 1}, {"compare": 1}])
def test_rows_without_answers_cannot_be_asked(how: dict[str, Any], model: Path, tmp_path: Path) -> None:
    texts = tmp_path / "texts.jsonl"
    texts.write_text("".join(json.dumps({"text": f"timer {i}"}) + "\n" for i in range(12)))
    with pytest.raises(DataError, match="the held-out rows are plain text, expected rows with answers"):
        smidgen.finetune(str(model), str(texts), tmp_path / "run", **how)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("name", ["early_stopping", "keep_best", "eval_answers"])
def test_what_goes_by_evaluations_needs_them(name: str, model: Path, tmp_path: Path) -> None:
    with pytest.raises(SettingsError, match=f"{name}: expected an eval_interval of 1 or more"):
        smidgen.finetune("m", "d", "out", **{name: True if name == "keep_best" else 1})
    few = write_rows(tmp_path / "few.jsonl", count=1)  # too few to hold any out
    with pytest.raises(DataError, match="no held-out rows"):
        smidgen.finetune(
            str(model), str(few), tmp_path / "run", eval_interval=1, **{name: True if name == "keep_best" else 1}
        )
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    "wrong",
    [
        {"label_smoothing": 1.0},
        {"neftune_alpha": -1.0},
        {"early_stopping": -1},
        {"optimizer": "lion"},
        {"epochs": math.inf},  # once an OverflowError, when all files had been read
        {"alpha": math.nan},
        {"alpha_pattern": {"q_proj": math.inf}},
    ],
)
def test_wrong_values_are_refused(wrong: dict) -> None:
    with pytest.raises(SettingsError, match=next(iter(wrong))):
        smidgen.finetune("m", "d", "out", **wrong)


def test_a_loss_that_is_not_finite_names_the_rows_and_leaves_the_last_good_checkpoint(
    model: Path, rows: Path, tmp_path: Path
) -> None:
    how = QUICK | DIVERGES | {"learning_rate": 1e30, "save_interval": 1}
    with pytest.raises(RunError, match=r"rows\.jsonl:\d+|not finite"):
        smidgen.finetune(str(model), str(rows), tmp_path / "run", **how)
    assert not (tmp_path / "run" / "adapter_config.json").exists()
    assert all(is_whole(folder) for folder in (tmp_path / "run" / "checkpoints").iterdir())


def test_answers_before_training_survive_an_interruption(model: Path, rows: Path, tmp_path: Path) -> None:
    how = QUICK | {"compare": 2}
    whole = smidgen.finetune(str(model), str(rows), tmp_path / "whole", **how)
    with pytest.raises(KeyboardInterrupt):
        smidgen.finetune(str(model), str(rows), tmp_path / "cut", report=stop_after(2), **how)
    smidgen.resume(tmp_path / "cut")
    answers = (whole.path / "answers.jsonl").read_text()
    assert (tmp_path / "cut" / "answers.jsonl").read_text() == answers
    assert all(isinstance(json.loads(line)["before"], str) for line in answers.splitlines())
