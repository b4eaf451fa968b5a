"""Measurements that benchmarks keep: what they were measured at, and those of before."""

import importlib.util
import json
from pathlib import Path
from types import ModuleType

import pytest


@pytest.fixture
def common(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.setenv("SMIDGEN_CACHE", str(tmp_path))
    file = Path(__file__).parents[2] / "benchmarks" / "common.py"
    spec = importlib.util.spec_from_file_location("common", file)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    monkeypatch.setattr(module, "read_commit", lambda: "0123+")
    return module


def test_a_measurement_has_its_commit_and_one_of_before_none(common: ModuleType, tmp_path: Path) -> None:
    kept = common.Kept("mine", again=False)
    assert kept.once("a", lambda: {"step_s": 1.0}) == kept.get("a") == {"commit": "0123+", "step_s": 1.0}
    assert kept.once("b", lambda: {"commit": "4567"}) == {"commit": "4567"}, "which it says itself"
    (file,) = (file for file in tmp_path.rglob("*.json") if "step_s" in file.read_text())
    file.write_text(json.dumps({"step_s": 2.0}))
    assert kept.once("a", lambda: {"step_s": 3.0}) == {"step_s": 2.0}
    assert common.Kept("mine", again=True).once("a", lambda: {"step_s": 3.0})["step_s"] == 3.0
