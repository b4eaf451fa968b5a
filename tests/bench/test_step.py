"""A whole `bench step` on the tiny shape: with real workers, and with a peer that is not to be had."""

import json
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch

from smidgen.bench import peers
from smidgen.bench.load import bench_load
from smidgen.bench.peers import STEP_PEERS, peer_interpreter
from smidgen.bench.shapes import SHAPES, random_token_ids, write_model
from smidgen.bench.step import StepSettings, bench_step
from smidgen.checkpoint.open import open_checkpoint
from smidgen.errors import RunError
from smidgen.events import Event, Progress, Warned

# What scripts rely on.
KEYS = {
    "step_s", "step_s_min", "step_s_max", "speedup", "peer_step_s", "peer_step_s_min", "peer_step_s_max",
    "peak_rss_bytes", "peer_peak_rss_bytes", "roofline_fraction", "peer_roofline_fraction", "four_bit_tax",
    "sgemm_gflops", "load_s", "load_peak_rss_bytes", "peer_load_s", "peer_load_peak_rss_bytes", "loss", "peers",
    "machine", "versions", "commit", "measured", "repeats", "skipped",
}  # fmt: skip


def test_the_folder_is_random_and_the_same_for_the_same_seed(tmp_path: Path) -> None:
    shape = SHAPES["tiny"]
    checkpoint = open_checkpoint(write_model(shape, tmp_path / "a"))
    assert {name: info.shape for name, info in checkpoint.tensors.items()} == dict(shape.tensors())
    weight = checkpoint.read("model.layers.1.mlp.up_proj.weight")
    assert weight.dtype == torch.bfloat16
    assert float(weight.float().std()) == pytest.approx(0.02, rel=0.05)
    assert float(checkpoint.read("model.norm.weight").float().mean()) == pytest.approx(1, abs=0.02)
    again = open_checkpoint(write_model(shape, tmp_path / "b"))
    assert torch.equal(weight, again.read("model.layers.1.mlp.up_proj.weight"))
    assert len(set(random_token_ids(shape, 200))) > 100


def test_a_whole_folder_is_used_again_and_half_of_one_is_not(tmp_path: Path) -> None:
    folder = write_model(SHAPES["tiny"], tmp_path)
    before = (folder / "model-00001.safetensors").stat().st_mtime_ns
    write_model(SHAPES["tiny"], tmp_path)
    assert (folder / "model-00001.safetensors").stat().st_mtime_ns == before
    (folder / "config.json").unlink()
    write_model(SHAPES["tiny"], tmp_path)
    assert (folder / "model-00001.safetensors").stat().st_mtime_ns > before


def test_ours_and_its_dense_twin(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SMIDGEN_CACHE", str(tmp_path))
    events: list[Event] = []
    result = bench_step(StepSettings("tiny", seq_len=16, repeats=2), events.append)
    assert result.keys() >= KEYS
    assert len(result["repeats"]) == len(result["loss"]) == 2
    assert all(len(step["sgemm_gflops"]) == 2 for step in result["repeats"])
    assert result["loss"][1] < result["loss"][0]  # it trains
    assert result["loss"][0] == pytest.approx(result["dense"]["loss"][0], rel=0.02)  # up to NF4's rounding
    assert result["speedup"] is None
    assert result["peers"] == []
    assert isinstance(result["four_bit_tax"], float)
    assert result["trainable_parameters"] == SHAPES["tiny"].lora_parameters(16)
    assert result["machine"]["threads"] == 1
    assert any(isinstance(event, Progress) and event.done == event.total == 6 for event in events)
    assert list((tmp_path / "bench").iterdir()) == []  # the weights are gone
    json.dumps(result)


@pytest.mark.skipif(
    any(find_spec(package) is None for package in STEP_PEERS["peft-bnb"].needs), reason="PEFT is not installed"
)
def test_the_peers_do_the_same_work(tmp_path: Path) -> None:
    names = ("peft-bnb", "peft-bnb-ckpt")
    settings = StepSettings("tiny", 16, repeats=1, against=names, four_bit_tax=False, isa="avx2", keep=tmp_path)
    result = bench_step(settings)
    assert "AVX512" not in result["cpu_capability"].values()
    assert result["notes"] == []  # bitsandbytes too has been kept to it
    assert [peer["name"] for peer in result["peers"]] == list(names)
    assert result["against"] == "peft-bnb"
    assert result["speedup"] == result["peers"][0]["speedup"]
    assert result["peer_peak_rss_bytes"] == result["peers"][0]["peak_rss_bytes"]
    assert result["four_bit_tax"] is None
    for peer in result["peers"]:
        # The same NF4 bytes and B = 0, but one step of AdamW from another random A before: equal to a few parts in 1e4.
        assert peer["loss"][0] == pytest.approx(result["loss"][0], rel=2e-3)
        assert peer["trainable_parameters"] == result["trainable_parameters"]
    assert (tmp_path / "tiny" / "config.json").is_file()


def test_a_peer_that_cannot_be_had_is_skipped_with_the_reason(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: Any) -> Path:
        raise RunError("peft cannot be installed", cure="with a network try again")

    monkeypatch.setattr("smidgen.bench.step.peer_interpreter", refuse)
    events: list[Event] = []
    settings = StepSettings("tiny", 16, repeats=1, against=("peft-bnb",), four_bit_tax=False, keep=tmp_path)
    result = bench_step(settings, events.append)
    assert result["skipped"] == {"peft-bnb": "peft cannot be installed. With a network try again."}
    assert [event.text for event in events if isinstance(event, Warned)] == [
        "peft-bnb is skipped: peft cannot be installed. With a network try again."
    ]


def test_loading_alone(tmp_path: Path) -> None:
    result = bench_load(StepSettings("tiny", repeats=2, keep=tmp_path))
    assert result["load_s_min"] <= result["load_s"] <= result["load_s_max"]
    assert len(result["repeats"]) == 2
    assert result["against"] is None


def test_an_environment_is_made_once_and_sees_our_packages(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """No index is asked: what pip would install is replaced by a package that is here already."""
    monkeypatch.setenv("SMIDGEN_CACHE", str(tmp_path))
    monkeypatch.setattr(peers, "_importable", lambda package: False)
    monkeypatch.setitem(peers.REQUIREMENTS, "click", "click")
    events: list[Event] = []
    python = peer_interpreter("tester", ("click",), events.append)
    assert python.is_relative_to(tmp_path)
    assert peers._run([str(python), "-c", "import torch, click; print('both')"]) == "both\n"
    assert peer_interpreter("tester", ("click",), events.append) == python
    assert len(events) == 1


def test_an_environment_that_cannot_be_made_names_the_cure(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SMIDGEN_CACHE", str(tmp_path))
    monkeypatch.setitem(peers.REQUIREMENTS, "no_such_package_here", "./no-such-folder-here")
    with pytest.raises(RunError, match="tester cannot be installed into"):
        peer_interpreter("tester", ("no_such_package_here",))
    with pytest.raises(RunError, match=r"pip install \./no-such-folder-here"):
        peer_interpreter("tester", ("no_such_package_here",))
