"""How events look where there is no terminal: plain lines, on standard error, each once."""

from pathlib import Path

import pytest

from smidgen.cli import progress, views
from smidgen.cli.console import Console, command
from smidgen.cli.progress import Smoothed, step_line
from smidgen.events import Answer, Answers, Evaluated, Note, Progress, RowShown, Saved, Step, Warned

LONG = "word " * 60


def step(number: int, total: int = 100, loss: float = 2.0) -> Step:
    return Step(number, total, loss, 1e-3, 1.0, 100, 812.4, 61.0, 1_204_000_000)


def test_notes_and_warnings_stay_on_one_line_in_a_log(capfd: pytest.CaptureFixture[str]) -> None:
    console = Console()
    console.report(Note(LONG))
    console.report(Warned(LONG))
    out, err = capfd.readouterr()
    assert out == ""
    assert [line.rstrip() for line in err.splitlines()] == [f"· {LONG}".rstrip(), f"warning: {LONG}".rstrip()]


def test_square_brackets_and_colons_are_text_and_not_markup(capfd: pytest.CaptureFixture[str]) -> None:
    Console().report(Note("a list [bold] of :smile: things [/]"))
    assert "a list [bold] of :smile: things [/]" in capfd.readouterr().err


def test_a_model_cannot_steer_the_terminal(capfd: pytest.CaptureFixture[str]) -> None:
    console = Console()
    answer = Answers("after", (Answer("q", "e", "\x1b[31mred\x07"),), {"exact_match": 0.0})
    console.report(answer)
    console.finished({}, Path("run"))
    assert "\x1b" not in "".join(capfd.readouterr())
    assert views.printable("a\x1b]0;title\x07\tb\nc") == "a\ufffd]0;title\ufffd\tb\nc"


def test_a_row_without_colours_has_its_trained_part_in_brackets(capfd: pytest.CaptureFixture[str]) -> None:
    Console().report(RowShown((("user: hi\nassistant: ", False), ("hello<|end|>", True), ("\n", False))))
    err = capfd.readouterr().err
    assert "  user: hi\n  assistant: [[hello<|end|>]]\n" in err


def test_a_very_long_row_is_cut_in_its_middle() -> None:
    text = views.marked_row((("a" * 4000, False), ("z" * 4000, True)), plain=True).plain
    assert text.startswith("aaa")
    assert text.endswith("zzz]]")
    assert "6,504 characters left out" in text


def test_training_tells_its_first_step_its_last_and_one_every_ten_seconds(
    capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    clock = iter(range(0, 10_000, 1))
    monkeypatch.setattr(progress.time, "monotonic", lambda: float(next(clock)))
    console = Console()
    for number in range(1, 26):
        console.report(step(number, 25))
    lines = capfd.readouterr().err.splitlines()
    assert [line.split()[1] for line in lines] == ["1/25", "11/25", "21/25", "25/25"]
    assert lines[0] == "training 1/25 loss 2.000 812 tok/s 1m01s left 1.2 GB"
    assert "left" not in lines[-1]


def test_other_work_tells_only_when_it_takes_long(
    capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    clock = 0.0
    monkeypatch.setattr(progress.time, "monotonic", lambda: clock)
    console = Console()
    for done in (0, 5, 10):
        clock += 0.1
        console.report(Progress("tokenising", done, 10))
    assert capfd.readouterr().err == ""
    for done in range(11):
        clock += 4
        console.report(Progress("quantising", done, 10))
    lines = capfd.readouterr().err.splitlines()
    assert lines[0].startswith("quantising 3/10")
    assert lines[-1] == "quantising: 10/10 in 40s"
    assert len(lines) == 4


def test_a_line_of_training_leaves_room_for_a_bar_in_80_columns() -> None:
    widest = step_line(Step(99_998, 99_999, 9.9, 1e-3, 1, 1, 99_999.0, 359_999.0, 999_900_000_000), 12.345)
    assert len(widest) <= 64


def test_loss_is_smoothed_without_a_wrong_start() -> None:
    smoothed = Smoothed()
    assert smoothed.add(4.0) == pytest.approx(4.0)
    assert smoothed.add(2.0) == pytest.approx((0.9 * 4 + 2) / 1.9)


def test_evaluations_and_answers_are_told_in_a_line(capfd: pytest.CaptureFixture[str]) -> None:
    console = Console()
    console.report(Evaluated(0, 2.6817, 100, 3456))
    console.report(Evaluated(20, 2.5, 100, 3456, {"exact_match": 1 / 3, "rouge_l": 0.5}))
    console.report(Answers("before", (Answer("q", "e", "a"),) * 3, {"exact_match": 1 / 3, "rouge_l": 0.5}))
    assert capfd.readouterr().err.splitlines() == [
        "held-out loss before training: 2.6817 (100 rows, 3,456 tokens)",
        "held-out loss after 20 steps: 2.5000 (100 rows, 3,456 tokens); answers: exact match 33.3 %, ROUGE-L 50 %",
        "answers before training: exact match 33.3 %, ROUGE-L 50 % (3 rows)",
    ]


def test_answers_that_changed_come_first_and_a_right_answer_stands_for_the_expected(
    capfd: pytest.CaptureFixture[str],
) -> None:
    console = Console()
    console.report(Answers("before", (Answer("one", "1", "1"), Answer("two", "2", "no")), {}))
    console.report(Answers("after", (Answer("one", "1", "1"), Answer("two", "2", "2")), {}))
    console.finished({}, Path("run"))
    lines = [line.split() for line in capfd.readouterr().out.splitlines()]
    assert lines.index(["asked", "two"]) < lines.index(["asked", "one"])
    assert ["before", "✗", "no"] in lines
    assert ["after", "✓", "2"] in lines
    assert not any(line[:1] == ["expected"] for line in lines)


def test_files_are_listed_once_with_checkpoints_in_a_line(capfd: pytest.CaptureFixture[str]) -> None:
    console = Console()
    for name, nbytes in (("checkpoints/step-5/a", 1), ("checkpoints/step-5/b", 2), ("summary.json", 5)):
        console.report(Saved(Path("runs/x") / name, nbytes))
    console.report(Saved(Path("runs/x/summary.json"), 7))
    console.files()
    lines = [" ".join(line.split()) for line in capfd.readouterr().out.splitlines()]
    assert lines[-2:] == ["runs/x/summary.json 7 B", "runs/x/checkpoints/step-5/ (2 files) 3 B"]


def test_commands_can_be_pasted() -> None:
    assert command("generate", "my run", "it's") == "smidgen generate 'my run' 'it'\"'\"'s'"
