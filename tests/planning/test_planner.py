"""The solver: what it finds fits and is the fastest, checked against all choices; formulas against counted tensors."""

from dataclasses import replace
from itertools import product
from typing import Any

import numpy as np
import pytest

from planning.machines import MACHINE
from smidgen.model.inventory import inventory_of
from smidgen.planning import estimate, planner
from smidgen.planning.inventory import Inventory, packed_bytes
from smidgen.planning.planner import Choice, Forecast, Machine, fastest, forecast, forecasts, smallest
from smidgen.planning.shapes import SHAPES
from smidgen.planning.work import Load, Rows, Work
from smidgen.train.config import Settings
from smidgen.train.memory import work_of
from smidgen.units import parse_bytes


def solve(model: Inventory, job: Work, machine: Machine, budget: int, **given: Any) -> Forecast | None:
    sizes = {name: given.pop(name) for name in ("micro_batch", "pack") if name in given}
    return fastest(forecasts(model, job, machine, asked(model, **sizes), **given), budget)


def asked(model: Inventory, **sizes: Any) -> Choice:
    """What is to be computed at once, and nothing again."""
    return Choice(accumulation=1, recompute=("none",) * model.num_layers, **sizes)


@pytest.fixture(scope="module")
def seven() -> Inventory:
    return inventory_of(None, SHAPES["llama-7b"], "nf4-dq", name="llama-7b")


def work(tokens: int = 512, rows: int = 4, **more: int) -> Work:
    return Work(Rows(np.full(rows, tokens)), rows, parameters=more.get("parameters", 4_194_304), ranks=16)


def test_the_inventory_of_known_models(seven: Inventory) -> None:
    assert seven.weights == pytest.approx(6.476e9, rel=1e-3)
    assert seven.packed_bytes == pytest.approx(seven.weights * 4.127 / 8, rel=1e-4)  # bits a weight of the QLoRA paper
    assert len(seven.layer_bytes) == 32 and len(set(seven.layer_bytes)) == 1
    assert seven.embedding_bytes == seven.head_bytes == 32000 * 4096 * 2
    assert inventory_of(None, SHAPES["qwen2.5-1.5b"], "none").head_bytes == 0  # tied


def test_a_configuration_names_its_type_in_either_way() -> None:
    """transformers 5 writes dtype, versions before it torch_dtype."""
    config = {key: value for key, value in SHAPES["smollm2-135m"].items() if not key.endswith("dtype")}
    ways = ({"torch_dtype": "bfloat16"}, {"dtype": "bfloat16"}, {"torch_dtype": "float32"}, {"dtype": "float32"})
    sizes = [inventory_of(None, config | how, "none").embedding_bytes for how in ways]
    assert sizes[0] == sizes[1] == sizes[2] // 2 == sizes[3] // 2


@pytest.mark.parametrize("name", SHAPES)
def test_every_shape_is_a_model(name: str) -> None:
    model = inventory_of(None, SHAPES[name], "nf4-dq", name=name)
    size = name.rpartition("-")[2]
    if size[-1] in "bm" and size[:-1].replace(".", "").isdigit():
        stated = float(size[:-1]) * (1e9 if size[-1] == "b" else 1e6)
        whole = model.weights + model.vocab_size * model.hidden_size * (2 if model.head_bytes else 1)
        assert whole == pytest.approx(stated, rel=0.25)  # names round generously


@pytest.mark.parametrize("storage", ["nf4-dq", "nf4", "fp4", "int8", "none"])
def test_packed_bytes_are_those_of_the_matrix(storage: str) -> None:
    import torch

    from smidgen.quant.matrix import quantise

    for shape in ((96, 64), (33, 72), (256, 300)):
        assert packed_bytes(*shape, storage) == quantise(torch.randn(shape).bfloat16(), storage).nbytes


