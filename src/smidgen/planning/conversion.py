"""Memory of `smidgen quantize` as arithmetic.

It goes through a model tensor by tensor, or layer by layer, and what has been made waits until a shard's worth of it is
written. So its peak is that of a walk over pieces:

    peak = framework + hidden states + max over pieces of (what waits already + this piece + what making it takes)

The size of a shard is what a budget can choose. Everything counts bytes.
"""

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from smidgen.planning.inventory import Inventory, packed_bytes

__all__ = [
    "LARGEST_SHARD",
    "Conversion",
    "Piece",
    "fitting",
    "gptq_group_bytes",
    "gptq_pieces",
    "hidden_state_bytes",
    "packed_pieces",
    "walk_bytes",
]

LARGEST_SHARD = 2_000_000_000
_SMALLEST_SHARD = 1 << 26
_FLOAT32 = 4
_FLOAT64_UP_TO = 4096  # inputs whose Hessian is factored in float64 (quant/gptq.py)
_RUNTIME = 64 << 20  # buffers of BLAS, panels of rows, tables of the tokenizer, what the allocator keeps

_LAPACK = 16 << 20  # program pages and buffers that come with the first factor


@dataclass(frozen=True)
class Piece:
    """What is written together. making: only while it is made; waiting: until its shard is written; mapped: pages of
    the model file that it is a view of, which come back when the shard is written.
    """

    making_bytes: int
    waiting_bytes: int
    mapped_bytes: int = 0


@dataclass(frozen=True)
class Conversion:
    """A forecast. terms: name -> bytes. shard_bytes: a shard is written when so much waits."""

    terms: dict[str, int]
    shard_bytes: int

    @property
    def peak_bytes(self) -> int:
        return sum(self.terms.values())


def walk_bytes(pieces: Iterable[Piece], shard_bytes: int) -> int:
    """The peak of making the pieces one after the other and writing whenever `shard_bytes` or more wait."""
    peak = waiting = mapped = 0
    for piece in pieces:
        peak = max(peak, waiting + max(piece.making_bytes, piece.mapped_bytes) + piece.waiting_bytes)
        waiting, mapped = waiting + piece.waiting_bytes, mapped + piece.mapped_bytes
        if waiting + mapped >= shard_bytes:
            peak, waiting, mapped = max(peak, waiting + mapped), 0, 0
    return max(peak, waiting + mapped)


def _others(model: Inventory, *, copies: bool, itemsize: int) -> tuple[Piece, Piece]:
    """(embedding, head). copies: they are written in another type than the file's; a head is always copied."""
    embedding = Piece(0, 0, model.embedding_bytes)
    if copies:
        embedding = Piece(model.embedding_bytes, itemsize * model.vocab_size * model.hidden_size)
    head = Piece(model.head_bytes, itemsize * model.vocab_size * model.hidden_size if model.head_bytes else 0)
    return embedding, head


def _look(model: Inventory) -> Piece:
    """The pass through the whole model that checks it: pages of one layer and of the head."""
    return Piece(max(model.layer_bytes) + (model.head_bytes or model.embedding_bytes), 0)


def packed_pieces(model: Inventory, storage: str, *, copies: bool, itemsize: int = 2) -> list[Piece]:
    """Each linear layer dense in float32 beside its pages of the file, then packed. model: as it is stored now."""
    embedding, head = _others(model, copies=copies, itemsize=itemsize)
    linears = [
        Piece(_FLOAT32 * linear.weights + linear.nbytes, packed_bytes(linear.out_features, linear.in_features, storage))
        for linear in model.linears
    ]
    return [_look(model), embedding, *linears, head]


def hidden_state_bytes(model: Inventory, calibration_tokens: int, held_out_tokens: int) -> int:
    """Of calibration text once, of held-out text once for each of four ways to store a layer; float32."""
    return _FLOAT32 * model.hidden_size * (calibration_tokens + 4 * held_out_tokens)


def gptq_group_bytes(inputs: int, outputs: int, *, act_order: bool) -> int:
    """Quantising linear layers of one input together (quant/gptq.py). outputs: of all of them.

    There all the time: H, the weights in float32, and the copy that is moved; with act_order H in that order too.
    Beside them either the factor is computed, or codes are.
    """
    square, weights = _FLOAT32 * inputs * inputs, _FLOAT32 * inputs * outputs
    number = 2 if inputs <= _FLOAT64_UP_TO else 1  # of float32s in one of the factor's numbers
    # the reversed H and its factor; then the factor, the unit matrix, the solution and what the solver copies
    factoring = 4 * number * square
    coding = square + weights // 4 + weights // 8
    reordering = max(2 * square, square + weights) if act_order else 0
    return _LAPACK + square + 2 * weights + max(reordering, (square if act_order else 0) + max(factoring, coding))


def gptq_pieces(model: Inventory, *, act_order: bool, copies: bool, bits: int = 4, itemsize: int = 2) -> list[Piece]:
    """A piece for each decoder layer, all of whose pages are there while it is worked on; then embedding and head.

    Linear layers of one module with as many inputs are taken to have the same input: at most too many together.
    """
    embedding, head = _others(model, copies=copies, itemsize=itemsize)
    pieces = []
    for layer in range(model.num_layers):
        groups: Counter[tuple[str, int]] = Counter()
        waiting = 0
        for linear in model.linears:
            if linear.layer == layer:
                groups[linear.name.rpartition(".")[0], linear.in_features] += linear.out_features
                waiting += packed_bytes(linear.out_features, linear.in_features, "gptq") * bits // 4
        making = max(gptq_group_bytes(inputs, outputs, act_order=act_order) for (_, inputs), outputs in groups.items())
        pieces.append(Piece(making + model.layer_bytes[layer] + waiting, waiting))
    return [_look(model), *pieces, embedding, head]


def fitting(
    pieces: Sequence[Piece], framework_bytes: int, hidden_bytes: int, norm_bytes: int, memory: int | None = None
) -> Conversion:
    """The forecast with the largest shard for which it is within `memory` bytes, or with the smallest shard.

    framework_bytes: of the process now. hidden_bytes: see hidden_state_bytes. None: no limit.
    """
    shard = LARGEST_SHARD
    while True:
        terms = {
            "framework": framework_bytes,
            "norms and biases": 2 * norm_bytes,
            "hidden states": hidden_bytes,
            "layers and shard": walk_bytes(pieces, shard),
            "runtime": _RUNTIME,
        }
        plan = Conversion({name: size for name, size in terms.items() if size}, shard)
        if memory is None or plan.peak_bytes <= memory or shard <= _SMALLEST_SHARD:
            return plan
        shard = max(_SMALLEST_SHARD, shard // 2)
