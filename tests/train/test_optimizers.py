"""The optimizers by name: which run where, and what they keep."""

import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

import smidgen
from smidgen.errors import SettingsError
from smidgen.lora.linear import LoraLinear
from smidgen.quant.linear import FrozenLinear
from smidgen.quant.matrix import quantise
from smidgen.train.config import Settings
from smidgen.train.optimizers import check_optimizer, make_optimizer
from tiny import tiny_folder, write_rows

CPU = torch.device("cpu")


def _adapters(rank: int = 64) -> dict[str, LoraLinear]:
    layer = LoraLinear(FrozenLinear(quantise(torch.randn(64, 64), "nf4")), rank=rank, alpha=4)
    layer.initialise(torch.Generator().manual_seed(0))
    return {"layer": layer}


def _after(name: str, steps: int, **settings: float) -> torch.Tensor:
    """lora_B after some steps down a bowl with its bottom at 1."""
    adapters = _adapters()
    optimizer = make_optimizer(adapters, Settings(optimizer=name, **settings))
    for _ in range(steps):
        optimizer.zero_grad()
        for parameter in adapters["layer"].parameters():
            parameter.grad = parameter.detach() - 1
        optimizer.step()
    return adapters["layer"].lora_B.detach()


@pytest.mark.parametrize("name", ["adamw", "adamw8bit", "sgd", "adafactor"])
def test_every_optimizer_goes_down(name: str) -> None:
    pytest.importorskip("bitsandbytes")
    check_optimizer(Settings(optimizer=name), CPU)
    first, last = _after(name, 1, learning_rate=0.05), _after(name, 60, learning_rate=0.05)
    assert float(first.min()) > 0  # from zero towards one
    assert float((last - 1).abs().mean()) < float((first - 1).abs().mean()) / 2


def test_eight_bits_are_near_to_thirty_two() -> None:
    pytest.importorskip("bitsandbytes")
    # A state of 8 bits is up to 1/2 of 2 % of its block's largest off; the steps' sizes follow.
    torch.testing.assert_close(
        _after("adamw8bit", 20, learning_rate=0.01), _after("adamw", 20, learning_rate=0.01), rtol=0.05, atol=0.005
    )


def test_sgd_has_momentum_and_every_optimizer_takes_the_weight_decay() -> None:
    # 0.1 of a gradient of -1, then 0.1 of (0.9 of the first velocity and the gradient at 0.1, which is -0.9).
    assert float(_after("sgd", 2, learning_rate=0.1)[0, 0]) == pytest.approx(0.1 + 0.1 * (0.9 + 0.9))
    for name in ("adamw", "adamw8bit", "sgd", "adafactor"):
        plain, decayed = (_after(name, 5, learning_rate=0.1, weight_decay=decay) for decay in (0.0, 0.5))
        assert float(decayed.mean()) < float(plain.mean()) - 1e-3


def test_a_paged_optimizer_without_cuda_is_one_line_before_anything_is_written(tmp_path: Path) -> None:
    model, rows = tiny_folder(tmp_path / "base"), write_rows(tmp_path / "rows.jsonl")
    with pytest.raises(SettingsError, match="optimizer: paged-adamw8bit needs a CUDA device, this is cpu; adamw8bit"):
        smidgen.finetune(str(model), str(rows), tmp_path / "run", optimizer="paged-adamw8bit", device="cpu")
    assert not (tmp_path / "run").exists()


def test_an_optimizer_whose_package_is_missing_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "bitsandbytes", None)
    with pytest.raises(SettingsError, match=r"needs bitsandbytes; pip install 'smidgen\[bnb\]'"):
        check_optimizer(Settings(optimizer="adamw8bit"), CPU)


def test_a_device_that_the_optimizer_does_not_run_on_is_one_line() -> None:
    pytest.importorskip("bitsandbytes")
    with pytest.raises(SettingsError, match=r"bitsandbytes.* adamw8bit .*meta.*take adamw"):
        check_optimizer(Settings(optimizer="adamw8bit"), torch.device("meta"))


def test_the_states_of_a_checkpoint_are_those_of_the_optimizer(tmp_path: Path) -> None:
    pytest.importorskip("bitsandbytes")
    model, rows = tiny_folder(tmp_path / "base"), write_rows(tmp_path / "rows.jsonl")
    for name, key, dtype in (
        ("adamw", "exp_avg_sq", torch.float32),
        ("adamw8bit", "state2", torch.uint8),
        ("sgd", "momentum_buffer", torch.float32),
        ("adafactor", "row_var", torch.float32),
    ):
        how = {"optimizer": name, "rank": 64, "max_steps": 1, "compute_dtype": "float32", "targets": "q"}
        run = smidgen.finetune(str(model), str(rows), tmp_path / name, **how)
        state = load_file(run.path / "checkpoints" / "step-1" / "state.safetensors")
        assert {t.dtype for n, t in state.items() if n.endswith("." + key)} == {dtype}
