"""Mixtures whose experts a checkpoint has packed one by one, as those on the hub do: used as they lie."""

import re
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

import smidgen
from packers import pack_folder, pack_with_bitsandbytes
from smidgen.checkpoint.open import open_checkpoint
from smidgen.errors import ModelError
from smidgen.model.build import read_config, skeleton
from smidgen.model.experts import PackedExperts
from smidgen.model.inventory import inventory_of
from smidgen.model.weights import Weights
from smidgen.quant.matrix import DenseMatrix, FrozenMatrix
from tiny import VOCAB_SIZE, tiny_folder, write_rows

IDS = torch.randint(0, VOCAB_SIZE, (2, 11), generator=torch.Generator().manual_seed(0))
# bitsandbytes' kernels for AVX-512 take no K of 32 or 96
WIDE = {"mixtral": {"intermediate_size": 128}, "qwen2-moe": {"intermediate_size": 128, "moe_intermediate_size": 64}}
FORMS = ["gptq", "gptq in act order", "awq", "nf4-dq", "nf4", "int8"]


def _packed(path: Path, architecture: str, form: str) -> tuple[Path, Path]:
    """(the packed folder, the dense one with the same numbers)"""
    dense = tiny_folder(path / "tiny", architecture, **WIDE[architecture])
    if form.startswith("gptq"):
        twin = pack_folder(dense, path / "packed", symmetric=False, act_order="act order" in form)
    elif form == "awq":
        twin = pack_folder(dense, path / "packed", method="awq", symmetric=False)
    else:
        pytest.importorskip("bitsandbytes")
        twin = pack_with_bitsandbytes(dense, path / "packed", form)  # routers too
    return path / "packed", twin


def _experts(base: Any) -> list[PackedExperts]:
    return [module for module in base.model.modules() if isinstance(module, PackedExperts)]


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("architecture", ["mixtral", "qwen2-moe"])
def test_logits_are_those_of_transformers_over_the_same_numbers(architecture: str, form: str, tmp_path: Path) -> None:
    packed, twin = _packed(tmp_path, architecture, form)
    base = smidgen.load(packed, compute_dtype="float32").base
    assert base.storage == form.split()[0]
    layers = _experts(base)
    assert len(layers) == 2
    for layer in layers:
        matrices = [module for module in layer.modules() if isinstance(module, FrozenMatrix)]
        assert len(matrices) == 4 * 3 and not any(isinstance(matrix, DenseMatrix) for matrix in matrices)
    assert all(parameter.dim() < 3 for parameter in base.model.parameters())
    expected = AutoModelForCausalLM.from_pretrained(twin, dtype=torch.float32).eval()
    with torch.no_grad():
        torch.testing.assert_close(base.model(IDS).logits, expected(IDS).logits, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    ("architecture", "form"), [("mixtral", "gptq"), ("qwen2-moe", "awq"), ("mixtral", "nf4-dq"), ("qwen2-moe", "int8")]
)
def test_it_trains_merges_and_is_exported(architecture: str, form: str, tmp_path: Path) -> None:
    packed, dense = _packed(tmp_path, architecture, form)
    how: dict[str, Any] = {"learning_rate": 5e-3, "compute_dtype": "float32", "compare": 0}
    said: list[Any] = []
    rows = str(write_rows(tmp_path / "rows.jsonl"))
    run = smidgen.finetune(str(packed), rows, tmp_path / "run", **how, report=said.append)
    assert run.summary["base_format"] == form
    sizes = {name: t.numel() for name, t in load_file(dense / "model.safetensors").items() if t.dim() > 1}
    sizes = {name: size for name, size in sizes.items() if ".layers." in name and not name.endswith(".gate.weight")}
    share = sum(size for name, size in sizes.items() if ".experts." in name) / sum(sizes.values())
    (note,) = [event.text for event in said if "get no adapter" in str(event)]
    assert f"experts, {share:.0%} of the decoder's weights" in note
    assert run.summary["loss_after"] < run.summary["loss_before"] - 0.3
    assert smidgen.merge(run.path, tmp_path / "merged", dtype="float32")["max_logit_difference"] < 1e-3
    trained = smidgen.load(run.path, compute_dtype="float32").base
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged", dtype=torch.float32).eval()
    with torch.no_grad():
        torch.testing.assert_close(trained.model(IDS).logits, merged(IDS).logits, rtol=1e-4, atol=1e-4)
    assert smidgen.export_run(run.path, tmp_path / "hf", to="hf")["mean_kl"] < 1e-4


