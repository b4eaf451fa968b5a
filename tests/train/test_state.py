"""What a checkpoint must not hold."""

import json
from pathlib import Path

import pytest
import torch

import smidgen
from smidgen.errors import RunError
from smidgen.lora.linear import LoraLinear
from smidgen.quant.linear import FrozenLinear
from smidgen.quant.matrix import quantise
from smidgen.train import run
from smidgen.train.state import Cursor, is_whole, save_state
from tiny import tiny_folder, write_rows


def _adapters() -> dict[str, LoraLinear]:
    return {"layer": LoraLinear(FrozenLinear(quantise(torch.randn(8, 64), "nf4")), rank=2, alpha=4)}


def test_an_optimizer_state_that_is_not_finite_is_never_saved(tmp_path: Path) -> None:
    adapters = _adapters()
    optimizer = torch.optim.AdamW(adapters["layer"].parameters())
    for parameter in adapters["layer"].parameters():
        parameter.grad = torch.ones_like(parameter)
    optimizer.step()
    save_state(tmp_path, Cursor(), adapters, optimizer)
    optimizer.state[adapters["layer"].lora_B]["exp_avg_sq"][3, 1] = torch.inf
    before = (tmp_path / "state.safetensors").read_bytes()
    with pytest.raises(RunError, match=r"layer.lora_B.exp_avg_sq holds numbers that are not finite"):
        save_state(tmp_path, Cursor(), adapters, optimizer)
    assert (tmp_path / "state.safetensors").read_bytes() == before


def test_a_checkpoint_whose_adapter_computes_something_else_is_not_kept(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As a fault of the writer would have it: from step 2 on, the saved alpha is not the one that was trained with."""

    def forgetful(folder: Path, *arguments: object) -> None:
        save(folder, *arguments)
        if "step-2" in folder.name:
            config = json.loads((folder / "adapter_config.json").read_text())
            (folder / "adapter_config.json").write_text(json.dumps(config | {"lora_alpha": 1}))

    save = run.save_adapter
    monkeypatch.setattr(run, "save_adapter", forgetful)
    model, rows = tiny_folder(tmp_path / "base"), write_rows(tmp_path / "rows.jsonl")
    how = {"save_interval": 1, "max_steps": 3, "rank": 2, "compute_dtype": "float32", "learning_rate": 1e-2}
    with pytest.raises(RunError, match="the saved adapter computes something else"):
        smidgen.finetune(str(model), str(rows), tmp_path / "run", **how)
    assert [folder.name for folder in (tmp_path / "run" / "checkpoints").iterdir()] == ["step-1"]


def test_a_manifest_of_no_files_vouches_for_nothing(tmp_path: Path) -> None:
    (tmp_path / "manifest.json").write_text('{"files": {}}')
    assert not is_whole(tmp_path)
