"""From repeats to figures: useful work, shares of the measured peak, medians of paired ratios. Pure functions."""

from collections.abc import Sequence
from statistics import median
from typing import Any

from smidgen.bench.shapes import Shape

__all__ = ["format_rate", "paired_ratio", "roofline_fraction", "shape_flops", "spread", "useful_flops"]


def useful_flops(
    *, linear_parameters: int, lora_parameters: int, tokens: int, hidden_size: int, num_layers: int
) -> float:
    """Floating point operations of one training step that no implementation can leave out.

    4 x (decoder linears + head) x tokens: forward and the gradient of the input, 2 each; frozen weights have none.
    6 x LoRA parameters x tokens: forward, gradient of the input, gradient of the weight.
    6 x tokens^2 x hidden_size x layers: causal attention, half of QKᵀ and PV (2 forward, 4 backward).
    Left out: norms, activations, softmax, the optimizer. Recomputation is not useful work.
    """
    return (
        4.0 * linear_parameters * tokens + 6.0 * lora_parameters * tokens + 6.0 * tokens**2 * hidden_size * num_layers
    )


def shape_flops(shape: Shape, tokens: int, rank: int) -> float:
    """useful_flops of a shape with adapters on all linear layers of the decoder and every token labelled."""
    return useful_flops(
        linear_parameters=shape.decoder_parameters + shape.head_parameters,
        lora_parameters=shape.lora_parameters(rank),
        tokens=tokens,
        hidden_size=shape.hidden_size,
        num_layers=shape.num_layers,
    )


def roofline_fraction(flops: float, steps: Sequence[dict[str, Any]]) -> float:
    """Median over steps of useful work a second / the mean of the probes before and after that very step.

    Each step: {"step_s": s, "sgemm_gflops": [before, after]}. A machine that slows down slows its probe too.
    """
    return median(
        flops / step["step_s"] / (sum(step["sgemm_gflops"]) / len(step["sgemm_gflops"]) * 1e9) for step in steps
    )


def paired_ratio(theirs: Sequence[float], ours: Sequence[float]) -> float:
    """Median over rounds of theirs / ours: both of a round were measured one right after the other."""
    return median(their / our for their, our in zip(theirs, ours, strict=True))


def spread(values: Sequence[float], name: str = "") -> dict[str, float]:
    """{name: median, name_min, name_max}; without a name: median, min, max."""
    prefix = f"{name}_" if name else ""
    return {name or "median": median(values), f"{prefix}min": min(values), f"{prefix}max": max(values)}


def format_rate(side: dict[str, Any]) -> str:
    """How fast a case of `smidgen bench kernels` is, in the unit that it has."""
    if "gflops" in side:
        return f"{side['gflops']:.1f} GFLOP/s"
    return f"{side['gweights_per_s_per_thread']:.2f} G weights/s/thread"
