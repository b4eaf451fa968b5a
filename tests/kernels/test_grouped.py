"""Integers in groups: the kernels and the plain twin against values worked out weight by weight."""

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from smidgen.kernels.lowrank import LowRank
from smidgen.quant.grouped import BITS, GroupedMatrix, pack, unpack

_many = settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])


def _stream(codes: list[int], bits: int) -> list[int]:
    """Bytes of one stream of codes, lowest bits first, as one long number."""
    number = sum(code << (index * bits) for index, code in enumerate(codes))
    return list(number.to_bytes((len(codes) + 7) // 8 * bits, "little"))


@_many
@given(codes=st.lists(st.integers(0, 255), min_size=1, max_size=70), bits=st.sampled_from(BITS))
def test_pack_is_one_stream_and_unpack_its_reverse(codes: list[int], bits: int) -> None:
    codes = [code % (1 << bits) for code in codes]
    packed = pack(torch.tensor([codes, codes], dtype=torch.uint8), bits)
    assert packed.tolist() == [_stream(codes, bits)] * 2
    assert unpack(packed, bits, len(codes)).tolist() == [codes, codes]


@pytest.mark.parametrize("backend", ["native", "torch"])
@_many
@given(data=st.data())
def test_values_and_products(isa: str, backend: str, data: st.DataObject) -> None:
    bits = data.draw(st.sampled_from(BITS), label="bits")
    n = data.draw(st.integers(1, 40), label="N")
    k = data.draw(st.one_of(st.integers(1, 300), st.sampled_from([1100, 1303])), label="K")  # long ones go in slices
    unit = data.draw(st.sampled_from([1, 8]), label="unit of groups")  # whole eights have a kernel of their own
    k = -(-k // unit) * unit
    sizes = data.draw(st.lists(st.integers(0, 90).map(lambda size: size * unit), min_size=1, max_size=6), label="sizes")
    is_shuffled = data.draw(st.booleans(), label="shuffled")
    dtype = data.draw(st.sampled_from([torch.float16, torch.bfloat16, torch.float32]), label="type of scales")
    rows = data.draw(st.sampled_from([1, 5, 12, 40]), label="rows of x")
    generator = torch.Generator().manual_seed(data.draw(st.integers(0, 99), label="seed"))
    ends = torch.tensor(sizes, dtype=torch.int64).cumsum(0).clamp_(max=k).to(torch.int32)
    ends[-1] = k
    groups = len(sizes)
    codes = torch.randint(0, 1 << bits, (n, k), generator=generator, dtype=torch.uint8)
    zeros = torch.randint(0, 1 << bits, (n, groups), generator=generator, dtype=torch.uint8)
    scales = (torch.randn(n, groups, generator=generator) * 0.1).to(dtype)
    order = torch.randperm(k, generator=generator) if is_shuffled else None
    group_of = torch.bucketize(torch.arange(k), ends, right=True)
    stored = scales.float()[:, group_of] * (codes.float() - zeros.float()[:, group_of])
    dense = stored if order is None else torch.empty_like(stored).index_copy_(1, order, stored)
    matrix = GroupedMatrix(k, bits, pack(codes, bits), scales, zeros, ends, order)
    A, B, low = (torch.randn(shape, generator=generator) for shape in ((3, k), (n, 3), (rows, 3)))
    adapter = LowRank(A, B, 2.0, low, torch.empty_like(low))
    x, g = torch.randn(rows, k, generator=generator), torch.randn(rows, n, generator=generator)
    y, dx = torch.empty(rows, n), torch.full((rows, k), 1.0)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("SMIDGEN_BACKEND", backend)
        assert torch.equal(matrix.rows(0, n, torch.float32), dense)
        assert torch.equal(matrix.rows(n // 2, n, torch.bfloat16), dense[n // 2 :].bfloat16())
        matrix.write_product(x, y, adapter)
        grad_B = matrix.write_product_t(g, dx, adapter, accumulate=True)
    assert grad_B is not None
    adapted = dense.double() + 2.0 * B.double() @ A.double()
    scale = float(dense.abs().max()) * 20 + 20
    expected = x.double() @ dense.double().t() + 2.0 * low.double() @ B.double().t()
    torch.testing.assert_close(y.double(), expected, rtol=1e-5, atol=1e-6 * scale)
    torch.testing.assert_close(dx.double(), 1 + g.double() @ adapted, rtol=1e-5, atol=1e-6 * scale)
    torch.testing.assert_close(grad_B.double(), 2.0 * g.double().t() @ low.double(), rtol=1e-4, atol=1e-4)
