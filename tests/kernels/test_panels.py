"""Products with packed weights for many rows, on hostile shapes, and the C interface as Python calls it."""

import re
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from smidgen.kernels import attention as attention_module
from smidgen.kernels import library as library_module
from smidgen.kernels.library import native_library
from smidgen.kernels.lowrank import LowRank
from smidgen.kernels.packed import SMALL_ROWS
from smidgen.quant.fourbit import nest_scales, quantise_4bit
from smidgen.quant.matrix import DenseMatrix, FourBitMatrix, FrozenMatrix, quantise

API = Path(__file__).parents[2] / "csrc" / "api.cpp"


def _matrix(form: str, shape: tuple[int, int], blocksize: int) -> FrozenMatrix:
    weight = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    if form in ("int8", "none"):
        return quantise(weight.bfloat16() if form == "none" else weight, form)
    if form == "float16":
        return DenseMatrix(weight.half())
    packed, absmax = quantise_4bit(weight, "nf4", blocksize)
    return FourBitMatrix(shape, packed, nest_scales(absmax) if form == "nf4-dq" else absmax, "nf4", blocksize)


@given(
    form=st.sampled_from(["nf4", "nf4-dq", "int8", "none", "float16"]),
    blocksize=st.sampled_from([32, 64, 256, 4096]),
    rows=st.integers(17, 300),
    n=st.integers(1, 220),
    k=st.one_of(st.integers(1, 150), st.sampled_from([1023, 1024, 1100, 2300, 2560])),  # slices; two threads' columns
    apart=st.integers(0, 5),
    accumulate=st.booleans(),
    rank=st.sampled_from([0, 1, 3, 16]),
    threads=st.sampled_from([1, 2]),
)
@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_products_of_many_rows(
    isa: str,
    form: str,
    blocksize: int,
    rows: int,
    n: int,
    k: int,
    apart: int,
    accumulate: bool,
    rank: int,
    threads: int,
) -> None:
    torch.set_num_threads(threads)
    matrix = _matrix(form, (n, k), blocksize)
    dense = matrix.rows(0, n, torch.float32).double()
    x, g = torch.randn(rows, k + apart)[:, apart:], torch.randn(rows, n + apart)[:, apart:]
    y, dx = torch.full((rows, n), torch.nan), torch.full((rows, k), 2.0 if accumulate else torch.nan)
    A, B, low = torch.randn(rank, k), torch.randn(n, rank), torch.randn(rows, rank + apart)[:, apart:]
    adapter = LowRank(A, B, 0.5, low, torch.full((rows, rank + apart), torch.nan)[:, apart:]) if rank else None
    matrix.write_product(x, y, adapter)
    grad_B = matrix.write_product_t(g, dx, adapter, accumulate=accumulate)
    # float32 sums of up to 2,560 terms: a few roundings of the sum of magnitudes
    exact, tolerance = 0.5 * low.double() @ B.double().t(), {"rtol": 1e-5, "atol": 1e-4 if k < 200 else 1e-3}
    torch.testing.assert_close(y.double(), x.double() @ dense.t() + exact, **tolerance)
    adapted = dense + 0.5 * B.double() @ A.double()
    torch.testing.assert_close(dx.double(), g.double() @ adapted + 2.0 * accumulate, **tolerance)
    if adapter is not None and adapter.grad_low is not None and grad_B is not None:
        torch.testing.assert_close(adapter.grad_low.double(), 0.5 * g.double() @ B.double(), **tolerance)
        torch.testing.assert_close(grad_B.double(), 0.5 * g.double().t() @ low.double(), **tolerance)


@pytest.fixture(autouse=True)
def threads_as_before() -> Iterator[None]:
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


def test_expanded_rows_are_multiplied_too() -> None:
    matrix = quantise(torch.randn(40, 64), "nf4")
    g = torch.randn(1, 40).expand(30, 40)
    torch.testing.assert_close(matrix.matmul_t(g), g @ matrix.rows(0, 40, torch.float32), rtol=1e-5, atol=1e-4)


def test_without_blas_the_products_are_made_by_pytorch(monkeypatch: pytest.MonkeyPatch) -> None:
    library = native_library()
    if library is None:
        pytest.skip("the native kernels are not built")
    matrix, x = quantise(torch.randn(40, 64), "nf4"), torch.randn(30, 64)
    expected = matrix.matmul(x)
    library.smidgen_use_sgemm(None)
    try:
        assert not library.smidgen_has_sgemm()
        torch.testing.assert_close(matrix.matmul(x), expected, rtol=1e-5, atol=1e-4)
    finally:
        native_library.cache_clear()
        assert native_library().smidgen_has_sgemm()


def test_python_calls_the_functions_as_c_declares_them() -> None:
    """A wrong letter would be read as an address: nothing else would notice."""
    kinds = {"int64_t": "i", "float": "f", "int": "t"}
    declared = {}
    source = "".join(path.read_text(encoding="utf-8") for path in (API, API.with_name("mapped.cpp")))
    for name, arguments in re.findall(r"^API void (smidgen_\w+)\(([^)]*)\)", source, re.M):
        if not name.startswith("smidgen_use_"):
            words = [argument.split() for argument in arguments.split(",")]
            declared[name] = "".join("p" if "*" in "".join(word) else kinds[word[0]] for word in words)
    assert declared == library_module._SIGNATURES


def test_python_repeats_the_constants_of_c() -> None:
    """Another size of block would give wrong attention, one row more a product beyond its registers."""
    header = API.with_name("kernels.h").read_text(encoding="utf-8")
    constants = {name: int(value) for name, value in re.findall(r"constexpr int64_t (k\w+) = (\d+);", header)}
    assert constants == {"kQueries": attention_module._QUERIES, "kSmallRows": SMALL_ROWS}
