"""Forecasts of `smidgen quantize` and `smidgen merge`: as arithmetic, and against real runs in fresh processes."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

import smidgen
import smidgen.export.quantise as quantise_module
import smidgen.merging as merging_module
import smidgen.planning.conversion as conversion_module
from smidgen.errors import SettingsError
from smidgen.export.adapter import save_adapter
from smidgen.lora.attach import attach_lora
from smidgen.planning.conversion import LARGEST_SHARD, Piece, fitting, walk_bytes
from tiny import build, byte_tokenizer, tiny_folder

WORKER = """
import json, sys
import torch
from smidgen.bench.workers.serving import reset_peak_rss
from smidgen.export.quantise import quantise_model
from smidgen.model.calibration import Calibration
from smidgen.model.load import open_source
from smidgen.quant.gptq import GptqSettings
from smidgen.train.memory import give_memory_back
from pathlib import Path

folder, out, to = sys.argv[1:]
torch.manual_seed(0)
give_memory_back()
how = {}
if to == "gptq":
    how = {"settings": GptqSettings(act_order=True), "calibration": Calibration(torch.randint(250, (4, 64)), None, "")}
source = open_source(folder)
reset_peak_rss()
result = quantise_model(source, Path(out), to, **how)
print(json.dumps({"peak": result["peak_rss_bytes"], "forecast": result["forecast_peak_bytes"]}))
"""


def test_what_waits_counts_until_its_shard_is_written() -> None:
    pieces = [Piece(50, 10), Piece(50, 10), Piece(0, 10, mapped_bytes=25)]
    assert walk_bytes(pieces, 1000) == 70  # the second: 10 wait, 50 + 10 more
    assert walk_bytes(pieces, 10) == 60
    assert walk_bytes([Piece(0, 30), Piece(0, 0, 40)], 1000) == 70
    assert walk_bytes([Piece(0, 30), Piece(0, 0, 40)], 30) == 40


def test_a_smaller_budget_takes_smaller_shards() -> None:
    pieces = [Piece(0, 100 << 20)] * 30
    free, tight = fitting(pieces, {}), fitting(pieces, {}, 1 << 30)
    assert free.shard_bytes == LARGEST_SHARD > tight.shard_bytes
    assert tight.peak_bytes <= 1 << 30 < free.peak_bytes


def _measured(folder: Path, out: Path, to: str) -> dict[str, int]:
    words = [sys.executable, "-c", WORKER, str(folder), str(out), to]
    done = subprocess.run(words, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Large enough that its weights show beside PyTorch: 16 MB a layer, a head of 33 MB."""
    folder = tiny_folder(
        tmp_path_factory.mktemp("base") / "model", hidden_size=512, intermediate_size=4096, num_hidden_layers=6,
        vocab_size=32000,
    )  # fmt: skip
    byte_tokenizer().save_pretrained(folder)
    return folder


@pytest.mark.parametrize("to", ["nf4-dq", "gptq"])
def test_the_forecast_holds(to: str, model: Path, tmp_path: Path) -> None:
    """Never under; over by at most 64 MiB and 5 %, which is what BLAS and the allocator take of the room left them."""
    found = _measured(model, tmp_path / "out", to)
    assert found["peak"] <= found["forecast"] <= 1.05 * found["peak"] + (64 << 20), found


