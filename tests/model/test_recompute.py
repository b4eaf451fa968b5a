"""Which of transformers' own layers are computed again: those that a plan says, and no others."""

from collections import Counter
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch

from planning.machines import MACHINE
from smidgen.data.batch import Batch
from smidgen.lora.attach import adapters, attach_lora
from smidgen.lora.targets import select_targets
from smidgen.model.build import Base
from smidgen.model.inventory import inventory_of
from smidgen.model.recompute import set_recompute
from smidgen.planning.estimate import layer_work_bytes
from smidgen.planning.planner import Choice, forecasts
from smidgen.train.config import Settings
from smidgen.train.loss import batch_loss
from smidgen.train.memory import work_of
from tiny import build, tiny_folder

LAYERS, TOKENS = 4, 24


MODELS: dict[str, dict[str, Any]] = {
    "gpt-neox": {},
    "gemma2": {"layer_types": ["sliding_attention", "full_attention"] * (LAYERS // 2)},
}


@pytest.fixture(params=MODELS)
def base(request: pytest.FixtureRequest, tmp_path: Path) -> Base:
    name = request.param
    found = build(tiny_folder(tmp_path, name, num_hidden_layers=LAYERS, **MODELS[name]), "nf4-dq")
    attach_lora(found.model, select_targets("q,v", found.linears, "")[0], rank=4, alpha=8, dropout=0.0, seed=0)
    for layer in adapters(found.model).values():
        layer.lora_B.data.normal_(generator=torch.Generator().manual_seed(1))
    found.model.train()
    return found


def _choices(base: Base) -> list[Choice]:
    """What a solver may choose from for one row."""
    model = inventory_of(base.checkpoint, base.checkpoint.config, "nf4-dq")
    assert not model.fused
    work = work_of(model, Settings(), [TOKENS], 4)
    given = Choice(1, 1, ("none",) * LAYERS)
    return [found.choice for found in forecasts(model, work, MACHINE, given, can_stream=False)]


def _gradient(base: Base) -> torch.Tensor:
    ids = torch.arange(TOKENS)[None]
    parameters = [parameter for layer in adapters(base.model).values() for parameter in layer.parameters()]
    gradients = torch.autograd.grad(batch_loss(base, Batch(ids, ids.clone(), torch.tensor([TOKENS]))), parameters)
    return torch.cat([gradient.flatten() for gradient in gradients])


def test_a_layer_is_computed_again_where_the_plan_says_so(base: Base) -> None:
    """Not every layer as soon as one is: with three of eight parts of a model recomputed all of it was."""
    chosen = {choice.recompute for choice in _choices(base)}
    assert {modes.count("full") for modes in chosen} == set(range(LAYERS + 1))
    assert set().union(*chosen) == {"none", "full"}, "there is nothing cheap that these layers can compute again"
    calls: Counter[int] = Counter()
    layers: Any = base.backbone.layers
    for index, layer in enumerate(layers):
        layer.input_layernorm.register_forward_pre_hook(partial(lambda index, *_: calls.update([index]), index))
    expected = _gradient(base)
    for modes in [*chosen, ("none", "full", "none", "full"), ("none",) * LAYERS]:
        set_recompute(base, modes)
        calls.clear()
        assert torch.equal(_gradient(base), expected)
        assert [calls[index] - 1 for index in range(LAYERS)] == [int(mode == "full") for mode in modes]


def test_what_is_recomputed_leaves_the_embedding_without_a_gradient(base: Base) -> None:
    """Which nobody needs, and which costs the first layer's products."""
    wanted: list[bool] = []
    base.backbone.layers[0].register_forward_pre_hook(lambda _, given: wanted.append(given[0].requires_grad))  # type: ignore[index]
    for mode in ("full", "none"):
        set_recompute(base, mode)
        _gradient(base)
    assert wanted == [False, False]


def test_the_forecast_falls_with_each_layer(base: Base) -> None:
    model = inventory_of(base.checkpoint, base.checkpoint.config, "nf4-dq")
    work = work_of(model, Settings(), [TOKENS], 4)
    given = Choice(1, 1, ("none",) * LAYERS)
    found = forecasts(model, work, replace(MACHINE, gflops=1.0), given, can_stream=False)
    counted = {each.choice.recompute.count("full"): each for each in found}
    kept = [counted[count].terms["kept activations"] for count in range(LAYERS + 1)]
    steps = [counted[count].step_s for count in range(LAYERS + 1)]
    assert kept == sorted(kept, reverse=True) and len(set(kept)) == len(kept)
    assert steps == sorted(steps) and len(set(steps)) == len(steps)


def test_what_is_computed_again_takes_the_place_of_what_is_gone(base: Base) -> None:
    """The last layer to have its gradient is the first one: what the others kept is gone by then."""
    model = inventory_of(base.checkpoint, base.checkpoint.config, "nf4-dq")

    def work(*modes: str) -> int:
        return layer_work_bytes(model, TOKENS, modes, 8, longest=TOKENS)

    assert work("none", "none") == work("full", "none") < work("none", "full") == work("full", "full")
