"""A budget of memory -> the fastest settings that fit it, each with its reason.

The solver looks at every micro-batch that leaves the optimizer steps as they are, smaller pieces of it for a layer and
for the loss, every number of layers that stay in memory and every number of layers that are computed again, adds up the
terms of estimate.py and takes the fastest; of equally fast ones, the one that reads least from disk.
"""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import product
from math import ceil

from smidgen.kernels.sizes import TILE_TOKENS
from smidgen.planning import estimate
from smidgen.planning.estimate import RECOMPUTE
from smidgen.planning.inventory import Inventory
from smidgen.planning.work import Work
from smidgen.units import format_bytes

__all__ = [
    "Choice",
    "Forecast",
    "Machine",
    "fastest",
    "forecast",
    "forecasts",
    "reasons",
    "smallest",
    "spread",
    "with_base",
]

_FORWARD_SHARE = 0.5  # of a layer's products: forward, and again as much for the gradient of its input
_OF_PIECE = 20  # tokens: what one tile, or chunk of the loss, costs beside its tokens: 0.29 s and 13 ms at 135M
_HALVINGS = 4  # sizes of pieces that the solver looks at, each half of the one before
_LEAST_TILE, _LEAST_CHUNK = 256, 64  # smaller products are slower by more than _OF_PIECE says
_SLACK = 0.01  # of everything but the base: the allocator's, and what the terms leave out
_MAPPED_AROUND = 1 << 16  # pages of a file that Linux maps where one of them is touched, those in its cache
_RUNTIME, _OF_THREAD = 8 << 20, 12 << 20  # what starts with the first step: buffers of BLAS, stacks of threads
_TOUCHED_LATER = 8 << 20  # of program files that are open already: pages that the first products and tokens bring in
_DEVICE_RUNTIME = 80 << 20  # a workspace of cuBLAS for each direction; 77 MB on an H100, less on older cards


@dataclass(frozen=True)
class Machine:
    """gflops: of products with packed weights; weights_per_s: that one token's products read from memory;
    disk_bytes_per_s: reading; framework_bytes: anonymous memory of the process before the model is loaded;
    library_bytes: its resident pages of program files. is_cpu: it computes there. compiles: products in 16 bits are
    compiled, for each number of rows.
    """

    gflops: float
    weights_per_s: float
    disk_bytes_per_s: float
    framework_bytes: int
    library_bytes: int
    threads: int
    is_cpu: bool = True
    compiles: bool = True


@dataclass(frozen=True)
class Choice:
    """recompute: of each layer. streamed: indices of the layers that are not kept in memory. pack: tokens that are
    computed at once, in place of so many rows. tile_tokens, loss_chunk: see train.config.Settings.
    """

    micro_batch: int
    accumulation: int
    recompute: tuple[str, ...]
    streamed: tuple[int, ...] = ()
    pack: int | None = None
    tile_tokens: int = TILE_TOKENS
    loss_chunk: int | None = None

    @property
    def recompute_name(self) -> str:
        """'none', 'cheap', 'full', or for a mixture 'full in 12 of 32 layers'."""
        kinds = sorted(set(self.recompute))
        if len(kinds) == 1:
            return kinds[0]
        return f"full in {self.recompute.count('full')} of {len(self.recompute)} layers"


@dataclass(frozen=True)
class Forecast:
    """terms: name -> bytes; mapped: those terms whose pages lie in files and can be given up by the system.

    peak_bytes counts all terms; step_s is the time of one optimizer step, read_bytes what it reads from disk; tokens:
    of the largest micro-batch.
    """

    choice: Choice
    terms: dict[str, int]
    mapped: frozenset[str]
    step_s: float
    read_bytes: int
    tokens: int

    @property
    def peak_bytes(self) -> int:
        return sum(self.terms.values())

    @property
    def anonymous_bytes(self) -> int:
        """Without what lies in files."""
        return sum(size for name, size in self.terms.items() if name not in self.mapped)


