"""Frozen matrices multiply like the dense matrix they stand for, forwards and backwards, on every back end."""

import pytest
import torch

from smidgen.kernels.library import native_library
from smidgen.quant import matrix as matrix_module
from smidgen.quant.linear import FrozenLinear, frozen_matmul
from smidgen.quant.matrix import DenseMatrix, Int8Matrix, quantise

STORAGES = ("nf4-dq", "nf4", "fp4-dq", "fp4", "int8", "none")
SHAPES = [(96, 64), (1, 64), (33, 72), (7, 1), (130, 200)]


@pytest.fixture(params=["native", "torch", "bitsandbytes"])
def backend(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    if request.param == "bitsandbytes":
        pytest.importorskip("bitsandbytes")
    if request.param == "native" and native_library() is None:
        pytest.skip("the native kernels are not built")
    monkeypatch.setenv("SMIDGEN_BACKEND", request.param)
    return request.param


@pytest.fixture(autouse=True)
def small_panels(monkeypatch: pytest.MonkeyPatch) -> None:
    """So small that every product walks over several panels."""
    monkeypatch.setattr(matrix_module, "PANEL_WEIGHTS", 700)


def _case(shape: tuple[int, int], storage: str) -> tuple[matrix_module.FrozenMatrix, torch.Tensor]:
    weight = torch.randn(shape, generator=torch.Generator().manual_seed(1))
    packed = quantise(weight, storage)
    return packed, packed.rows(0, shape[0], torch.float32).clone()


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("storage", STORAGES)
@pytest.mark.parametrize("rows", [5, 30])  # few: fused in registers where there is a kernel; many: by panels
def test_products_equal_the_dense_matrix(rows: int, storage: str, shape: tuple[int, int], backend: str) -> None:
    packed, dense = _case(shape, storage)
    x, g = torch.randn(2, rows, shape[1]), torch.randn(2, rows, shape[0])
    # the same float32 sums in another order: a few ulps of the sum of magnitudes
    torch.testing.assert_close(packed.matmul(x), x @ dense.t(), rtol=1e-5, atol=1e-4)
    torch.testing.assert_close(packed.matmul_t(g), g @ dense, rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize("storage", [*STORAGES, "none-bfloat16"])
@pytest.mark.parametrize("threads", [1, 3])
def test_products_of_many_rows_write_only_their_place(storage: str, threads: int, backend: str) -> None:
    """More rows than a thread takes at once, read from and written into columns of larger matrices."""
    weight = torch.randn(200, 72, generator=torch.Generator().manual_seed(1))
    packed = DenseMatrix(weight.bfloat16()) if storage == "none-bfloat16" else quantise(weight, storage)
    dense = packed.rows(0, 200, torch.float32).clone()
    x, g = torch.randn(600, 80)[:, 4:76], torch.randn(600, 210)[:, 6:206]
    wide, dx = torch.full((600, 230), 7.0), torch.ones(600, 72)
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        packed.write_product(x, wide[:, 20:220])
        packed.write_product_t(g, dx, accumulate=True)
    finally:
        torch.set_num_threads(before)
    torch.testing.assert_close(wide[:, 20:220], x @ dense.t(), rtol=1e-5, atol=1e-4)
    assert (wide[:, :20] == 7).all() and (wide[:, 220:] == 7).all()
    torch.testing.assert_close(dx, 1 + g @ dense, rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize("storage", STORAGES)
@pytest.mark.parametrize("shape", SHAPES)
def test_any_rows_are_rows_of_the_whole(storage: str, shape: tuple[int, int], backend: str) -> None:
    packed, dense = _case(shape, storage)
    for start, stop in {(0, 1), (shape[0] // 2, shape[0]), (shape[0] - 1, shape[0])}:
        assert torch.equal(packed.rows(start, stop, torch.float32), dense[start:stop])


def test_the_back_ends_give_the_same_bits(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("bitsandbytes")
    packed, dense = _case((33, 72), "nf4-dq")
    monkeypatch.setenv("SMIDGEN_BACKEND", "bitsandbytes")
    for dtype in (torch.float32, torch.bfloat16):
        assert torch.equal(packed.rows(0, 33, dtype), dense.to(dtype))


def test_quantised_is_close_to_the_weight() -> None:
    weight = torch.randn(64, 256)
    errors = {
        s: float((quantise(weight, s).rows(0, 64, torch.float32) - weight).norm() / weight.norm()) for s in STORAGES
    }
    assert errors["none"] == 0
    assert errors["int8"] < 0.02 < errors["nf4"] < 0.11  # NF4 of a normal distribution: about 0.09
    assert abs(errors["nf4-dq"] - errors["nf4"]) < 1e-3  # 8 bits for the scales cost almost nothing
    assert errors["nf4-dq"] < errors["fp4"]


def test_bytes_per_weight_are_those_of_the_paper() -> None:
    weight = torch.randn(1024, 1024)
    bits = {storage: quantise(weight, storage).nbytes * 8 / weight.numel() for storage in STORAGES}
    assert bits["nf4"] == 4.5
    assert bits["nf4-dq"] == pytest.approx(4.127, abs=1e-3)
    assert bits["int8"] == pytest.approx(8.03, abs=0.01)


def test_int8_equals_bitsandbytes() -> None:
    bnb = pytest.importorskip("bitsandbytes.functional")
    weight = torch.randn(40, 96)
    ours = quantise(weight, "int8")
    assert isinstance(ours, Int8Matrix)
    codes, scale, _ = bnb.int8_vectorwise_quant(weight)
    assert torch.equal(ours.codes, codes) and torch.equal(ours.scale, scale)


def test_a_row_of_zeros_survives() -> None:
    weight = torch.zeros(3, 64)
    weight[1] = 1.0
    for storage in STORAGES:
        rows = quantise(weight, storage).rows(0, 3, torch.float32)
        assert rows.isfinite().all() and (rows[0].abs() < 1e-3).all(), storage


def test_none_keeps_the_stored_tensor_itself() -> None:
    weight = torch.randn(8, 8, dtype=torch.bfloat16)
    kept = quantise(weight, "none")
    assert isinstance(kept, DenseMatrix) and kept.weight.data_ptr() == weight.data_ptr()


@pytest.mark.parametrize("storage", STORAGES)
def test_gradient_reaches_x_and_nothing_dense_is_saved(storage: str) -> None:
    packed, dense = _case((33, 72), storage)
    saved: list[torch.Tensor] = []

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        saved.append(tensor)
        return tensor

    x = torch.randn(4, 72, requires_grad=True)
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        y = frozen_matmul(x, packed)
    assert not saved
    g = torch.randn_like(y)
    y.backward(g)
    torch.testing.assert_close(x.grad, g @ dense, rtol=1e-5, atol=1e-4)
    assert not any(parameter.requires_grad for parameter in FrozenLinear(packed).parameters())
