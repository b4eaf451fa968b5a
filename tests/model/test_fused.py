"""Our decoder layers against transformers' own: values, gradients, what is kept, and when they step aside."""

import copy
from pathlib import Path
from typing import Any

import pytest
import torch

from smidgen.data.batch import Batch
from smidgen.lora.attach import adapters, attach_lora
from smidgen.lora.targets import select_targets
from smidgen.model.build import Base
from smidgen.model.fused import FusedLayer
from smidgen.model.generate import Sampling, stream_tokens
from smidgen.model.recompute import set_recompute
from smidgen.train.loss import batch_loss
from tiny import build, tiny_folder

FUSED = ["llama", "llama-odd", "mistral", "qwen2", "qwen3", "qwen3-one-key-head"]


def _layers(base: Base) -> list[FusedLayer]:
    return [module for module in base.model.modules() if isinstance(module, FusedLayer)]


def _model(folder: Path, *, own: bool, dtype: torch.dtype = torch.float32, targets: str = "all", **lora: Any) -> Base:
    """own: with our layers; else transformers' layers over the same packed weights."""
    base = build(folder, "nf4-dq", dtype)
    if not own:
        for index, layer in enumerate(base.backbone.layers):  # type: ignore[arg-type]
            base.backbone.layers[index] = layer._original[0]  # type: ignore[index]
    names, _ = select_targets(targets, base.linears, base.head_name)
    attach_lora(base.model, names, **{"rank": 4, "alpha": 8, "dropout": 0.0, "seed": 0} | lora)
    generator = torch.Generator().manual_seed(1)
    for layer in adapters(base.model).values():  # B is zero at the start, and so would be half of the gradients
        layer.lora_B.data = torch.randn(layer.lora_B.shape, generator=generator) * 0.1
        if layer.lora_magnitude_vector is not None:
            layer.lora_magnitude_vector.data *= torch.rand(layer.out_features, generator=generator) + 0.5
    return base


def _batch(lengths: tuple[int, ...] = (21, 13, 1, 7)) -> Batch:
    ids = torch.randint(0, 250, (len(lengths), max(lengths)), generator=torch.Generator().manual_seed(2))
    real = torch.arange(max(lengths)) < torch.tensor(lengths)[:, None]
    return Batch(ids * real, torch.where(real, ids, -100), torch.tensor(lengths))


def _loss_and_gradient(base: Base, batch: Batch) -> tuple[float, torch.Tensor]:
    base.model.train()
    parameters = [p for layer in adapters(base.model).values() for p in layer.trainable.values()]
    loss = batch_loss(base, batch)
    gradients = torch.autograd.grad(loss, parameters)
    return float(loss.detach()), torch.cat([gradient.reshape(-1) for gradient in gradients]).double()


