"""Memory of generation: one prompt, then token after token. The base and the process count as in training."""

from smidgen.errors import SettingsError
from smidgen.kernels.sizes import cache_capacity
from smidgen.planning import estimate
from smidgen.planning.inventory import Inventory
from smidgen.planning.planner import Choice, Forecast, Machine, with_base
from smidgen.units import format_bytes

__all__ = ["cache_bytes", "plan_generation"]

_FLOAT32 = 4


def plan_generation(
    model: Inventory, machine: Machine, prompt_tokens: int, new_tokens: int, itemsize: int, budget: int
) -> Forecast:
    """With as few layers streamed as the budget (bytes) allows. Raises SettingsError where all of them are not enough.

    itemsize: of the compute type. step_s: seconds of one new token by reading and arithmetic alone; read_bytes: of it.
    """
    for count in range(model.num_layers + 1):
        found = _forecast(model, machine, prompt_tokens, new_tokens, itemsize, count)
        if found.peak_bytes <= budget:
            return found
    raise SettingsError(
        [
            f"memory: {format_bytes(budget)} is too little for {model.name or 'this model'}: at least"
            f" {format_bytes(found.peak_bytes)} is needed for a prompt of {prompt_tokens} tokens, with every layer read"
            " from disk for each token; a shorter prompt needs less"
        ]
    )


def _forecast(
    model: Inventory, machine: Machine, prompt_tokens: int, new_tokens: int, itemsize: int, count: int
) -> Forecast:
    """With the first `count` layers streamed."""
    streamed = tuple(range(count))
    small = {
        "key cache": cache_bytes(model, prompt_tokens, new_tokens, itemsize),
        "one layer's working set": estimate.prompt_bytes(model, prompt_tokens, itemsize),
        "logits": 3 * _FLOAT32 * model.vocab_size,  # of one position: themselves, in order, and their sum
        "scratch": estimate.panel_bytes(machine.threads),
    }
    if machine.is_cpu and itemsize < _FLOAT32:
        small["programs"] = estimate.program_bytes(prompt_tokens, prompt_tokens)
    terms, mapped = with_base(model, machine, streamed, small)
    sizes = [model.layer_bytes[layer] for layer in streamed]
    read = max(0, sum(sizes) - sum(sizes[:2]))
    flops = 2 * (model.weights + model.vocab_size * model.hidden_size)
    step_s = max(flops / machine.gflops / 1e9, read / machine.disk_bytes_per_s)
    choice = Choice(1, 1, ("none",) * model.num_layers, streamed)
    return Forecast(choice, terms, mapped, step_s, read, prompt_tokens)


def cache_bytes(model: Inventory, prompt_tokens: int, new_tokens: int, itemsize: int) -> int:
    """Keys and values of all layers, of one row, where it is largest: as it grows, with what it grew from.

    smidgen's own decoder keeps float32 and grows by half; transformers' cache has the compute type and grows by a
    token, one layer at a time.
    """
    numbers = 2 * model.num_kv_heads * model.head_dim
    tokens = prompt_tokens + new_tokens
    if not model.fused:
        return itemsize * numbers * tokens * (model.num_layers + 1)
    before, capacity = 0, cache_capacity(prompt_tokens, 0)
    while capacity < tokens:
        before, capacity = capacity, cache_capacity(capacity + 1, capacity)
    return _FLOAT32 * numbers * (before + capacity) * model.num_layers
