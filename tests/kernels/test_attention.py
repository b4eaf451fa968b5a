"""Causal attention against PyTorch's in float64: rows of many lengths, groups, windows, types, instruction sets.

Tolerance: float32 products and sums over at most 300 keys; 2e-6 norm-wise is a few roundings. bfloat16 inputs are
computed in float32 and rounded once (2**-9).
"""

import os
import subprocess
import sys

import pytest
import torch

from smidgen.kernels.attention import (
    Heads,
    Segments,
    attention,
    attention_backward,
    attention_decode,
    attention_twin,
)

CASES = [
    ([1], Heads(1, 1, 8, 1.0)),
    ([64], Heads(2, 2, 16, 0.25)),
    ([300, 1, 65, 128], Heads(9, 3, 64, 0.125)),  # above and below the length that is split
    ([77, 40], Heads(4, 1, 20, 0.3)),  # a head that is no whole number of vectors
    ([130, 9], Heads(4, 2, 32, 0.2, window=7)),
    ([270], Heads(2, 1, 64, 0.125, window=100)),
]
# Rows that go on after another one: one and several blocks of queries, groups above and below the length that is split,
# windows that end in the prefix, in the row itself, and beyond both.
SHARED = [
    ([70, 5, 64, 1], [-1, 0, 0, 0], Heads(4, 2, 16, 0.25)),
    ([30, 9, 100, 20, 130, 7], [-1, -1, 1, 1, 1, -1], Heads(9, 3, 64, 0.125)),
    ([1, 3, 77], [-1, 0, 0], Heads(4, 1, 20, 0.3)),
    ([130, 9, 40], [-1, 0, 0], Heads(4, 2, 32, 0.2, window=7)),
    ([50, 270, 20], [-1, 0, 0], Heads(2, 1, 64, 0.125, window=100)),
    ([50, 20], [-1, 0], Heads(2, 1, 64, 0.125, window=1000)),
]


def _distance(ours: torch.Tensor, exact: torch.Tensor) -> float:
    return float((ours.double() - exact).norm() / exact.norm())


@pytest.mark.parametrize(("lengths", "heads"), CASES)
@pytest.mark.parametrize(("dtype", "close"), [(torch.float32, 2e-6), (torch.bfloat16, 4e-3)])
def test_forward_and_gradient(isa: str, lengths: list[int], heads: Heads, dtype: torch.dtype, close: float) -> None:
    segments = Segments(lengths)
    qkv = torch.randn(segments.tokens, heads.width).to(dtype)
    grad = torch.randn(segments.tokens, heads.q_width).to(dtype)
    out, lse = attention(qkv, segments, heads)
    assert lse.shape == (heads.heads, segments.tokens), "the native kernel has to have run"
    ours = attention_backward(grad, qkv, out, lse, segments, heads)

    leaf = qkv.double().requires_grad_()
    exact = attention_twin(leaf, segments, heads)
    exact_grad = torch.autograd.grad(exact, leaf, grad.double())[0]
    assert out.dtype == ours.dtype == dtype
    assert _distance(out, exact.detach()) < close
    assert _distance(ours, exact_grad) < 3 * close  # three products one after the other


