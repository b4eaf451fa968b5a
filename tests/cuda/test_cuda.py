"""The CUDA path against the CPU: the same packed bytes, made there or here, values, products, losses, gradients, runs.

Left out where there is no such card; `pytest tests/cuda` on a machine with one proves or refutes the path.
"""

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

import smidgen
import smidgen.model.segments
from gguf_models import write_gguf
from packers import pack_folder
from smidgen.data.batch import Batch, make_batch
from smidgen.data.render import Example
from smidgen.kernels.lowrank import LowRank
from smidgen.lora.attach import attach_lora
from smidgen.lora.targets import select_targets
from smidgen.quant.blocks import BlockMatrix
from smidgen.quant.grouped import BITS, GroupedMatrix, pack
from smidgen.quant.matrix import FrozenMatrix, quantise
from smidgen.train.loss import batch_loss
from smidgen.train.sharing import refuse_packing
from tiny import CONFIGS, build, tiny_folder, write_rows

pytestmark = [
    pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no CUDA device"),
    pytest.mark.filterwarnings("ignore:Attempting to run cuBLAS"),  # once, in the thread of the backward pass
]

CUDA = torch.device("cuda")
N, K = 96, 512
QUICK: dict[str, Any] = {"rank": 4, "alpha": 8, "micro_batch": 4, "learning_rate": 5e-3, "device": "cuda"}


