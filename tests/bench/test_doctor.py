"""What `smidgen doctor` measures and checks."""

import os
from typing import Any

import pytest
import torch

import smidgen
import smidgen.api as api
import smidgen.bench.doctor as doctor
import smidgen.kernels.selfcheck as selfcheck
from smidgen.errors import RunError
from smidgen.quant.matrix import FrozenMatrix


def test_every_kernel_agrees_with_its_twin_and_the_environment_is_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SMIDGEN_BACKEND", "torch")
    found = selfcheck.check_kernels()
    if not found:
        pytest.skip("no native kernels here")
    assert set(found.values()) == {"ok"} and len(found) >= 6
    assert os.environ["SMIDGEN_BACKEND"] == "torch"


def test_a_kernel_that_is_wrong_or_broken_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    if not selfcheck.check_kernels():
        pytest.skip("no native kernels here")

    def wrong(x: torch.Tensor) -> torch.Tensor:
        return x + 1 if os.environ["SMIDGEN_BACKEND"] == "native" else x

    def broken(*_: Any) -> Any:
        raise OSError("undefined symbol")

    monkeypatch.setattr(selfcheck, "swiglu", wrong)
    monkeypatch.setattr(selfcheck, "rms_norm", broken)
    found = selfcheck.check_kernels()
    assert found["swiglu"].startswith("wrong: relative error") and found["rms_norm"] == "fails: undefined symbol"
    assert found["attention"] == "ok"


def test_a_step_stays_within_its_forecast(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor, "_LAYERS", 1)
    monkeypatch.setattr(doctor, "_TOKENS", 64)
    found = doctor.check_step()
    assert found["verdict"] == "ok" and 0 < found["measured_peak_bytes"] <= found["forecast_peak_bytes"]
    assert found["measured_step_s"] > 0 and found["forecast_step_s"] > 0


def test_a_step_above_its_forecast_or_without_room_is_wrong(monkeypatch: pytest.MonkeyPatch) -> None:
    figures = {"forecast_rss_bytes": 10, "peak_rss_bytes": 11, "forecast_step_s": 1.0, "step_s": 1.0}
    monkeypatch.setattr(doctor, "bench_memory", lambda settings, report: figures)
    assert doctor.check_step()["verdict"] == "wrong: more memory than was forecast"

    def full(*_: Any) -> Any:
        raise RunError("no room")

    monkeypatch.setattr(doctor, "bench_memory", full)
    assert doctor.check_step() == {"verdict": "fails: no room."}


def test_learning_elsewhere_is_compared_with_float32_on_the_cpu(tmp_path: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Here the other device is the CPU again, with another rounding."""
    monkeypatch.setenv("SMIDGEN_CACHE", str(tmp_path))
    monkeypatch.setattr(doctor, "_SHAPE", "tiny")
    monkeypatch.setattr(doctor, "_LAYERS", 2)
    monkeypatch.setattr(doctor, "_TOKENS", 64)
    cpu = torch.device("cpu")
    places: list[Any] = []
    learn = doctor._learn
    monkeypatch.setattr(doctor, "_learn", lambda folder, *how: places.append(folder.parent) or learn(folder, *how))
    same = doctor.check_learning(cpu, torch.float32)
    assert {place.parent for place in places} == {tmp_path / "bench"}, "where what was killed is removed the next time"
    assert not any((tmp_path / "bench").iterdir())
    assert same["verdict"] == "ok" and same["loss_distance"] == same["adapter_distance"] == 0
    rounded = doctor.check_learning(cpu, torch.bfloat16)
    assert rounded["verdict"] == "ok" and rounded["loss"][-1] < rounded["loss"][0]
    assert rounded["loss_distance"] > 0 and rounded["adapter_distance"] > 0
    monkeypatch.setitem(doctor._TOLERANCES, torch.bfloat16, (0.1, 1e-9))
    assert doctor.check_learning(cpu, torch.bfloat16)["verdict"].startswith("wrong: what the adapters learnt is")
    monkeypatch.setitem(doctor._TOLERANCES, torch.bfloat16, (0.0, 1.0))
    assert doctor.check_learning(cpu, torch.bfloat16)["verdict"].startswith("wrong: losses are")


def test_a_device_that_computes_wrongly_or_not_at_all_is_found(tmp_path: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SMIDGEN_CACHE", str(tmp_path))
    for name, value in (("_SHAPE", "tiny"), ("_LAYERS", 2), ("_TOKENS", 64)):
        monkeypatch.setattr(doctor, name, value)
    matmul_t, calls = FrozenMatrix.matmul_t, []

    def not_transposed(self: FrozenMatrix, g: torch.Tensor, *more: Any) -> torch.Tensor:
        return matmul_t(self, g.flip(1), *more)

    learn = doctor._learn

    def learn_wrongly(*arguments: Any) -> dict[str, Any]:
        calls.append(arguments)
        if len(calls) == 2:
            monkeypatch.setattr(FrozenMatrix, "matmul_t", not_transposed)
            monkeypatch.setenv("SMIDGEN_BACKEND", "torch")
        return learn(*arguments)

    monkeypatch.setattr(doctor, "_learn", learn_wrongly)
    assert doctor.check_learning(torch.device("cpu"), torch.float32)["verdict"].startswith("wrong: ")
    found = doctor.check_learning(torch.device("cuda", 99), torch.float32)
    assert found["verdict"].startswith("fails: ")


def test_the_disk_is_measured_and_left_as_it_was(tmp_path: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SMIDGEN_CACHE", str(tmp_path / "cache"))
    found = doctor.check_disk()
    assert found["verdict"] == "ok" and found["read_bytes_per_s"] > 0 and found["free_bytes"] > 0
    assert found["folder"] == str(tmp_path / "cache") and not any((tmp_path / "cache").iterdir())


def test_a_cache_that_cannot_be_written_is_a_line_and_the_rest_goes_on(
    tmp_path: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A file in its place, and a folder that cannot be made."""
    (tmp_path / "file").touch()
    for place, why in ((tmp_path / "file", "File exists"), (tmp_path / "file" / "cache", "Not a directory")):
        monkeypatch.setenv("SMIDGEN_CACHE", str(place))
        cure = "Set SMIDGEN_CACHE to a folder that can be written"
        assert doctor.check_disk() == {"folder": str(place), "verdict": f"fails: {place}: {why}. {cure}"}
        assert doctor.check_learning(torch.device("cpu"), torch.float32)["verdict"].startswith("fails: ")
    monkeypatch.setattr(api, "check_backends", lambda device: {"cpu": "ok"})
    monkeypatch.setattr(api, "check_kernels", lambda: {"swiglu": "ok"})
    found = smidgen.doctor()
    assert {"disk", "training step"} <= {*found["failed"]} and found["kernels"] == {"swiglu": "ok"}
