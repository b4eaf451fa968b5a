"""Memory as arithmetic: one small pure function for each term, with its formula and what it leaves out.

Everything counts bytes. tokens: of one micro-batch. itemsize: of the compute type. What is kept is counted tensor by
tensor as model/fused.py makes it; for transformers' own layers by what their modules save on the meta device
(model/kept.py).
"""

from collections.abc import Sequence
from math import ceil

from smidgen.kernels.sizes import (
    ATTENTION_MOST_PARTS,
    ATTENTION_PART,
    DEVICE_PANEL_WEIGHTS,
    PANEL_WEIGHTS,
    PROMPT_TOKENS,
    TILE_TOKENS,
    TWIN_LOGITS,
)
from smidgen.planning.inventory import Inventory

__all__ = [
    "RECOMPUTE",
    "adapter_bytes",
    "chunk_positions",
    "evaluation_bytes",
    "kept_bytes",
    "layer_work_bytes",
    "loss_bytes",
    "most_positions",
    "panel_bytes",
    "program_bytes",
    "prompt_bytes",
    "scratch_bytes",
    "stream_bytes",
    "tile_tokens",
]

RECOMPUTE = ("none", "cheap", "full")  # what a layer computes again in the backward pass, from fastest to smallest

_CHUNK_LOGITS = 1 << 25  # 128 MiB of float32: 682 positions of 49,152 classes
_FLOAT32 = 4
_PROGRAMS = 24 << 20  # of oneDNN, for the products of one number of rows
_MODULES = (14, 5)  # vectors of hidden_size and intermediate_size that a layer of transformers keeps at most


def _widths(model: Inventory) -> tuple[int, int, int, int]:
    """(hidden, intermediate, queries, keys and values together), numbers a token."""
    return (
        model.hidden_size,
        model.intermediate_size,
        model.num_heads * model.head_dim,
        2 * model.num_kv_heads * model.head_dim,
    )


