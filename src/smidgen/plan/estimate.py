"""Memory as arithmetic: one small pure function for each term, with its formula and what it leaves out."""

__all__ = ["RECOMPUTE", "estimate_activation_bytes"]

RECOMPUTE = ("none", "cheap", "full")  # what a layer computes again in the backward pass, from fastest to smallest

# Vectors that a token of a layer keeps for the backward pass: (of hidden_size, of intermediate_size), by what is
# computed again. q, k and v count as three of hidden_size; grouped heads need less.
_KEPT_VECTORS = {
    "none": (8, 2),  # input, normed, q, k, v, attended, middle, its norm; gate, up
    "cheap": (6, 2),  # without the two norms' outputs
    "full": (1, 0),  # the input
    "modules": (14, 5),  # transformers' own modules, which keep the input of every operation
}


def estimate_activation_bytes(
    tokens: int, *, hidden_size: int, intermediate_size: int, num_layers: int, itemsize: int, recompute: str
) -> int:
    """What the layers of a Llama-shaped decoder keep for the backward pass.

    recompute: 'none', 'cheap' or 'full' of fused layers; 'modules' for transformers' layers without recomputation. Left
    out: the working set of one layer (with 'full', that is one layer of 'none'), attention's own buffers, adapters,
    logits.
    """
    hidden, intermediate = _KEPT_VECTORS[recompute]
    return tokens * num_layers * itemsize * (hidden * hidden_size + intermediate * intermediate_size)
