"""In a real terminal: bars that move, colours, a stream that comes as it is made."""

import json
import os
import re
import signal
import sys
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from stories import stories_folder

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
console.stream(lambda: iter(["one ", "two"]))
"""


def _spawn(*words: str, width: int = 80, term: str = "xterm-256color", cwd: Path | None = None) -> Any:
    """Python with these words in a terminal of 40 rows."""
    kept = {key: value for key, value in os.environ.items() if key not in {"NO_COLOR", "FORCE_COLOR", "COLUMNS"}}
    env = {**kept, "TERM": term, "PYTHONIOENCODING": "utf-8", "HF_HUB_OFFLINE": "1"}
    return pexpect.spawn(
        sys.executable,
        list(words),
        env=env,
        dimensions=(40, width),
        encoding="utf-8",
        timeout=120,
        cwd=cwd,
        preexec_fn=partial(signal.signal, signal.SIGINT, signal.SIG_DFL),  # a shell's background jobs ignore Ctrl-C
    )


def _screen(tmp_path: Path, *, width: int, term: str = "xterm-256color") -> str:
    program = tmp_path / "program.py"
    program.write_text(_PROGRAM, encoding="utf-8")
    child = _spawn(str(program), width=width, term=term)
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


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """A run on stories260K made in a terminal: the folder that holds it, and all that the screen showed."""
    folder = tmp_path_factory.mktemp("terminal")
    stories_folder(folder)
    rows = [{"messages": [_turn("user", f"Tom saw {n} cats"), _turn("assistant", "He ran.")]} for n in range(24)]
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    words = ("--out", "run", "--micro-batch", "2", "--compute-dtype", "float32")
    child = _spawn("-m", "smidgen", "finetune", "stories260K", "rows.jsonl", *words, cwd=folder)
    child.expect(pexpect.EOF)
    child.close()
    assert child.exitstatus == 0, child.before
    return folder, child.before


def _turn(role: str, content: str) -> dict[str, str]:
    return {"role": role, "content": content}


def test_finetune_shows_its_progress_and_what_it_reached(trained: tuple[Path, str]) -> None:
    folder, screen = trained
    shown = re.findall(r"(\d+)/(\d+) loss (\d+\.\d+) \d+ tok/s", screen)
    assert len({step for step, _, _ in shown}) >= 2, "the bar is seen on the way"
    step, total, loss = shown[-1]
    assert step == total
    assert float(loss) < float(shown[0][2])
    plain = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", screen)
    summary = json.loads((folder / "run" / "summary.json").read_text(encoding="utf-8"))
    assert f"held-out loss   {summary['loss_before']:.3f}  {summary['loss_after']:.3f}" in plain
    assert "smidgen chat run" in plain


def test_chat_streams_stops_with_ctrl_c_and_leaves_with_ctrl_d(tmp_path: Path) -> None:
    story = stories_folder(tmp_path)
    for file in (story / "config.json", story / "tokenizer_config.json"):  # its stories have no end
        text = file.read_text(encoding="utf-8")
        file.write_text(text.replace('"eos_token_id": 2', '"eos_token_id": 0').replace("</s>", "<unk>"), "utf-8")
    words = ("--max-new-tokens", "400", "--temperature", "0", "--compute-dtype", "float32")
    child = _spawn("-m", "smidgen", "chat", "stories260K", *words, cwd=tmp_path)
    child.delaybeforesend = None  # Ctrl-C comes while the answer does, also on a busy machine
    os.setpriority(os.PRIO_PROCESS, child.pid, 19)
    child.expect("> ")
    child.sendline("/help")
    child.expect("/reset starts anew")
    child.expect("> ")
    child.sendline("/reset")
    child.expect("A new conversation")
    child.expect("> ")
    child.sendline("Tom saw 3 cats")
    child.expect("cats\r\n")
    child.sendintr()  # ends the answer, even before its first word (it once ended the chat there)
    child.expect("stopped")
    child.expect("> ")
    child.sendline("Tom saw 4 cats")
    child.expect('"Here,"')  # how it begins; hundreds of tokens follow
    child.sendintr()
    child.expect("stopped")
    child.expect("> ")
    child.sendintr()  # only clears the line
    child.expect("> ")
    child.sendeof()
    child.expect(pexpect.EOF)
    child.close()
    assert child.exitstatus == 0
