"""Gradients of the adapter against a dense float64 reference, over every stored form of the base."""

from typing import Any

import pytest
import torch

from smidgen.lora import dora, linear
from smidgen.lora.linear import LoraLinear
from smidgen.quant.linear import FrozenLinear
from smidgen.quant.matrix import quantise


def _layer(
    storage: str, dropout: float = 0.0, bias: bool = True, use_dora: bool = False
) -> tuple[LoraLinear, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    packed = quantise(torch.randn(40, 72, generator=generator), storage)
    base = FrozenLinear(packed, torch.randn(40, generator=generator) if bias else None)
    layer = LoraLinear(base, 4, 8.0, dropout, use_dora=use_dora)
    layer.initialise(generator)
    with torch.no_grad():
        layer.lora_B.copy_(torch.randn(40, 4, generator=generator))
        if layer.lora_magnitude_vector is not None:
            layer.lora_magnitude_vector.mul_(torch.rand(40, generator=generator) + 0.5)
    return layer, packed.rows(0, 40, torch.float32).double()


def _reference(
    layer: LoraLinear, dense: torch.Tensor, x: torch.Tensor, mask: torch.Tensor | float = 1.0
) -> tuple[torch.Tensor, list[torch.Tensor]]:
    """Output and the leaves (x, A, B and DoRA's m) of the same layer in float64, by ordinary autograd."""
    leaves = [t.detach().double().requires_grad_() for t in (x, *layer.trainable.values())]
    y = leaves[0] @ dense.t() + layer.scaling * (leaves[0] * mask) @ leaves[1].t() @ leaves[2].t()
    if layer.use_dora:
        y = y * leaves[3] / (dense + layer.scaling * leaves[2] @ leaves[1]).detach().norm(dim=1)
    return (y if layer.base.bias is None else y + layer.base.bias.double()), leaves


@pytest.mark.parametrize("storage", ["nf4-dq", "nf4", "fp4", "int8", "none"])
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("use_dora", [False, True])
def test_output_and_gradients_equal_a_dense_float64_reference(storage: str, bias: bool, use_dora: bool) -> None:
    layer, dense = _layer(storage, bias=bias, use_dora=use_dora)
    x = torch.randn(2, 5, 72, requires_grad=True)
    weight = torch.randn(2, 5, 40)
    y = layer(x)
    (y * weight).sum().backward()
    expected, leaves = _reference(layer, dense, x)
    (expected * weight.double()).sum().backward()
    for ours, exact in zip(
        (y, x.grad, *(p.grad for p in layer.trainable.values())), (expected, *(t.grad for t in leaves)), strict=True
    ):
        # float32 against float64: relative error of the whole tensor, a few thousand sums of magnitude one
        assert float((ours.double() - exact).norm() / exact.norm()) < 1e-5


def test_dropout_drops_the_stated_share_and_its_gradient_uses_the_same_mask() -> None:
    layer, dense = _layer("none", dropout=0.25)
    x = torch.ones(500, 72, requires_grad=True)
    torch.manual_seed(3)
    y = layer(x)
    y.sum().backward()
    torch.manual_seed(3)
    seed = int(torch.randint(0, 2**62, ()).item())
    keep = torch.rand(x.shape, generator=torch.Generator().manual_seed(seed)) >= 0.25
    assert 0.73 < float(keep.float().mean()) < 0.77
    expected, leaves = _reference(layer, dense, x, keep.double() / 0.75)
    expected.sum().backward()
    for ours, exact in zip(
        (y, x.grad, layer.lora_A.grad, layer.lora_B.grad), (expected, *(t.grad for t in leaves)), strict=True
    ):
        assert float((ours.double() - exact).norm() / exact.norm()) < 1e-5


def test_dropout_is_off_in_evaluation_as_it_is_in_the_base() -> None:
    packed = quantise(torch.randn(40, 72), "none")
    layer = LoraLinear(FrozenLinear(packed).eval(), 4, 8.0, 0.5)  # loaded adapters are never told
    with torch.no_grad():
        layer.lora_A.fill_(0.1)
        layer.lora_B.fill_(0.1)
    x = torch.randn(3, 72)
    assert torch.equal(layer(x), layer(x))


@pytest.mark.parametrize("use_dora", [False, True])
def test_a_fresh_adapter_changes_nothing(use_dora: bool) -> None:
    layer, _ = _layer("nf4-dq", use_dora=use_dora)
    layer.initialise(torch.Generator().manual_seed(0))
    x = torch.randn(3, 72)
    assert torch.equal(layer(x), layer.base(x))
    assert float(layer.lora_A.detach().abs().max()) <= 72**-0.5


def test_saved_for_backward_is_x_and_the_low_rank_product_only() -> None:
    layer, _ = _layer("nf4-dq")
    x = torch.randn(10, 72, requires_grad=True)
    saved: list[torch.Tensor] = []

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        saved.append(tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        layer(x)
    assert sorted(tuple(t.shape) for t in saved) == sorted([(10, 72), (10, 4), (4, 72), (40, 4)])


def test_adapter_stays_float32_when_computing_in_bfloat16() -> None:
    layer, dense = _layer("nf4-dq", bias=False)
    x = torch.randn(6, 72, dtype=torch.bfloat16, requires_grad=True)
    y = layer(x)
    y.float().sum().backward()
    assert y.dtype == torch.bfloat16 and layer.lora_A.grad.dtype == torch.float32
    expected, _ = _reference(layer, dense, x)
    assert float((y.double() - expected).norm() / expected.norm()) < 2e-2  # bfloat16 keeps 8 bits


@pytest.mark.parametrize("use_dora", [False, True])
def test_merge_gives_what_base_and_adapter_multiply_with(use_dora: bool) -> None:
    layer, dense = _layer("none", bias=False, use_dora=use_dora)
    x = torch.randn(3, 72)
    merged = layer.merge(0, dense.float())
    torch.testing.assert_close(layer(x), x @ merged.t(), rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(layer.merge(7, dense[7:9].float()), merged[7:9])
    torch.testing.assert_close(layer.delta(7, 9), layer.delta(0, 40)[7:9])  # BLAS may round other heights otherwise


def test_norms_of_rows_are_those_of_the_dense_weight(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dora, "_PANEL_WEIGHTS", 7 * 72)  # six panels, the last one lower
    layer, dense = _layer("nf4-dq", use_dora=True)
    exact = (dense + layer.scaling * layer.lora_B.double() @ layer.lora_A.double()).norm(dim=1)
    torch.testing.assert_close(layer.row_norms().double(), exact, rtol=1e-6, atol=0)  # rounded to float32


def test_norms_follow_an_optimizer_that_changes_the_adapter_unseen() -> None:
    """AdamW's fused form does not count up a parameter's version: what is kept in evaluation must not outlive it."""
    layer, dense = _layer("none", use_dora=True)
    optimizer = torch.optim.AdamW(layer.trainable.values(), lr=0.3, fused=True)
    x = torch.randn(3, 72)
    for _ in range(2):
        layer.train()
        for _ in range(2):
            torch.testing.assert_close(layer(x).double(), _reference(layer, dense, x)[0], rtol=1e-4, atol=1e-4)
            layer(x).square().sum().backward()
            optimizer.step()
        layer.eval()
        torch.testing.assert_close(layer(x).double(), _reference(layer, dense, x)[0], rtol=1e-4, atol=1e-4)


def test_norms_are_computed_once_while_answering(monkeypatch: pytest.MonkeyPatch) -> None:
    layer, _ = _layer("nf4-dq", use_dora=True)
    layer.eval()
    calls: list[Any] = []
    monkeypatch.setattr(linear, "row_norms", lambda *given: calls.append(given) or dora.row_norms(*given))
    x = torch.randn(3, 72)
    with torch.inference_mode():
        first = layer(x)
        assert torch.equal(layer(x), first) and len(calls) == 1
    layer(x).sum().backward()  # what was kept may be used for a gradient
    with torch.no_grad():
        layer.lora_B.mul_(2)
    assert not torch.equal(layer(x), first) and len(calls) == 2


def test_a_row_of_zeros_stays_zero_with_dora() -> None:
    weight = torch.randn(40, 72)
    weight[3] = 0
    layer = LoraLinear(FrozenLinear(quantise(weight, "none")), 4, 8.0, use_dora=True)
    layer.initialise(torch.Generator().manual_seed(0))
    y = layer(torch.randn(5, 72))
    y.sum().backward()
    assert not y[:, 3].any() and y.isfinite().all()
    assert all(parameter.grad.isfinite().all() for parameter in layer.trainable.values())
