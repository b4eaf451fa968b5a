"""The tables of numbers that a 4-bit or 8-bit code stands for.

NF4: 16 quantiles of a standard normal distribution, scaled to [-1, 1] (QLoRA, arXiv 2305.14314, appendix E).
FP4: sign, two exponent bits, one mantissa bit, in the order of the bit patterns, divided by 12.
Dynamic map: 256 values with a moving split between exponent and fraction (arXiv 2110.02861, section 1.3); it stores the
scales of the scales in double quantisation. All three are bitsandbytes' tables, bit for bit.
"""

from functools import cache

import torch

__all__ = ["FOUR_BIT_CODES", "dynamic_map", "four_bit_code"]

FOUR_BIT_CODES: dict[str, tuple[float, ...]] = {
    "nf4": (
        *(-1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453),
        *(-0.28444138169288635, -0.18477343022823334, -0.09105003625154495, 0.0),
        *(0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224),
        *(0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0),
    ),
    "fp4": (
        *(0.0, 0.0625, 8.0, 12.0, 4.0, 6.0, 2.0, 3.0),
        *(-0.0, -0.0625, -8.0, -12.0, -4.0, -6.0, -2.0, -3.0),
    ),
}


@cache
def four_bit_code(quant_type: str) -> torch.Tensor:
    """The 16 values of 'nf4' or 'fp4' as float32 [16], indexed by the 4-bit code, scaled to [-1, 1]."""
    code = torch.tensor(FOUR_BIT_CODES[quant_type], dtype=torch.float32)
    return code / code.abs().max()


@cache
def dynamic_map(device: torch.device | str = "cpu") -> torch.Tensor:
    """The signed dynamic map: float32 [256], sorted, from -0.993 to 1, zero at index 127."""
    values = [0.0, 1.0]
    for exponent in range(7):
        edges = torch.linspace(0.1, 1, 2**exponent + 1, dtype=torch.float32)
        middles = (10 ** (exponent - 6)) * ((edges[:-1] + edges[1:]) / 2.0)
        values += [*middles.tolist(), *(-middles).tolist()]
    return torch.tensor(sorted(values), dtype=torch.float32, device=device)
