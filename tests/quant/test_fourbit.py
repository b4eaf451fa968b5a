"""Packed bytes and de-quantised values are bitsandbytes' own, bit for bit."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from smidgen.quant import fourbit
from smidgen.quant.codebooks import dynamic_map, four_bit_code

bnb = pytest.importorskip("bitsandbytes.functional")


def _weight(rows: int, columns: int, seed: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    spread = torch.rand(rows, 1, generator=generator) * 3
    return (torch.randn(rows, columns, generator=generator) * spread).to(dtype)


def test_tables_are_bitsandbytes_tables() -> None:
    assert torch.equal(dynamic_map(), bnb.create_dynamic_map(signed=True))
    for name in ("nf4", "fp4"):
        assert torch.equal(four_bit_code(name), bnb.get_4bit_type(name, device="cpu"))


@settings(max_examples=60, deadline=None)
@given(
    rows=st.integers(1, 40),
    columns=st.integers(1, 200),
    seed=st.integers(0, 1000),
    quant_type=st.sampled_from(["nf4", "fp4"]),
    blocksize=st.sampled_from([64, 128, 256]),
    dtype=st.sampled_from([torch.float32, torch.bfloat16, torch.float16]),
)
def test_bytes_and_values_equal_bitsandbytes(
    rows: int, columns: int, seed: int, quant_type: str, blocksize: int, dtype: torch.dtype
) -> None:
    weight = _weight(rows, columns, seed, dtype)
    packed, absmax = fourbit.quantise_4bit(weight, quant_type, blocksize)
    theirs, state = bnb.quantize_4bit(weight, blocksize=blocksize, quant_type=quant_type)
    assert torch.equal(packed, theirs.flatten())
    assert torch.equal(absmax, state.absmax)
    values = fourbit.dequantise_4bit(packed, absmax, quant_type, blocksize)[: weight.numel()].view(weight.shape)
    if columns % blocksize and columns % 16 == 0:
        # bitsandbytes 0.50 on AVX-512 takes wrong scales where blocks cross rows of such lengths: its layout holds
        codes = torch.stack([theirs >> 4, theirs & 15], dim=-1).flatten()[: weight.numel()].long()
        scales = state.absmax.repeat_interleave(blocksize)[: weight.numel()]
        expected = (four_bit_code(quant_type)[codes] * scales).view(weight.shape).to(dtype)
    else:
        expected = bnb.dequantize_4bit(theirs, state).reshape(weight.shape)  # one byte counts as transposed there
    assert torch.equal(values.to(dtype), expected)


@settings(max_examples=40, deadline=None)
@given(rows=st.integers(1, 300), columns=st.sampled_from([64, 65, 128, 640]), seed=st.integers(0, 1000))
def test_double_quantisation_equals_bitsandbytes(rows: int, columns: int, seed: int) -> None:
    weight = _weight(rows, columns, seed)
    packed, absmax = fourbit.quantise_4bit(weight, "nf4")
    nested = fourbit.nest_scales(absmax)
    theirs, state = bnb.quantize_4bit(weight, blocksize=64, quant_type="nf4", compress_statistics=True)
    assert torch.equal(nested.codes, state.absmax.flatten())
    assert torch.equal(nested.absmax, state.state2.absmax)
    assert torch.equal(nested.offset, state.offset)
    scales = nested.scales(0, absmax.numel())
    values = fourbit.dequantise_4bit(packed, scales, "nf4", 64)[: weight.numel()].view(weight.shape)
    assert torch.equal(values, bnb.dequantize_4bit(theirs, state))


@pytest.mark.parametrize("fill", [0.0, 1e-30, -3.0])
def test_constant_weights_equal_bitsandbytes(fill: float) -> None:
    weight = torch.full((64, 64), fill)
    packed, absmax = fourbit.quantise_4bit(weight, "nf4")
    theirs, state = bnb.quantize_4bit(weight, blocksize=64, quant_type="nf4", compress_statistics=True)
    nested = fourbit.nest_scales(absmax)
    assert torch.equal(packed, theirs.flatten())
    assert torch.equal(nested.codes, state.absmax.flatten())


def test_weights_longer_than_a_chunk_are_packed_the_same() -> None:
    weight = _weight(3, (1 << 18) // 2 + 32, 0)  # the chunk's border falls inside a row
    packed, absmax = fourbit.quantise_4bit(weight, "nf4")
    theirs, state = bnb.quantize_4bit(weight, blocksize=64, quant_type="nf4")
    assert torch.equal(packed, theirs.flatten()) and torch.equal(absmax, state.absmax)


def test_any_range_of_nested_scales_equals_the_whole() -> None:
    nested = fourbit.nest_scales(torch.rand(1000, generator=torch.Generator().manual_seed(0)))
    whole = nested.scales(0, 1000)
    for start, stop in ((0, 1), (255, 257), (300, 900), (999, 1000)):
        assert torch.equal(nested.scales(start, stop), whole[start:stop])
