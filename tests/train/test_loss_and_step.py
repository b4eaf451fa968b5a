"""The loss and one step: what must be equal whatever is chunked, recomputed or accumulated."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F

from smidgen.data.batch import Batch, make_batch
from smidgen.data.render import Example
from smidgen.errors import RunError
from smidgen.lora.attach import adapters, attach_lora
from smidgen.model.build import Base
from smidgen.model.device import padded_rows
from smidgen.model.recompute import set_recompute
from smidgen.train.config import Settings
from smidgen.train.loss import batch_loss, chunked_cross_entropy, row_losses, token_losses
from smidgen.train.optimizers import make_optimizer
from smidgen.train.step import learning_rate_at, optimizer_step
from tiny import VOCAB_SIZE, build, tiny_folder


def _examples(lengths: list[int], seed: int = 0) -> list[Example]:
    generator = torch.Generator().manual_seed(seed)
    examples = []
    for number, length in enumerate(lengths):
        ids = torch.randint(0, VOCAB_SIZE, (length,), generator=generator).tolist()
        labels = [-100] * (length // 2) + ids[length // 2 :]
        examples.append(Example(ids, labels, False, f"row {number}"))
    return examples


def _model(path: Path, architecture: str = "llama", targets: str = "all", storage: str = "nf4-dq"):
    base = build(tiny_folder(path, architecture), storage)
    names = [n for n in base.linears if n != base.head_name or targets == "head"]
    attached = attach_lora(base.model, names, rank=4, alpha=8, dropout=0.0, seed=0)
    with torch.no_grad():  # B not zero, so that A has a gradient too
        for index, layer in enumerate(attached.values()):
            layer.lora_B.copy_(torch.randn(layer.lora_B.shape, generator=torch.Generator().manual_seed(index)) * 0.05)
    base.model.train()
    return base, [p for p in base.model.parameters() if p.requires_grad]


def _grads(base, parameters, batches: list[Batch]) -> list[torch.Tensor]:
    for parameter in parameters:
        parameter.grad = None
    tokens = sum(batch.num_labels for batch in batches)
    for batch in batches:
        (batch_loss(base, batch) / tokens).backward()
    return [parameter.grad.clone() for parameter in parameters]


def _assert_close(ours: list[torch.Tensor], theirs: list[torch.Tensor]) -> None:
    for a, b in zip(ours, theirs, strict=True):
        # float32 sums in another order
        assert float((a - b).norm()) <= 2e-5 * float(b.norm()) + 1e-9


@pytest.mark.parametrize("architecture", ["llama", "gemma2"])
def test_rows_that_fill_up_a_product_change_nothing(
    architecture: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As products in 16 bits take them, here in float32, where rounding does not hide anything."""
    base, parameters = _model(tmp_path, architecture)
    base.packs = True
    batch = make_batch(_examples([30, 7, 41]))
    plain, plain_rows = _grads(base, parameters, [batch]), row_losses(base, batch)
    plain_loss = batch_loss(base, batch).detach()
    monkeypatch.setattr(type(base), "padded", lambda self, rows: -(-rows // 64) * 64)
    assert len(base.hidden_of_rows(batch.input_ids, batch.lengths)[0]) == 128
    _assert_close(_grads(base, parameters, [batch]), plain)
    torch.testing.assert_close(batch_loss(base, batch).detach(), plain_loss)
    torch.testing.assert_close(row_losses(base, batch), plain_rows, rtol=1e-5, atol=1e-5)


def test_only_products_in_16_bits_on_a_cpu_are_filled_up(tmp_path: Path) -> None:
    cpu = torch.device("cpu")
    assert [padded_rows(65, kind, cpu) for kind in (torch.float32, torch.bfloat16, torch.float16)] == [65, 128, 128]
    assert padded_rows(65, torch.bfloat16, torch.device("cuda")) == 65
    base = build(tiny_folder(tmp_path), dtype=torch.bfloat16)
    batch = make_batch(_examples([30, 7, 41]))
    assert len(base.hidden_of_rows(batch.input_ids, batch.lengths)[0]) == 128


def _full_loss(base, batch: Batch) -> torch.Tensor:
    logits = base.model(batch.input_ids, use_cache=False).logits[:, :-1].float()
    return F.cross_entropy(logits.flatten(0, 1), batch.labels[:, 1:].flatten(), ignore_index=-100, reduction="sum")


@pytest.mark.parametrize(
    "architecture", ["llama", "llama-tied", "gemma2", "gemma3", "granite", "gpt2", "mixtral", "gpt-neox"]
)
@pytest.mark.parametrize("targets", ["all", "head"])
def test_chunked_loss_and_gradients_equal_the_full_ones(architecture: str, targets: str, tmp_path: Path) -> None:
    base, parameters = _model(tmp_path, architecture, targets)
    batch = make_batch(_examples([12, 30, 21]))
    ours = batch_loss(base, batch)
    ours.backward()
    grads = [parameter.grad.clone() for parameter in parameters]
    for parameter in parameters:
        parameter.grad = None
    full = _full_loss(base, batch)
    full.backward()
    torch.testing.assert_close(ours, full, rtol=1e-5, atol=1e-4)
    _assert_close(grads, [parameter.grad for parameter in parameters])


def test_any_chunk_gives_the_same_loss(tmp_path: Path) -> None:
    base, _ = _model(tmp_path, targets="head")
    hidden, targets = torch.randn(50, 64), torch.randint(0, VOCAB_SIZE, (50,))
    expected = F.cross_entropy(base.logits_of(hidden), targets, reduction="sum")
    for chunk in (1, 7, 50, 1000):
        torch.testing.assert_close(chunked_cross_entropy(base, hidden, targets, chunk), expected, rtol=1e-5, atol=1e-4)


def test_the_chunk_of_a_setting_is_the_most_at_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    base, _ = _model(tmp_path)
    sizes: list[int] = []
    logits_of = Base.logits_of
    monkeypatch.setattr(Base, "logits_of", lambda self, hidden: sizes.append(len(hidden)) or logits_of(self, hidden))
    hidden, targets = torch.randn(50, 64), torch.randint(0, VOCAB_SIZE, (50,))
    for base.loss_chunk, expected in ((None, [50]), (20, [17, 17, 16])):
        for loss in (chunked_cross_entropy, token_losses):
            loss(base, hidden, targets)
            assert sizes == expected, "in training and where nothing is learnt"
            sizes.clear()


def test_gradients_of_every_adapter_equal_a_dense_float64_model(tmp_path: Path) -> None:
    """The whole model in float64, dense and by ordinary autograd, is the reference."""
    base, parameters = _model(tmp_path, storage="none")
    batch = make_batch(_examples([12, 30, 21]))
    ours = _grads(base, parameters, [batch])
    double, doubles = _model(tmp_path / "again", storage="none")
    double.model.double()
    for layer in double.linears.values():
        layer.double()
    double.compute_dtype = torch.float64
    loss = _full_loss_double(double, batch)
    loss.backward()
    for a, b in zip(ours, [p.grad for p in doubles], strict=True):
        assert float((a.double() - b).norm() / b.norm()) < 1e-4  # float32 through two layers


def _full_loss_double(base, batch: Batch) -> torch.Tensor:
    logits = base.model(batch.input_ids, use_cache=False).logits[:, :-1]
    flat = F.cross_entropy(logits.flatten(0, 1), batch.labels[:, 1:].flatten(), ignore_index=-100, reduction="sum")
    return flat / batch.num_labels


@pytest.mark.parametrize("architecture", ["gemma3", "gpt2", "mixtral"])  # of fused layers: tests/model/test_fused.py
def test_recomputed_gradients_are_the_same(architecture: str, tmp_path: Path) -> None:
    base, parameters = _model(tmp_path, architecture)
    batch = make_batch(_examples([12, 30, 21]))
    kept = _grads(base, parameters, [batch])
    set_recompute(base, "full")
    calls = []
    layer = next(m for n, m in base.model.named_modules() if n.endswith(("mlp", "mlp.gate")))
    layer.register_forward_pre_hook(lambda *_: calls.append(1))
    recomputed = _grads(base, parameters, [batch])
    assert len(calls) == 2  # really computed twice
    assert all(torch.equal(a, b) for a, b in zip(kept, recomputed, strict=True))


def test_recomputed_dropout_draws_the_same_mask(tmp_path: Path) -> None:
    base, parameters = _model(tmp_path)
    for module in base.model.modules():
        if hasattr(module, "lora_A"):
            module.dropout = 0.3
    batch = make_batch(_examples([12, 30, 21]))
    torch.manual_seed(0)
    kept = _grads(base, parameters, [batch])
    set_recompute(base, "full")
    torch.manual_seed(0)
    assert all(torch.equal(a, b) for a, b in zip(kept, _grads(base, parameters, [batch]), strict=True))


def test_accumulated_one_by_four_equals_four_by_one(tmp_path: Path) -> None:
    """Rows of very different lengths. The control arm, a mean of the means of micro-batches, is far from it."""
    base, parameters = _model(tmp_path)
    examples = _examples([6, 40, 12, 25])
    apart = [make_batch([example]) for example in examples]

    def gradients(batches: list[Batch], loss_of: Callable[[Batch], torch.Tensor]) -> list[torch.Tensor]:
        """What the step gives its optimizer."""
        given: list[torch.Tensor] = []
        optimizer = torch.optim.SGD(parameters)
        optimizer.register_step_pre_hook(lambda *_: given.extend(parameter.grad.clone() for parameter in parameters))
        optimizer_step(loss_of, batches, parameters, optimizer, learning_rate=0.0, clip=0)
        return given

    together = gradients([make_batch(examples)], lambda batch: batch_loss(base, batch))
    _assert_close(gradients(apart, lambda batch: batch_loss(base, batch)), together)
    share = sum(batch.num_labels for batch in apart) / len(apart)
    means = gradients(apart, lambda batch: batch_loss(base, batch) * share / batch.num_labels)
    assert all(float((a - b).norm()) > 0.05 * float(b.norm()) for a, b in zip(means, together, strict=True))


def test_padding_changes_nothing(tmp_path: Path) -> None:
    base, _ = _model(tmp_path)
    short, long = _examples([8, 40])
    alone = batch_loss(base, make_batch([short]))
    beside = batch_loss(base, make_batch([short, long])) - batch_loss(base, make_batch([long]))
    torch.testing.assert_close(alone, beside, rtol=1e-4, atol=1e-3)


def test_a_step_reports_the_mean_over_labelled_tokens_and_clips(tmp_path: Path) -> None:
    base, parameters = _model(tmp_path)
    batches = [make_batch([e]) for e in _examples([6, 40])]
    expected = sum(float(batch_loss(base, b)) for b in batches) / sum(b.num_labels for b in batches)
    before = [p.detach().clone() for p in parameters]
    optimizer = torch.optim.SGD(parameters, lr=0.0)
    result = optimizer_step(lambda b: batch_loss(base, b), batches, parameters, optimizer, learning_rate=1.0, clip=0.01)
    assert result.loss == pytest.approx(expected, rel=1e-5)
    assert (result.tokens, result.labelled_tokens) == (46, 23)
    moved = torch.cat([(p - b).flatten() for p, b in zip(parameters, before, strict=True)]).norm()
    assert result.grad_norm > 0.01 and float(moved) == pytest.approx(0.01, rel=1e-3)


def test_a_loss_that_is_not_finite_stops_the_step_and_changes_nothing(tmp_path: Path) -> None:
    base, parameters = _model(tmp_path)
    with torch.no_grad():
        parameters[0][0, 0] = torch.nan
    before = [p.detach().clone() for p in parameters[1:]]
    optimizer = torch.optim.AdamW(parameters)
    with pytest.raises(RunError, match="nan"):
        optimizer_step(
            lambda b: batch_loss(base, b), [make_batch(_examples([9]))], parameters, optimizer, learning_rate=1, clip=1
        )
    assert all(torch.equal(p, b) for p, b in zip(parameters[1:], before, strict=True))


def test_a_loss_that_is_not_finite_names_the_rows_of_its_batch_and_not_all_of_them(tmp_path: Path) -> None:
    base, parameters = _model(tmp_path)
    examples = _examples([9] * 24)
    batches = [make_batch(examples[start : start + size]) for start, size in ((0, 2), (2, 2), (4, 10), (14, 10))]
    factors = iter([1.0, torch.inf])
    optimizer = torch.optim.SGD(parameters)

    def step(loss_of: Callable[[Batch], torch.Tensor], chosen: list[Batch]) -> str:
        with pytest.raises(RunError) as refused:
            optimizer_step(loss_of, chosen, parameters, optimizer, learning_rate=1, clip=1)
        return str(refused.value)

    said = step(lambda batch: batch_loss(base, batch) * next(factors), batches)
    assert said.startswith("loss inf, found rows row 2, row 3. Lower")
    said = step(lambda batch: batch_loss(base, batch) * torch.nan, batches[2:])
    assert "found rows row 4, row 5, row 6, row 7, row 8, row 9, row 10, row 11 and 2 more. Lower" in said
    with torch.no_grad():
        embedding: Any = base.model.get_input_embeddings()
        embedding.weight.data = embedding.weight.data.clone()  # what is mapped is read again at each look-up
        embedding.weight[0, 0] = torch.nan  # as a damaged row of a base would be
    damaged = [make_batch([example]) for example in examples[:3]]
    damaged[1].input_ids[0, 3] = 0
    clean = [batch for batch in damaged if not (batch.input_ids == 0).any()]
    assert "found rows row 1. Lower" in step(lambda batch: batch_loss(base, batch), [*clean, damaged[1]])
    # finite losses with a gradient that is not: nothing tells which of the rows it was
    steep = [make_batch(examples[start : start + 6]) for start in (0, 6)]
    assert "row 0, row 1, row 2, row 3, row 4, row 5, row 6, row 7 and 4 more" in step(_steep(parameters[0]), steep)


def _steep(parameter: torch.nn.Parameter) -> Callable[[Batch], torch.Tensor]:
    """A loss of zero whose slope is infinite: the square root at zero."""
    return lambda batch: (parameter * 0).abs().sum().sqrt()


def test_lora_plus_is_a_rate_of_b_alone(tmp_path: Path) -> None:
    """Adam's first step is the rate itself wherever the gradient is far above epsilon, 1e-8."""
    moved: dict[tuple[float, str], float] = {}
    for ratio in (1.0, 16.0):
        base, parameters = _model(tmp_path)
        layers = adapters(base.model)
        before = {
            name: {part: p.detach().clone() for part, p in layer.trainable.items()} for name, layer in layers.items()
        }
        optimizer = make_optimizer(layers, Settings(lora_plus_ratio=ratio))
        batches = [make_batch(_examples([30, 40]))]
        optimizer_step(lambda b: batch_loss(base, b), batches, parameters, optimizer, learning_rate=1e-4, clip=0)  # noqa: B023
        for part in ("lora_A", "lora_B"):
            steps = [(layer.trainable[part] - before[name][part]).abs().flatten() for name, layer in layers.items()]
            moved[ratio, part] = float(torch.cat(steps).detach().median())
    assert moved[1.0, "lora_A"] == pytest.approx(1e-4, rel=1e-2) and moved[16.0, "lora_A"] == moved[1.0, "lora_A"]
    assert moved[1.0, "lora_B"] == pytest.approx(1e-4, rel=1e-2)
    assert moved[16.0, "lora_B"] == pytest.approx(16e-4, rel=1e-2)


def test_learning_rates_of_the_schedules() -> None:
    rates = [learning_rate_at(s, 10, 1.0, 0.2, "linear") for s in range(10)]
    assert rates == pytest.approx([0.5, 1.0, 1.0, 0.875, 0.75, 0.625, 0.5, 0.375, 0.25, 0.125])
    assert [learning_rate_at(s, 4, 2.0, 0.0, "constant") for s in range(4)] == [2.0] * 4
    cosine = [learning_rate_at(s, 8, 1.0, 0.0, "cosine") for s in (0, 2, 4, 6)]
    assert cosine == pytest.approx([1.0, 0.853553, 0.5, 0.146447], abs=1e-6)
    assert learning_rate_at(0, 1, 1.0, 0.05, "cosine") == 1.0  # one step in all is no reason for a rate of zero


@pytest.mark.parametrize("native", [True, False])
def test_label_smoothing_equals_pytorchs(native: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    if not native:
        monkeypatch.setattr("smidgen.kernels.elementwise._library", lambda *_: None)
    base, parameters = _model(tmp_path, targets="head")
    targets = torch.randint(0, VOCAB_SIZE, (50,))
    ours, theirs = (torch.randn(50, 64, generator=torch.Generator().manual_seed(1)).requires_grad_() for _ in "ab")
    loss = chunked_cross_entropy(base, ours, targets, chunk=20, smoothing=0.2)
    expected = F.cross_entropy(base.logits_of(theirs), targets, reduction="sum", label_smoothing=0.2)
    torch.testing.assert_close(loss, expected, rtol=1e-5, atol=1e-4)
    (loss / 50).backward()
    grads = [parameter.grad.clone() for parameter in parameters if parameter.grad is not None]
    for parameter in parameters:
        parameter.grad = None
    (expected / 50).backward()
    _assert_close([ours.grad, *grads], [theirs.grad, *(p.grad for p in parameters if p.grad is not None)])
