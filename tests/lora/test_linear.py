"""Gradients of the adapter against a dense float64 reference, over every stored form of the base."""

import pytest
import torch

from smidgen.lora.linear import LoraLinear
from smidgen.quant.linear import FrozenLinear
from smidgen.quant.matrix import quantise


def _layer(storage: str, dropout: float = 0.0, bias: bool = True) -> tuple[LoraLinear, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    packed = quantise(torch.randn(40, 72, generator=generator), storage)
    layer = LoraLinear(FrozenLinear(packed, torch.randn(40, generator=generator) if bias else None), 4, 8.0, dropout)
    layer.initialise(generator)
    with torch.no_grad():
        layer.lora_B.copy_(torch.randn(40, 4, generator=generator))
    return layer, packed.rows(0, 40, torch.float32).double()


def _reference(
    layer: LoraLinear, dense: torch.Tensor, x: torch.Tensor, mask: torch.Tensor | float = 1.0
) -> tuple[torch.Tensor, list[torch.Tensor]]:
    """Output and the leaves (x, A, B) of the same layer in float64, by ordinary autograd."""
    leaves = [t.detach().double().requires_grad_() for t in (x, layer.lora_A, layer.lora_B)]
    y = leaves[0] @ dense.t() + layer.scaling * (leaves[0] * mask) @ leaves[1].t() @ leaves[2].t()
    return (y if layer.base.bias is None else y + layer.base.bias.double()), leaves


@pytest.mark.parametrize("storage", ["nf4-dq", "nf4", "fp4", "int8", "none"])
@pytest.mark.parametrize("bias", [True, False])
def test_output_and_gradients_equal_a_dense_float64_reference(storage: str, bias: bool) -> None:
    layer, dense = _layer(storage, bias=bias)
    x = torch.randn(2, 5, 72, requires_grad=True)
    weight = torch.randn(2, 5, 40)
    y = layer(x)
    (y * weight).sum().backward()
    expected, leaves = _reference(layer, dense, x)
    (expected * weight.double()).sum().backward()
    for ours, exact in zip(
        (y, x.grad, layer.lora_A.grad, layer.lora_B.grad), (expected, *(t.grad for t in leaves)), strict=True
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


def test_dropout_is_off_in_evaluation() -> None:
    layer, _ = _layer("none", dropout=0.5)
    layer.eval()
    x = torch.randn(3, 72)
    assert torch.equal(layer(x), layer(x))


def test_a_fresh_adapter_changes_nothing() -> None:
    layer, _ = _layer("nf4-dq")
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


def test_delta_is_what_the_adapter_adds() -> None:
    layer, dense = _layer("none", bias=False)
    x = torch.randn(3, 72)
    merged = dense.float() + layer.delta(0, 40)
    torch.testing.assert_close(layer(x), x @ merged.t(), rtol=1e-4, atol=1e-4)
    assert torch.equal(layer.delta(7, 9), layer.delta(0, 40)[7:9])
