"""csrc/build.py as a module."""

import importlib.util
from pathlib import Path
from types import ModuleType

import pytest


@pytest.fixture(scope="session")
def build_kernels() -> ModuleType:
    path = Path(__file__).parents[2] / "csrc" / "build.py"
    specification = importlib.util.spec_from_file_location("build_kernels", path)
    assert specification and specification.loader
    module = importlib.util.module_from_spec(specification)
    specification.loader.exec_module(module)
    return module
