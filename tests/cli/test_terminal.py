"""In a real terminal: bars that move, colours, a stream that comes as it is made."""

import re
import sys
from pathlib import Path

import pytest

pexpect = pytest.importorskip("pexpect")

_PROGRAM = """
import time
from smidgen.cli.console import Console
from smidgen.events import Note, Progress, RowShown, Step
console = Console()
for done in range(11):
    console.report(Progress("quantising", done, 10))
    time.sleep(0.06)
console.report(RowShown((("ask ", False), ("answer", True))))
for step in range(1, 11):
    console.report(Step(step, 10, 2.0, 1e-3, 1.0, 100, 812.0, 10.0 - step, 1_200_000_000))
    time.sleep(0.2)
    if step == 5:
        console.report(Note("half way"))
console.stream(iter(["one ", "two"]))
"""


def _screen(tmp_path: Path, *, width: int, term: str = "xterm-256color") -> str:
    program = tmp_path / "program.py"
    program.write_text(_PROGRAM, encoding="utf-8")
    env = {"TERM": term, "PATH": "/usr/bin:/bin", "LANG": "C.UTF-8", "PYTHONIOENCODING": "utf-8"}
    child = pexpect.spawn(sys.executable, [str(program)], env=env, dimensions=(40, width), encoding="utf-8", timeout=60)
    child.expect(pexpect.EOF)
    child.close()
    assert child.exitstatus == 0
    return child.before


@pytest.mark.parametrize("width", [80, 120])
def test_the_training_bar_is_redrawn_in_place(tmp_path: Path, width: int) -> None:
    screen = _screen(tmp_path, width=width)
    steps = {int(number) for number in re.findall(r"(\d+)/10 loss 2\.000", screen)}
    assert len(steps) >= 4, "the bar shows steps on the way, not only the end"
    assert 10 in steps
    assert "812 tok/s" in screen
    assert "\x1b[1A" in screen or "\x1b[2K" in screen, "the cursor goes back to redraw"
    lines = [re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", line) for line in re.split(r"[\r\n]+", screen)]
    assert max(map(len, lines)) <= width
    assert "half way" in screen
    assert screen.rstrip().endswith("one two")


def test_trained_tokens_are_underlined_and_not_in_brackets(tmp_path: Path) -> None:
    screen = _screen(tmp_path, width=80)
    assert re.search(r"\x1b\[[0-9;]*4[0-9;]*manswer", screen)
    assert "[[" not in screen


def test_a_dumb_terminal_gets_plain_lines(tmp_path: Path) -> None:
    screen = _screen(tmp_path, width=80, term="dumb")
    assert "\x1b" not in screen
    assert "training 1/10" in screen
    assert "training 10/10" in screen
