"""Packed rows and shared prefixes: the loss and every gradient are those of rows computed one by one."""

import dataclasses
from collections.abc import Callable, Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from transformers import AttentionInterface

import smidgen.model.build
import smidgen.model.fused
import smidgen.model.packing
import smidgen.model.segments
from smidgen.data.batch import Batch, make_batch
from smidgen.data.prefix import computed_tokens
from smidgen.data.render import Example
from smidgen.kernels.attention import Segments, attention_backward
from smidgen.lora.attach import adapters, attach_lora
from smidgen.model.build import Base
from smidgen.model.fused import FusedLayer
from smidgen.model.packing import PackedRows, pack_rows
from smidgen.model.recompute import set_recompute
from smidgen.model.segments import SegmentMasks, attend_in_segments
from smidgen.train.loss import batch_loss
from smidgen.train.sharing import refuse_packing
from tiny import CONFIGS, VOCAB_SIZE, build, tiny_folder

FUSED = ["llama", "mistral", "qwen2", "qwen3", "qwen3-one-key-head"]  # Mistral's window of 8 ends within the prefixes
_SHAPE: dict[str, Any] = {
    "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4, "vocab_size": 272,
    "bos_token_id": 256, "eos_token_id": 257, "pad_token_id": 258,
}  # fmt: skip
MORE: dict[str, Any] = {
    "gpt-oss": transformers.GptOssConfig(
        **_SHAPE, num_key_value_heads=2, head_dim=16, num_local_experts=4, num_experts_per_tok=2, sliding_window=8
    ),
    "bloom": transformers.BloomConfig(hidden_size=64, n_layer=2, n_head=4, vocab_size=272),
    "lfm2": transformers.Lfm2Config(**_SHAPE, num_key_value_heads=2, layer_types=["conv", "full_attention"]),
}
REFUSED = ["falcon", "bloom", "lfm2"]  # attentions that cannot be exchanged, and a convolution
# Windows and a soft-cap that tell at these lengths; the models' own are larger.
CHANGES: dict[str, dict[str, Any]] = {
    "gemma2": {"sliding_window": 8, "attn_logit_softcapping": 1.0},
    "mixtral": {"sliding_window": 8},
    "phi3": {"sliding_window": 8},
}


def _model(folder: Path, storage: str = "nf4-dq", dtype: torch.dtype = torch.float32, **lora: Any) -> Base:
    base = build(folder, storage, dtype)
    names = list(base.linears)  # the head too
    attach_lora(base.model, names, **{"rank": 4, "alpha": 8, "dropout": 0.0, "seed": 0} | lora)
    generator = torch.Generator().manual_seed(1)
    for layer in adapters(base.model).values():  # B is zero at the start, and so would be half of the gradients
        layer.lora_B.data = torch.randn(layer.lora_B.shape, generator=generator) * 0.1
    base.model.train()
    return base


def _examples(labels: str) -> list[Example]:
    """Three rows share 20 tokens, two others 70, two are the same, one is alone. labels: 'answers' or 'all'."""
    generator = torch.Generator().manual_seed(2)

    def ids(count: int) -> list[int]:
        return torch.randint(0, VOCAB_SIZE, (count,), generator=generator).tolist()

    system, tools, twin = ids(20), ids(70), ids(15)
    rows = [system + ids(9), tools + ids(1), ids(13), system + ids(30), twin, tools + ids(66), system + ids(4), twin]
    starts = [20, 70, 5, 20, 14, 70, 22, 14] if labels == "answers" else [1] * 8
    pairs = zip(rows, starts, strict=True)
    return [Example(row, [-100] * start + row[start:], False, "") for row, start in pairs]


def _gradient(base: Base, batches: list[Batch]) -> tuple[float, torch.Tensor]:
    parameters = [p for layer in adapters(base.model).values() for p in (layer.lora_A, layer.lora_B)]
    loss, total = 0.0, torch.zeros(sum(p.numel() for p in parameters), dtype=torch.float64)
    for batch in batches:
        summed = batch_loss(base, batch)
        total += torch.cat([grad.reshape(-1).double() for grad in torch.autograd.grad(summed, parameters)])
        loss += float(summed.detach())
    return loss, total