@pytest.mark.parametrize("form", ["gptq", "gptq in act order", "awq"])
def test_the_forecast_counts_the_bytes_that_are_loaded(form: str, tmp_path: Path) -> None:
    packed, _ = _packed(tmp_path, "qwen2-moe", form)
    base = smidgen.load(packed, compute_dtype="float32").base
    model = inventory_of(base.checkpoint, base.checkpoint.config, base.storage)
    counted = {linear.name: linear.nbytes for linear in model.linears if linear.is_expert}
    loaded = {}
    for name, module in base.model.named_modules():
        if isinstance(module, PackedExperts):
            gate_up: Any = module.gate_up
            down: Any = module.down
            loaded |= {f"{name}.gate_up_proj.{i}": sum(m.nbytes for m in parts) for i, parts in enumerate(gate_up)}
            loaded |= {f"{name}.down_proj.{i}": matrix.nbytes for i, matrix in enumerate(down)}
    assert counted == loaded
    assert model.ordered == (form == "gptq in act order")


def test_experts_that_were_left_in_16_bits_are_views_of_the_file(tmp_path: Path) -> None:
    """Among packed layers, and where nothing is packed."""
    dense = tiny_folder(tmp_path / "tiny", "mixtral", torch.bfloat16)
    pack_folder(dense, tmp_path / "packed")
    numbers, path = load_file(dense / "model.safetensors"), tmp_path / "packed" / "model.safetensors"
    tensors = {name: tensor for name, tensor in load_file(path).items() if ".experts." not in name}
    save_file(tensors | {n: t for n, t in numbers.items() if ".experts." in n}, path, metadata={"format": "pt"})
    for folder, storage in ((tmp_path / "packed", "gptq"), (dense, "none")):
        base = smidgen.load(folder, quantize=storage, compute_dtype="float32").base
        matrices = [m for layer in _experts(base) for m in layer.modules() if isinstance(m, FrozenMatrix)]
        assert len(matrices) == 2 * 4 * 3
        assert all(base.checkpoint.place_of(matrix.weight) is not None for matrix in matrices)


@pytest.fixture(scope="module")
def mixtral(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return _packed(tmp_path_factory.mktemp("mixtral"), "mixtral", "gptq")[0]


def _changed(model: Path, folder: Path, change: Any) -> Path:
    shutil.copytree(model, folder)
    tensors = load_file(model / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


def test_an_expert_without_one_of_its_parts_is_refused(mixtral: Path, tmp_path: Path) -> None:
    def change(tensors: dict[str, torch.Tensor]) -> None:
        for name in [name for name in tensors if re.search(r"layers\.1\..*experts\.2\.w3\.", name)]:
            del tensors[name]

    with pytest.raises(ModelError, match=r"layers\.1\.mlp\.experts\.gate_up_proj, expected 4 experts of each kind"):
        smidgen.load(_changed(mixtral, tmp_path / "changed", change))


def test_an_expert_of_another_shape_is_refused(mixtral: Path, tmp_path: Path) -> None:
    def change(tensors: dict[str, torch.Tensor]) -> None:
        name = next(name for name in tensors if name.endswith("layers.0.block_sparse_moe.experts.1.w2.qweight"))
        tensors[name] = tensors[name][:-1].clone()

    with pytest.raises(ModelError, match=r"experts\.1\.w2\.qweight, expected int32 \[16, 64\], found int32 \[15, 64\]"):
        smidgen.load(_changed(mixtral, tmp_path / "changed", change))


@pytest.mark.parametrize(("value", "opens"), [(0.0, True), (0.5, False)])
def test_biases_that_autogptq_wrote_for_experts(value: float, opens: bool, mixtral: Path, tmp_path: Path) -> None:
    def change(tensors: dict[str, torch.Tensor]) -> None:
        for name in [name for name in tensors if ".experts." in name and name.endswith(".qweight")]:
            outputs = tensors[name].shape[1]
            tensors[name.replace("qweight", "bias")] = torch.full((outputs,), value, dtype=torch.float16)

    packed = _changed(mixtral, tmp_path / "changed", change)
    if opens:
        smidgen.load(packed)
    else:
        with pytest.raises(ModelError, match=r"experts\.0\.w1\.bias.* left over"):
            smidgen.load(packed)


@pytest.mark.parametrize("architecture", ["mixtral", "qwen2-moe"])
def test_experts_that_are_quantised_come_one_at_a_time(
    architecture: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """All of a layer's at once were 3.8 GB of Mixtral 8x7B while they were put together."""
    folder = tiny_folder(tmp_path / "tiny", architecture)
    checkpoint = open_checkpoint(folder)
    weights = Weights(skeleton(read_config(checkpoint.config, "config.json"), torch.float32), checkpoint)
    names = [name for name, shape in weights.shapes.items() if len(shape) == 3]
    assert len(names) == 4
    whole = Weights.read
    for name in names:
        assert torch.equal(torch.stack([*weights.each_expert(name)]), whole(weights, name))

    def read(self: Weights, name: str) -> torch.Tensor:
        assert name not in names
        return whole(self, name)

    monkeypatch.setattr(Weights, "read", read)
    assert _experts(smidgen.load(folder, quantize="nf4", compute_dtype="float32").base)
