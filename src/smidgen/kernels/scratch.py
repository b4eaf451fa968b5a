"""Memory that is used again and again: one growing buffer for each purpose, type and device, in each thread.

Fresh memory from the system costs a page fault for every 4 KiB, which is more than the de-quantisation of what goes in.
"""

import math
import threading
from typing import Any

import torch

__all__ = ["scratch"]

_local = threading.local()


def scratch(purpose: str, shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    """A tensor with undefined content, valid until the next call with the same purpose, type and device."""
    buffers: dict[Any, torch.Tensor] = _local.__dict__
    count = math.prod(shape)
    key = (purpose, dtype, device)
    buffer = buffers.get(key)
    if buffer is None or buffer.numel() < count:
        with torch.inference_mode(False):  # or a buffer made while generating could not be written in training
            buffers[key] = buffer = torch.empty(count, dtype=dtype, device=device)
    return buffer[:count].view(shape)