@pytest.mark.parametrize("budget", ["1500MB", "2GiB", "3GiB", "5GiB", "8GiB"])
def test_the_solution_fits_and_nothing_faster_does(seven: Inventory, budget: str) -> None:
    small = replace(seven, num_layers=8, linears=tuple(x for x in seven.linears if x.layer < 8))
    limit = parse_bytes(budget)
    job = work()
    found = solve(small, job, MACHINE, limit, micro_batch=4)
    assert found is not None and found.peak_bytes <= limit
    best = min(
        other.step_s
        for m, full, count in product((4, 2, 1), range(9), range(9))
        if (
            other := forecast(
                small, job, MACHINE,
                Choice(m, 4 // m, ("full",) * full + ("cheap",) * (8 - full), tuple(range(8))[:count]),
            )
        ).peak_bytes <= limit
    )  # fmt: skip
    assert found.step_s <= 1.1 * best


def test_more_memory_is_never_slower(seven: Inventory) -> None:
    steps = []
    for gib in (2, 3, 4, 6, 8, 12, 24):
        found = solve(seven, work(), MACHINE, gib << 30, micro_batch=4)
        assert found is not None
        steps.append(found.step_s)
    assert steps == sorted(steps, reverse=True)


def test_what_does_not_fit_is_refused_with_what_would(seven: Inventory) -> None:
    assert solve(seven, work(), MACHINE, 1 << 29, micro_batch=4) is None
    least = smallest(forecasts(seven, work(), MACHINE, asked(seven, micro_batch=4)))
    assert solve(seven, work(), MACHINE, least.peak_bytes, micro_batch=4) is not None
    assert solve(seven, work(), MACHINE, least.peak_bytes - 1, micro_batch=4) is None


def test_the_optimizer_steps_stay_the_same(seven: Inventory) -> None:
    found = solve(seven, work(rows=6), MACHINE, 2 << 30, micro_batch=6)
    assert found is not None
    assert found.choice.micro_batch * found.choice.accumulation == 6


def test_settings_that_are_given_are_kept(seven: Inventory) -> None:
    found = solve(seven, work(), MACHINE, 64 << 30, micro_batch=4, recompute="full", can_stream=False)
    assert found is not None
    assert set(found.choice.recompute) == {"full"} and not found.choice.streamed


def test_each_setting_changes_its_own_term(seven: Inventory) -> None:
    asked = Choice(4, 1, ("none",) * 32)

    def changed(job: Work, choice: Choice, before: Choice = asked) -> set[str]:
        plain, other = forecast(seven, work(), MACHINE, before).terms, forecast(seven, job, MACHINE, choice).terms
        return {name for name in plain if plain[name] != other[name]} - {"runtime and slack"}

    learned = {"adapters", "gradients", "optimizer"}
    assert changed(work(parameters=8_388_608), Choice(4, 1, ("none",) * 32)) == learned
    assert changed(work(), Choice(4, 1, ("cheap",) * 32)) == {"kept activations"}
    assert changed(work(), Choice(4, 1, ("none",) * 32, (3,))) == {"packed weights", "stream buffers"}
    assert "kept activations" in changed(work(), Choice(2, 2, ("none",) * 32))
    assert changed(work(), Choice(4, 1, ("none",) * 32, loss_chunk=64)) == {"loss chunk", "one layer's working set"}
    of_tile = {"one layer's working set", "scratch"}
    in_chunks = replace(asked, loss_chunk=64)  # or the loss takes more than any layer
    assert changed(work(), replace(in_chunks, tile_tokens=512), in_chunks) == of_tile


def test_what_is_shared_and_what_has_no_label_take_no_time(seven: Inventory) -> None:
    choice = Choice(4, 1, ("none",) * 32)
    plain = forecast(seven, work(), MACHINE, choice)
    shared = forecast(seven, replace(work(), rows=Rows(np.full(4, 512), computed=0.5)), MACHINE, choice)
    unlabelled = forecast(seven, replace(work(), rows=Rows(np.full(4, 512), labelled=0.0)), MACHINE, choice)
    assert plain.terms == shared.terms == unlabelled.terms, "a share of all tokens says nothing of the largest"
    head = seven.vocab_size * seven.hidden_size
    piece = planner._OF_PIECE / 2048  # one tile, two chunks of at most 1,048 logits
    assert estimate.most_positions(seven.vocab_size) == 1048
    of_layers, of_head = (1 + piece) * seven.weights, (1 + 2 * piece) * head
    halved = (0.5 + piece) * seven.weights
    assert shared.step_s / plain.step_s == pytest.approx((halved + of_head) / (of_layers + of_head))
    assert unlabelled.step_s / plain.step_s == pytest.approx(of_layers / (of_layers + of_head))


def rows_of(*lengths: int, **more: Any) -> Rows:
    return Rows(np.array(lengths), **{name: np.array(counts) for name, counts in more.items()})


def test_micro_batches_are_those_that_come() -> None:
    """The longest rows, of 100 and 90 tokens, do not meet; the second step has one row, and nothing else."""
    rows = rows_of(100, 10, 90, 20, 30, 0, 0, 0, labels=[5, 5, 9, 9, 3, 0, 0, 0])
    assert rows.load(4) == Load(220, 28, 30)
    assert rows.load(2) == Load(110, 18, 30)
    assert rows.load(1) == Load(100, 9, 10)
    assert replace(work(), rows=rows).mean_tokens == 125


def test_packed_rows_are_counted_by_their_tokens() -> None:
    """Rows of 100 and 10 tokens: 120 at once take 2 batches for 4 rows of 55 on average, 60 at once still hold 100."""
    job = replace(work(), rows=rows_of(100, 100, 10, 10))
    assert (job.load(4, 120, 2048, True), job.batches(4, 120)) == (Load(120, 124, 10), 2)
    assert job.load(4, 60, 2048, True).tokens == 100
    assert replace(job, rows=replace(job.rows, computed=0.5)).batches(4, 120) == 1


def test_layers_that_may_pad_count_both_ways_and_every_label() -> None:
    rows = replace(rows_of(100, 10, 90, 20, labels=[1, 1, 1, 1]), shared=lambda micro_batch: Load(105, 2, 60))
    job = replace(work(), rows=rows)
    assert job.load(2, None, 2048, True) == Load(105, 2, 60), "fused layers share what begins alike"
    assert job.load(2, None, 2048, False) == Load(110, 110, 60)
    assert job.load(2, None, 1024, True) == Load(110, 2, 60), "in smaller tiles fewer rows do"


def test_the_loss_by_hand(seven: Inventory) -> None:
    """With 10 labels in 1,000 tokens the norm's gradient takes more than the labels and their logits; not with all."""
    hidden, classes = 4096, 32000
    assert estimate.loss_bytes(seven, 1000, 10) == 4 * 3 * 1000 * hidden
    few = 4 * (100 * hidden + 2 * 90 * hidden + 90 * (classes + 2 * hidden))
    assert estimate.loss_bytes(seven, 100, 90) == few < estimate.loss_bytes(seven, 100, 100)


def test_labels_shrink_the_loss_and_long_held_out_rows_count(seven: Inventory) -> None:
    choice = Choice(2, 1, ("full",) * 32)
    rows = rows_of(600, 600, 500, 500)
    plain = forecast(seven, replace(work(), rows=rows), MACHINE, choice).terms
    few = replace(rows, labels=np.array([6, 6, 5, 5]))
    assert forecast(seven, replace(work(), rows=few), MACHINE, choice).terms["loss chunk"] < plain["loss chunk"] / 2
    assert "held-out rows" not in plain

    def held_out(tokens: int) -> dict[str, int]:
        more = replace(rows, held_out=np.array([tokens, 10]))
        return forecast(seven, replace(work(), rows=more), MACHINE, choice).terms

    assert held_out(500)["held-out rows"] == 0
    assert held_out(9000)["held-out rows"] > held_out(6000)["held-out rows"] > 9000 * 4 * 4096


def test_packed_rows_shrink_to_a_budget(seven: Inventory) -> None:
    """2,048 tokens at once, then half, then half of that; the longest row has 500."""
    job = replace(work(), rows=rows_of(*[500, 100, 400, 200] * 4), rows_per_step=8)
    ways = forecasts(seven, job, MACHINE, asked(seven, micro_batch=8, pack=2048))
    found = {each.choice.pack: each.choice for each in ways}
    assert list(found) == [2048, 1024, 512, 500]
    assert {choice.micro_batch * choice.accumulation for choice in found.values()} == {8}
    whole = forecast(seven, job, MACHINE, Choice(8, 1, ("cheap",) * 32, pack=2048)).peak_bytes
    less = solve(seven, job, MACHINE, whole - 1, micro_batch=8, pack=2048, recompute="cheap", can_stream=False)
    assert less is not None and less.choice.pack == 1024


def test_pieces_are_halved_down_to_what_pays(seven: Inventory) -> None:
    """1,048 positions of 32,000 classes are 128 MiB."""

    def pieces(**given: Any) -> list[tuple[int, int | None]]:
        ways = forecasts(seven, work(), MACHINE, asked(seven, micro_batch=4, **given), can_stream=False)
        return list(dict.fromkeys((way.choice.tile_tokens, way.choice.loss_chunk) for way in ways))

    assert pieces() == [(2048, None), (1024, 524), (512, 262), (256, 131)]
    assert pieces(tile_tokens=300, loss_chunk=100) == [(300, 100), (256, 64)]
    assert pieces(tile_tokens=128, loss_chunk=32) == [(128, 32)], "what is asked for is not made larger"


def test_what_smaller_pieces_save_is_said(seven: Inventory) -> None:
    given, job = asked(seven, micro_batch=4), work()
    whole = forecast(seven, job, MACHINE, given)
    found = solve(seven, job, MACHINE, whole.peak_bytes - 1, micro_batch=4, recompute="none", can_stream=False)
    assert found is not None and found.choice == replace(given, tile_tokens=1024, loss_chunk=524)
    said = planner.reasons(seven, found, job, given, whole.peak_bytes)
    assert any("at most 1024 tokens at once, the loss 524" in line for line in said)
    assert not any("at most" in line for line in planner.reasons(seven, whole, job, given, whole.peak_bytes))


def test_the_heads_adapter_follows_its_settings(seven: Inventory) -> None:
    def numbers(**how: Any) -> tuple[int, int]:
        found = work_of(seven, Settings(targets="head", **how), [512], 4)
        return found.parameters, found.head_parameters

    both = 32000 + 4096
    assert numbers(rank=8) == (8 * both, 8 * both)
    assert numbers(rank=8, rank_pattern={"lm_head": 2}) == (2 * both, 2 * both)
    assert numbers(rank=8, use_dora=True) == (8 * both + 32000,) * 2


def test_programs_count_where_they_are_compiled(seven: Inventory) -> None:
    terms = [
        forecast(
            seven, replace(work(), itemsize=2), replace(MACHINE, compiles=compiles), Choice(1, 1, ("full",) * 32)
        ).terms
        for compiles in (True, False)
    ]
    assert "programs" in terms[0] and "programs" not in terms[1]


def test_kept_activations_of_a_llama_layer(seven: Inventory) -> None:
    """By hand from model/fused.py: x, normed, middle, its norm; q, k, v, attended; gate, up; 16 + 34 more."""
    per_token = 4 * (4 * 4096 + 4 * 4096 + 2 * 11008 + 16 + 34)
    one = replace(seven, num_layers=1)
    assert estimate.kept_bytes(one, 1, ("none",), 16) == per_token


@pytest.mark.parametrize(
    ("text", "size"),
    [("6GiB", 6 << 30), ("1.5 GB", 1_500_000_000), ("900MB", 900_000_000), ("900m", None), ("4096", 4096),
     ("2kib", 2048), ("", None), ("GB", None), ("-1GB", None), ("1.5.5GB", None)],
)  # fmt: skip
def test_sizes(text: str, size: int | None) -> None:
    if size is None:
        with pytest.raises(ValueError, match="not a size"):
            parse_bytes(text)
    else:
        assert parse_bytes(text) == size
