"""The native kernels of packed weights against their twins in plain PyTorch: bit for bit where they de-quantise and
quantise, to float32's rounding where they multiply. On every instruction set that this machine has.
"""

import math

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from smidgen.kernels import library
from smidgen.kernels import packed as kernels
from smidgen.kernels.packed import SMALL_ROWS
from smidgen.quant import backend, fourbit
from smidgen.quant import matrix as matrix_module
from smidgen.quant.fourbit import NestedScales
from smidgen.quant.matrix import FourBitMatrix, FrozenMatrix, StackedMatrix, quantise

pytestmark = pytest.mark.skipif(library.native_library() is None, reason="the native kernels are not built")

BLOCKSIZES = (16, 32, 64, 128, 256, 512, 1024, 2048, 4096)
_many = settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])


def _bits(tensor: torch.Tensor) -> torch.Tensor:
    """As integers, with all NaN the same: which NaN comes out is nobody's promise."""
    plain = torch.where(tensor.isnan(), torch.nan, tensor.float())
    return plain.view(torch.int32)


def _scales(count: int, nested: bool, generator: torch.Generator) -> torch.Tensor | NestedScales:
    if not nested:
        return torch.rand(count, generator=generator)
    return NestedScales(
        torch.randint(0, 256, (count,), generator=generator, dtype=torch.uint8),
        torch.rand(math.ceil(count / 256), generator=generator),
        torch.rand((), generator=generator),
    )


