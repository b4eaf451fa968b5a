"""csrc/build.py as a module, and the kernels of one instruction set after the other."""

import importlib.util
import platform
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import pytest

from smidgen.kernels.library import native_library

ISAS = ("plain", "neon") if platform.machine() in ("aarch64", "arm64") else ("plain", "avx2", "avx512")


@pytest.fixture(scope="session")
def build_kernels() -> ModuleType:
    path = Path(__file__).parents[2] / "csrc" / "build.py"
    specification = importlib.util.spec_from_file_location("build_kernels", path)
    assert specification and specification.loader
    module = importlib.util.module_from_spec(specification)
    specification.loader.exec_module(module)
    return module


@pytest.fixture(params=ISAS)
def isa(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """The kernels of one instruction set; the one in use before again afterwards."""
    monkeypatch.delenv("SMIDGEN_BACKEND", raising=False)
    library = native_library()
    if library is None:
        pytest.skip("the native kernels are not built")
    before = library.smidgen_isa()
    if not library.smidgen_use_isa(request.param.encode()):
        pytest.skip(f"this machine has no {request.param}")
    yield request.param
    assert library.smidgen_use_isa(before)
