"""Each native kernel against its twin in float64 arithmetic, on random and hostile shapes, for every instruction set.

Tolerances: a kernel computes in float32 with its own order of sums, so results differ by a few units of float32's
rounding (6e-8) times the square root of the terms, norm-wise; bfloat16 results differ by one rounding (2**-9 at most).
"""

import pytest
import torch

from smidgen.kernels import elementwise

pytestmark = pytest.mark.usefixtures("isa")

_CLOSE = {torch.float32: 2e-6, torch.bfloat16: 3e-3}
TYPES = list(_CLOSE)


def _both(monkeypatch: pytest.MonkeyPatch, function, *arguments, **more):
    """(what the native kernel gives, what the twin gives), on copies of the arguments."""

    def call(backend: str):
        monkeypatch.setenv("SMIDGEN_BACKEND", backend)
        copies = [a.clone() if isinstance(a, torch.Tensor) else a for a in arguments]
        return function(*copies, **more), copies

    return call("native"), call("torch")


def _assert_close(ours: torch.Tensor, twin: torch.Tensor) -> None:
    assert ours.dtype == twin.dtype and ours.shape == twin.shape
    norm = float(twin.double().norm())
    assert float((ours.double() - twin.double()).norm()) <= _CLOSE[ours.dtype] * norm + 1e-30


@pytest.mark.parametrize("dtype", TYPES)
@pytest.mark.parametrize("shape", [(1, 3), (3, 7), (2, 5, 64), (4, 100), (70, 576), (0, 16)])
def test_rms_norm(shape: tuple[int, ...], dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    x, weight = torch.randn(shape).to(dtype), torch.randn(shape[-1])
    ((y, rstd), _), ((y2, rstd2), _) = _both(monkeypatch, elementwise.rms_norm, x, weight, 1e-5)
    _assert_close(y, y2)
    _assert_close(rstd, rstd2)
    for residual in (None, torch.randn(shape).to(dtype)):
        grad = torch.randn(shape).to(dtype)
        (ours, _), (twin, _) = _both(monkeypatch, elementwise.rms_norm_backward, grad, x, weight, rstd2, residual)
        _assert_close(ours, twin)


def test_the_gradient_of_rms_norm_is_autograds(monkeypatch: pytest.MonkeyPatch) -> None:
    x, weight, grad = torch.randn(5, 48, dtype=torch.float64), torch.randn(48), torch.randn(5, 48)
    leaf = x.clone().requires_grad_()
    (leaf * torch.rsqrt(leaf.square().mean(-1, keepdim=True) + 1e-6) * weight).backward(grad.double())
    y_rstd = elementwise.rms_norm(x.float(), weight, 1e-6)[1]
    _assert_close(elementwise.rms_norm_backward(grad, x.float(), weight, y_rstd), leaf.grad.float())


@pytest.mark.parametrize("dtype", TYPES)
@pytest.mark.parametrize(("rows", "heads", "head_dim", "rotary"), [(1, 1, 2, 2), (5, 3, 64, 64), (3, 2, 20, 12)])
def test_rotate(
    rows: int, heads: int, head_dim: int, rotary: int, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    wide = torch.randn(rows, heads * head_dim + 5).to(dtype)  # what lies behind the heads must stay as it is
    angles = torch.rand(rows, rotary // 2) * 6
    for back in (False, True):
        (ours, _), (twin, _) = _both(
            monkeypatch, elementwise.rotate_, wide, angles.cos(), angles.sin(), heads, head_dim, back=back
        )
        _assert_close(ours, twin)
        assert torch.equal(ours[:, heads * head_dim :], wide[:, heads * head_dim :])
    there = elementwise.rotate_(wide.float().clone(), angles.cos(), angles.sin(), heads, head_dim)
    again = elementwise.rotate_(there, angles.cos(), angles.sin(), heads, head_dim, back=True)
    assert torch.allclose(again, wide.float(), atol=1e-5)


@pytest.mark.parametrize("dtype", TYPES)
@pytest.mark.parametrize(("rows", "width"), [(1, 1), (3, 17), (4, 96), (0, 8), (20, 1536)])
def test_swiglu(rows: int, width: int, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    gate_up, grad = (torch.randn(rows, 2 * width) * 4).to(dtype), torch.randn(rows, width).to(dtype)
    (ours, _), (twin, _) = _both(monkeypatch, elementwise.swiglu, gate_up)
    _assert_close(ours, twin)
    filled = torch.empty_like(gate_up), torch.empty_like(grad)
    (_, ours), (_, twin) = _both(monkeypatch, elementwise.swiglu_backward, grad, gate_up, *filled)
    _assert_close(ours[2], twin[2])
    _assert_close(ours[3], twin[3])


def test_swiglu_at_the_ends_of_the_number_range() -> None:
    gate = torch.tensor([[0.0, -0.0, 1e-40, -1e-40, 100.0, -100.0, 3e38, -3e38, torch.inf]])
    y = elementwise.swiglu(torch.cat([gate, torch.ones_like(gate)], dim=1))
    expected = torch.nn.functional.silu(gate.double())
    assert torch.allclose(y.double(), expected, rtol=1e-6, atol=1e-37)
    assert elementwise.swiglu(torch.tensor([[torch.nan, 1.0]])).isnan().all()


@pytest.mark.parametrize("dtype", TYPES)
@pytest.mark.parametrize(("rows", "classes"), [(1, 1), (3, 5), (7, 1000), (2, 49152), (0, 9)])
def test_cross_entropy(rows: int, classes: int, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    logits, targets = (torch.randn(rows, classes) * 5).to(dtype), torch.randint(0, classes, (rows,))
    reference = torch.nn.functional.cross_entropy(logits.double(), targets, reduction="none")
    for backward in (False, True):
        (ours, after), (twin, twin_after) = _both(
            monkeypatch, elementwise.cross_entropy_, logits, targets, backward=backward
        )
        assert torch.allclose(ours.double(), reference, rtol=1e-6, atol=2e-6)
        assert torch.allclose(twin.double(), reference, rtol=1e-6, atol=2e-6)
        _assert_close(after[0], twin_after[0])
        assert backward or torch.equal(after[0], logits)


def test_the_gradient_at_the_target_is_rounded_once() -> None:
    """In bfloat16 the probability of a sure answer rounds to 1; the gradient, about 1 - 0.9997, must not round to 0."""
    logits = torch.zeros(1, 50, dtype=torch.bfloat16)
    logits[0, 7] = 12.0
    exact = float(logits.double().softmax(1)[0, 7]) - 1
    elementwise.cross_entropy_(logits, torch.tensor([7]), backward=True)
    assert float(logits[0, 7]) == pytest.approx(exact, rel=2**-8)


def test_a_loss_without_a_number_stays_without_one() -> None:
    logits = torch.randn(3, 40)
    logits[1, 7], logits[2, 3] = torch.nan, torch.inf
    losses = elementwise.cross_entropy_(logits, torch.tensor([1, 2, 3]), backward=False)
    assert losses[0].isfinite() and not losses[1:].isfinite().any()