def forecast(model: Inventory, work: Work, machine: Machine, choice: Choice) -> Forecast:
    """Memory and time of one choice."""
    load = work.load(choice.micro_batch, choice.pack, choice.tile_tokens, model.fused)
    longest = work.rows.longest
    item, threads = work.itemsize, machine.threads
    in_64s = machine.is_cpu and item == 2  # see program_bytes
    load = load.padded(64) if in_64s else load
    tokens = load.tokens
    may_pad = not model.fused and choice.micro_batch > 1 and longest > work.rows.shortest  # in more, smaller batches
    more = {"longest": longest, "inputs": work.inputs}
    layers = (model, tokens, choice.recompute, work.ranks, item)
    kept = estimate.kept_bytes(*layers, **more, idle=work.idle, kept_item=work.kept_item)
    tile, chunk, is_cpu = choice.tile_tokens, choice.loss_chunk, machine.is_cpu
    backward = estimate.layer_work_bytes(*layers, **more, kept_item=work.kept_item, tile=tile)
    loss = estimate.loss_bytes(model, tokens, load.labels, item, work.head_parameters, chunk=chunk, is_cpu=is_cpu)
    scratch = estimate.scratch_bytes(model, tokens, longest, threads, item, tile=tile, is_cpu=is_cpu)
    reuses = is_cpu and model.fused  # pages: what one thing has had stays beside what comes later (kernels/pages.py)
    small = {
        **estimate.adapter_bytes(
            work.parameters,
            work.state_bytes,
            kept,
            model.num_layers,
            at_once=reuses or choice.accumulation > 1 or choice.pack is not None or may_pad,
            head_parameters=work.head_parameters,
        ),
        "kept activations": kept,
        "one layer's working set": max(0, backward - loss),  # the two are never at once; together they are the larger
        "loss chunk": loss,
        "scratch": scratch,
    }
    if reuses and model.embedding_bytes < item * model.vocab_size * model.hidden_size:
        small["looked-up embeddings"] = tokens * model.embedding_bytes // model.vocab_size  # before they are converted
    if evaluated := work.rows.evaluated(choice.micro_batch, model.fused):
        evaluated = evaluated.padded(64) if in_64s else evaluated
        held_out = estimate.evaluation_bytes(
            model, evaluated.tokens, evaluated.labels, choice.recompute[-1], work.ranks, longest, item, tile=tile,
            chunk=chunk, is_cpu=is_cpu,
        )  # fmt: skip
        held_out += estimate.scratch_bytes(model, evaluated.tokens, longest, threads, item, tile=tile, is_cpu=is_cpu)
        small["held-out rows"] = max(0, held_out - kept - max(backward, loss) - scratch)  # there are no gradients then
        load |= evaluated
    if in_64s and machine.compiles:
        small["programs"] = estimate.program_bytes(load.tokens, load.least_tokens)
    terms, mapped = with_base(model, machine, choice.streamed, small, load.tokens)
    step_s, read_bytes = _time(model, work, machine, choice)
    return Forecast(choice, terms, mapped, step_s, read_bytes, tokens)