@pytest.mark.parametrize("backend", ["native", "torch"])
@pytest.mark.parametrize("architecture", FUSED)
def test_loss_and_gradients_are_transformers(
    architecture: str, backend: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """float32: two orders of the same sums, through two layers; 1e-5 is far above their rounding and below any bug."""
    monkeypatch.setenv("SMIDGEN_BACKEND", backend)
    folder = tiny_folder(tmp_path, architecture)
    ours, theirs = _model(folder, own=True), _model(folder, own=False)
    assert len(_layers(ours)) == 2 and not _layers(theirs)
    loss, gradient = _loss_and_gradient(ours, _batch())
    expected_loss, expected = _loss_and_gradient(theirs, _batch())
    assert loss == pytest.approx(expected_loss, rel=1e-6)
    assert float((gradient - expected).norm() / expected.norm()) < 1e-5


def test_the_loss_curve_is_that_of_plain_pytorch(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Twelve updates with everything native against transformers' layers on the plain back end.

    AdamW divides by the gradient's size, so rounding grows from step to step: 1e-4 of a loss that falls by a third.
    """
    folder = tiny_folder(tmp_path)
    curves = []
    for own, backend in ((True, "native"), (False, "torch")):
        monkeypatch.setenv("SMIDGEN_BACKEND", backend)
        base = _model(folder, own=own)
        base.model.train()
        parameters = [p for layer in adapters(base.model).values() for p in (layer.lora_A, layer.lora_B)]
        optimizer = torch.optim.AdamW(parameters, lr=2e-2, weight_decay=0.0)
        losses = []
        for _ in range(12):
            optimizer.zero_grad()
            loss = batch_loss(base, _batch()) / _batch().num_labels
            loss.backward()
            optimizer.step()
            losses.append(float(loss.detach()))
        curves.append(losses)
    assert curves[0][-1] < 0.67 * curves[0][0]
    assert curves[0] == pytest.approx(curves[1], rel=1e-4)


@pytest.mark.parametrize("use_dora", [False, True])
def test_bfloat16_is_as_near_to_float32_as_transformers_is(use_dora: bool, tmp_path: Path) -> None:
    folder = tiny_folder(tmp_path)
    exact = _loss_and_gradient(_model(folder, own=False, use_dora=use_dora), _batch())[1]
    ours = _loss_and_gradient(_model(folder, own=True, dtype=torch.bfloat16, use_dora=use_dora), _batch())[1]
    theirs = _loss_and_gradient(_model(folder, own=False, dtype=torch.bfloat16, use_dora=use_dora), _batch())[1]
    assert float((ours - exact).norm()) < 1.2 * float((theirs - exact).norm())


@pytest.mark.parametrize("backend", ["native", "torch"])
@pytest.mark.parametrize(
    ("architecture", "targets"), [("llama-odd", "all"), ("qwen2", "q,down"), ("qwen3", "k,o,gate")]
)
def test_dora_is_that_of_the_modules(
    architecture: str, targets: str, backend: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SMIDGEN_BACKEND", backend)
    folder = tiny_folder(tmp_path, architecture)
    ours, theirs = (_model(folder, own=own, targets=targets, use_dora=True) for own in (True, False))
    monkeypatch.setattr(_layers(ours)[0]._original[0], "forward", None)  # it is not called
    loss, gradient = _loss_and_gradient(ours, _batch())
    expected_loss, expected = _loss_and_gradient(theirs, _batch())
    assert loss == pytest.approx(expected_loss, rel=1e-6)
    assert float((gradient - expected).norm() / expected.norm()) < 1e-5  # as above


@pytest.mark.parametrize("targets", ["q,v", "down", "gate,o"])
def test_adapters_on_some_layers(targets: str, tmp_path: Path) -> None:
    folder = tiny_folder(tmp_path, "qwen2")
    ours = _loss_and_gradient(_model(folder, own=True, targets=targets), _batch())[1]
    theirs = _loss_and_gradient(_model(folder, own=False, targets=targets), _batch())[1]
    assert float((ours - theirs).norm() / theirs.norm()) < 1e-5


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("use_dora", [False, True])
def test_recomputation_changes_no_bit(
    dtype: torch.dtype, use_dora: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    base = _model(tiny_folder(tmp_path), own=True, dtype=dtype, use_dora=use_dora)
    runs: list[FusedLayer] = []
    run = FusedLayer.run
    monkeypatch.setattr(FusedLayer, "run", lambda self, *more: runs.append(self) or run(self, *more))
    results, kept_bytes, calls = {}, {}, {}
    for mode in ("none", "cheap", "full"):
        set_recompute(base, mode)
        runs.clear()
        storages: dict[int, int] = {}

        def keep(tensor: torch.Tensor, storages: dict[int, int] = storages) -> torch.Tensor:
            storages[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            results[mode] = _loss_and_gradient(base, _batch())
        kept_bytes[mode], calls[mode] = sum(storages.values()), len(runs)
    assert results["none"][0] == results["cheap"][0] == results["full"][0]
    assert torch.equal(results["none"][1], results["cheap"][1]) and torch.equal(results["none"][1], results["full"][1])
    assert calls == {"none": 2, "cheap": 2, "full": 4}  # only `full` computes products twice
    assert kept_bytes["none"] > 1.1 * kept_bytes["cheap"] > 2 * kept_bytes["full"]


@pytest.mark.parametrize("architecture", ["llama", "qwen3"])
def test_activations_may_wait_in_bfloat16(architecture: str, tmp_path: Path) -> None:
    """The loss is not touched. A rounded number is off by 2^-9 at most, and errors of many average out."""
    base = _model(tiny_folder(tmp_path, architecture), own=True)
    exact, kept_bytes = {}, {}
    for activation_dtype in ("auto", "bfloat16"):
        for mode in ("none", "cheap", "full"):
            set_recompute(base, mode, activation_dtype)
            storages: dict[int, int] = {}

            def keep(tensor: torch.Tensor, storages: dict[int, int] = storages) -> torch.Tensor:
                if tensor.shape[0] == 42 and tensor.dim() == 2 and tensor.shape[1] > 8:  # of all tokens; no low rank
                    storages[tensor.untyped_storage().data_ptr()] = tensor.nbytes
                return tensor

            with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
                loss, gradient = _loss_and_gradient(base, _batch())
            kept_bytes[activation_dtype, mode] = sum(storages.values())
            expected_loss, expected = exact.setdefault(mode, (loss, gradient))
            assert loss == expected_loss
            if activation_dtype == "bfloat16":
                assert 0 < float((gradient - expected).norm() / expected.norm()) < 2**-7
    assert kept_bytes["bfloat16", "none"] < 0.6 * kept_bytes["auto", "none"]


def test_each_layer_has_its_own_choice(tmp_path: Path) -> None:
    base = _model(tiny_folder(tmp_path), own=True)
    whole = _loss_and_gradient(base, _batch())[1]
    first, second = _layers(base)
    first.recompute, second.recompute = "full", "cheap"
    assert torch.equal(_loss_and_gradient(base, _batch())[1], whole)


def test_padding_is_not_computed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    base = _model(tiny_folder(tmp_path), own=True)
    tokens: list[int] = []
    run = FusedLayer.run
    monkeypatch.setattr(FusedLayer, "run", lambda self, x, *more: tokens.append(len(x)) or run(self, x, *more))
    _loss_and_gradient(base, _batch((21, 13, 7)))
    assert tokens == [41, 41]


def test_no_product_for_a_gradient_that_nobody_needs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The first layer's input is the embedding, which is frozen: its q, k, v need no product backwards."""
    base = _model(tiny_folder(tmp_path), own=True)
    first = _layers(base)[0].parts().qkv.matrix
    backwards: list[Any] = []
    before = type(first).matmul_t
    monkeypatch.setattr(type(first), "matmul_t", lambda self, *given: backwards.append(self) or before(self, *given))
    _loss_and_gradient(base, _batch())
    assert backwards and first not in backwards


def test_dropout_goes_through_the_modules(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tiny_folder(tmp_path)
    ours, theirs = (_model(folder, own=own, dropout=0.3) for own in (True, False))
    results = []
    for base, mode in ((theirs, "none"), (ours, "none"), (ours, "full")):
        set_recompute(base, mode)
        torch.manual_seed(5)
        results.append(_loss_and_gradient(base, _batch())[1])
    assert torch.equal(results[0], results[1]) and torch.equal(results[0], results[2])
    ours.model.eval()
    monkeypatch.setattr(_layers(ours)[0]._original[0], "forward", None)  # not called without dropout
    batch_loss(ours, _batch())


def test_dropout_in_a_later_layer_is_not_overlooked(tmp_path: Path) -> None:
    base = _model(tiny_folder(tmp_path), own=True, targets="model.layers.1.self_attn.q_proj", dropout=0.5)
    torch.manual_seed(5)
    first = _loss_and_gradient(base, _batch())[0]
    assert _loss_and_gradient(base, _batch())[0] != first


def test_training_after_generating_in_one_process(tmp_path: Path) -> None:
    """A scratch buffer made in inference mode could not be written in training."""
    base = _model(tiny_folder(tmp_path), own=True, dtype=torch.bfloat16)
    list(stream_tokens(base, list(range(90)), [], Sampling(max_new_tokens=2), 272))
    _loss_and_gradient(base, _batch((9, 4)))


def test_a_padding_mask_goes_through_the_modules(tmp_path: Path) -> None:
    base = build(tiny_folder(tmp_path))
    ids = torch.randint(0, 250, (2, 9))
    mask = torch.ones_like(ids)
    mask[0, :4] = 0
    theirs = copy.deepcopy(base.model)
    for index, layer in enumerate(theirs.model.layers):
        theirs.model.layers[index] = layer._original[0]
    ours = base.model(input_ids=ids, attention_mask=mask, use_cache=False).logits
    assert torch.allclose(ours[:, 4:], theirs(input_ids=ids, attention_mask=mask, use_cache=False).logits[:, 4:])
