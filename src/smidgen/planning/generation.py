"""Memory of generation: one prompt, then token after token. The base and the process count as in training.

Where a budget is too small for all of it, two things are given up in turn: keys and values wait rounded to bfloat16,
at half of float32's memory; then layers are read from disk for each token.
"""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass

from smidgen.errors import SettingsError
from smidgen.kernels.sizes import cache_capacity
from smidgen.planning import estimate
from smidgen.planning.budget import too_little
from smidgen.planning.inventory import Inventory
from smidgen.planning.planner import Choice, Forecast, Machine, spread, with_base
from smidgen.units import format_bytes

__all__ = ["GenerationPlan", "cache_bytes", "generation_plans", "plan_generation"]

_FLOAT32, _BFLOAT16 = 4, 2


@dataclass(frozen=True)
class GenerationPlan:
    """forecast: its step is one new token. cache_item: bytes of a number in the key cache. tokens: of prompt and answer
    together that there is room for.
    """

    forecast: Forecast
    cache_item: int
    tokens: int

    @property
    def cache_dtype(self) -> str:
        return {_FLOAT32: "float32", _BFLOAT16: "bfloat16"}[self.cache_item]

    @property
    def streamed(self) -> tuple[int, ...]:
        return self.forecast.choice.streamed

    def reasons(self, model: Inventory, budget: int) -> list[str]:
        """A sentence for each choice that the budget (bytes) made."""
        found = self.forecast
        lines = [f"memory: forecast {format_bytes(found.peak_bytes)} of {format_bytes(budget)}, {self.tokens} tokens"]
        if model.fused and self.cache_item < _FLOAT32:
            lines.append(
                f"keys and values wait in bfloat16: {format_bytes(found.terms['key cache'])}, half of float32's"
            )
        if self.streamed:
            lines.append(
                f"{len(self.streamed)} of {model.num_layers} layers are streamed from disk:"
                f" {format_bytes(found.read_bytes)} are read for each token"
            )
        return lines


def plan_generation(
    model: Inventory, ways: Iterable[GenerationPlan], budget: int, where: str = "--memory"
) -> GenerationPlan:
    """The first of `ways` (see generation_plans) within the budget (bytes). Raises SettingsError where none is."""
    for plan in ways:
        if plan.forecast.peak_bytes <= budget:
            return plan
    prompt_tokens = plan.forecast.tokens
    last = ", with every layer read from disk for each token" if plan.streamed else ""
    more = (
        f" for a prompt of {prompt_tokens} tokens and an answer of {plan.tokens - prompt_tokens}{last}; a shorter"
        " prompt or answer needs less"
    )
    name, least = model.name or "this model", plan.forecast.peak_bytes
    raise SettingsError([too_little(budget, where, f"for {name}", least, more)])


def generation_plans(
    model: Inventory,
    machine: Machine,
    prompt_tokens: int,
    new_tokens: int,
    itemsize: int,
    *,
    adapter_bytes: int = 0,
    can_stream: bool = True,
) -> Iterator[GenerationPlan]:
    """Every way, from that which gives up nothing to the smallest.

    itemsize: of the compute type. adapter_bytes: of adapters in memory. step_s of a forecast: seconds of one new token
    by its products and reading alone; read_bytes: of it.
    """
    counts = range(model.num_layers + 1) if can_stream else (0,)
    ways = [((), _FLOAT32), *((spread(count, model.num_layers), _BFLOAT16) for count in counts)]
    for streamed, item in ways:
        cache_item = item if model.fused else itemsize
        small = {
            "adapters": adapter_bytes,
            "key cache": cache_bytes(model, prompt_tokens, new_tokens, cache_item),
            "one layer's working set": estimate.prompt_bytes(model, prompt_tokens, itemsize),
        }
        found = _forecast(model, machine, prompt_tokens, itemsize, small, streamed)
        yield GenerationPlan(found, cache_item, prompt_tokens + new_tokens)


def _forecast(
    model: Inventory,
    machine: Machine,
    prompt_tokens: int,
    itemsize: int,
    small: dict[str, int],
    streamed: tuple[int, ...],
) -> Forecast:
    """small: the terms that depend on how it is done."""
    small = {
        **small,
        "logits": 3 * _FLOAT32 * model.vocab_size,  # of one position: themselves, in order, and their sum
        "scratch": estimate.panel_bytes(machine.threads),
    }
    if machine.is_cpu and machine.compiles and itemsize < _FLOAT32:
        small["programs"] = estimate.program_bytes(prompt_tokens, prompt_tokens)
    terms, mapped = with_base(model, machine, streamed, small, prompt_tokens)
    sizes = [model.layer_bytes[layer] for layer in streamed]
    read = max(0, sum(sizes) - sum(sizes[:2]))
    weights = model.weights + model.vocab_size * model.hidden_size
    step_s = max(weights / machine.weights_per_s, read / machine.disk_bytes_per_s)
    choice = Choice(1, 1, ("none",) * model.num_layers, streamed)
    return Forecast(choice, terms, mapped, step_s, read, prompt_tokens)


def cache_bytes(model: Inventory, prompt_tokens: int, new_tokens: int, item: int) -> int:
    """Keys and values of all layers, of one row, where they are largest. item: bytes of a number.

    smidgen's own decoder keeps room, which grows by half, a layer's keys or values at a time: beside the last ones that
    are made are those that they are copied from. transformers' cache grows by a token, one layer at a time.
    """
    numbers = 2 * model.num_kv_heads * model.head_dim
    tokens = prompt_tokens + new_tokens - 1  # nothing follows the last one
    if not model.fused:
        return item * numbers * tokens * (model.num_layers + 1)
    before, capacity = 0, cache_capacity(prompt_tokens, 0, tokens)
    while capacity < tokens:
        before, capacity = capacity, cache_capacity(capacity + 1, capacity, tokens)
    return item * numbers * capacity * model.num_layers + item * numbers // 2 * before
