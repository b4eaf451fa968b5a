"""`smidgen bench memory` on a tiny model: real workers, a real limit where one can be made, real figures."""

from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file

from smidgen.bench.memory import MemorySettings, bench_memory
from smidgen.bench.packed_model import write_packed_model
from smidgen.checkpoint.open import open_checkpoint
from smidgen.errors import RunError, SettingsError
from smidgen.model.build import build_base
from smidgen.planning.shapes import SHAPES

LIMIT = 900_000_000


@pytest.mark.parametrize("mode", ["train", "generate"])
def test_a_tiny_model_within_a_limit(mode: str, tmp_path: Path) -> None:
    settings = MemorySettings("tiny", mode=mode, seq_len=64, memory=LIMIT, keep=tmp_path, resident=mode == "train")
    result = bench_memory(settings)
    assert result["step_s"] > 0
    assert 0 < result["measured_peak_bytes"] < result["peak_rss_bytes"] < LIMIT
    # below 1.3 GB a forecast may be 64 MiB too high
    assert result["measured_peak_bytes"] <= result["forecast_peak_bytes"]
    assert result["forecast_peak_bytes"] <= result["measured_peak_bytes"] + (64 << 20)
    if result["limit_enforced"]:
        assert 0 < result["cgroup_peak_bytes"] <= LIMIT
    assert list(tmp_path.iterdir()) == [tmp_path / "tiny-2-512-nf4-dq"]
    if mode == "train":
        assert result["resident_step_s"] > 0 and all(loss < 20 for loss in result["loss"])


def test_of_no_further_rounds_the_first_counts(tmp_path: Path) -> None:
    settings = MemorySettings("tiny", seq_len=64, keep=tmp_path, repeats=0, activation_dtype="bfloat16")
    result = bench_memory(settings)
    assert len(result["repeats"]) == len(result["loss"]) == 1
    assert 0 < result["measured_peak_bytes"] <= result["forecast_peak_bytes"]


@pytest.mark.parametrize("mode", ["train", "generate"])
def test_a_limit_that_is_too_low_is_refused(mode: str, tmp_path: Path) -> None:
    with pytest.raises((RunError, SettingsError), match="is too little for"):
        bench_memory(MemorySettings("tiny", mode=mode, seq_len=64, memory=340_000_000, keep=tmp_path))


def test_a_disk_without_room_is_said_and_what_was_written_goes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SMIDGEN_CACHE", str(tmp_path))
    with pytest.raises((RunError, SettingsError), match="is too little for"):  # once the weights are there
        bench_memory(MemorySettings("tiny", seq_len=64, memory=340_000_000))
    assert not any((tmp_path / "bench").iterdir())
    monkeypatch.setattr("shutil.disk_usage", lambda _: SimpleNamespace(free=1000))
    with pytest.raises(RunError, match=r"too little room for the model, expected .* kB, found 1.0 kB"):
        bench_memory(MemorySettings("tiny", seq_len=64))
    assert not any((tmp_path / "bench").iterdir())


@pytest.mark.parametrize("storage", ["nf4-dq", "nf4", "int8", "gptq", "none"])
def test_the_random_models_are_like_trained_ones(storage: str, tmp_path: Path) -> None:
    """They open, their weights have the deviation of a trained model's, and logits stay finite and small."""
    config = SHAPES["tiny"] | {"hidden_size": 128, "intermediate_size": 256, "head_dim": 32}
    folder = write_packed_model(config, tmp_path / "model", storage)
    base = build_base(open_checkpoint(folder), storage=storage, compute_dtype=torch.float32, device=torch.device("cpu"))
    for name, linear in base.linears.items():
        deviation = float(linear.weight.rows(0, linear.out_features, torch.float32).std())
        assert 0.01 < deviation < 0.04, name
    logits = base.model(input_ids=torch.arange(32)[None]).logits
    assert logits.isfinite().all() and logits.abs().max() < 30
    assert not list((tmp_path / "model").glob("*.bin"))
    assert load_file(next((tmp_path / "model").glob("*.safetensors")))
