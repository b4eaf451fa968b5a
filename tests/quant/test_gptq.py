"""GPTQ against a slow float64 version written from the paper, against rounding to nearest, and on awkward inputs."""

import math
from typing import Any

import pytest
import torch

from smidgen.errors import ModelError
from smidgen.events import Warned
from smidgen.quant.gptq import GptqSettings, Hessian, output_error, quantise_gptq, round_to_nearest
from smidgen.quant.grouped import GroupedMatrix

OUTPUTS = 24


def _inputs(count: int, width: int, seed: int = 0) -> torch.Tensor:
    """Correlated inputs of unequal sizes, as layers see them, float32 [count, width]."""
    generator = torch.Generator().manual_seed(seed)
    mixed = torch.randn(count, width // 4, generator=generator) @ torch.randn(width // 4, width, generator=generator)
    sizes = torch.rand(width, generator=generator) * 3 + 0.1
    return (mixed / math.sqrt(width // 4) + 0.3 * torch.randn(count, width, generator=generator)) * sizes


def _weight(width: int, outputs: int = OUTPUTS, seed: int = 1) -> torch.Tensor:
    return torch.randn(outputs, width, generator=torch.Generator().manual_seed(seed)) * 0.05


def _hessian(x: torch.Tensor) -> torch.Tensor:
    hessian = Hessian(x.shape[1])
    for part in x.split(100):  # in pieces, as the rows of a text come
        hessian.add(part[None])
    return hessian.matrix


def _values(matrix: GroupedMatrix) -> torch.Tensor:
    return matrix.rows(0, matrix.out_features, torch.float32).clone()


def _grid(group: torch.Tensor, bits: int, symmetric: bool) -> tuple[torch.Tensor, torch.Tensor]:
    """Scale (as float16 has it) and zero point of each row of `group`, float64."""
    most = 2**bits - 1
    if symmetric:
        return (2 * group.abs().amax(1) / most).half().double(), torch.full((len(group),), 2.0 ** (bits - 1)).double()
    low, high = group.amin(1).clamp(max=0), group.amax(1).clamp(min=0)
    scale = ((high - low) / most).half().double()
    zero = (-low / scale).round()
    return torch.where(zero < 1, (high / (most - 1)).half().double(), scale), zero.clamp(1, most)


def _reference(weight: torch.Tensor, x: torch.Tensor, settings: GptqSettings) -> torch.Tensor:
    """Section 3.3 of the paper, one input after the other, with H⁻¹ as it is and nothing postponed; float64 [N, K]."""
    w, count = weight.double().clone(), weight.shape[1]
    hessian = x.double().t() @ x.double()
    order = torch.argsort(hessian.diagonal(), descending=True) if settings.act_order else torch.arange(count)
    w, hessian = w[:, order], hessian[order][:, order]
    hessian = hessian + settings.damp * hessian.diagonal().mean() * torch.eye(count)
    upper = torch.linalg.cholesky(torch.linalg.inv(hessian), upper=True)
    size = count if settings.group_size == -1 else settings.group_size
    result = torch.zeros_like(w)
    for i in range(count):
        if i % size == 0:
            scale, zero = _grid(w[:, i : i + size], settings.bits, settings.symmetric)
        code = (w[:, i] / scale + zero).round().clamp(0, 2**settings.bits - 1)
        result[:, i] = (code - zero) * scale
        w[:, i:] -= ((w[:, i] - result[:, i]) / upper[i, i])[:, None] * upper[i, i:]
    return result[:, torch.argsort(order)]


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("act_order", [False, True])
@pytest.mark.parametrize(("width", "group_size"), [(96, 32), (160, 64), (200, 128), (300, 128), (136, -1)])
def test_equal_to_the_paper_column_by_column(
    width: int, group_size: int, bits: int, symmetric: bool, act_order: bool
) -> None:
    """Widths that are no multiple of groups or of the blocks of 128 that are worked on at once."""
    x, weight = _inputs(400, width), _weight(width)
    settings = GptqSettings(bits, group_size, symmetric, act_order)
    (matrix,) = quantise_gptq([weight], _hessian(x), settings)
    expected = _reference(weight, x, settings)
    assert (matrix.bits, matrix.scales.dtype) == (bits, torch.float16)
    # A weight that lies between two codes may go to the other one in float32, and its row differs from there on.
    same_rows = (_values(matrix).double() - expected).abs().amax(1) < 1e-6
    assert int((~same_rows).sum()) <= 2
    ours, theirs = (float((x.double() @ (weight - q).double().t()).norm()) for q in (_values(matrix), expected))
    assert ours == pytest.approx(theirs, rel=2e-2)


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("act_order", [False, True])
@pytest.mark.parametrize("group_size", [32, 128, -1])
def test_better_than_rounding_to_nearest(bits: int, symmetric: bool, act_order: bool, group_size: int) -> None:
    x, weight = _inputs(600, 256), _weight(256)
    hessian, settings = _hessian(x), GptqSettings(bits, group_size, symmetric, act_order)
    (matrix,) = quantise_gptq([weight], hessian, settings)
    nearest = round_to_nearest(weight, settings)
    errors = [output_error(weight, each, hessian) for each in (matrix, nearest)]
    exact = [float((x @ (weight - _values(m)).t()).norm() / (x @ weight.t()).norm()) for m in (matrix, nearest)]
    assert errors == pytest.approx(exact, rel=1e-3)  # the error comes from the Hessian alone
    assert errors[0] < 0.8 * errors[1]  # measured 0.34 to 0.71


def test_act_order_scatters_groups_and_keeps_the_largest_inputs_best() -> None:
    x, weight = _inputs(600, 128), _weight(128)
    x[:, 100] *= 50
    (matrix,) = quantise_gptq([weight], _hessian(x), GptqSettings(bits=3, group_size=32, act_order=True))
    assert matrix.order is not None and int(matrix.order[0]) == 100
    assert sorted(matrix.order.tolist()) == list(range(128))
    y = torch.randn(5, 128)
    torch.testing.assert_close(matrix.matmul(y), y @ _values(matrix).t(), rtol=1e-4, atol=1e-5)
    (plain,) = quantise_gptq([weight], _hessian(x), GptqSettings(bits=3, group_size=32))
    assert plain.order is None


def test_layers_with_the_same_input_do_not_influence_one_another() -> None:
    hessian, settings = _hessian(_inputs(300, 64)), GptqSettings(group_size=32)
    first, second = _weight(64, 16, seed=1), _weight(64, 40, seed=2)
    together = quantise_gptq([first, second], hessian, settings)
    alone = [quantise_gptq([weight], hessian, settings)[0] for weight in (first, second)]
    for ours, theirs in zip(together, alone, strict=True):
        assert torch.equal(ours.codes, theirs.codes) and torch.equal(ours.scales, theirs.scales)


@pytest.mark.parametrize("act_order", [False, True])
def test_inputs_that_are_always_zero_get_weight_zero(act_order: bool) -> None:
    x, weight = _inputs(300, 64), _weight(64)
    dead = [3, 40, 41]
    x[:, dead] = 0
    (matrix,) = quantise_gptq([weight], _hessian(x), GptqSettings(group_size=32, act_order=act_order))
    values = _values(matrix)
    assert bool((values[:, dead] == 0).all())
    assert output_error(weight, matrix, _hessian(x)) < 0.1
    (nothing,) = quantise_gptq([weight], torch.zeros(64, 64), GptqSettings(group_size=32))  # no input ever
    assert bool((_values(nothing) == 0).all())


def test_fewer_rows_than_inputs_are_enough() -> None:
    """H is singular; the damping makes it regular."""
    x, weight = _inputs(20, 128), _weight(128)
    said: list[Any] = []
    settings = GptqSettings(group_size=32)
    (matrix,) = quantise_gptq([weight], _hessian(x), settings, said.append)
    assert not said
    assert output_error(weight, matrix, _hessian(x)) < output_error(
        weight, round_to_nearest(weight, settings), _hessian(x)
    )


def test_damping_is_raised_where_the_hessian_is_not_positive_definite() -> None:
    x, weight = _inputs(300, 64), _weight(64)
    hessian = _hessian(x)
    mean = float(hessian.diagonal().mean())
    direction = torch.nn.functional.normalize(torch.randn(64), dim=0)
    broken = hessian - torch.outer(direction, direction) * (float(direction @ hessian @ direction) + 0.05 * mean)
    said: list[Any] = []
    (matrix,) = quantise_gptq([weight], broken, GptqSettings(group_size=32, damp=0.001), said.append)
    assert [type(event) for event in said] == [Warned] and "damping raised from 0.001 to" in said[0].text
    assert bool(_values(matrix).isfinite().all())
    with pytest.raises(ModelError, match="no positive definite Hessian"):
        quantise_gptq([weight], -hessian, GptqSettings(group_size=32))


@pytest.mark.parametrize("spoilt", [torch.nan, torch.inf])
def test_what_is_not_finite_is_refused(spoilt: float) -> None:
    x, weight = _inputs(300, 64), _weight(64)
    hessian = _hessian(x)
    hessian[3, 5] = spoilt
    with pytest.raises(ModelError, match="inputs of a layer are not finite"):
        quantise_gptq([weight], hessian, GptqSettings(group_size=32))
    weight[2, 3] = spoilt
    for make in (
        lambda: quantise_gptq([weight], _hessian(x), GptqSettings(group_size=32)),
        lambda: round_to_nearest(weight, GptqSettings(group_size=32)),
    ):
        with pytest.raises(ModelError, match="not finite, or too large for scales in float16"):
            make()


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_zero_points_are_never_zero(bits: int) -> None:
    """Files of format v1 hold them less one. Rows of one sign only are where it matters."""
    weight = _weight(64).abs()
    weight[::2] *= -1
    weight[5] = 0
    settings = GptqSettings(bits, 32, symmetric=False)
    for matrix in (round_to_nearest(weight, settings), quantise_gptq([weight], _hessian(_inputs(99, 64)), settings)[0]):
        assert int(matrix.zeros.min()) >= 1 and int(matrix.zeros.max()) <= 2**bits - 1
        assert bool((_values(matrix)[5] == 0).all())
    step = round_to_nearest(weight, settings).scales.float().amax(1)
    wrong = (_values(round_to_nearest(weight, settings)) - weight).abs().amax(1)
    assert bool((wrong <= 0.51 * step).all())


def test_tiny_weights_do_not_underflow_their_scales() -> None:
    weight = _weight(64) * 1e-8
    assert bool(_values(round_to_nearest(weight, GptqSettings(group_size=32))).isfinite().all())


def test_half_precision_weights() -> None:
    x, weight = _inputs(300, 64), _weight(64)
    settings = GptqSettings(group_size=32)
    (ours,) = quantise_gptq([weight.bfloat16()], _hessian(x.bfloat16()), settings)
    (same,) = quantise_gptq([weight.bfloat16().float()], _hessian(x.bfloat16().float()), settings)
    assert torch.equal(ours.codes, same.codes)


def test_the_first_token_of_a_row_can_count_more_often() -> None:
    x = _inputs(10, 16)
    once, often = Hessian(16), Hessian(16)
    once.add(torch.cat([x[:1]] * 4 + [x[1:]]))
    often.add(x[None], first=4.0)
    torch.testing.assert_close(often.matrix, once.matrix)
