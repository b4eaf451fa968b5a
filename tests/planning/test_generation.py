"""The forecast of generation: what is given up follows from the budget, and memory is that of a real decoder."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

import smidgen
from planning.machines import MACHINE
from smidgen.errors import DataError, SettingsError
from smidgen.events import Event, Note
from smidgen.model.decoder import FusedDecoder
from smidgen.model.inventory import inventory_of
from smidgen.planning.generation import GenerationPlan, cache_bytes, generation_plans, plan_generation
from smidgen.planning.inventory import Inventory
from smidgen.planning.shapes import SHAPES
from tiny import build, tiny_folder


def _plan(model: Inventory, budget: int) -> GenerationPlan:
    """Of 512 tokens and 8 new ones, in float32."""
    return plan_generation(model, generation_plans(model, MACHINE, 512, 8, 4), budget)


def test_the_cache_is_rounded_before_layers_are_streamed_and_as_few_as_the_budget_allows() -> None:
    seven = inventory_of(None, SHAPES["llama-7b"], "nf4-dq", name="llama-7b")
    whole = _plan(seven, 1 << 40)
    assert not whole.streamed and whole.cache_dtype == "float32" and whole.forecast.read_bytes == 0
    rounded = _plan(seven, whole.forecast.peak_bytes - 1)
    assert not rounded.streamed and rounded.cache_dtype == "bfloat16"
    assert 2 * rounded.forecast.terms["key cache"] == whole.forecast.terms["key cache"]
    budget = rounded.forecast.peak_bytes - 1
    less = _plan(seven, budget)
    count = len(less.streamed)
    assert count == 3, "two slots take as much as two layers"
    assert less.cache_dtype == "bfloat16" and less.forecast.peak_bytes <= budget
    assert less.forecast.terms["packed weights"] == seven.packed_bytes - count * seven.layer_bytes[0]
    with pytest.raises(
        SettingsError, match=r"900.0 MB \(--memory\) is too little for llama-7b: at least .* prompt of 512"
    ):
        _plan(seven, 900_000_000)


@pytest.mark.parametrize("cache_dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("new_tokens", [3, 100, 150])
def test_the_key_cache_is_that_of_a_decoder(new_tokens: int, cache_dtype: torch.dtype, tmp_path: Path) -> None:
    """It grows by half, and never beyond what can come; a layer's keys or values at a time."""
    base = build(tiny_folder(tmp_path, max_position_embeddings=512), "nf4-dq", torch.float32)
    base.cache_dtype = cache_dtype
    model = inventory_of(base.checkpoint, base.checkpoint.config, "nf4-dq")
    decoder, sizes = FusedDecoder(base), []
    with torch.inference_mode():
        decoder.start([list(range(40))], new_tokens)
        for _ in range(new_tokens - 1):
            sizes.append(_cache_bytes(decoder))
            decoder.step(torch.tensor([1]))
    last = _cache_bytes(decoder)
    steps = sorted({*sizes, last})
    beside = steps[-2] // len([*decoder._keys, *decoder._values]) if len(steps) > 1 else 0
    assert cache_bytes(model, 40, new_tokens, cache_dtype.itemsize) == last + beside
    assert decoder._keys[0].shape[2] == 40 + new_tokens - 1
    assert len(steps) == {3: 1, 100: 2, 150: 3}[new_tokens]


def _cache_bytes(decoder: FusedDecoder) -> int:
    return sum(part.nbytes for part in [*decoder._keys, *decoder._values])


ANSWERS = """
import json, sys
import smidgen

folder, memory = sys.argv[1:]
how = {"quantize": "nf4-dq", "compute_dtype": "float32", "device": "cpu"}
model = smidgen.load(folder, memory=memory, prompt=200, max_new_tokens=20, **how)
answer = model.generate("x" * 200, raw=True, max_new_tokens=20)
print(json.dumps([answer.new_tokens, answer.text, model.memory(), list(model.plan.streamed), model.plan.cache_dtype]))
"""


def test_an_answer_keeps_to_a_budget_with_the_same_words(tmp_path: Path) -> None:
    """A model of 50 MB in NF4: with its layers resident, and, in less memory, read from disk for each token."""
    changes = {"hidden_size": 1024, "intermediate_size": 2816, "num_hidden_layers": 8, "num_attention_heads": 16}
    folder = tiny_folder(tmp_path / "model", dtype=torch.bfloat16, num_key_value_heads=4, **changes)

    def answer(memory: str) -> tuple[int, str, dict[str, int], list[int], str]:
        command = [sys.executable, "-c", ANSWERS, str(folder), memory]
        return json.loads(subprocess.run(command, env=os.environ, check=True, capture_output=True, text=True).stdout)

    _, words, whole, streamed, cache = answer("8GiB")
    assert not streamed and cache == "float32"
    budget = whole["forecast_peak_bytes"] - 20_000_000
    _, in_less, less, streamed, cache = answer(str(budget))
    assert streamed and cache == "bfloat16"
    for found in (whole, less):
        assert found["peak_rss_bytes"] <= found["forecast_peak_bytes"] <= found["peak_rss_bytes"] + (64 << 20)
    assert less["peak_rss_bytes"] <= budget and less["peak_rss_bytes"] < whole["peak_rss_bytes"]
    assert words == in_less


def test_what_was_not_planned_for_is_refused(tmp_path: Path) -> None:
    folder, told = tiny_folder(tmp_path), list[Event]()
    how = {"quantize": "nf4-dq", "compute_dtype": "float32", "device": "cpu"}
    model = smidgen.load(folder, memory="8GiB", prompt="hello", max_new_tokens=5, report=told.append, **how)
    assert model.plan is not None and any("forecast" in event.text for event in told if isinstance(event, Note))
    assert model.generate("hello", max_new_tokens=5).prompt_tokens == model.plan.tokens - 5
    with pytest.raises(DataError, match=f"expected at most {model.plan.tokens} together"):
        model.generate("hello, you", max_new_tokens=5)
    with pytest.raises(SettingsError, match="is too little"):
        smidgen.load(folder, memory="10MB", **how)


def test_generation_can_be_planned_for_a_shape_and_a_model(tmp_path: Path) -> None:
    how: dict[str, Any] = {"generate": 256, "seq_len": 32, "compute_dtype": "float32", "device": "cpu"}
    small = smidgen.plan("llama-7b", memory="300MB", **how)
    assert not small["fits"] and small["smallest_bytes"] > 300_000_000
    found = smidgen.plan("llama-7b", memory=str(small["smallest_bytes"] + 100_000_000), **how)
    assert found["fits"] and 20 < found["settings"]["streamed_layers"] <= 32
    assert sum(found["terms"].values()) == found["peak_bytes"] <= small["smallest_bytes"] + 100_000_000
    folder = tiny_folder(tmp_path)
    whole = smidgen.plan(str(folder), generate=8, seq_len=32, compute_dtype="float32", memory="8GiB")
    assert whole["settings"]["cache_dtype"] == "float32" and [row["change"] for row in whole["what_if"]]
    with pytest.raises(SettingsError, match=r"data: generation has none.*rank: generation has none"):
        smidgen.plan(str(folder), "rows.jsonl", generate=8, rank=8)
