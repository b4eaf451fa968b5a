"""Streamed layers compute what resident ones compute, bit for bit, and a file that changes is an error."""

import gc
import os
import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

import smidgen.model.stream as stream_module
from gguf_models import write_gguf
from packers import pack_folder, pack_with_bitsandbytes
from smidgen.checkpoint.open import open_checkpoint
from smidgen.data.batch import Batch
from smidgen.errors import RunError
from smidgen.events import Event, Progress
from smidgen.lora.attach import attach_lora
from smidgen.lora.targets import select_targets
from smidgen.model.build import Base, build_base
from smidgen.model.load import choose_storage, load_base, open_source
from smidgen.model.recompute import set_recompute
from smidgen.model.stream import LayerStream, layer_of
from smidgen.train.loss import batch_loss
from tiny import tiny_folder

LAYERS = 5


@pytest.fixture(autouse=True)
def _every_buffer_is_large(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(stream_module, "_SMALL", 64)


def _model(tmp_path: Path, form: str) -> tuple[Path, str]:
    """(folder or file, how it is to be stored). form: also 'gptq' and 'awq', or 'bnb-' and what bitsandbytes stores."""
    architecture = {"gpt-neox": "gpt-neox", "mixtral": "mixtral", "mixtral-none": "mixtral"}.get(form, "llama")
    folder = tmp_path / "model"
    if not folder.exists():
        tiny_folder(folder, architecture, num_hidden_layers=LAYERS)
    packed = tmp_path / "packed"
    if form in ("gptq", "awq"):
        if not packed.exists():
            pack_folder(folder, packed, method=form, symmetric=form == "gptq", act_order=form == "gptq")
        return packed, "keep"
    if form.startswith("bnb-"):
        pytest.importorskip("bitsandbytes")
        if not packed.exists():
            pack_with_bitsandbytes(folder, packed, form.removeprefix("bnb-"))
        return packed, "keep"
    if form == "gguf":
        file = tmp_path / "model.gguf"
        if not file.exists():
            write_gguf(folder, file, {})
        return file, "keep"
    return folder, {"gpt-neox": "nf4-dq", "mixtral": "nf4-dq", "mixtral-none": "none"}.get(form, form)


def _build(path: Path, storage: str, streamed: tuple[int, ...], spill: Path) -> Base:
    checkpoint = open_checkpoint(path)
    stream = LayerStream(streamed, checkpoint, spill) if streamed else None
    storage, _ = choose_storage(storage, checkpoint)
    return build_base(
        checkpoint, storage=storage, compute_dtype=torch.float32, device=torch.device("cpu"), stream=stream
    )


def _results(base: Base, recompute: str) -> tuple[list[float], torch.Tensor]:
    """Losses of three micro-batches, one without gradients; the accumulated gradient."""
    names, _ = select_targets("all", base.linears, base.head_name)
    adapters = attach_lora(base.model, names, rank=2, alpha=4, dropout=0.0, seed=0)
    for layer in adapters.values():
        layer.lora_B.data.normal_(generator=torch.Generator().manual_seed(1))
    set_recompute(base, recompute)
    ids = torch.randint(0, 250, (2, 30), generator=torch.Generator().manual_seed(2))
    batch = Batch(ids, ids.clone(), torch.tensor([30, 21]))
    base.model.train()
    losses = []
    for _ in range(2):
        loss = batch_loss(base, batch)
        loss.backward()
        losses.append(float(loss.detach()))
    with torch.no_grad():
        losses.append(float(batch_loss(base, batch)))
    gradients = [p.grad.flatten() for layer in adapters.values() for p in layer.parameters() if p.grad is not None]
    return losses, torch.cat(gradients)


@pytest.mark.parametrize("recompute", ["none", "full"])
@pytest.mark.parametrize(
    "form",
    [
        "nf4-dq", "int8", "none", "gptq", "awq", "gguf", "bnb-nf4-dq", "bnb-fp4", "bnb-int8", "gpt-neox", "mixtral",
        "mixtral-none",
    ],
)  # fmt: skip
def test_streamed_is_resident_bit_for_bit(form: str, recompute: str, tmp_path: Path) -> None:
    path, storage = _model(tmp_path, form)
    losses, gradients = _results(_build(path, storage, (), tmp_path / "spill"), recompute)
    for streamed in (tuple(range(LAYERS)), (1, 3), (4,)):
        base = _build(path, storage, streamed, tmp_path / "spill")
        assert base.stream is not None
        away = {layer_of(name) for name, buffer in base.model.named_buffers() if buffer.is_meta}
        assert len(away) == max(0, len(streamed) - 2)
        again, same = _results(base, recompute)
        assert again == losses and torch.equal(same, gradients)
        assert base.stream.read_bytes > 0
        base.stream.close()
    assert not (tmp_path / "spill").exists() or not any((tmp_path / "spill").iterdir())


def test_what_lies_in_the_model_file_is_read_from_there(tmp_path: Path) -> None:
    path, storage = _model(tmp_path, "gguf")
    base = _build(path, storage, tuple(range(LAYERS)), tmp_path / "spill")
    assert not (tmp_path / "spill").exists()
    assert base.stream is not None
    base.stream.close()


def test_the_turns_cost_no_read(tmp_path: Path) -> None:
    """Two slots: forwards and backwards read each layer but the two at the end twice, and those at the start once."""
    path, storage = _model(tmp_path, "none")
    base = _build(path, storage, tuple(range(LAYERS)), tmp_path / "spill")
    stream = base.stream
    assert stream is not None
    ids = torch.arange(20)[None]
    batch = Batch(ids, ids.clone(), torch.tensor([20]))
    attach_lora(base.model, ["model.layers.0.self_attn.q_proj"], rank=2, alpha=4, dropout=0.0, seed=0)
    base.model.train()
    layer = sum(piece.nbytes for piece in stream._order[0].pieces)
    reads = []
    for _ in range(3):
        before = stream.read_bytes
        batch_loss(base, batch).backward()
        stream._slots[0].ready.result(), stream._slots[1].ready.result()  # type: ignore[union-attr]
        reads.append((stream.read_bytes - before) / layer)
    assert reads[1:] == [2 * LAYERS - 4] * 2


def test_a_layer_that_is_away_cannot_be_used(tmp_path: Path) -> None:
    path, storage = _model(tmp_path, "nf4-dq")
    base = _build(path, storage, tuple(range(LAYERS)), tmp_path / "spill")
    weight = base.linears["model.layers.0.mlp.up_proj"].weight
    weight.streamed = None
    with pytest.raises((RuntimeError, NotImplementedError)):
        weight.packed.sum().item()
    assert base.stream is not None
    base.stream.close()


@pytest.mark.parametrize("how", ["shortened", "written to"])
def test_a_file_that_changes_is_named(how: str, tmp_path: Path) -> None:
    path, storage = _model(tmp_path, "gguf")
    base = _build(path, storage, tuple(range(LAYERS)), tmp_path / "spill")
    if how == "shortened":
        os.truncate(path, path.stat().st_size // 4)
    else:
        with open(path, "r+b") as file:
            file.seek(-1, os.SEEK_END)
            file.write(b"\x01")
    ids = torch.arange(20)[None]
    with pytest.raises(RunError, match=f"{path.name} changed while it was in use"):
        for _ in range(2):  # the first layers may be there already
            batch_loss(base, Batch(ids, ids.clone(), torch.tensor([20])))
    assert base.stream is not None
    base.stream.close()


def test_a_disk_without_room_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path, storage = _model(tmp_path, "nf4-dq")

    def full(*_: object) -> int:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "pwrite", full)
    with pytest.raises(RunError, match=r"cannot be put down there \(No space left on device\)"):
        _build(path, storage, (1,), tmp_path / "spill")
    shutil.rmtree(tmp_path / "spill")


def test_a_disk_with_too_little_room_is_said_before_weights_are_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A GGUF file's blocks are read where they are, so that nothing has to be put down."""
    monkeypatch.setenv("SMIDGEN_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr("shutil.disk_usage", lambda _: SimpleNamespace(free=1000))
    told: list[Event] = []
    how: dict[str, Any] = {"compute_dtype": "float32", "device": "cpu", "streamed": range(LAYERS)}
    with pytest.raises(RunError, match=r"streamed: too little room for the 5 layers .* expected .* kB, found 1.0 kB"):
        load_base(open_source(str(_model(tmp_path, "nf4-dq")[0])), **how, report=told.append)
    assert not [event for event in told if isinstance(event, Progress)] and not (tmp_path / "cache").exists()
    load_base(open_source(str(_model(tmp_path, "gguf")[0])), **how)


def test_a_model_that_is_dropped_gives_back_its_files_and_the_disks_room(tmp_path: Path) -> None:
    """Without `close`, as in a notebook; matrices and stream refer to each other."""

    def spills() -> list[str]:
        links = [f"/proc/self/fd/{number}" for number in os.listdir("/proc/self/fd")]
        return [link for link in links if os.path.lexists(link) and str(tmp_path / "spill") in os.readlink(link)]

    base = _build(*_model(tmp_path, "nf4-dq"), tuple(range(LAYERS)), tmp_path / "spill")
    _results(base, "none")
    assert len(spills()) == 1
    del base
    gc.collect()
    assert not spills()


def test_layer_of() -> None:
    assert layer_of("model.layers.17.mlp.up_proj") == 17
    assert layer_of("transformer.h.3.attn") == 3
    assert layer_of("model.norm") is None