@pytest.mark.parametrize(("lengths", "prefixes", "heads"), SHARED)
@pytest.mark.parametrize("backend", ["native", "torch"])
def test_a_shared_prefix_is_computed_once_with_the_same_result(
    isa: str, backend: str, lengths: list[int], prefixes: list[int], heads: Heads, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Against rows that each have their own copy of it, in float64: the copies' gradients are its gradient's terms."""
    monkeypatch.setenv("SMIDGEN_BACKEND", backend)
    segments = Segments(lengths, prefixes)
    qkv = torch.randn(segments.tokens, heads.width)
    grad = torch.randn(segments.tokens, heads.q_width)
    out, lse = attention(qkv, segments, heads)
    ours = attention_backward(grad, qkv, out, lse, segments, heads)

    leaf = qkv.double().requires_grad_()
    rows = leaf.split(lengths)
    copies = [row if prefix < 0 else torch.cat([rows[prefix], row]) for row, prefix in zip(rows, prefixes, strict=True)]
    whole = attention_twin(torch.cat(copies), Segments([len(copy) for copy in copies]), heads)
    parts = whole.split([len(copy) for copy in copies])
    exact = torch.cat([part[-length:] for part, length in zip(parts, lengths, strict=True)])
    exact_grad = torch.autograd.grad(exact, leaf, grad.double())[0]
    assert _distance(out, exact.detach()) < 2e-6
    assert _distance(ours, exact_grad) < 6e-6


def test_rows_do_not_see_each_other(isa: str) -> None:
    heads = Heads(4, 2, 16, 0.25)
    rows = [torch.randn(length, heads.width) for length in (70, 5, 300)]
    together, _ = attention(torch.cat(rows), Segments([len(row) for row in rows]), heads)
    alone = [attention(row, Segments([len(row)]), heads)[0] for row in rows]
    assert torch.equal(together, torch.cat(alone))


def test_large_scores_do_not_overflow(isa: str) -> None:
    heads = Heads(1, 1, 8, 1.0)
    qkv = torch.randn(50, heads.width) * 100
    out, lse = attention(qkv, Segments([50]), heads)
    grad = attention_backward(torch.randn(50, 8), qkv, out, lse, Segments([50]), heads)
    assert out.isfinite().all() and lse.isfinite().all() and grad.isfinite().all()
    assert _distance(out, attention_twin(qkv.double(), Segments([50]), heads)) < 1e-4


@pytest.mark.parametrize("heads", [Heads(9, 3, 64, 0.125), Heads(4, 4, 20, 0.3), Heads(4, 1, 32, 0.2, window=7)])
def test_decode(isa: str, heads: Heads, monkeypatch: pytest.MonkeyPatch) -> None:
    lengths, capacity = torch.tensor([0, 39, 16]), 48
    qkv = torch.randn(3, heads.width)
    keys, values = torch.randn(2, 3, heads.kv_heads, capacity, heads.head_dim).unbind()
    caches = [(keys.clone(), values.clone()) for _ in range(2)]
    ours = attention_decode(qkv, *caches[0], lengths, heads)
    monkeypatch.setenv("SMIDGEN_BACKEND", "torch")
    exact = attention_decode(qkv, *caches[1], lengths, heads).double()
    assert _distance(ours, exact) < 2e-6
    assert all(torch.equal(a, b) for a, b in zip(*caches, strict=True))
    assert torch.equal(caches[0][0][1, 0, 39], qkv[1, heads.q_width :][: heads.head_dim])


@pytest.mark.parametrize("heads", [Heads(9, 3, 64, 0.125), Heads(4, 4, 20, 0.3), Heads(4, 1, 32, 0.2, window=7)])
def test_decode_with_a_rounded_cache(isa: str, heads: Heads, monkeypatch: pytest.MonkeyPatch) -> None:
    """Keys and values in bfloat16: the new token's rounded as PyTorch rounds, what is computed with them float32."""
    lengths, capacity = torch.tensor([0, 39, 16]), 48
    qkv = torch.randn(3, heads.width)
    keys, values = torch.randn(2, 3, heads.kv_heads, capacity, heads.head_dim).bfloat16().unbind()
    caches = [(keys.clone(), values.clone()) for _ in range(2)]
    ours = attention_decode(qkv, *caches[0], lengths, heads)
    monkeypatch.setenv("SMIDGEN_BACKEND", "torch")
    exact = attention_decode(qkv, *caches[1], lengths, heads).double()
    assert ours.dtype == torch.float32 and _distance(ours, exact) < 2e-6
    assert all(torch.equal(a, b) for a, b in zip(*caches, strict=True))


def test_the_gradient_does_not_depend_on_the_threads() -> None:
    """Bit for bit: sums are in a fixed order, whoever computes their terms."""
    code = (
        "import torch, hashlib\n"
        "from smidgen.kernels.attention import *\n"
        "torch.manual_seed(0); h, s = Heads(3, 1, 32, .2), Segments([300, 90, 8], [-1, 0, -1])\n"
        "x, g = torch.randn(398, h.width), torch.randn(398, h.q_width)\n"
        "o, l = attention(x, s, h); d = attention_backward(g, x, o, l, s, h)\n"
        "print(hashlib.sha256(o.numpy().tobytes() + d.numpy().tobytes()).hexdigest())\n"
    )
    one, two = (
        subprocess.check_output([sys.executable, "-c", code], env=os.environ | {"OMP_NUM_THREADS": threads})
        for threads in ("1", "2")
    )
    assert one == two