def test_a_budget_writes_smaller_files_of_the_same_tensors(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Beside PyTorch a tiny model is nothing: PyTorch is counted as nothing, and shards may be tiny."""
    monkeypatch.setattr(quantise_module, "resident_bytes", lambda: (0, 0))
    monkeypatch.setattr(conversion_module, "_SMALLEST_SHARD", 1 << 12)
    folder = tiny_folder(tmp_path / "model", num_hidden_layers=8)
    byte_tokenizer().save_pretrained(folder)
    free = smidgen.quantize(str(folder), tmp_path / "free", to="int8")
    tight = smidgen.quantize(
        str(folder), tmp_path / "tight", to="int8", memory=str(free["forecast_peak_bytes"] - 100_000)
    )
    assert tight["forecast_peak_bytes"] <= free["forecast_peak_bytes"] - 100_000
    files = {name: sorted((tmp_path / name).glob("*.safetensors")) for name in ("free", "tight")}
    assert len(files["free"]) == 1 < len(files["tight"])
    one, other = ({k: t for f in files[name] for k, t in load_file(f).items()} for name in ("free", "tight"))
    assert one.keys() == other.keys() and all(torch.equal(one[key], other[key]) for key in one)


def test_too_little_is_refused_with_what_would_do(tmp_path: Path) -> None:
    folder = tiny_folder(tmp_path / "model")
    byte_tokenizer().save_pretrained(folder)
    with pytest.raises(
        SettingsError, match=r"50.0 MB \(--memory\) is too little to make gptq of model: at least \d+ MB is needed; f"
    ):
        smidgen.quantize(str(folder), tmp_path / "out", to="gptq", memory="50MB")
    assert not (tmp_path / "out").exists()
    with pytest.raises(SettingsError, match="memory: not a size: 'much'"):
        smidgen.quantize(str(folder), tmp_path / "out", to="nf4", memory="much")


def test_what_the_machine_has_free_is_the_budget_of_those_who_give_none(
    adapter: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for module in (quantise_module, merging_module):
        monkeypatch.setattr(module, "budget_on", lambda device, memory: (60_000_000, "what this machine has free"))
    said = r"60.0 MB \(what this machine has free\) is too little to {}: at least \d+ MB is needed"
    with pytest.raises(SettingsError, match=said.format("make nf4 of model")):
        smidgen.quantize(str(adapter.parent / "model"), tmp_path / "out", to="nf4")
    with pytest.raises(SettingsError, match=said.format("merge .*adapter")):
        smidgen.merge(adapter, tmp_path / "out")
    assert not (tmp_path / "out").exists()


MERGE = """
import json, sys
import smidgen
from smidgen.bench.workers.serving import reset_peak_rss

run, out, memory = sys.argv[1:]
smidgen.merge  # with what it imports
reset_peak_rss()
result = smidgen.merge(run, out, memory=memory or None)
peak, forecast, kl = (result[key] for key in ("peak_rss_bytes", "forecast_peak_bytes", "mean_kl"))
print(json.dumps({"peak": peak, "forecast": forecast, "kl": kl}))
"""


@pytest.fixture(scope="module")
def adapter(model: Path) -> Path:
    """Of rank 64 on all layers of `model`, which it names as its base."""
    folder = model.parent / "adapter"
    folder.mkdir()
    base = build(model, "nf4-dq")
    layers = attach_lora(base.model, list(base.linears)[:-1], rank=64, alpha=64, dropout=0, seed=0)
    for layer in layers.values():
        torch.nn.init.normal_(layer.lora_B, std=0.01)
    save_adapter(folder, base, dict(layers), str(model))
    return folder


def _merged(run: Path, out: Path, memory: str = "") -> dict[str, float]:
    done = subprocess.run([sys.executable, "-c", MERGE, str(run), str(out), memory], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def test_the_forecast_of_a_merge_holds(adapter: Path, tmp_path: Path) -> None:
    """As for quantize. Within the smallest budget too, where the base is streamed and the files are small."""
    free = _merged(adapter, tmp_path / "free")
    with pytest.raises(SettingsError, match=r"to merge .*adapter: at least \d+ MB is needed") as refused:
        smidgen.merge(adapter, tmp_path / "refused", memory="100MB")
    assert not (tmp_path / "refused").exists()
    tight = _merged(adapter, tmp_path / "tight", str(int(free["forecast"] - 60e6)))
    for found in (free, tight):
        assert found["peak"] <= found["forecast"] <= 1.05 * found["peak"] + (64 << 20), (free, tight, refused.value)
    assert tight["forecast"] <= free["forecast"] - 60e6 and tight["kl"] == free["kl"]
    files = [load_file(next((tmp_path / name).glob("*.safetensors"))) for name in ("free", "tight")]
    assert all(torch.equal(files[0][key], tensor) for key, tensor in files[1].items())
