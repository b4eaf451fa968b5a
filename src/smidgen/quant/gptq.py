"""Weights to integers in groups, by GPTQ (arXiv 2210.17323) and, to compare with, by rounding each to its nearest.

GPTQ takes the inputs X [M, K] that a layer saw in a little text and looks for codes with a small |X (W - Q)ᵀ|². Inputs
are quantised one after the other; after each, those still to come are moved so as to make up for its error e:

    H = Xᵀ X + damping,   H⁻¹ = Uᵀ U with U upper triangular
    e_i = (w_i - q_i) / U[i, i],   w_j -= e_i U[i, j]  for j > i                                   (paper, section 3.3)

U comes from one Cholesky factor: with the order of the inputs reversed H = L Lᵀ, and U is L⁻¹ reversed; H itself is
never inverted. Within a block of 128 inputs the weights are moved at once, those after it once for the whole block, as
one matrix product. A group's scale and zero point are found when its first input is reached, from the weights as they
have been moved by then, and scales are rounded to float16, as files hold them, before they are used.

Zero points of an asymmetric quantiser lie in 1 .. 2^bits - 1, because the files' first format stores them less one and
many readers do not take a wrapped one.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from smidgen.errors import ModelError
from smidgen.events import Report, Warned, silent
from smidgen.quant.grouped import BITS, GroupedMatrix, pack
from smidgen.quant.matrix import FrozenMatrix

__all__ = ["GROUP_SIZES", "GptqSettings", "Hessian", "output_error", "quantise_gptq", "round_to_nearest"]

GROUP_SIZES = (32, 64, 128, -1)
_BLOCK = 128  # inputs whose errors are handed on together; a multiple of every group size but -1
_ROWS = 256  # packed or compared at once
_SMALLEST_SCALE = 2.0**-24  # of float16
_DOUBLE_UP_TO = 4096  # inputs: above, the factor in float64 would take more memory than a layer
_DAMP_MOST = 1.0


@dataclass(frozen=True)
class GptqSettings:
    """group_size: inputs with one scale, -1: all of them. damp: share of H's mean diagonal that is added to it.

    act_order: inputs in the order of H's diagonal, largest first; groups are then scattered over the inputs.
    """

    bits: int = 4
    group_size: int = 128
    symmetric: bool = True
    act_order: bool = False
    damp: float = 0.01

    def __post_init__(self) -> None:
        assert self.bits in BITS and self.group_size in GROUP_SIZES and self.damp > 0


class Hessian:
    """H = Xᵀ X, float32 [K, K], of all inputs that a layer has seen."""

    def __init__(self, in_features: int, device: torch.device | None = None) -> None:
        self.matrix = torch.zeros(in_features, in_features, device=device)

    def add(self, x: torch.Tensor, first: float = 1.0) -> None:
        """x [..., K] of a float type, a row of text; its first token counts `first` times."""
        rows = x.reshape(-1, x.shape[-1]).float()
        self.matrix.addmm_(rows.t(), rows).addr_(rows[0], rows[0], alpha=first - 1)


@torch.no_grad()
def quantise_gptq(
    weights: Sequence[torch.Tensor], hessian: torch.Tensor, settings: GptqSettings, report: Report = silent
) -> list[GroupedMatrix]:
    """Weights [N_i, K] of layers with the same input, hessian float32 [K, K] of that input -> their matrices.

    The layers do not influence one another; one pass over the inputs serves all. Raises ModelError where inputs or
    weights are not finite; where damping has to be raised, reports Warned.
    """
    if not bool(hessian.isfinite().all()):
        raise ModelError("the inputs of a layer are not finite in the calibration text", cure="use another text")
    order = torch.argsort(hessian.diagonal(), descending=True, stable=True) if settings.act_order else None
    work = torch.cat([weight.t().float() for weight in weights], dim=1)  # [K, N]: an input's weights lie together
    if order is not None:
        hessian, work = hessian[order][:, order], work[order]
    work[hessian.diagonal() == 0] = 0  # inputs that were always zero: nothing is known of them
    factor = _inverse_factor(hessian, settings.damp, report)
    inputs, outputs = work.shape
    size = inputs if settings.group_size == -1 else settings.group_size
    most = (1 << settings.bits) - 1
    codes = torch.empty(inputs, outputs, dtype=torch.uint8, device=work.device)
    grids: list[tuple[torch.Tensor, torch.Tensor]] = []
    for start in range(0, inputs, _BLOCK):
        stop = min(start + _BLOCK, inputs)
        errors = torch.empty(stop - start, outputs, device=work.device)
        for i in range(start, stop):
            if i % size == 0:
                grids.append(_grid(work[i : i + size], settings))
            scale, zero = grids[-1]
            code = (work[i] / scale).add_(zero).round_().clamp_(0, most)
            codes[i] = code
            torch.sub(work[i], code.sub_(zero).mul_(scale), out=errors[i - start]).div_(factor[i, i])
            work[i + 1 : stop].addr_(factor[i, i + 1 : stop], errors[i - start], alpha=-1)
        work[stop:].addmm_(factor[start:stop, stop:].t(), errors, alpha=-1)
    scales, zeros = (torch.stack(parts, dim=1) for parts in zip(*grids, strict=True))
    matrices, end = [], 0
    for weight in weights:
        start, end = end, end + weight.shape[0]
        matrices.append(_matrix(codes[:, start:end], scales[start:end], zeros[start:end], settings, order))
    return matrices


@torch.no_grad()
def round_to_nearest(weight: torch.Tensor, settings: GptqSettings) -> GroupedMatrix:
    """weight [N, K] -> each weight rounded to the nearest code of its group, groups in the order of the inputs."""
    columns = weight.t().float()
    inputs, outputs = columns.shape
    size = inputs if settings.group_size == -1 else settings.group_size
    codes = torch.empty(inputs, outputs, dtype=torch.uint8, device=weight.device)
    grids = []
    for start in range(0, inputs, size):
        grids.append(_grid(columns[start : start + size], settings))
        scale, zero = grids[-1]
        rounded = (columns[start : start + size] / scale).add_(zero).round_()
        codes[start : start + size] = rounded.clamp_(0, (1 << settings.bits) - 1)
    scales, zeros = (torch.stack(parts, dim=1) for parts in zip(*grids, strict=True))
    return _matrix(codes, scales, zeros, settings, None)


@torch.no_grad()
def output_error(weight: torch.Tensor, matrix: FrozenMatrix, hessian: torch.Tensor) -> float:
    """|X (W - Q)ᵀ| / |X Wᵀ| in Frobenius norms, from hessian = Xᵀ X [K, K]; weight [N, K] of a float type."""
    lost = whole = 0.0
    for start in range(0, weight.shape[0], _ROWS):
        some = weight[start : start + _ROWS].float()
        wrong = some - matrix.rows(start, start + len(some), torch.float32)
        lost += float(((wrong @ hessian) * wrong).sum(dtype=torch.float64))
        whole += float(((some @ hessian) * some).sum(dtype=torch.float64))
    return math.sqrt(max(lost, 0.0) / whole) if whole > 0 else 0.0


def _inverse_factor(hessian: torch.Tensor, damp: float, report: Report) -> torch.Tensor:
    """U float32 [K, K], upper triangular, with Uᵀ U the inverse of the damped H."""
    dtype = torch.float64 if hessian.shape[0] <= _DOUBLE_UP_TO and hessian.device.type != "mps" else torch.float32
    mean = float(hessian.diagonal().mean(dtype=torch.float32)) or 1.0
    used = damp
    while True:
        damped = hessian.flip(0, 1).to(dtype)
        diagonal = damped.diagonal()
        diagonal[diagonal == 0] = mean
        diagonal.add_(used * mean)
        lower, info = torch.linalg.cholesky_ex(damped)
        del damped, diagonal
        if not int(info) and bool(lower.diagonal().isfinite().all()):
            break
        if used >= _DAMP_MOST:
            raise ModelError(
                "a layer's inputs in the calibration text give no positive definite Hessian",
                cure="use another --calibration text",
            )
        used = min(10 * used, _DAMP_MOST)
    if used > damp:
        report(Warned(f"damping raised from {damp:g} to {used:g}: the Hessian of a layer was not positive definite"))
    unit = torch.eye(len(lower), dtype=dtype, device=lower.device)
    return torch.linalg.solve_triangular(lower, unit, upper=False).flip(0, 1).float()


def _grid(part: torch.Tensor, settings: GptqSettings) -> tuple[torch.Tensor, torch.Tensor]:
    """part [inputs of a group, N] -> (scale, zero point), float32 [N]; scales as float16 holds them."""
    most = (1 << settings.bits) - 1
    if settings.symmetric:
        top = part.abs().amax(dim=0)
        scale = _half(2 * top / most)
        return scale, torch.full_like(scale, 1 << (settings.bits - 1))
    low, high = part.amin(dim=0).clamp_(max=0), part.amax(dim=0).clamp_(min=0)
    scale = _half((high - low) / most)
    zero = (-low / scale).round_().clamp_(max=most)
    above = zero < 1  # no zero point 0: one code fewer for what is positive
    return torch.where(above, _half(high / (most - 1)), scale), zero.clamp_(min=1)


def _half(scale: torch.Tensor) -> torch.Tensor:
    rounded = scale.half().float()
    if not bool(rounded.isfinite().all()):
        raise ModelError("a layer's weights are not finite, or too large for scales in float16")
    return torch.where(scale > 0, rounded.clamp(min=_SMALLEST_SCALE), 1.0)


def _matrix(
    codes: torch.Tensor, scales: torch.Tensor, zeros: torch.Tensor, settings: GptqSettings, order: torch.Tensor | None
) -> GroupedMatrix:
    """codes uint8 [K, N] in stored order, scales and zeros [N, G]."""
    inputs, outputs = codes.shape
    width = math.ceil(inputs / 8) * settings.bits
    packed = torch.empty(outputs, width, dtype=torch.uint8, device=codes.device)
    for start in range(0, outputs, _ROWS):
        packed[start : start + _ROWS] = pack(codes[:, start : start + _ROWS].t().contiguous(), settings.bits)
    size = inputs if settings.group_size == -1 else settings.group_size
    ends = (torch.arange(1, scales.shape[1] + 1, dtype=torch.int32, device=codes.device) * size).clamp_(max=inputs)
    return GroupedMatrix(inputs, settings.bits, packed, scales.half(), zeros.to(torch.uint8), ends, order)
