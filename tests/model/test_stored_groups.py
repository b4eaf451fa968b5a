"""GPTQ and AWQ folders, packed bit by bit in the tests (packers.py): trained on in place."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

import smidgen
from packers import pack_folder
from smidgen.errors import ModelError
from smidgen.events import Warned
from smidgen.model.inventory import inventory_of
from smidgen.quant.grouped import GroupedMatrix
from tiny import VOCAB_SIZE, tiny_folder, write_rows

IDS = torch.randint(0, VOCAB_SIZE, (2, 11), generator=torch.Generator().manual_seed(0))
PROJECTION = "model.layers.0.self_attn.q_proj"


def _logits(folder: Path, **how: Any) -> torch.Tensor:
    with torch.no_grad():
        return smidgen.load(folder, compute_dtype="float32", **how).base.model(IDS).logits


def _check(tmp_path: Path, storage: str, shape: dict[str, int] | None = None, **how: Any) -> Path:
    dense = pack_folder(tiny_folder(tmp_path / "tiny", **shape or {}), tmp_path / "packed", **how)
    loaded = smidgen.load(tmp_path / "packed", compute_dtype="float32")
    assert loaded.base.storage == storage
    matrix = loaded.base.linears[PROJECTION].weight
    assert isinstance(matrix, GroupedMatrix) and matrix.bits == how.get("bits", 4)
    expected = load_file(dense / "model.safetensors")[f"{PROJECTION}.weight"]
    assert torch.equal(matrix.rows(0, matrix.out_features, torch.float32), expected)
    with torch.no_grad():
        ours = loaded.base.model(IDS).logits
    torch.testing.assert_close(ours, _logits(dense, quantize="none"), rtol=1e-4, atol=1e-4)
    return tmp_path / "packed"


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize("act_order", [False, True])
@pytest.mark.parametrize(("symmetric", "version"), [(True, "gptq"), (False, "gptq"), (False, "gptq_v2")])
def test_gptq(bits: int, act_order: bool, symmetric: bool, version: str, tmp_path: Path) -> None:
    _check(tmp_path, "gptq", bits=bits, act_order=act_order, symmetric=symmetric, version=version)


@pytest.mark.parametrize("group_size", [32, 64, -1])
def test_group_sizes(group_size: int, tmp_path: Path) -> None:
    """96 inputs of a layer are no multiple of 64: the last group is shorter."""
    _check(tmp_path, "gptq", group_size=group_size, symmetric=False)


@pytest.mark.parametrize(
    "how",
    [
        {"bits": 4, "group_size": 32},
        {"bits": 4, "group_size": 32, "act_order": True},
        {"bits": 3, "group_size": 64, "act_order": True},
        {"bits": 8, "group_size": -1, "act_order": True},
        {"bits": 2, "group_size": -1},
        {"bits": 4, "group_size": 32, "legacy": True},
        {"method": "awq", "group_size": 32, "symmetric": False},
    ],
    ids=str,
)
def test_the_forecast_counts_the_bytes_that_are_loaded(how: dict[str, Any], tmp_path: Path) -> None:
    pack_folder(tiny_folder(tmp_path / "tiny"), tmp_path / "packed", **how)
    base = smidgen.load(tmp_path / "packed", compute_dtype="float32").base
    model = inventory_of(base.checkpoint, base.checkpoint.config, base.storage)
    loaded = {name: base.linears[name].weight for name in (linear.name for linear in model.linears)}
    assert {linear.name: linear.nbytes for linear in model.linears} == {k: w.nbytes for k, w in loaded.items()}
    assert model.ordered == any(weight.order is not None for weight in loaded.values())


def test_the_forecast_counts_what_gptq_will_make(tmp_path: Path) -> None:
    """Before it is made, of a model that finetune quantises on the way: act-order, groups of 128."""
    folder = tiny_folder(tmp_path / "model", hidden_size=256, intermediate_size=640)
    base = smidgen.load(folder, quantize="gptq", compute_dtype="float32").base
    model = inventory_of(base.checkpoint, base.checkpoint.config, "gptq")
    assert model.ordered
    assert {x.name: x.nbytes for x in model.linears} == {
        x.name: base.linears[x.name].weight.nbytes for x in model.linears
    }


@pytest.mark.parametrize(
    "how",
    [
        {"bits": 4},
        {"bits": 4, "act_order": True, "symmetric": False},
        {"bits": 3, "symmetric": False},
        {"bits": 3, "act_order": True},
        {"method": "awq", "symmetric": False},
    ],
    ids=str,
)
def test_groups_of_128(how: dict[str, Any], tmp_path: Path) -> None:
    """The size that most checkpoints have: 256 inputs are two groups, 192 one and a half."""
    shape = {"hidden_size": 192, "intermediate_size": 256, "num_hidden_layers": 1}
    _check(tmp_path, how.get("method", "gptq"), shape, group_size=128, **how)


@pytest.mark.parametrize("method", ["gptq", "awq"])
def test_a_file_beside_the_config_of_old_exports(method: str, tmp_path: Path) -> None:
    _check(tmp_path, method, method=method, symmetric=method == "gptq", legacy=True)


def test_awq(tmp_path: Path) -> None:
    _check(tmp_path, "awq", method="awq", symmetric=False)


@pytest.mark.parametrize(("version", "label"), [("gptq_v2", "gptq"), ("gptq", "gptq_v2")])
def test_a_lying_label_is_found_out_where_all_zero_points_are_the_middle(
    version: str, label: str, tmp_path: Path
) -> None:
    dense = pack_folder(tiny_folder(tmp_path / "tiny"), tmp_path / "packed", version=version, label=label)
    reports: list[Any] = []
    ours = _logits(tmp_path / "packed", report=reports.append)
    torch.testing.assert_close(ours, _logits(dense, quantize="none"), rtol=1e-4, atol=1e-4)
    warnings = [event.text for event in reports if isinstance(event, Warned)]
    assert sum(f"says format {label}" in text for text in warnings) == 1


def test_a_g_idx_that_was_never_filled_in_means_inputs_in_order(tmp_path: Path) -> None:
    """All zeros beside several groups: every input was decoded by the first group's scale."""
    dense = pack_folder(tiny_folder(tmp_path / "tiny"), tmp_path / "packed", symmetric=False)
    path = tmp_path / "packed" / "model.safetensors"
    tensors = {k: t.zero_() if k.endswith(".g_idx") else t for k, t in load_file(path).items()}
    save_file(tensors, path, metadata={"format": "pt"})
    reports: list[Any] = []
    ours = _logits(tmp_path / "packed", report=reports.append)
    torch.testing.assert_close(ours, _logits(dense, quantize="none"), rtol=1e-4, atol=1e-4)
    warnings = [event.text for event in reports if isinstance(event, Warned)]
    assert len(warnings) == 1 and f"{PROJECTION}.g_idx is all zeros" in warnings[0]


