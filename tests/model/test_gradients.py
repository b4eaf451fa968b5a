"""LoRA's gradients through whole models in every stored form, against float64 over the numbers that the form holds.

The numbers come from the tests' own packers and from the reference packages, not from the decoders under test; only
where a model is packed while it loads are they read back. A run's own path is taken: fused layers, packed rows, chunked
loss.
"""

import shutil
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

import smidgen
from gguf_models import write_gguf
from packers import pack_folder, pack_with_bitsandbytes
from smidgen.data.batch import make_batch
from smidgen.data.render import Example
from smidgen.kernels.library import native_library
from smidgen.lora.attach import adapters, attach_lora
from smidgen.lora.linear import LoraLinear
from smidgen.train.loss import batch_loss
from tiny import VOCAB_SIZE, tiny_folder

Numbers = dict[str, torch.Tensor]
Made = tuple[Path, Numbers]  # the model, and the numbers that it stands for
# bitsandbytes' kernels for AVX-512 take no K of 32 or 96
WIDE = {"llama": {"intermediate_size": 128}, "qwen2-moe": {"intermediate_size": 128, "moe_intermediate_size": 64}}
BLOCKS_OF_256 = {"hidden_size": 256, "intermediate_size": 256, "head_dim": 64, "num_hidden_layers": 1}
GGML_TYPES = ["F32", "F16", "BF16", "Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0", "Q2_K", "Q3_K", "Q4_K", "Q5_K", "Q6_K"]
ROWS = [torch.randint(0, VOCAB_SIZE, (n,), generator=torch.Generator().manual_seed(n)).tolist() for n in (21, 13, 7)]


def _plain(path: Path, dtype: torch.dtype) -> Made:
    folder = tiny_folder(path / "model", dtype=dtype)
    return folder, load_file(folder / "model.safetensors")


def _bitsandbytes(
    path: Path, kind: str, architecture: str = "llama", shape: dict[str, int] | None = None, **how: Any
) -> Made:
    pytest.importorskip("bitsandbytes")
    dense = tiny_folder(path / "model", architecture, **shape or WIDE[architecture])
    twin = pack_with_bitsandbytes(dense, path / "packed", kind, **how)
    return path / "packed", load_file(twin / "model.safetensors")


def _groups(path: Path, architecture: str = "llama", **how: Any) -> Made:
    twin = pack_folder(tiny_folder(path / "model", architecture), path / "packed", **how)
    return path / "packed", load_file(twin / "model.safetensors")


def _gguf(path: Path, kind: str) -> Made:
    folder = tiny_folder(path / "model", **BLOCKS_OF_256 if kind.endswith("_K") else {})
    return path / "tiny.gguf", write_gguf(folder, path / "tiny.gguf", {}, default=kind)


FORMS: dict[str, Callable[[Path], Made]] = {
    "folder of float16": partial(_plain, dtype=torch.float16),
    "folder of bfloat16": partial(_plain, dtype=torch.bfloat16),
    "awq": partial(_groups, method="awq", symmetric=False),
    "gptq, a mixture": partial(_groups, architecture="mixtral", symmetric=False, act_order=True),
    "awq, a mixture": partial(_groups, architecture="qwen2-moe", method="awq", symmetric=False),
    "bitsandbytes nf4-dq, a mixture": partial(_bitsandbytes, kind="nf4-dq", architecture="qwen2-moe"),
}
FORMS |= {
    f"bitsandbytes {kind} in blocks of {size}, stored as bfloat16": partial(
        _bitsandbytes, kind=kind, shape=BLOCKS_OF_256, blocksize=size, quant_storage=torch.bfloat16
    )
    for kind, size in (("nf4-dq", 128), ("fp4", 256))
}
FORMS |= {
    f"bitsandbytes {kind}": partial(_bitsandbytes, kind=kind) for kind in ("nf4-dq", "nf4", "fp4-dq", "fp4", "int8")
}
FORMS |= {
    f"gptq {bits}{', symmetric' * symmetric}{', act-order' * act_order}": partial(
        _groups, bits=bits, symmetric=symmetric, act_order=act_order
    )
    for bits in (2, 3, 4, 8)
    for symmetric in (False, True)
    for act_order in (False, True)
}
FORMS |= {f"GGUF {kind}": partial(_gguf, kind=kind) for kind in GGML_TYPES}


