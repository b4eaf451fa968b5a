"""The optimizers by name.

    adamw               arXiv 1711.05101, betas 0.9, 0.999; two float32 numbers for each parameter
    adamw8bit           the same in bitsandbytes' 8-bit blocks (arXiv 2110.02861): two bytes; adapters of fewer than
                        4,096 numbers keep float32
    paged-adamw8bit     and in memory that CUDA moves to the CPU when the card is full (arXiv 2305.14314)
    sgd                 momentum 0.9; one float32 number
    adafactor           arXiv 1804.04235, PyTorch's: a row and a column for each matrix; the rate stays below
                        1 / sqrt(step), and does not follow the size of the parameters

The adapters of one run are small: what the 8-bit states save is little next to the base and the activations.
"""

import warnings
from typing import Any

import torch

from smidgen.errors import SettingsError, first_line
from smidgen.model.trained import Adapters
from smidgen.train.config import Settings

__all__ = ["STATE_BYTES", "check_optimizer", "make_optimizer"]

# for each parameter; an adapter's matrices are long, so that adafactor's row and column are little
STATE_BYTES = {"adamw": 8.0, "adamw8bit": 2.1, "paged-adamw8bit": 2.1, "sgd": 4.0, "adafactor": 0.2}

_8BIT = {"adamw8bit": "AdamW8bit", "paged-adamw8bit": "PagedAdamW8bit"}
_BLOCKWISE_NUMBERS = 4096  # bitsandbytes keeps smaller states in float32


def make_optimizer(adapters: Adapters, settings: Settings) -> torch.optim.Optimizer:
    """The optimizer that the settings name, over all adapters. `check_optimizer` says whether it can be made.

    A group's `lr_ratio` is what optimizer_step multiplies the learning rate by: LoRA+ (arXiv 2402.12354) for lora_B.
    """
    parts = [item for layer in adapters.values() for item in layer.trainable.items()]
    groups = [
        {"params": [parameter for part, parameter in parts if part != "lora_B"], "lr_ratio": 1.0},
        {"params": [parameter for part, parameter in parts if part == "lora_B"], "lr_ratio": settings.lora_plus_ratio},
    ]
    return _optimizer(groups, settings)


def _optimizer(groups: list[dict[str, Any]], settings: Settings) -> torch.optim.Optimizer:
    common: dict[str, Any] = {"lr": settings.learning_rate, "weight_decay": settings.weight_decay}
    if settings.optimizer in _8BIT:
        from bitsandbytes import optim

        return getattr(optim, _8BIT[settings.optimizer])(groups, **common)
    if settings.optimizer == "sgd":
        return torch.optim.SGD(groups, momentum=0.9, **common)
    if settings.optimizer == "adafactor":
        # PyTorch multiplies a step by max(eps, size of the parameter), which would hold lora_B, zero at the start, back
        # for hundreds of steps. With 1 it is the rate alone, as everyone else has it for adapters.
        return torch.optim.Adafactor(groups, eps=(None, 1.0), **common)
    fused = groups[0]["params"][0].device.type in ("cpu", "cuda")
    return torch.optim.AdamW(groups, fused=fused, **common)


def check_optimizer(settings: Settings, device: torch.device) -> None:
    """Raise SettingsError where the optimizer does not run on the device: an 8-bit one is tried on a few numbers."""
    name = settings.optimizer
    if name not in _8BIT:
        return
    if name.startswith("paged") and device.type != "cuda":
        raise SettingsError([f"optimizer: {name} needs a CUDA device, this is {device}; adamw8bit does without"])
    tried = torch.nn.Parameter(torch.zeros(_BLOCKWISE_NUMBERS, device=device))
    tried.grad = torch.ones_like(tried)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            _optimizer([{"params": [tried]}], settings).step()
        moved = bool((tried < 0).all())
    except ImportError:
        raise SettingsError([f"optimizer: {name} needs bitsandbytes; pip install 'smidgen[bnb]'"]) from None
    except Exception as error:  # whatever a back end says that lacks the operation
        reason = first_line(error)
        raise SettingsError([f"optimizer: bitsandbytes has no {name} for {device} ({reason}); take adamw"]) from error
    if not moved:
        raise SettingsError([f"optimizer: bitsandbytes' {name} computes nothing on {device}; take adamw"])