@pytest.mark.parametrize(("act_order", "group_size", "opens"), [(True, 32, False), (True, -1, True), (False, 32, True)])
def test_a_missing_g_idx_is_refused_where_it_says_something(
    act_order: bool, group_size: int, opens: bool, tmp_path: Path
) -> None:
    """With desc_act it was read as if the inputs were in order."""
    dense = pack_folder(tiny_folder(tmp_path / "tiny"), tmp_path / "packed", act_order=act_order, group_size=group_size)
    path = tmp_path / "packed" / "model.safetensors"
    tensors = {name: tensor for name, tensor in load_file(path).items() if not name.endswith(".g_idx")}
    save_file(tensors, path, metadata={"format": "pt"})
    if opens:
        ours, theirs = _logits(tmp_path / "packed"), _logits(dense, quantize="none")
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)
    else:
        with pytest.raises(
            ModelError, match=r"has no tensor model\..*_proj\.g_idx, expected one, since desc_act is true"
        ):
            smidgen.load(tmp_path / "packed")


@pytest.mark.parametrize(("method", "act_order"), [("gptq", True), ("awq", False)])
def test_it_trains_and_merges(method: str, act_order: bool, tmp_path: Path) -> None:
    pack_folder(tiny_folder(tmp_path / "tiny"), tmp_path / "packed", method=method, act_order=act_order)
    rows = write_rows(tmp_path / "rows.jsonl")
    run = smidgen.finetune(
        str(tmp_path / "packed"), str(rows), tmp_path / "run", learning_rate=5e-3, compute_dtype="float32"
    )
    assert run.summary["base_format"] == method
    assert run.summary["loss_after"] < run.summary["loss_before"] - 0.3
    assert smidgen.load(tmp_path / "run").base.storage == method
    assert smidgen.merge(run.path, tmp_path / "merged", dtype="float32")["max_logit_difference"] < 1e-3


@pytest.mark.parametrize(("value", "opens"), [(0.0, True), (0.5, False)])
def test_biases_that_autogptq_wrote_for_layers_without_one(value: float, opens: bool, tmp_path: Path) -> None:
    pack_folder(tiny_folder(tmp_path / "tiny"), tmp_path / "packed")
    path = tmp_path / "packed" / "model.safetensors"
    tensors = load_file(path)
    tensors[f"{PROJECTION}.bias"] = torch.full((64,), value, dtype=torch.float16)
    save_file(tensors, path, metadata={"format": "pt"})
    if opens:
        smidgen.load(tmp_path / "packed")
    else:
        with pytest.raises(ModelError, match=r"q_proj\.bias left over"):
            smidgen.load(tmp_path / "packed")


def test_rules_that_leave_layers_dense_are_read(tmp_path: Path) -> None:
    pack_folder(tiny_folder(tmp_path / "tiny"), tmp_path / "packed")
    path = tmp_path / "packed" / "config.json"
    config = json.loads(path.read_text())
    config["quantization_config"]["dynamic"] = {"-:.*lm_head.*": {}}
    path.write_text(json.dumps(config))
    assert smidgen.load(tmp_path / "packed").base.storage == "gptq"


def test_a_packed_norm_is_refused_by_name(tmp_path: Path) -> None:
    pack_folder(tiny_folder(tmp_path / "tiny"), tmp_path / "packed")
    path = tmp_path / "packed" / "model.safetensors"
    tensors = load_file(path)
    norm = "model.layers.0.input_layernorm"
    del tensors[f"{norm}.weight"]
    parts = {name: tensor for name, tensor in tensors.items() if name.startswith(f"{PROJECTION}.")}
    tensors |= {name.replace(PROJECTION, norm): tensor.clone() for name, tensor in parts.items()}
    save_file(tensors, path, metadata={"format": "pt"})
    with pytest.raises(ModelError, match=r"input_layernorm\.weight is packed, where only numbers can be read"):
        smidgen.load(tmp_path / "packed")