def _distance(ours: torch.Tensor, expected: torch.Tensor) -> float:
    return float((ours - expected).norm() / expected.norm())


@pytest.mark.parametrize("labels", ["answers", "all"])
@pytest.mark.parametrize("backend", ["native", "torch"])
@pytest.mark.parametrize("architecture", FUSED)
def test_gradients_are_those_of_rows_one_by_one(
    architecture: str, backend: str, labels: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """float32: two orders of the same sums, through two layers; 1e-5 is above their rounding and below any bug."""
    monkeypatch.setenv("SMIDGEN_BACKEND", backend)
    base, examples = _model(tiny_folder(tmp_path, architecture)), _examples(labels)
    expected_loss, expected = _gradient(base, [make_batch([example]) for example in examples])
    loss, gradient = _gradient(base, [make_batch(examples, share_prefix=True)])
    assert loss == pytest.approx(expected_loss, rel=1e-6)
    assert _distance(gradient, expected) < 1e-5
    assert _distance(_gradient(base, [make_batch(examples)])[1], expected) < 1e-5  # packed, nothing shared


@pytest.mark.parametrize("labels", ["answers", "all"])
@pytest.mark.parametrize("architecture", FUSED)
def test_gradients_are_exact_in_float64(
    architecture: str, labels: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The plain back end computes in float64, whose rounding is 1e-16; so nothing but rounding is left."""
    monkeypatch.setenv("SMIDGEN_BACKEND", "torch")
    base, examples = _model(tiny_folder(tmp_path, architecture), "none", torch.float64), _examples(labels)
    for layer in adapters(base.model).values():
        layer.double()
    norm: Any = base.backbone.norm  # transformers' own computes in float32 whatever comes
    base.backbone.norm = torch.nn.RMSNorm(norm.weight.shape, norm.variance_epsilon, dtype=torch.float64)
    expected = _gradient(base, [make_batch([example]) for example in examples])[1]
    gradient = _gradient(base, [make_batch(examples, share_prefix=True)])[1]
    assert _distance(gradient, expected) < 1e-12


@pytest.mark.parametrize("mode", ["none", "cheap", "full"])
def test_tiles_of_a_large_batch_give_the_gradients_of_the_whole(
    mode: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    base, batch = _model(tiny_folder(tmp_path, "qwen3")), make_batch(_examples("all"), share_prefix=True)
    set_recompute(base, mode)
    expected_loss, expected = _gradient(base, [batch])
    tokens: list[int] = []
    run = FusedLayer.run
    monkeypatch.setattr(FusedLayer, "run", lambda self, x, *more: tokens.append(len(x)) or run(self, x, *more))
    base.tile_tokens = 60
    loss, gradient = _gradient(base, [batch])
    assert len(tokens) > 2 * (1 + (mode == "full")) and len(set(tokens)) > 1
    assert loss == pytest.approx(expected_loss, rel=1e-6)
    assert _distance(gradient, expected) < 1e-5  # sums in another order
    # the control arm: all tiles in the place of the first one
    put = smidgen.model.fused._put
    monkeypatch.setattr(
        smidgen.model.fused, "_put", lambda all_, tile, part, n: put(all_, slice(0, len(part)), part, n)
    )
    assert not _distance(_gradient(base, [batch])[1], expected) < 1e-3


def _positions_restart(packed: PackedRows) -> PackedRows:
    lengths = packed.segments.lengths
    return dataclasses.replace(packed, positions=torch.cat([torch.arange(length) for length in lengths]))


def _prefix_unseen(packed: PackedRows) -> PackedRows:
    return dataclasses.replace(packed, segments=Segments(packed.segments.lengths))


def _one_branch_label(packed: PackedRows) -> PackedRows:
    """The position before a branch predicts the first row's token for all rows, as where labels are packed too."""
    places = packed.places.clone()
    seen: set[int] = set()
    for index, place in enumerate(places.tolist()):
        places[index] = 0 if place in seen else place
        seen.add(place)
    return dataclasses.replace(packed, places=places)


@pytest.mark.parametrize("fault", [_positions_restart, _prefix_unseen, _one_branch_label])
def test_a_broken_prefix_would_be_caught(
    fault: Callable[[PackedRows], PackedRows], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The control arm: each is a mistake that other packings make, and far from 1e-5."""
    base, examples = _model(tiny_folder(tmp_path)), _examples("answers")
    expected = _gradient(base, [make_batch([example]) for example in examples])[1]
    monkeypatch.setattr(smidgen.model.build, "pack_rows", lambda *given: fault(pack_rows(*given)))
    assert _distance(_gradient(base, [make_batch(examples, share_prefix=True)])[1], expected) > 1e-3


def test_a_prefix_without_its_branches_gradient_would_be_caught(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def own_only(grad_out: torch.Tensor, *given: Any) -> torch.Tensor:
        segments = given[-2]
        followed = torch.isin(torch.arange(len(segments.lengths)), segments.prefixes)
        is_prefix = followed.repeat_interleave(torch.tensor(segments.lengths))[:, None]
        alone = attention_backward(grad_out * is_prefix, *given).clone()
        return torch.where(is_prefix, alone, attention_backward(grad_out, *given))

    base, examples = _model(tiny_folder(tmp_path)), _examples("answers")
    expected = _gradient(base, [make_batch([example]) for example in examples])[1]
    monkeypatch.setattr(smidgen.model.fused, "attention_backward", own_only)
    assert _distance(_gradient(base, [make_batch(examples, share_prefix=True)])[1], expected) > 1e-3


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_recomputation_changes_no_bit(dtype: torch.dtype, tmp_path: Path) -> None:
    base, batch = _model(tiny_folder(tmp_path, "qwen3"), dtype=dtype), make_batch(_examples("all"), share_prefix=True)
    results = []
    for mode in ("none", "cheap", "full"):
        set_recompute(base, mode)
        results.append(_gradient(base, [batch])[1])
    assert torch.equal(results[0], results[1]) and torch.equal(results[0], results[2])


def test_a_prefix_is_computed_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    base, examples = _model(tiny_folder(tmp_path)), _examples("answers")
    tokens: list[int] = []
    run = FusedLayer.run
    monkeypatch.setattr(FusedLayer, "run", lambda self, x, *more: tokens.append(len(x)) or run(self, x, *more))
    _gradient(base, [make_batch(examples, share_prefix=True)])
    rows = [example.input_ids for example in examples]
    assert tokens == [computed_tokens(rows)] * 2 == [sum(map(len, rows)) - 2 * 20 - 70 - 14] * 2


def test_logits_of_shared_labels_are_computed_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With all labels counted, the prefix's own are the same in every row; only the branching ones differ."""
    base, examples = _model(tiny_folder(tmp_path)), _examples("all")
    rows: list[int] = []
    logits_of = Base.logits_of
    monkeypatch.setattr(Base, "logits_of", lambda self, hidden: rows.append(len(hidden)) or logits_of(self, hidden))
    batch = make_batch(examples, share_prefix=True)
    _gradient(base, [batch])
    # of each shared prefix all labels but the one behind it are merged; the twins' last token is the same too
    assert sum(rows) == batch.num_labels - 2 * 19 - 69 - 14


@pytest.mark.parametrize("architecture", ["llama", "gemma2"])
def test_layers_of_transformers_compute_every_row_in_full(architecture: str, tmp_path: Path) -> None:
    """Dropout, and layers that are not our own: the groups of a batch are no error and change nothing."""
    dropout = 0.3 if architecture == "llama" else 0.0
    base, examples = _model(tiny_folder(tmp_path, architecture), dropout=dropout), _examples("answers")
    results = []
    for share in (False, True):
        torch.manual_seed(5)
        results.append(_gradient(base, [make_batch(examples, share_prefix=share)])[1])
    assert torch.equal(*results)


@pytest.fixture
def unfused(monkeypatch: pytest.MonkeyPatch) -> Callable[..., Base]:
    """Any architecture by transformers' own layers, as on CUDA; not yet known to pack."""
    monkeypatch.setattr(smidgen.model.build, "fuse_layers", lambda model: 0)
    for name, config in MORE.items():
        monkeypatch.setitem(CONFIGS, name, config)
    return lambda path, name, **how: _model(tiny_folder(path, name, **CHANGES.get(name, {})), **how)


@pytest.mark.parametrize("labels", ["answers", "all"])
@pytest.mark.parametrize("architecture", [name for name in [*CONFIGS, "gpt-oss"] if name not in REFUSED])
def test_transformers_layers_pack_with_the_gradients_of_rows_one_by_one(
    architecture: str, labels: str, unfused: Callable[..., Base], tmp_path: Path
) -> None:
    """float32: see above. The expected gradient is transformers' own, without anything of ours in its attention."""
    base, examples = unfused(tmp_path, architecture, storage="none"), _examples(labels)
    expected_loss, expected = _gradient(base, [make_batch([example]) for example in examples])
    assert refuse_packing(base, 136) == "" and not base.packs
    base.packs = True
    base.model.train()
    for share in (True, False):
        loss, gradient = _gradient(base, [make_batch(examples, share_prefix=share)])
        assert loss == pytest.approx(expected_loss, rel=1e-6)
        assert _distance(gradient, expected) < 1e-5


@pytest.mark.parametrize("architecture", ["gpt2", "mistral", "gemma2", "gpt-oss"])
def test_one_mask_for_all_segments_gives_the_same_gradients(
    architecture: str, unfused: Callable[..., Base], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What a GPU does with many short segments, done here."""
    base, batch = unfused(tmp_path, architecture, storage="none"), make_batch(_examples("all"), share_prefix=True)
    base.packs = True
    expected = _gradient(base, [batch])[1]
    monkeypatch.setattr(smidgen.model.segments, "_are_one_block", lambda *given: True)
    assert refuse_packing(base, 136) == ""
    base.packs = True
    base.model.train()
    assert _distance(_gradient(base, [batch])[1], expected) < 1e-5


@pytest.mark.parametrize("architecture", ["gpt2", "gpt-neox", "opt", "stablelm", "llama", "mistral"])
def test_transformers_layers_pack_exactly_in_float64(
    architecture: str, unfused: Callable[..., Base], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SMIDGEN_BACKEND", "torch")
    base, examples = unfused(tmp_path, architecture, storage="none", dtype=torch.float64), _examples("all")
    for name, module in list(base.model.named_modules()):
        if type(module).__name__.endswith("RMSNorm"):  # transformers' own compute in float32 whatever comes
            norm = torch.nn.RMSNorm(module.weight.shape, module.variance_epsilon, dtype=torch.float64)  # type: ignore[arg-type, union-attr]
            base.model.set_submodule(name, norm)
    for layer in adapters(base.model).values():
        layer.double()
    expected = _gradient(base, [make_batch([example]) for example in examples])[1]
    base.packs = True
    assert _distance(_gradient(base, [make_batch(examples, share_prefix=True)])[1], expected) < 1e-12


@pytest.mark.parametrize("architecture", ["gemma2", "stablelm", "gpt-neox"])
def test_layers_computed_again_attend_as_they_did(
    architecture: str, unfused: Callable[..., Base], tmp_path: Path
) -> None:
    base, batch = unfused(tmp_path, architecture), make_batch(_examples("answers"), share_prefix=True)
    base.packs = True
    results = []
    for mode in ("none", "full"):
        set_recompute(base, mode)
        results.append(_gradient(base, [batch])[1])
    assert torch.equal(*results)


@pytest.mark.parametrize("recompute", ["none", "full"])
def test_fused_layers_with_dropout_pack_too(recompute: str, tmp_path: Path) -> None:
    """transformers' layers stand in for them then. So little dropout drops nothing, and gradients can be compared."""
    base, examples = _model(tiny_folder(tmp_path, "mistral"), dropout=1e-9), _examples("answers")
    set_recompute(base, recompute)
    expected = _gradient(base, [make_batch([example]) for example in examples])[1]
    base.packs = True
    assert _distance(_gradient(base, [make_batch(examples)])[1], expected) < 1e-5


def _one_segment(packed: PackedRows) -> PackedRows:
    return dataclasses.replace(packed, segments=Segments([packed.segments.tokens]))


@pytest.mark.parametrize("fault", [_one_segment, _positions_restart, _prefix_unseen, _one_branch_label])
def test_broken_packing_would_be_caught_by_the_tests_and_before_a_run(
    fault: Callable[[PackedRows], PackedRows],
    unfused: Callable[..., Base],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The control arm: rows that see each other, wrong positions, rows without their prefix, a label for all rows."""
    base, examples = unfused(tmp_path, "phi3"), _examples("answers")
    expected = _gradient(base, [make_batch([example]) for example in examples])[1]
    monkeypatch.setattr(smidgen.model.build, "pack_rows", lambda *given: fault(pack_rows(*given)))
    assert "does not compute packed rows as rows apart" in refuse_packing(base, 136)
    base.packs = True
    base.model.train()
    assert _distance(_gradient(base, [make_batch(examples, share_prefix=True)])[1], expected) > 1e-3


@pytest.fixture
def _registered() -> Iterator[None]:
    yield
    AttentionInterface.register("smidgen_segments", attend_in_segments)


@pytest.mark.usefixtures("_registered")
@pytest.mark.parametrize(
    ("architecture", "ignored"),
    [("gemma2", "softcap"), ("gemma2", "sliding_window"), ("phi3", "sliding_window"), ("gpt-oss", "s_aux")],
)
def test_what_an_attention_ignores_is_found_before_a_run(
    architecture: str, ignored: str, unfused: Callable[..., Base], tmp_path: Path
) -> None:
    """As an architecture would be that asks for something that is not known here."""
    base = unfused(tmp_path, architecture, storage="none")
    assert refuse_packing(base, 20) == ""
    _ignore(ignored)
    assert "does not compute packed rows as rows apart" in refuse_packing(base, 20)


@pytest.mark.usefixtures("_registered")
def test_a_window_counts_where_rows_are_longer(tmp_path: Path) -> None:
    """The trial's rows are short; a window that only longer rows to come leave makes one of them longer."""
    base = _model(tiny_folder(tmp_path, "phi3", sliding_window=40))
    assert refuse_packing(base, 60) == ""
    _ignore("sliding_window")
    assert refuse_packing(base, 40) == ""
    assert refuse_packing(base, 60) != ""


def _ignore(argument: str) -> None:
    AttentionInterface.register(
        "smidgen_segments", lambda *given, **how: attend_in_segments(*given, **how | {argument: None})
    )


@pytest.mark.parametrize("architecture", REFUSED)
def test_models_that_mix_rows_elsewhere_are_refused_and_padded(
    architecture: str, unfused: Callable[..., Base], tmp_path: Path
) -> None:
    base, examples = unfused(tmp_path, architecture), _examples("answers")
    why = refuse_packing(base, 136)
    assert why.startswith(type(base.model).__name__) and "\n" not in why
    base.model.train()
    expected = _gradient(base, [make_batch([example]) for example in examples])[1]
    assert _distance(_gradient(base, [make_batch(examples, share_prefix=True)])[1], expected) < 1e-5


@pytest.mark.parametrize("window", [0, 3, 7])
def test_the_mask_of_all_segments_is_that_of_each(window: int) -> None:
    segments = Segments([5, 9, 4, 6, 3], [-1, -1, 1, 1, -1])
    masks, like = SegmentMasks(segments), torch.empty(0)
    expected = torch.full((segments.tokens, segments.tokens), -torch.inf)
    spans = [slice(start, stop) for start, stop in pairwise(segments.starts.tolist())]
    for own, queries, prefix in zip(spans, segments.lengths, segments.prefixes.tolist(), strict=True):
        before = segments.lengths[prefix] if prefix >= 0 else 0
        mask = masks.causal(queries, before + queries, window, like)
        expected[own, own] = mask[:, before:]
        if before:
            expected[own, spans[prefix]] = mask[:, :before]
    assert torch.equal(masks.block(window, like), expected)
    assert masks.block(window, like) is masks.block(window, like)  # one for all layers
