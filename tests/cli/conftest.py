"""What the tests of the command line share: running it in this process over a stand-in for the library."""

import sys
from collections.abc import Callable
from dataclasses import dataclass
from types import ModuleType
from typing import Any

import pytest

from smidgen.cli.main import main


@dataclass
class Outcome:
    code: int
    out: str
    err: str


@pytest.fixture
def smidgen(capfd: pytest.CaptureFixture[str]) -> Callable[..., Outcome]:
    """Runs `smidgen WORDS...` and returns exit code, standard output and standard error."""

    def run(*words: str) -> Outcome:
        with pytest.raises(SystemExit) as leaving:
            main(list(words))
        captured = capfd.readouterr()
        return Outcome(int(leaving.value.code or 0), captured.out, captured.err)

    return run


@pytest.fixture
def api(monkeypatch: pytest.MonkeyPatch) -> Any:
    """An empty stand-in for smidgen.api; a test gives it the functions that its verb calls."""
    import smidgen as package

    stand_in = ModuleType("smidgen.api")
    monkeypatch.setitem(sys.modules, "smidgen.api", stand_in)
    monkeypatch.setattr(package, "api", stand_in, raising=False)
    return stand_in
