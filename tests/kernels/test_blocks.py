"""GGUF blocks: kernels and plain twins against the gguf package's reference, bit for bit; products to rounding.

Blocks are random bytes, so scales are anything a float16 can be, infinite and NaN included.
"""

import gguf.quants
import numpy as np
import pytest
import torch
from gguf.constants import GGMLQuantizationType
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from smidgen.checkpoint.gguf_header import BLOCK_TYPES
from smidgen.kernels.lowrank import LowRank
from smidgen.quant.blocks import BlockMatrix, dequantise_blocks

SIZES = {name: (elements, size) for name, elements, size in BLOCK_TYPES.values()}
_many = settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])


def _reference(raw: torch.Tensor, name: str) -> torch.Tensor:
    array = raw.numpy()
    if name in ("F32", "F16"):
        return torch.from_numpy(array.view({"F32": np.float32, "F16": np.float16}[name]).astype(np.float32))
    with np.errstate(all="ignore"):
        return torch.from_numpy(gguf.quants.dequantize(array, GGMLQuantizationType[name]))


def _bits(values: torch.Tensor) -> torch.Tensor:
    """As integers, with all NaN the same."""
    return torch.where(values.isnan(), torch.nan, values.float()).view(torch.int32)


def _sane_blocks(name: str, rows: int, blocks: int, seed: int) -> torch.Tensor:
    """Random blocks whose values are finite and of moderate size: the float16 scales are made small."""
    elements, size = SIZES[name]
    generator = torch.Generator().manual_seed(seed)
    if name in ("F32", "F16", "BF16"):
        kind = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}[name]
        return torch.randn(rows, blocks, generator=generator).to(kind).view(torch.uint8)
    raw = torch.randint(0, 256, (rows, blocks, size), generator=generator, dtype=torch.uint8)
    places = {"Q4_1": (0, 2), "Q5_1": (0, 2), "Q2_K": (80, 82), "Q3_K": (108,), "Q4_K": (0, 2), "Q5_K": (0, 2)}
    for at in places.get(name, (208,) if name == "Q6_K" else (0,)):
        scale = torch.rand(rows, blocks, 1, generator=generator).mul_(0.01).half()
        raw[:, :, at : at + 2] = scale.view(torch.uint8)
    assert elements * size > 0
    return raw.view(rows, -1)


@pytest.mark.parametrize("name", [name for name, (elements, _) in SIZES.items() if elements > 1])
def test_scales_that_are_not_finite_are_found_without_decoding(name: str) -> None:
    rows = torch.randint(0, 256, (1000, SIZES[name][1]), dtype=torch.uint8)
    found = [BlockMatrix(row[None], name).has_finite_scales() for row in rows]
    assert found == dequantise_blocks(rows, name).isfinite().all(dim=1).tolist()
    assert 500 < sum(found) < 1000
    assert not BlockMatrix(rows, name).has_finite_scales()


@pytest.mark.parametrize("name", SIZES)
@_many
@given(data=st.data())
def test_any_rows_decode_to_the_references_bits(isa: str, name: str, data: st.DataObject) -> None:
    elements, size = SIZES[name]
    rows = data.draw(st.integers(1, 40), label="rows")
    blocks = data.draw(st.integers(1, 5) if elements > 1 else st.integers(1, 70), label="blocks of a row")
    shift = data.draw(st.integers(0, 3), label="unaligned by")
    if name in ("F32", "F16", "BF16"):
        shift = 0  # torch itself wants numbers aligned; the reader copies what is not
    generator = torch.Generator().manual_seed(data.draw(st.integers(0, 99), label="seed"))
    flat = torch.randint(0, 256, (shift + rows * blocks * size,), generator=generator, dtype=torch.uint8)
    raw = flat[shift:].view(rows, -1)
    expected = _reference(raw, name)
    assert torch.equal(_bits(dequantise_blocks(raw, name)), _bits(expected))
    matrix = BlockMatrix(raw, name)
    start = data.draw(st.integers(0, rows - 1), label="start")
    stop = data.draw(st.integers(start, rows), label="stop")
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        assert torch.equal(_bits(matrix.rows(start, stop, dtype)), _bits(expected[start:stop].to(dtype)))
    some = torch.randint(0, rows, (7,), generator=generator)
    assert torch.equal(_bits(matrix.take(some, torch.float32)), _bits(expected[some]))


@pytest.mark.parametrize("backend", ["native", "torch"])
@pytest.mark.parametrize("name", ["F16", "Q4_0", "Q6_K"])
def test_rows_in_pairs_are_found_at_their_place(
    isa: str, name: str, backend: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SMIDGEN_BACKEND", backend)
    heads, half = 3, 4
    raw = _sane_blocks(name, heads * 2 * half, 1 if name != "F16" else 32, 0)
    stored = _reference(raw, name)
    expected = stored.view(heads, half, 2, -1).transpose(1, 2).reshape(stored.shape)
    matrix = BlockMatrix(raw, name, half)
    assert torch.equal(matrix.rows(0, len(raw), torch.float32), expected)
    assert torch.equal(matrix.rows(5, 19, torch.float32), expected[5:19])
    rows = torch.tensor([23, 0, 9, 9])
    assert torch.equal(matrix.take(rows, torch.float32), expected[rows])
    x = torch.randn(2, expected.shape[1])
    torch.testing.assert_close(matrix.matmul(x), x @ expected.t(), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("backend", ["native", "torch"])
@pytest.mark.parametrize("rows", [1, 3, 9, 16, 17, 90])
@pytest.mark.parametrize("name", SIZES)
def test_products(isa: str, name: str, rows: int, backend: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Both directions with an adapter, against float64 over the reference's values."""
    monkeypatch.setenv("SMIDGEN_BACKEND", backend)
    elements = SIZES[name][0]
    blocks = 3 if elements > 1 else 77
    if rows == 90:  # long rows go in slices
        blocks = 1300 // elements
    raw = _sane_blocks(name, 30, blocks, rows)
    dense = _reference(raw, name).double()
    matrix = BlockMatrix(raw, name)
    generator = torch.Generator().manual_seed(1)
    x, g, low, A, B = (
        torch.randn(shape, generator=generator)
        for shape in ((rows, dense.shape[1]), (rows, 30), (rows, 4), (4, dense.shape[1]), (30, 4))
    )
    adapter = LowRank(A, B, 0.5, low, torch.empty_like(low))
    y, dx = torch.empty(rows, 30), torch.empty_like(x)
    matrix.write_product(x, y, adapter)
    grad_B = matrix.write_product_t(g, dx, adapter)
    assert grad_B is not None
    # float32 sums of up to 1,300 terms: a few roundings of the sum of magnitudes
    exact = x.double() @ dense.t()
    scale = float((x.double().abs() @ dense.abs().t()).max())
    torch.testing.assert_close(y.double(), exact + 0.5 * low.double() @ B.double().t(), rtol=1e-5, atol=2e-6 * scale)
    adapted = dense + 0.5 * B.double() @ A.double()
    scale = float((g.double().abs() @ adapted.abs()).max())
    torch.testing.assert_close(dx.double(), g.double() @ adapted, rtol=1e-5, atol=2e-6 * scale)
    torch.testing.assert_close(grad_B.double(), 0.5 * g.double().t() @ low.double(), rtol=1e-4, atol=1e-4)