@_many
@given(data=st.data())
def test_any_range_of_4_bit_weights_decodes_to_the_twins_bits(isa: str, data: st.DataObject) -> None:
    blocksize = data.draw(st.sampled_from(BLOCKSIZES), label="blocksize")
    total = data.draw(st.integers(1, 3 * blocksize + 700) | st.integers(33_000, 36_000), label="weights")
    first = data.draw(st.integers(0, total), label="first")
    count = data.draw(st.integers(0, total - first), label="count")
    quant_type = data.draw(st.sampled_from(["nf4", "fp4"]), label="type")
    nested = data.draw(st.booleans(), label="nested")
    dtype = data.draw(st.sampled_from([torch.float32, torch.bfloat16, torch.float16]), label="dtype")
    shift = data.draw(st.integers(0, 3), label="unaligned by")
    generator = torch.Generator().manual_seed(data.draw(st.integers(0, 99), label="seed"))
    packed = torch.randint(0, 256, (shift + (total + 1) // 2,), generator=generator, dtype=torch.uint8)[shift:]
    scales = _scales(math.ceil(total / blocksize), nested, generator)
    absmax = scales.scales(0, math.ceil(total / blocksize)) if isinstance(scales, NestedScales) else scales
    expected = fourbit.dequantise_4bit(packed, absmax.repeat_interleave(blocksize // 16), quant_type, 16).clone()
    expected = expected[first : first + count].to(dtype)
    values = backend.dequantise_4bit(packed, scales, quant_type, blocksize, first, count, dtype)
    assert torch.equal(values, expected)
    if dtype in library.TYPES:  # float16 is float32, cast
        out = torch.full((shift + count + 1,), 7.0, dtype=dtype)
        weights = backend.weights_4bit(packed, scales, quant_type, blocksize)
        assert weights is not None
        kernels.dequantise(weights, first, out[shift : shift + count].view(-1, 1))
        assert torch.equal(out[shift : shift + count], expected)
        assert (out[:shift] == 7).all() and out[-1] == 7, "written beside its place"


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_extreme_scales_decode_to_the_twins_bits(isa: str, dtype: torch.dtype) -> None:
    special = [0.0, -0.0, math.inf, -math.inf, math.nan, 1e-45, 1e-38, 3.4e38, 1e-40, 1.0]
    absmax = torch.tensor(special)
    packed = torch.arange(256, dtype=torch.uint8).repeat(len(special) // 8 + 1)[: len(special) * 32]
    expected = fourbit.dequantise_4bit(packed, absmax, "nf4", 64)
    values = backend.dequantise_4bit(packed, absmax, "nf4", 64, 0, packed.numel() * 2, dtype)
    assert torch.equal(_bits(values), _bits(expected.to(dtype)))


@_many
@given(data=st.data())
def test_int8_rows_decode_to_the_twins_bits(isa: str, data: st.DataObject) -> None:
    rows, width = data.draw(st.integers(0, 9), label="rows"), data.draw(st.integers(1, 200), label="width")
    dtype = data.draw(st.sampled_from([torch.float32, torch.bfloat16, torch.float16]), label="dtype")
    shift = data.draw(st.integers(0, 3), label="unaligned by")
    generator = torch.Generator().manual_seed(rows * 1000 + width)
    codes = torch.randint(-128, 128, (shift + rows * width,), generator=generator, dtype=torch.int8)[shift:]
    codes, scale = codes.view(rows, width), torch.randn(rows, generator=generator)
    out = torch.full((shift + rows * width + 1,), 7.0, dtype=dtype)
    backend.dequantise_int8(codes, scale, out[shift:-1].view(rows, width))
    assert torch.equal(out[shift:-1].view(rows, width), (codes.float() * (scale / 127)[:, None]).to(dtype))
    assert (out[:shift] == 7).all() and out[-1] == 7, "written beside its place"


def _weight(data: st.DataObject, rows: int, columns: int, dtype: torch.dtype) -> torch.Tensor:
    """Random numbers with some of what real files may hold: zeros, tiny and huge numbers, ties."""
    generator = torch.Generator().manual_seed(data.draw(st.integers(0, 99), label="seed"))
    weight = torch.randn(rows, columns, generator=generator)
    for value in data.draw(st.lists(st.sampled_from([0.0, 1e-45, -1e-38, 3e38, -65000.0, 0.5, 1.0]), max_size=4)):
        weight[torch.rand(rows, columns, generator=generator) < 0.2] = value
    if data.draw(st.booleans(), label="a row of zeros"):
        weight[0] = 0
    return weight.to(dtype)


@_many
@given(data=st.data())
def test_4_bit_bytes_are_the_twins_bytes(isa: str, data: st.DataObject) -> None:
    rows, columns = data.draw(st.integers(1, 30), label="rows"), data.draw(st.integers(1, 300), label="columns")
    quant_type = data.draw(st.sampled_from(["nf4", "fp4"]), label="type")
    blocksize = data.draw(st.sampled_from(BLOCKSIZES), label="blocksize")
    dtype = data.draw(st.sampled_from([torch.float32, torch.bfloat16, torch.float16, torch.float64]), label="dtype")
    weight = _weight(data, rows, columns, dtype)
    if data.draw(st.booleans(), label="transposed"):
        weight = weight.t()
    packed, absmax = backend.quantise_4bit(weight, quant_type, blocksize)
    their_packed, their_absmax = fourbit.quantise_4bit(weight, quant_type, blocksize)
    assert torch.equal(_bits(absmax), _bits(their_absmax))
    assert torch.equal(packed, their_packed)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("quant_type", ["nf4", "fp4"])
@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_weights_that_are_not_finite_spoil_only_their_block(
    isa: str, bad: float, quant_type: str, dtype: torch.dtype
) -> None:
    weight = torch.randn(5, 64, generator=torch.Generator().manual_seed(0)).to(dtype)
    weight[1, 7] = bad
    flat = weight.flatten()[:-3]  # a tail block too
    flat[-1] = bad
    for part in (weight, flat.view(1, -1)):
        packed, absmax = backend.quantise_4bit(part, quant_type)
        their_packed, their_absmax = fourbit.quantise_4bit(part, quant_type)
        assert torch.equal(packed, their_packed) and torch.equal(_bits(absmax), _bits(their_absmax))
        values = backend.dequantise_4bit(packed, absmax, quant_type, 64, 0, 64, torch.float32)
        assert values.isfinite().all()


def test_every_midpoint_falls_to_the_side_that_the_twin_takes(isa: str) -> None:
    for quant_type in ("nf4", "fp4"):
        midpoints, _ = fourbit.midpoints_and_codes(quant_type)
        around = [torch.nextafter(midpoints, torch.full_like(midpoints, to)) for to in (-2.0, 2.0)]
        weight = torch.cat([midpoints, *around, torch.tensor([1.0, -1.0, 0.0]), torch.zeros(80)]).view(2, 64)
        weight[1, 0] = 1.0
        assert torch.equal(backend.quantise_4bit(weight, quant_type)[0], fourbit.quantise_4bit(weight, quant_type)[0])


@_many
@given(data=st.data())
def test_int8_codes_are_the_twins_codes(isa: str, data: st.DataObject) -> None:
    rows, columns = data.draw(st.integers(1, 12), label="rows"), data.draw(st.integers(1, 150), label="columns")
    dtype = data.draw(st.sampled_from([torch.float32, torch.bfloat16, torch.float16]), label="dtype")
    weight = _weight(data, rows, columns, dtype)
    for bad in data.draw(st.lists(st.sampled_from([math.nan, math.inf, -math.inf]), max_size=2), label="bad"):
        weight[data.draw(st.integers(0, rows - 1)), 0] = bad
    if data.draw(st.booleans(), label="transposed"):
        weight = weight.t()
    codes, scale = backend.quantise_int8(weight)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("SMIDGEN_BACKEND", "torch")
        their_codes, their_scale = backend.quantise_int8(weight)
    assert torch.equal(_bits(scale), _bits(their_scale))
    assert torch.equal(codes, their_codes)


FORMS = ("nf4", "nf4-dq", "fp4", "fp4-dq", "int8", "bfloat16", "float16")


def _matrix(form: str, rows: int, columns: int, seed: int = 0) -> FrozenMatrix:
    weight = torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed))
    dtype = {"bfloat16": torch.bfloat16, "float16": torch.float16}.get(form)
    return quantise(weight, form) if dtype is None else quantise(weight.to(dtype), "none")


def _check_product(matrix: FrozenMatrix, x: torch.Tensor, y: torch.Tensor) -> None:
    """Each rounding is at most eps of the sum of magnitudes; K of them in the worst order, far fewer in practice."""
    dense = matrix.rows(0, matrix.out_features, torch.float32).double()
    exact, magnitude = x.double() @ dense.t(), x.double().abs() @ dense.abs().t()
    bound = magnitude * 2**-24 * min(matrix.in_features + 4, 64)
    if y.dtype == torch.bfloat16:
        bound += exact.abs() * 2**-8
    assert ((y.double() - exact).abs() <= bound + 1e-30).all()


@_many
@given(data=st.data())
def test_small_products_equal_float64(isa: str, data: st.DataObject) -> None:
    form = data.draw(st.sampled_from(FORMS), label="form")
    four_bit = form[1:3] in ("f4", "p4")
    step = 64 if four_bit else 1
    columns = data.draw(st.integers(1, 700 // step), label="columns") * step
    matrix = _matrix(form, data.draw(st.integers(1, 40), label="N"), columns, data.draw(st.integers(0, 9)))
    rows = data.draw(st.integers(1, SMALL_ROWS), label="M")
    generator = torch.Generator().manual_seed(rows)
    dtype = data.draw(st.sampled_from([torch.float32, torch.bfloat16]), label="x")
    gap = data.draw(st.integers(0, 3), label="gap between rows")
    x = torch.randn(rows, columns + gap, generator=generator).to(dtype)[:, :columns]
    y = torch.full((rows, matrix.out_features + 2 + gap), 7.0, dtype=dtype)
    matrix.write_product(x, y[:, 1 : 1 + matrix.out_features])
    _check_product(matrix, x, y[:, 1 : 1 + matrix.out_features])
    assert (y[:, 0] == 7).all() and (y[:, 1 + matrix.out_features :] == 7).all(), "written beside its place"


@pytest.mark.parametrize("blocksize", BLOCKSIZES)
@pytest.mark.parametrize("nested", [False, True])
def test_small_products_know_every_blocksize(isa: str, blocksize: int, nested: bool) -> None:
    weight = torch.randn(19, 2 * max(blocksize, 64), generator=torch.Generator().manual_seed(0))
    packed, absmax = fourbit.quantise_4bit(weight, "nf4", blocksize)
    scales = fourbit.nest_scales(absmax) if nested else absmax
    matrix = FourBitMatrix((19, weight.shape[1]), packed, scales, "nf4", blocksize)
    for rows in (1, 2, 4, 5, 8, 9, 16):
        x = torch.randn(rows, weight.shape[1], generator=torch.Generator().manual_seed(rows))
        _check_product(matrix, x, matrix.matmul(x))


@pytest.mark.parametrize("form", FORMS)
def test_a_bad_number_reaches_only_what_it_is_multiplied_with(isa: str, form: str) -> None:
    matrix = _matrix(form, 11, 128)
    for rows in (1, 3, 8, 12):
        x = torch.randn(rows, 128, generator=torch.Generator().manual_seed(0))
        clean = matrix.matmul(x)
        x[0, 5] = math.nan
        spoilt = matrix.matmul(x)
        assert spoilt[0].isnan().all() and torch.equal(spoilt[1:], clean[1:])


def test_no_rows_make_no_product(isa: str) -> None:
    for form in FORMS:
        matrix = _matrix(form, 11, 128)
        assert matrix.matmul(torch.empty(0, 128)).shape == (0, 11)
        assert matrix.rows(4, 4, torch.float32).shape == (0, 128)


@pytest.mark.parametrize("rows", [0, 1, 7, 16, 17, 40])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_stack_multiplies_like_its_parts(rows: int, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(matrix_module, "PANEL_WEIGHTS", 64 * 25)  # panels end within parts
    parts = [_matrix(form, height, 64, height) for form, height in zip(FORMS, (30, 1, 8, 64, 5, 9, 3), strict=True)]
    parts.append(quantise(torch.randn(4, 64), "none"))
    stack = StackedMatrix(parts)
    dense = torch.cat([part.rows(0, part.out_features, torch.float32).clone() for part in parts])
    x = torch.randn(rows, 64, generator=torch.Generator().manual_seed(rows)).to(dtype)
    assert (stack.out_features, stack.in_features) == (124, 64)
    without = [None] * len(parts)
    y, g = stack.matmul(x, without), torch.randn(rows, 124, generator=torch.Generator().manual_seed(1)).to(dtype)
    # bfloat16: half a unit in the last place of 8 bits for W, for each panel's partial sum, and for the result
    tolerance = {"rtol": 1e-5, "atol": 1e-4} if dtype == torch.float32 else {"rtol": 0.02, "atol": 0.4}
    torch.testing.assert_close(y.float(), x.float() @ dense.t(), **tolerance)
    torch.testing.assert_close(stack.matmul_t(g, without)[0].float(), g.float() @ dense, **tolerance)