def _adapted(model: Path, quantize: str) -> tuple[Any, dict[str, LoraLinear]]:
    """A base with an adapter on each linear layer, the head too; B is not zero, as A's gradient would then be."""
    base = smidgen.load(model, quantize=quantize, compute_dtype="float32").base
    attached = attach_lora(base.model, list(base.linears), rank=4, alpha=8, dropout=0.0, seed=0)
    generator = torch.Generator().manual_seed(1)
    for layer in attached.values():
        layer.lora_B.data = torch.randn(layer.lora_B.shape, generator=generator) * 0.1
    base.model.train()
    return base, attached


def _gradients(base: Any) -> dict[str, torch.Tensor]:
    loss = batch_loss(base, make_batch([Example(row, row, False, "") for row in ROWS]))
    parts = {
        f"{name}.{key}": part for name, layer in adapters(base.model).items() for key, part in layer.trainable.items()
    }
    return dict(zip(parts, torch.autograd.grad(loss, list(parts.values())), strict=True))


def _exact_gradients(folder: Path, numbers: Numbers, attached: dict[str, LoraLinear]) -> dict[str, torch.Tensor]:
    """Those of transformers' own model in float64, with the adapters added by hooks. folder: has its config.json."""
    exact = folder.with_name("exact")
    exact.mkdir()
    shutil.copy(folder / "config.json", exact)
    save_file({name: number.contiguous() for name, number in numbers.items()}, exact / "model.safetensors")
    model: Any = AutoModelForCausalLM.from_pretrained(exact, dtype=torch.float64, experts_implementation="eager")
    for name, module in list(model.named_modules()):
        if type(module).__name__.endswith("RMSNorm"):  # it computes in float32 whatever comes
            norm = torch.nn.RMSNorm(module.weight.shape, module.variance_epsilon, dtype=torch.float64)
            norm.weight = module.weight
            model.set_submodule(name, norm)
    leaves: dict[str, torch.Tensor] = {}

    def added(a: torch.Tensor, b: torch.Tensor, scaling: float) -> Any:
        return lambda _module, given, output: output + scaling * given[0] @ a.t() @ b.t()

    for name, layer in attached.items():
        a, b = (part.detach().double().requires_grad_() for part in (layer.lora_A, layer.lora_B))
        leaves |= {f"{name}.lora_A": a, f"{name}.lora_B": b}
        model.get_submodule(name).register_forward_hook(added(a, b, layer.scaling))
    loss = torch.zeros((), dtype=torch.float64)
    for row in ROWS:
        logits = model(torch.tensor([row]), use_cache=False).logits[0, :-1]
        loss = loss + torch.nn.functional.cross_entropy(logits, torch.tensor(row[1:]), reduction="sum")
    return dict(zip(leaves, torch.autograd.grad(loss, list(leaves.values())), strict=True))


def _check(base: Any, exact: dict[str, torch.Tensor], monkeypatch: pytest.MonkeyPatch) -> None:
    """Every tensor's gradient, as a whole. Measured: 2e-6, the rounding of float32 through two layers; with Q4_K and
    Q5_K, whose random blocks have a mean, so that values grow large, 3e-5.
    """
    for backend in ("native", "torch"):
        if backend == "native" and native_library() is None:
            continue
        monkeypatch.setenv("SMIDGEN_BACKEND", backend)
        ours = _gradients(base)
        assert ours.keys() == exact.keys()
        far = {name: float((ours[name] - exact[name]).norm() / exact[name].norm()) for name in exact}
        worst = max(far, key=lambda name: far[name])
        print(f"{backend}: {worst} {far[worst]:.2g}")
        assert far[worst] < 1e-4, (backend, worst)


@pytest.mark.parametrize("form", FORMS)
def test_gradients_over_what_a_file_holds(form: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path, numbers = FORMS[form](tmp_path)
    base, attached = _adapted(path, "none" if form.startswith("folder") else "keep")
    _check(base, _exact_gradients(tmp_path / "model", numbers, attached), monkeypatch)


@pytest.mark.parametrize("storage", ["nf4-dq", "nf4", "fp4-dq", "fp4", "int8", "none"])
def test_gradients_over_what_is_packed_while_it_loads(
    storage: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tiny_folder(tmp_path / "model", "llama-odd")  # blocks cross the rows of down_proj
    base, attached = _adapted(folder, storage)
    numbers = load_file(folder / "model.safetensors")
    for name, layer in attached.items():
        matrix: Any = layer.base.weight
        numbers[f"{name}.weight"] = matrix.rows(0, matrix.out_features, torch.float32).clone()
    _check(base, _exact_gradients(folder, numbers, attached), monkeypatch)