def with_base(
    model: Inventory, machine: Machine, streamed: Sequence[int], small: dict[str, int], tokens: int
) -> tuple[dict[str, int], frozenset[str]]:
    """(all terms: the base and the process beside what is done with them, `small`; which of them lie in files).

    tokens: that are looked up at once.
    """
    looked_up = model.embedding_bytes
    if machine.is_cpu:  # where it lies in a file (model/pages.py); a card has it whole
        looked_up = min(looked_up, tokens * (_MAPPED_AROUND + model.embedding_bytes // model.vocab_size))
    sizes = model.layer_bytes
    beside = {"framework": machine.framework_bytes, "norms and biases": model.norm_bytes, **small}
    slack = round(_SLACK * (sum(beside.values()) - machine.framework_bytes))
    runtime = _RUNTIME + machine.threads * _OF_THREAD if machine.is_cpu else _DEVICE_RUNTIME
    terms = {
        "packed weights": model.packed_bytes - sum(sizes[layer] for layer in streamed),
        "embedding and head": (model.head_bytes or model.embedding_bytes) + (looked_up if model.head_bytes else 0),
        "program files": machine.library_bytes + (_TOUCHED_LATER if machine.library_bytes else 0),
        "stream buffers": estimate.stream_bytes(model, streamed),
        **beside,
        "runtime and slack": runtime + slack,
    }
    mapped = {"embedding and head", "program files", *(("packed weights",) if model.mapped else ())}
    return terms, frozenset(mapped)


def _time(model: Inventory, work: Work, machine: Machine, choice: Choice) -> tuple[float, int]:
    """(seconds of one optimizer step, bytes that it reads from disk). Left out: norms, attention, the optimizer."""
    batches = work.batches(choice.micro_batch, choice.pack)
    share = choice.recompute.count("full") / len(choice.recompute)
    head = model.vocab_size * model.hidden_size
    computed, labelled = (work.mean_tokens * part for part in (work.rows.computed, work.rows.labelled))
    tile = choice.tile_tokens if model.fused else computed
    chunk = choice.loss_chunk or estimate.most_positions(model.vocab_size)
    tiles, chunks = (batches * ceil(tokens / batches / most) for tokens, most in ((computed, tile), (labelled, chunk)))
    of_layers = (computed + _OF_PIECE * tiles) * model.weights * (1 + _FORWARD_SHARE * share)
    flops = 4 * (of_layers + (labelled + _OF_PIECE * chunks) * head)
    sizes = [model.layer_bytes[layer] for layer in sorted(choice.streamed)]
    # forwards and backwards, but at either end two layers are there already
    read = batches * max(0, 2 * sum(sizes) - sum(sizes[:2]) - sum(sizes[-2:]))
    return max(flops / machine.gflops / 1e9, read / machine.disk_bytes_per_s), read


def spread(count: int, layers: int) -> tuple[int, ...]:
    """`count` of the layers, as evenly apart as can be, so that there is time to read between them."""
    return tuple(sorted({round((i + 0.5) * layers / count - 0.5) for i in range(count)})) if count else ()


def _at_once(work: Work, micro_batch: int, pack: int | None) -> list[tuple[int, int | None]]:
    """(micro-batch, pack), smaller and smaller, that leave the optimizer steps as they are."""
    sizes = [m for m in range(micro_batch, 0, -1) if work.rows_per_step % m == 0]
    if pack is None:
        return [(m, None) for m in sizes]
    halvings = (max(1, pack // work.rows.longest)).bit_length()  # down to the longest row; rows held out follow
    found = [(pack >> n, next(m for m in sizes if m <= max(1, micro_batch >> n))) for n in range(halvings)]
    return [(m, tokens) for tokens, m in [*found, (min(pack, work.rows.longest), 1)]]


def _pieces(model: Inventory, tile: int, chunk: int | None) -> list[tuple[int, int | None]]:
    """(tile_tokens, loss_chunk), smaller and smaller."""
    most = chunk or estimate.most_positions(model.vocab_size)
    least_tile = min(tile, _LEAST_TILE) if model.fused else tile
    least_chunk = min(most, _LEAST_CHUNK)
    smaller = [(max(least_tile, tile >> n), max(least_chunk, most >> n)) for n in range(1, _HALVINGS)]
    return list(dict.fromkeys([(tile, chunk), *smaller]))


def _choices(model: Inventory, work: Work, given: Choice, *, can_stream: bool, recompute: str) -> Iterator[Choice]:
    layers = model.num_layers
    if recompute != "auto":
        mixtures = [(recompute,) * layers]
    else:
        least = "cheap" if model.fused else "none"
        counts = sorted({layers * part // 8 for part in range(9)})
        mixtures = [("none",) * layers, *(("full",) * n + (least,) * (layers - n) for n in counts)]
    ways = [spread(count, layers) for count in (range(layers + 1) if can_stream else (0,))]
    ways = [streamed for count, streamed in enumerate(ways) if len(streamed) == count]
    at_once = dict.fromkeys(_at_once(work, given.micro_batch, given.pack))
    pieces = _pieces(model, given.tile_tokens, given.loss_chunk)
    for (m, tokens), (tile, chunk), mixture, streamed in product(at_once, pieces, dict.fromkeys(mixtures), ways):
        yield Choice(m, work.rows_per_step // m, mixture, streamed, tokens, tile, chunk)


def forecasts(
    model: Inventory,
    work: Work,
    machine: Machine,
    given: Choice,
    *,
    recompute: str = "auto",
    can_stream: bool = True,
) -> list[Forecast]:
    """Of every choice that there is: what `fastest` and `smallest` choose from. given: the most of each that is to be
    computed at once. recompute: of all layers, 'auto': any.
    """
    choices = _choices(model, work, given, can_stream=can_stream, recompute=recompute)
    return [forecast(model, work, machine, choice) for choice in choices]


def fastest(found: Iterable[Forecast], budget: int) -> Forecast | None:
    """The fastest that fits the budget (bytes, everything counted); None if none does."""
    return min((each for each in found if each.peak_bytes <= budget), key=_rank, default=None)


def smallest(found: Iterable[Forecast]) -> Forecast:
    """The one that needs least memory, whatever its speed."""
    return min(found, key=lambda each: each.peak_bytes)


def _rank(found: Forecast) -> tuple[float, int, int, int, int]:
    """Faster first (to three digits), then fewer bytes read, larger micro-batches, less that is computed again."""
    choice = found.choice
    at_once = (-(choice.pack or 0), -choice.micro_batch)
    return float(f"{found.step_s:.3g}"), found.read_bytes, *at_once, RECOMPUTE.index(choice.recompute[0])


def reasons(model: Inventory, found: Forecast, work: Work, given: Choice, budget: int) -> list[str]:
    """A sentence for each choice that the budget made, where `given` was asked for."""
    choice, there = found.choice, format_bytes(budget)
    lines = [f"memory: forecast {format_bytes(found.peak_bytes)} of {there}"]
    if choice.streamed:
        moved = sum(model.layer_bytes[layer] for layer in choice.streamed)
        lines.append(
            f"{len(choice.streamed)} of {model.num_layers} layers are streamed from disk: {format_bytes(moved)} do not"
            f" stay in memory, {format_bytes(found.read_bytes)} are read for each step"
        )
    lines.append(f"recompute {choice.recompute_name}: kept activations {format_bytes(found.terms['kept activations'])}")
    if choice.tile_tokens < given.tile_tokens or choice.loss_chunk != given.loss_chunk:
        lines.append(
            f"a layer takes at most {choice.tile_tokens} tokens at once, the loss {choice.loss_chunk}: scratch"
            f" {format_bytes(found.terms['scratch'])}, loss chunk {format_bytes(found.terms['loss chunk'])}"
        )
    if choice.pack is not None:
        lines.append(f"rows are packed into at most {choice.pack} tokens: the same optimizer steps")
    elif choice.accumulation * choice.micro_batch == work.rows_per_step and choice.accumulation > 1:
        lines.append(f"micro-batch {choice.micro_batch}, accumulation {choice.accumulation}: the same optimizer steps")
    return lines
