"""Sizes of what kernels work on at once: they use them, and forecasts of memory count them. Imports nothing."""

__all__ = [
    "ATTENTION_MOST_PARTS",
    "ATTENTION_PART",
    "DEVICE_PANEL_WEIGHTS",
    "MAPPED_BYTES",
    "PANEL_WEIGHTS",
    "PROMPT_TOKENS",
    "TILE_TOKENS",
    "TWIN_LOGITS",
    "cache_capacity",
]

# Of one thread, in float32: a panel of 512 KiB stays in its cache; twice as much measured the same.
PANEL_WEIGHTS = 1 << 17
# Elsewhere than on a CPU, where starting an operation costs more than its memory.
DEVICE_PANEL_WEIGHTS = 1 << 24
# A row is split into about so many queries in the backward pass, so that few heads keep all threads busy.
ATTENTION_PART = 128
ATTENTION_MOST_PARTS = 4
# Rows of a large batch go through a layer in tiles of at most so many tokens, one longer row alone: a layer's working
# set stops growing, and products of this height are as fast as any.
TILE_TOKENS = 1 << 11
# Tensors from so many bytes on have pages of their own, which can go back to the system when they are freed; from a
# megabyte on, short rows left holes of 48 MB in the heap of 30 layers.
MAPPED_BYTES = 1 << 18
# Logits that plain PyTorch takes the loss of at once: it needs them twice more, in float32.
TWIN_LOGITS = 1 << 22
# A prompt goes through all of a layer but its attention in tiles of so many tokens: unpacking the weights for each is
# about a fiftieth of the work. A multiple of 64: see model/device.py.
PROMPT_TOKENS = 1 << 8


def cache_capacity(tokens: int, before: int, most: int) -> int:
    """Tokens that a key cache has room for when it is made anew for `tokens`; before: that it had, 0 at first; most:
    that it can ever hold.
    """
    return max(tokens, min(most, max(tokens + 64, before * 3 // 2)))
