"""Exit codes and the one line that a mistake gets."""

import errno
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from smidgen.errors import DataError, SettingsError


def test_version(smidgen: Callable[..., Any]) -> None:
    assert smidgen("--version").out.startswith("smidgen 0.")


def test_alone_it_prints_its_help(smidgen: Callable[..., Any]) -> None:
    alone = smidgen()
    assert alone.code == 0
    assert alone.out == smidgen("-h").out
    assert "finetune" in alone.out


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (("tune",), "no verb 'tune'; there are demo, plan, finetune,"),
        (("finetune", "--learning-rat", "3"), "Did you mean '--learning-rate'? See smidgen finetune --help."),
        (("demo", "--out"), "Option '--out' requires an argument. See smidgen --help."),
        (("download", "a", "b"), "unexpected extra argument"),
        (("generate",), "MODEL|RUN: missing."),
        (("generate", "m", "hi", "--raw", "--system", "x"), "--raw: has no place for --system."),
        (("generate", "m", "hi", "--top-p", "0"), "--top-p: expected more than 0 and at most 1, found '0'."),
        (("evaluate", "m", "d", "--limit", "0"), "--limit: expected 1 or more, found '0'."),
        (("merge", "run"), "--out: missing."),
        (("finetune", "--resume", "run", "--rank", "3"), "--rank: a resumed run keeps its own, leave it out."),
        (("chat", "m", "--config", "nowhere.yaml"), "--config nowhere.yaml: cannot be read (No such file"),
    ],
)
def test_a_mistake_on_the_command_line_is_one_line_and_code_2(
    smidgen: Callable[..., Any], words: tuple[str, ...], said: str
) -> None:
    outcome = smidgen(*words)
    assert outcome.code == 2
    assert outcome.out == ""
    assert outcome.err.startswith("smidgen: error: ")
    assert outcome.err.count("\n") == 1
    assert said in outcome.err


def test_wrong_settings_are_all_said_in_a_real_process(tmp_path: Path) -> None:
    config = tmp_path / "run.yaml"
    config.write_text("epochs: -1\nnonsense: 1\n", encoding="utf-8")
    words = ["finetune", "model", "--dropout", "2", "--rank", "zero", "--warmup", "1.5", "--config", str(config)]
    done = subprocess.run([sys.executable, "-m", "smidgen", *words], capture_output=True, text=True, timeout=60)
    assert done.returncode == 2
    assert done.stdout == ""
    assert done.stderr.splitlines() == [
        f"smidgen: error: {config}: unknown key 'nonsense'.",
        "smidgen: error: --rank: expected a whole number, found 'zero'.",
        "smidgen: error: DATA: missing.",
        "smidgen: error: --out: missing.",
        "smidgen: error: --dropout: expected 0 or more and less than 1, found 2.0.",
        "smidgen: error: --warmup: expected a fraction of all steps, 0 or more and less than 1, found 1.5.",
        f"smidgen: error: {config}: epochs: expected more than 0, found -1.0.",
    ]


@pytest.mark.parametrize(
    ("error", "code", "said"),
    [
        (DataError("rows.jsonl:3: no answer", cure="give it one"), 2, "rows.jsonl:3: no answer. Give it one.\n"),
        (SettingsError(["rank: no", "alpha: no"]), 2, "rank: no.\nsmidgen: error: alpha: no.\n"),
        (OSError(errno.ENOSPC, "No space left on device", "run/adapter"), 2, "run/adapter: No space left on device."),
        (PermissionError(errno.EACCES, "Permission denied", "/root/x"), 2, "/root/x: Permission denied. Choose"),
        (MemoryError(), 2, "out of memory"),
        (KeyboardInterrupt(), 130, ""),
    ],
)
def test_what_becomes_of_errors(
    smidgen: Callable[..., Any], api: Any, error: BaseException, code: int, said: str
) -> None:
    def download(spec: str, **_: Any) -> None:
        raise error

    api.download = download
    outcome = smidgen("download", "owner/name", "--json")
    assert outcome.code == code
    assert said in outcome.err
    assert "Traceback" not in outcome.err
    assert outcome.out == ""


def test_our_own_bugs_keep_their_traceback(api: Any) -> None:
    from smidgen.cli.main import main

    def download(spec: str, **_: Any) -> None:
        raise ZeroDivisionError

    api.download = download
    with pytest.raises(ZeroDivisionError):
        main(["download", "owner/name"])


def test_a_reader_that_leaves_early_is_no_error() -> None:
    """`smidgen --help | head -0` once ended in a traceback of BrokenPipeError."""
    reader, writer = os.pipe()
    os.close(reader)
    done = subprocess.run(
        [sys.executable, "-m", "smidgen", "--help"], stdout=writer, stderr=subprocess.PIPE, text=True, timeout=60
    )
    os.close(writer)
    assert done.stderr == ""
    assert done.returncode == 1
