"""Do the packed operations of every back end on this machine agree with plain arithmetic? For `smidgen doctor`."""

import os
from itertools import product

import torch

from smidgen.errors import SettingsError, first_line
from smidgen.quant.backend import BACKENDS
from smidgen.quant.matrix import quantise

__all__ = ["check_backends"]


def check_backends(device: torch.device) -> dict[str, str]:
    """Back end -> 'ok', or what is wrong: products of packed matrices against products of their dense rows."""
    chosen = os.environ.get("SMIDGEN_BACKEND")
    results = {}
    try:
        for name in BACKENDS:
            if name == "native" and device.type != "cpu":
                continue
            os.environ["SMIDGEN_BACKEND"] = name
            try:
                results[name] = _check(device)
            except SettingsError:
                results[name] = "not installed"
            except Exception as error:  # a broken installation is what a doctor is to find, whatever it raises
                results[name] = f"fails: {first_line(error)}"
    finally:
        os.environ.pop("SMIDGEN_BACKEND", None)
        if chosen is not None:
            os.environ["SMIDGEN_BACKEND"] = chosen
    return results


def _check(device: torch.device) -> str:
    generator = torch.Generator().manual_seed(0)
    worst = 0.0
    # Rows with blocks that cross them and without, few and many of x: every way to multiply.
    for storage, k, m in product(("nf4", "nf4-dq", "fp4", "fp4-dq", "int8", "none"), (200, 192), (5, 40)):
        weight = torch.randn(96, k, generator=generator)
        x, g = torch.randn(m, k, generator=generator).to(device), torch.randn(m, 96, generator=generator).to(device)
        matrix = quantise(weight, storage).to(device)
        dense = matrix.rows(0, 96, torch.float32).double()
        for ours, exact in ((matrix.matmul(x), x.double() @ dense.t()), (matrix.matmul_t(g), g.double() @ dense)):
            worst = max(worst, float((ours.double() - exact).norm() / exact.norm()))
    return "ok" if worst < 1e-5 else f"wrong: relative error {worst:.1e}"
