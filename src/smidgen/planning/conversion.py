"""Memory of `smidgen quantize` and `smidgen merge` as arithmetic.

They go through a model tensor by tensor, or layer by layer, and what has been made waits until a shard's worth of it is
written. So its peak is that of a walk over pieces:

    peak = what is there all the time + max over pieces of (what waits already + this piece + what making it takes)

The size of a shard is what a budget can choose; of a merge, whether the base stays in memory too. Everything counts
bytes.
"""

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from math import ceil

from smidgen.errors import SettingsError
from smidgen.planning.budget import too_little
from smidgen.planning.inventory import Inventory, packed_bytes
from smidgen.units import format_bytes

__all__ = [
    "LARGEST_SHARD",
    "LEFT_BY_GPTQ",
    "Conversion",
    "Piece",
    "comparison_bytes",
    "fitting",
    "gptq_group_bytes",
    "gptq_pieces",
    "hidden_state_bytes",
    "merged_pieces",
    "packed_pieces",
    "walk_bytes",
]

LARGEST_SHARD = 2_000_000_000
_SMALLEST_SHARD = 1 << 26
_FLOAT32 = 4
_FLOAT64_UP_TO = 4096  # inputs whose Hessian is factored in float64 (quant/gptq.py)
_RUNTIME = 64 << 20  # buffers of BLAS, panels of rows, tables of the tokenizer, what the allocator keeps

_LAPACK = 16 << 20  # program pages and buffers that come with the first factor
# Anonymous memory that a process keeps which has quantised: LAPACK's, and what the allocator does not give back. 22 to
# 41 MB were measured, of four models (docs/memory.md).
LEFT_BY_GPTQ = _LAPACK + (32 << 20)


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

    def within(self, budget: int, where: str, what: str, more: str = "") -> str:
        """What is said of it. Raises SettingsError where `budget` bytes are too little; the words are too_little's."""
        if self.peak_bytes > budget:
            raise SettingsError([too_little(budget, where, what, self.peak_bytes, more)])
        forecast, files = format_bytes(self.peak_bytes), format_bytes(self.shard_bytes)
        return f"memory: forecast {forecast} of {format_bytes(budget)}, files of {files}"


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


def hidden_state_bytes(model: Inventory, tokens: int) -> int:
    """tokens: of calibration text, and of held-out text once for each of four ways to store a layer; float32."""
    return _FLOAT32 * model.hidden_size * tokens


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


def gptq_pieces(
    model: Inventory, *, act_order: bool, copies: bool, bits: int = 4, group_size: int = 128, itemsize: int = 2
) -> list[Piece]:
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
                waiting += _gptq_file_bytes(linear.out_features, linear.in_features, bits, group_size)
        making = max(gptq_group_bytes(inputs, outputs, act_order=act_order) for (_, inputs), outputs in groups.items())
        pieces.append(Piece(making + model.layer_bytes[layer] + waiting, waiting))
    return [_look(model), *pieces, embedding, head]


def _gptq_file_bytes(outputs: int, inputs: int, bits: int, group_size: int) -> int:
    """qweight, qzeros, scales and g_idx of a linear layer (export/packed.py)."""
    groups = 1 if group_size == -1 else ceil(inputs / group_size)
    zeros = 4 * groups * ceil(outputs * bits / 32)
    return 4 * outputs * ceil(inputs * bits / 32) + zeros + 2 * groups * outputs + 4 * inputs


def merged_pieces(
    model: Inventory, itemsize: int, *, copies: bool, has_own_head: bool, grows: bool, file_bytes: int, adapters: int
) -> list[Piece]:
    """Loading base and adapters, then each matrix dense in the files' type, made panel by panel.

    itemsize: of the files' type. copies: the embedding is written in another form than the base's file has it.
    has_own_head: of a tied model whose head has learnt apart. grows: rows of new tokens are added. file_bytes: of the
    decoder layers in the base's file. adapters: bytes in memory, of which there are twice as many while they are read.
    """
    embedding, head = _others(model, copies=copies, itemsize=itemsize)
    matrix = itemsize * model.vocab_size * model.hidden_size
    if has_own_head and not model.head_bytes:
        head = Piece(model.embedding_bytes, matrix)
    if grows:
        embedding, head = (Piece(each.making_bytes + matrix, each.waiting_bytes) for each in (embedding, head))
    weights: Counter[str] = Counter()  # experts of a layer are read and written together
    pages: Counter[str] = Counter()
    experts = set()
    for linear in model.linears:
        name = linear.name.rpartition(".")[0] if linear.is_expert else linear.name
        weights[name] += linear.weights
        pages[name] += linear.nbytes if model.mapped else 0
        experts |= {name} if linear.is_expert else set()
    loading = Piece(max(adapters, max(weights.values()) * file_bytes // model.weights), 0)
    matrices = [
        Piece(pages[name] + (itemsize * count if name in experts else 0), itemsize * count)
        for name, count in weights.items()
    ]
    return [loading, embedding, *matrices, head]


def comparison_bytes(model: Inventory, itemsize: int, tokens: int) -> int:
    """The pass of a short text through base and merged model: pages of one layer and of the head; hidden states of a
    layer; and seven tables of float32 logits, those of both and what their distance takes (export/compare.py).
    """
    written = itemsize * (max(_layer_weights(model)) + model.vocab_size * model.hidden_size)
    own = (max(model.layer_bytes) if model.mapped else 0) + (model.head_bytes or model.embedding_bytes)
    states = _FLOAT32 * tokens * (8 * model.hidden_size + 4 * model.intermediate_size)
    return max(written, own) + states + 7 * _FLOAT32 * tokens * model.vocab_size


def _layer_weights(model: Inventory) -> list[int]:
    sums = [0] * model.num_layers
    for linear in model.linears:
        sums[linear.layer] += linear.weights
    return sums


def fitting(
    pieces: Sequence[Piece], always: Mapping[str, int], memory: int | None = None, *, at_least: int = 0
) -> Conversion:
    """The forecast with the largest shard for which it is within `memory` bytes, or with the smallest shard.

    always: terms of what is there from the start to the end, this process as it is now among them. None: no limit.
    at_least: what the work takes apart from the pieces, and not beside them.
    """
    shard = LARGEST_SHARD
    while True:
        terms = {**always, "layers and shard": max(at_least, walk_bytes(pieces, shard)), "runtime": _RUNTIME}
        plan = Conversion({name: size for name, size in terms.items() if size}, shard)
        if memory is None or plan.peak_bytes <= memory or shard <= _SMALLEST_SHARD:
            return plan
        shard = max(_SMALLEST_SHARD, shard // 2)
