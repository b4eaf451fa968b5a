"""Memory as arithmetic: one small pure function for each term, with its formula and what it leaves out."""

__all__ = ["estimate_activation_bytes"]


def estimate_activation_bytes(
    tokens: int, *, hidden_size: int, intermediate_size: int, num_layers: int, itemsize: int
) -> int:
    """What the layers of a Llama-shaped decoder keep for the backward pass, without recomputation.

    A token of a layer keeps about 14 vectors of hidden_size (two norms with their inputs, q, k, v before and after
    rotation, the attention's output, residuals) and 5 of intermediate_size (gate, up, activation, product). Left out:
    attention's own buffers, adapters, logits. Grouped heads need less than this.
    """
    return tokens * num_layers * itemsize * (14 * hidden_size + 5 * intermediate_size)