def kept_bytes(
    model: Inventory,
    tokens: int,
    recompute: Sequence[str],
    ranks: int,
    itemsize: int = _FLOAT32,
    *,
    longest: int = 1,
    inputs: int = 0,
    idle: int = 0,
    kept_item: int | None = None,
) -> int:
    """What the layers keep for the backward pass, layer by layer as `recompute` says.

    ranks: of all adapters of a layer together (the products x Aᵀ). inputs: numbers a token that a layer of transformers
    keeps for adapters alone; idle: bytes a token that the first of them does not keep. longest: tokens of the longest
    row. kept_item: bytes of what is rounded while it waits.
    Left out: nothing of a token's size.
    """
    hidden, inner, q, kv = _widths(model)
    if model.fused:
        # x, both norms' outputs, the middle; q, k, v; attended; gate and up; the adapters' products; and in float32
        # the log-sums of attention and the two norms' factors
        item = kept_item or itemsize
        none = item * (4 * hidden + 2 * q + kv + 2 * inner) + itemsize * ranks + _FLOAT32 * (model.num_heads + 2)
        if model.head_norms:
            none += item * (q + kv // 2) + _FLOAT32 * (model.num_heads + model.num_kv_heads)
        of_layer = {"none": none, "cheap": none - 2 * item * hidden, "full": item * hidden}
    else:
        if model.kept is not None:
            none = ceil(model.kept.each_token(longest) / model.num_layers) + itemsize * (inputs + ranks)
        else:
            of_hidden, of_inner = _MODULES
            none = itemsize * (of_hidden * hidden + of_inner * inner + ranks)
        of_layer = {"none": none, "cheap": none, "full": itemsize * hidden}
    return tokens * (sum(of_layer[choice] for choice in recompute) - (idle if recompute[0] == "none" else 0))


def _widest(model: Inventory) -> int:
    """Numbers a token between the products of a layer's MLP: gate and up together, or the one that there is."""
    inner = model.intermediate_size
    layer = [linear for linear in model.linears if linear.layer == 0 and not linear.is_expert]
    found = sum(linear.out_features for linear in layer if linear.out_features % inner == 0)
    return found or 2 * inner


def layer_work_bytes(
    model: Inventory,
    tokens: int,
    recompute: Sequence[str],
    ranks: int,
    itemsize: int = _FLOAT32,
    *,
    kept_item: int | None = None,
    tile: int = TILE_TOKENS,
    **kept: int,
) -> int:
    """The largest working set of one layer, beside all that is kept: its backward pass, and what it computes again for
    that.

    tile: see tile_tokens. kept: more arguments of kept_bytes. Left out: panels of W (scratch_bytes).
    """
    hidden, inner, q, kv = _widths(model)
    computed = kept_bytes(model, 1, ("none",), ranks, itemsize, **kept)  # all that a layer's gradient needs
    again = computed - itemsize * hidden
    if not model.fused:
        # of the MLP's product and then what it is made of; or of what goes into attention and comes out
        backward = itemsize * (3 * hidden + max(_widest(model) + inner, 2 * q + kv))
        most = gone = 0
        for choice in reversed(recompute):  # what the layers behind have kept is gone then
            most = max(most, backward + (again if choice == "full" else 0) - gone)
            gone += kept_bytes(model, 1, (choice,), ranks, itemsize, **kept)
        return tokens * most
    # always the gradient of the output; then that of the product of gate and up; or the middle's, attention's and
    # those of q, k, v; or the last with those of the middle, of the norm, of the input, and the norm once more, which
    # `full` has already
    numbers = [hidden + inner, 2 * hidden + 2 * q + kv, 5 * hidden + q + kv]
    found = [itemsize * max(*numbers[:2], numbers[2] - hidden) + again] if "full" in recompute else []
    if set(recompute) != {"full"}:
        if (kept_item or itemsize) < itemsize:  # what was rounded is there once more: gate and up; attention's; norms'
            numbers = [numbers[0] + 2 * inner, numbers[1] + 2 * q + kv, numbers[2] + 2 * hidden]
            found.append(computed + itemsize * inner)  # forwards, before it is rounded
        found.append(itemsize * max(numbers))
    tile = tile_tokens(model, tokens, kept.get("longest", 1), tile)
    if tile == tokens:
        return tile * max(found)
    # gradients of the output and of the input, of all tokens: a tile's part of the first is a view
    return itemsize * hidden * (2 * tokens - tile) + tile * max(found)


def prompt_bytes(model: Inventory, tokens: int, itemsize: int = _FLOAT32) -> int:
    """What one layer has at once while a prompt goes through it, no gradient wanted (FusedLayer.run_in_place); of
    transformers' own all that it computes.
    """
    hidden, inner, q, kv = _widths(model)
    if not model.fused:
        return tokens * itemsize * (3 * hidden + max(2 * _widest(model), 2 * q + kv))
    # x, q, k, v, attended and its log-sums; and attention's operands
    whole = itemsize * (hidden + 2 * q + kv) + _FLOAT32 * model.num_heads
    whole += _FLOAT32 * (2 * q + kv) if itemsize < _FLOAT32 else 0
    # of a tile: gate and up with their product; or the norm's output with q, k, v, and those before their own norms
    numbers = max(3 * inner, hidden + q + kv + (2 * q if model.head_norms else 0), 3 * hidden)
    ordered = max(linear.in_features for linear in model.linears) if model.ordered else 0
    return tokens * whole + min(tokens, PROMPT_TOKENS) * itemsize * (numbers + ordered)


def tile_tokens(model: Inventory, tokens: int, longest: int, tile: int = TILE_TOKENS) -> int:
    """Tokens that go through a layer at once, at most `tile`. longest: of one row, which is never cut."""
    return min(tokens, max(longest, tile)) if model.fused else tokens


def scratch_bytes(
    model: Inventory,
    tokens: int,
    longest: int,
    threads: int,
    itemsize: int = _FLOAT32,
    *,
    tile: int = TILE_TOKENS,
    is_cpu: bool = True,
) -> int:
    """Memory that is used again and again: gradients of gate and up, their product, attention's partial sums and, in 16
    bits, its operands in float32; a product's operand in act-order; panels.

    longest: tokens of the longest row. tile: see tile_tokens.
    """
    _, inner, q, kv = _widths(model)
    parts = max(1, min(ATTENTION_MOST_PARTS, longest // ATTENTION_PART))
    wide = _FLOAT32 * (4 * q + 2 * kv) if itemsize < _FLOAT32 else 0  # q, k, v, the output, and gradients of them
    per_token = 3 * itemsize * inner + _FLOAT32 * parts * kv + wide if model.fused else 0
    if model.ordered:
        per_token += itemsize * max(linear.in_features for linear in model.linears)
    panels = panel_bytes(threads) if is_cpu else itemsize * DEVICE_PANEL_WEIGHTS
    return tile_tokens(model, tokens, longest, tile) * per_token + panels


def panel_bytes(threads: int) -> int:
    """De-quantised weights of each thread, and what BLAS makes of them."""
    return threads * 4 * PANEL_WEIGHTS * _FLOAT32


def program_bytes(most_tokens: int, least_tokens: int) -> int:
    """What oneDNN compiles for products in 16 bits, for each number of rows, a multiple of 64 (model/device.py).

    most_tokens, least_tokens: of a micro-batch. Two more stand for the labels and for rows that are evaluated.
    """
    return _PROGRAMS * (2 + ceil(most_tokens / 64) - least_tokens // 64)


def chunk_positions(positions: int, classes: int, most: int | None = None) -> int:
    """How many positions' logits the loss computes at once: at most `most`, by default 128 MiB of them in float32.

    All chunks are about as long.
    """
    most = most or most_positions(classes)
    return max(1, ceil(positions / max(1, ceil(positions / most))))


def most_positions(classes: int) -> int:
    """How many positions' logits are 128 MiB of float32, at least 16."""
    return max(16, _CHUNK_LOGITS // classes)


def loss_bytes(
    model: Inventory,
    tokens: int,
    labels: int,
    itemsize: int = _FLOAT32,
    head_parameters: int = 0,
    *,
    chunk: int | None = None,
    is_cpu: bool = True,
) -> int:
    """With the last norm's input, of all tokens: the hidden states of the labelled positions, their gradient and a
    chunk of logits with its own; or then what the norm's gradient needs, of all tokens.

    chunk: see chunk_positions. For what the head learns (head_parameters) a chunk's gradient, the chunks' sum, and the
    parameters in the compute type. Elsewhere than on a CPU some of a chunk is there twice more, in float32.
    """
    # not the equal chunks of these labels: fewer of them may come to a longer one
    positions = min(labels, chunk or most_positions(model.vocab_size))
    if is_cpu and itemsize < _FLOAT32:
        positions = 64 * ceil(positions / 64)  # see program_bytes
    of_chunk = positions * (model.vocab_size + 2 * model.hidden_size)
    wide = 0 if is_cpu else 2 * _FLOAT32 * min(positions * model.vocab_size, max(TWIN_LOGITS, model.vocab_size))
    of_norm = 0 if model.kept else tokens * model.hidden_size  # kept has its input
    selected, states = 2 * labels * model.hidden_size, tokens * model.hidden_size
    if model.fused:  # the gradient before the norm and behind it
        numbers = of_norm + max(selected + of_chunk, 2 * states)
    elif itemsize < _FLOAT32:  # the norm computes in float32 and keeps that
        numbers = of_norm + 3 * states + selected + of_chunk
    else:
        numbers = of_norm + max(selected + of_chunk, 5 * states)
    learnt = head_parameters * (2 * _FLOAT32 + (itemsize if itemsize < _FLOAT32 else 0))
    return itemsize * numbers + learnt + wide


def evaluation_bytes(
    model: Inventory,
    tokens: int,
    labels: int,
    recompute: str,
    ranks: int,
    longest: int,
    itemsize: int = _FLOAT32,
    *,
    tile: int = TILE_TOKENS,
    chunk: int | None = None,
    is_cpu: bool = True,
) -> int:
    """Held-out rows without a gradient: a layer's pass, which makes all that one would need and gathers what waits for
    one, tile after tile; or the loss, counted as in training. Left out: scratch_bytes.
    """
    kept = {"ranks": ranks, "itemsize": itemsize, "longest": longest}
    tile = tile_tokens(model, tokens, longest, tile)
    whole = kept_bytes(model, tokens, (recompute,), **kept) + itemsize * tokens * model.hidden_size
    layer = whole + kept_bytes(model, tile, ("none",), **kept) + itemsize * tile * _widest(model)
    return max(layer, loss_bytes(model, tokens, labels, itemsize, chunk=chunk, is_cpu=is_cpu))


def adapter_bytes(
    parameters: int, state_bytes: float, kept: int, layers: int, *, at_once: bool, head_parameters: int = 0
) -> dict[str, int]:
    """Adapters and gradients in float32, and `state_bytes` of the optimizer for each parameter.

    Gradients come while kept activations (`kept` bytes, of so many layers) go, layer by layer: what counts is how much
    more they are in the end. The head's come first. at_once: all count beside the activations, as with accumulation.
    """
    size = _FLOAT32 * parameters
    first = size if at_once else _FLOAT32 * head_parameters
    gradients = first + max(0, size - first - kept + kept // layers)
    return {"adapters": size, "gradients": gradients, "optimizer": round(state_bytes * parameters)}


def stream_bytes(model: Inventory, streamed: Sequence[int]) -> int:
    """The two slots that streamed layers take turns in (model/stream.py)."""
    sizes = model.layer_bytes
    return min(2, len(streamed)) * max((sizes[layer] for layer in streamed), default=0)
