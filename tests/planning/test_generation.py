"""The forecast of generation: what is streamed follows from the budget, and the key cache is that of a real decoder."""

from pathlib import Path

import pytest
import torch

from smidgen.errors import SettingsError
from smidgen.model.decoder import FusedDecoder
from smidgen.model.inventory import inventory_of
from smidgen.planning.generation import cache_bytes, plan_generation
from smidgen.planning.planner import Machine
from smidgen.planning.shapes import SHAPES
from tiny import build, tiny_folder

MACHINE = Machine(gflops=50.0, disk_bytes_per_s=1e9, framework_bytes=280_000_000, library_bytes=100_000_000, threads=2)


def test_as_few_layers_are_streamed_as_the_budget_allows() -> None:
    seven = inventory_of(None, SHAPES["llama-7b"], "nf4-dq", name="llama-7b")
    whole = plan_generation(seven, MACHINE, 512, 8, 4, 1 << 40)
    assert not whole.choice.streamed and whole.read_bytes == 0
    budget = whole.peak_bytes - 1
    less = plan_generation(seven, MACHINE, 512, 8, 4, budget)
    count = len(less.choice.streamed)
    assert count and less.peak_bytes <= budget
    assert less.terms["packed weights"] == seven.packed_bytes - count * seven.layer_bytes[0]
    with pytest.raises(SettingsError, match=r"1.0 GB is too little for llama-7b: at least .* a prompt of 512 tok"):
        plan_generation(seven, MACHINE, 512, 8, 4, 10**9)


@pytest.mark.parametrize("new_tokens", [3, 100])
def test_the_key_cache_is_that_of_a_decoder(new_tokens: int, tmp_path: Path) -> None:
    """As long as it need not grow it is counted exactly; when it grows, what it grew from is counted too."""
    base = build(tiny_folder(tmp_path, max_position_embeddings=512), "nf4-dq", torch.float32)
    model = inventory_of(base.checkpoint, base.checkpoint.config, "nf4-dq")
    decoder = FusedDecoder(base)
    with torch.inference_mode():
        decoder.start([list(range(40))])
        first = _cache_bytes(decoder)
        for _ in range(new_tokens):
            decoder.step(torch.tensor([1]))
    last = _cache_bytes(decoder)
    assert cache_bytes(model, 40, new_tokens, 4) == (last if last == first else first + last)
    assert (last > first) == (new_tokens == 100)


def _cache_bytes(decoder: FusedDecoder) -> int:
    return sum(part.nbytes for part in [*decoder._keys, *decoder._values])
