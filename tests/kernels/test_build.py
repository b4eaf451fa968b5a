"""The kernels compile for every instruction set, and smidgen works where they do not compile at all."""

import os
import shutil
import subprocess
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any, cast

import pytest
import torch

from smidgen.errors import SettingsError
from smidgen.events import Event, Warned
from smidgen.kernels import library
from smidgen.model import load
from smidgen.quant import backend
from smidgen.quant.matrix import quantise

ROOT = Path(__file__).parents[2]


def _cross_compiler(machine: str) -> list[str] | None:
    """A C++ compiler for the machine that is not this one."""
    if path := shutil.which(f"{machine}-linux-gnu-g++"):
        return [path]
    headers = Path(f"/usr/{machine}-linux-gnu/include")
    path = shutil.which("clang++")
    return [path, f"--target={machine}-linux-gnu"] if path and headers.exists() else None


@pytest.mark.parametrize("machine", ["x86_64", "aarch64"])
def test_every_instruction_set_compiles_without_a_warning(build_kernels: ModuleType, machine: str) -> None:
    here = os.uname().machine == machine
    compiler = build_kernels.find_compiler() if here else _cross_compiler(machine)
    if compiler is None:
        pytest.skip(f"no C++ compiler for {machine}")
    for source, flags in build_kernels.sources(machine).items():
        command = [*compiler, *build_kernels.FLAGS, *build_kernels.WARNINGS, *flags, "-fsyntax-only", "-Werror"]
        done = subprocess.run([*command, str(build_kernels.SOURCE / source)], capture_output=True, text=True)
        assert done.returncode == 0, f"{source}: {done.stderr}"


@pytest.mark.parametrize("compiler", ["/nowhere/c++", "false"])
def test_a_compiler_that_does_not_work_ends_the_build_in_a_sentence(compiler: str) -> None:
    done = subprocess.run(
        [sys.executable, str(ROOT / "csrc" / "build.py")],
        capture_output=True, text=True, env={**os.environ, "CXX": compiler},
    )  # fmt: skip
    assert done.returncode == 1 and compiler in done.stderr and "Traceback" not in done.stderr


@pytest.fixture
def no_library(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """As after an installation without a compiler."""
    monkeypatch.delenv("SMIDGEN_BACKEND", raising=False)
    monkeypatch.setattr(library, "_PATH", tmp_path / "libsmidgen.so")
    library.native_library.cache_clear()
    yield
    library.native_library.cache_clear()


def test_without_the_library_plain_pytorch_computes(no_library: None, monkeypatch: pytest.MonkeyPatch) -> None:
    assert backend.backend_name(torch.device("cpu")) == "torch"
    assert library.describe_library() == "not installed"
    weight, x = torch.randn(11, 64), torch.randn(3, 64)
    for storage in ("nf4", "nf4-dq", "fp4", "fp4-dq", "int8", "none"):
        matrix = quantise(weight, storage)
        torch.testing.assert_close(matrix.matmul(x), x @ matrix.rows(0, 11, torch.float32).t())
    monkeypatch.setenv("SMIDGEN_BACKEND", "native")
    with pytest.raises(SettingsError, match="not installed"):
        backend.backend_name(torch.device("cpu"))


def _warnings_of_a_load(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    events: list[Event] = []
    monkeypatch.setattr(load, "build_base", lambda *args, **settings: None)
    source = cast(load.Source, SimpleNamespace(checkpoint=SimpleNamespace(config={}, files=[])))
    load.load_base(source, compute_dtype="float32", device="cpu", report=events.append)
    return [event.text for event in events if isinstance(event, Warned)]


def test_a_missing_library_is_said_once_for_each_load(no_library: None, monkeypatch: pytest.MonkeyPatch) -> None:
    assert _warnings_of_a_load(monkeypatch) == [library.MISSING]
    monkeypatch.setenv("SMIDGEN_BACKEND", "torch")  # wanted so: nothing to say
    assert _warnings_of_a_load(monkeypatch) == []


def test_a_library_that_is_there_is_not_mentioned(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("SMIDGEN_BACKEND", raising=False)
    monkeypatch.setattr(load, "native_library", lambda: object())
    assert _warnings_of_a_load(monkeypatch) == []