def _matrices() -> dict[str, FrozenMatrix]:
    """One matrix [N, K] of every stored form."""
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(N, K, generator=generator) * 0.05
    found = {form: quantise(weight, form) for form in ("nf4-dq", "nf4", "fp4-dq", "fp4", "int8", "none")}
    found["bfloat16"] = quantise(weight.bfloat16(), "none")
    for bits in BITS:
        codes = torch.randint(0, 1 << bits, (N, K), generator=generator, dtype=torch.uint8)
        zeros = torch.randint(0, 1 << bits, (N, K // 128), generator=generator, dtype=torch.uint8)
        scales = (torch.rand(N, K // 128, generator=generator) * 0.01).half()
        ends = torch.arange(128, K + 1, 128, dtype=torch.int32)
        for order in (None, torch.randperm(K, generator=generator)):
            name = f"gptq-{bits}" + ("" if order is None else "-act-order")
            found[name] = GroupedMatrix(K, bits, pack(codes, bits), scales, zeros, ends, order)
    places = {"Q4_0": (18, 0), "Q4_1": (20, 0), "Q5_0": (22, 0), "Q5_1": (24, 0), "Q8_0": (34, 0)}
    places |= {"Q2_K": (84, 80), "Q3_K": (110, 108), "Q4_K": (144, 0), "Q5_K": (176, 0), "Q6_K": (210, 208)}
    for name, (size, at) in places.items():
        blocks = K // (256 if name.endswith("K") else 32)
        raw = torch.randint(0, 256, (N, blocks, size), generator=generator, dtype=torch.uint8)
        scale = torch.rand(N, blocks, 1, generator=generator).mul_(0.01).half().view(torch.uint8)
        raw[:, :, at : at + 2] = scale
        if name in ("Q4_1", "Q5_1", "Q4_K", "Q5_K", "Q2_K"):  # they have a second one
            raw[:, :, at + 2 : at + 4] = scale
        found[name] = BlockMatrix(raw.view(N, -1), name, pair_width=16)
    return found


@pytest.mark.parametrize("form", _matrices())
def test_values_and_products(form: str) -> None:
    ours = _matrices()[form]
    dense = ours.rows(0, N, torch.float32).clone()
    matrix = ours.to(CUDA)
    values = matrix.rows(0, N, torch.float32)
    assert values.device.type == "cuda"
    torch.testing.assert_close(values.cpu(), dense, rtol=3e-7, atol=1e-9)  # a product more or less, rounded once
    part = matrix.rows(5, 70, torch.float32)
    torch.testing.assert_close(part.cpu(), dense[5:70], rtol=3e-7, atol=1e-9)
    for rows in (1, 40):
        x, g = torch.randn(rows, K), torch.randn(rows, N)
        exact, exact_t = x.double() @ dense.double().t(), g.double() @ dense.double()
        for dtype, tolerance in ((torch.float32, 2e-5), (torch.bfloat16, 1e-2)):  # of the norm: a few roundings
            y = matrix.matmul(x.to(CUDA, dtype)).cpu().double()
            assert (y - exact).norm() <= tolerance * exact.norm()
            dx = matrix.matmul_t(g.to(CUDA, dtype)).cpu().double()
            assert (dx - exact_t).norm() <= tolerance * exact_t.norm()
        A, B = torch.randn(3, K, device=CUDA), torch.randn(N, 3, device=CUDA)
        low = x.to(CUDA) @ A.t()
        y = torch.empty(rows, N, device=CUDA)
        matrix.write_product(x.to(CUDA), y, LowRank(A, B, 2.0, low, torch.empty_like(low)))
        exact = exact + 2.0 * (low @ B.t()).cpu().double()
        assert (y.cpu().double() - exact).norm() <= 2e-5 * exact.norm()


@pytest.mark.parametrize("form", ["nf4-dq", "fp4", "int8"])
def test_quantised_there_or_here_the_bytes_are_the_same(form: str) -> None:
    weight = (torch.randn(300, 4099, generator=torch.Generator().manual_seed(0)) * 0.05).bfloat16()
    here, there = quantise(weight, form), quantise(weight.to(CUDA), form)
    for name, stored in here.named_buffers():
        other = there.get_buffer(name).cpu()
        if stored.is_floating_point():  # sums of the scales' mean in another order
            torch.testing.assert_close(other, stored, rtol=1e-6, atol=0)
        else:
            # so a nested scale may fall beside the midpoint of two codes; the weights' own codes never differ
            assert (other != stored).sum() <= (stored.numel() // 1000 if name == "absmax" else 0)


def _loss_and_gradients(folder: Path, storage: str, device: torch.device) -> tuple[float, dict[str, torch.Tensor]]:
    base = build(folder, storage, device=device)
    names, _ = select_targets("all", base.linears, base.head_name)
    adapters = attach_lora(base.model, names, rank=4, alpha=8, dropout=0.0, seed=0)
    for layer in adapters.values():
        generator = torch.Generator().manual_seed(1)
        layer.lora_B.data.copy_(torch.randn(layer.lora_B.shape, generator=generator) * 0.05)
    ids = torch.randint(0, 256, (3, 24), generator=torch.Generator().manual_seed(2))
    lengths = torch.tensor([24, 17, 9])
    labels = torch.where(torch.arange(24) < lengths[:, None], ids, -100)
    base.model.train()
    loss = batch_loss(base, Batch(ids, labels, lengths))
    loss.backward()
    gradients = {
        f"{name}.{key}": parameter.grad.cpu().double()
        for name, layer in adapters.items()
        for key, parameter in layer.named_parameters()
        if parameter.grad is not None
    }
    return float(loss.detach()), gradients


@pytest.mark.parametrize("architecture", CONFIGS)
def test_loss_and_gradients_of_each_architecture(architecture: str, tmp_path: Path) -> None:
    folder = tiny_folder(tmp_path / "model", architecture)
    loss, gradients = _loss_and_gradients(folder, "nf4-dq", torch.device("cpu"))
    there, gradients_there = _loss_and_gradients(folder, "nf4-dq", CUDA)
    assert there == pytest.approx(loss, rel=1e-5)
    assert gradients.keys() == gradients_there.keys() and gradients
    for name, gradient in gradients.items():  # float32 sums in another order, through two layers
        assert (gradients_there[name] - gradient).norm() <= 1e-3 * gradient.norm() + 1e-7, name


@pytest.mark.parametrize("block_tokens", [0, 2048])  # each segment on its own, and one masked square
@pytest.mark.parametrize("architecture", [name for name in CONFIGS if name != "falcon"])  # which cannot pack
def test_packed_rows_have_the_gradients_of_rows_one_by_one(
    architecture: str, block_tokens: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(smidgen.model.segments, "_BLOCK_TOKENS", block_tokens)
    base = build(tiny_folder(tmp_path / "model", architecture), device=CUDA)
    names, _ = select_targets("all", base.linears, base.head_name)
    layers = attach_lora(base.model, names, rank=4, alpha=8, dropout=0.0, seed=0).values()
    parameters = [parameter for layer in layers for parameter in (layer.lora_A, layer.lora_B)]
    generator = torch.Generator().manual_seed(1)
    for layer in layers:
        layer.lora_B.data.copy_(torch.randn(layer.lora_B.shape, generator=generator) * 0.05)
    ids = torch.randint(0, 256, (70,), generator=generator).tolist()
    rows = [ids[:20] + ids[30:40], ids[50:63], ids[:20] + ids[40:70], ids[:20] + ids[63:67]]
    examples = [Example(row, [-100, *row[1:]], False, "") for row in rows]

    def gradient(batches: list[Batch]) -> torch.Tensor:
        base.model.train()
        loss = torch.stack([batch_loss(base, batch) for batch in batches]).sum()
        return torch.cat([part.flatten().double() for part in torch.autograd.grad(loss, parameters)])

    expected = gradient([make_batch([example]) for example in examples])
    assert refuse_packing(base, 50) == ""
    base.packs = True
    for share in (True, False):
        found = gradient([make_batch(examples, share_prefix=share)])
        assert (found - expected).norm() <= 1e-4 * expected.norm()  # float32 sums in another order, other kernels


@pytest.mark.parametrize("form", ["gptq", "awq", "gguf", "int8", "nf4", "none"])
def test_each_stored_form_trains(form: str, tmp_path: Path) -> None:
    if form in ("gptq", "awq"):
        model = tmp_path / "model"
        pack_folder(tiny_folder(tmp_path / "plain"), model, method=form)
    elif form == "gguf":
        model = tmp_path / "model.gguf"
        write_gguf(tiny_folder(tmp_path / "plain"), model, {})
    else:
        model = tiny_folder(tmp_path / "model")
    quantize = form if form in ("int8", "nf4", "none") else "keep"
    rows = write_rows(tmp_path / "rows.jsonl")
    run = smidgen.finetune(str(model), str(rows), tmp_path / "run", quantize=quantize, compare=0, **QUICK)
    assert run.summary["loss_after"] < run.summary["loss_before"] - 0.2
    answers = [
        smidgen.load(run.path, device=device, compute_dtype="float32").generate("say red 1", max_new_tokens=8).text
        for device in ("cuda", "cpu")
    ]
    assert answers[0] == answers[1]
    merged = smidgen.merge(run.path, tmp_path / "merged")
    assert merged


@pytest.mark.parametrize("dropout", [0.0, 0.1])
@pytest.mark.parametrize("recompute", ["none", "full"])
def test_a_resumed_run_is_the_uninterrupted_one(recompute: str, dropout: float, tmp_path: Path) -> None:
    model, rows = tiny_folder(tmp_path / "model"), write_rows(tmp_path / "rows.jsonl")
    settings = {**QUICK, "compare": 0, "recompute": recompute, "dropout": dropout, "save_interval": 3}
    smidgen.finetune(str(model), str(rows), tmp_path / "whole", **settings)
    smidgen.finetune(str(model), str(rows), tmp_path / "parts", **settings)
    newest = max((tmp_path / "parts" / "checkpoints").iterdir(), key=lambda path: int(path.name.split("-")[1]))
    shutil.rmtree(newest)
    (tmp_path / "parts" / "summary.json").unlink()
    smidgen.resume(tmp_path / "parts")
    one, other = (tmp_path / name / "adapter_model.safetensors" for name in ("whole", "parts"))
    assert one.read_bytes() == other.read_bytes()


def test_the_doctor_finds_every_back_end_well() -> None:
    found = smidgen.doctor()
    assert found["device"].startswith("cuda")
    assert all(verdict == "ok" for verdict in found["backends"].values())
    there = found["training_on_device"]
    assert there["float32"]["verdict"] == there["bfloat16"]["verdict"] == "ok"
    assert there["bfloat16"]["measured_peak_bytes"] > 0 and there["bfloat16"]["forecast_peak_bytes"] > 0
    assert not found["failed"]
