"""Damaged and hostile model files, read down to the kernels: a result or one clear line, never a crash or a hang.

Every file is a real one with random changes: bits, whole numbers, cuts, and in JSON other values in the place of the
right ones. It is opened, packed weights and all, and a text is sent through the model, forwards and backwards. Numbers
may come out wrong or not finite; memory outside the file may not be read, which the checks before the kernels see to.
SMIDGEN_HOSTILE_FILES: how many for each reader.
"""

import json
import os
import random
import resource
import shutil
import struct
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, BitsAndBytesConfig

from gguf_models import write_gguf
from packers import pack_folder
from smidgen.checkpoint.open import open_checkpoint
from smidgen.errors import SmidgenError
from smidgen.lora.attach import attach_lora
from smidgen.model.build import build_base
from smidgen.model.load import choose_storage
from tiny import VOCAB_SIZE, tiny_folder

COUNT = int(os.environ.get("SMIDGEN_HOSTILE_FILES", "2000"))
IDS = torch.randint(0, VOCAB_SIZE, (1, 20), generator=torch.Generator().manual_seed(0))
_NUMBERS = (0, 1, 255, 1 << 15, 1 << 31, (1 << 32) - 1, 1 << 63, (1 << 64) - 1)
_VALUES: tuple[Any, ...] = (0, -1, 1, 3, 1 << 40, -(1 << 63), 0.5, 1e308, "", "x", "../../x", None, True, [], {}, [1])
_SMALL = {"num_hidden_layers": 1}


def _use(path: Path) -> None:
    """All that training does with a file: packed weights, a loss, a gradient."""
    checkpoint = open_checkpoint(path)
    storage, _ = choose_storage("auto", checkpoint)
    base = build_base(checkpoint, storage=storage, compute_dtype=torch.float32, device=torch.device("cpu"))
    names = [name for name in base.linears if name != base.head_name]
    adapters = attach_lora(base.model, names, rank=2, alpha=2, dropout=0.0, seed=0)
    ids = IDS % base.head.out_features
    logits = base.logits_of(base.hidden_of(ids))
    torch.nn.functional.cross_entropy(logits[0, :-1], ids[0, 1:]).backward()
    assert all(layer.lora_B.grad is not None for layer in adapters.values())
    checkpoint.fingerprint()


def _mutate_bytes(raw: bytearray, generator: random.Random, limit: int) -> None:
    """limit: how far from the start most changes are (the header, where lies do most)."""
    for _ in range(generator.choice((1, 1, 1, 2, 8))):
        at = generator.randrange(limit if generator.random() < 0.7 else len(raw))
        raw[at] = generator.choice((0, 255, 127, raw[at] ^ 1 << generator.randrange(8)))
    if generator.random() < 0.2:
        at = generator.randrange(max(1, limit - 8))
        raw[at : at + 8] = struct.pack("<Q", generator.choice(_NUMBERS))
    if generator.random() < 0.1:
        del raw[generator.randrange(len(raw)) :]


def _mutate_json(value: Any, generator: random.Random) -> Any:
    """One value somewhere inside becomes another one."""
    if isinstance(value, dict) and value and generator.random() < 0.9:
        key = generator.choice(list(value))
        if generator.random() < 0.1:
            return {k: v for k, v in value.items() if k != key}
        return value | {key: _mutate_json(value[key], generator)}
    if isinstance(value, list) and value and generator.random() < 0.8:
        at = generator.randrange(len(value))
        return [*value[:at], _mutate_json(value[at], generator), *value[at + 1 :]]
    if isinstance(value, int) and generator.random() < 0.5:
        return value + generator.choice((-1, 1, 7, 64, -64))
    return generator.choice(_VALUES)


def _mutate_folder(folder: Path, generator: random.Random) -> None:
    if generator.random() < 0.4:
        path = folder / "config.json"
        path.write_text(json.dumps(_mutate_json(json.loads(path.read_text()), generator)))
        return
    path = folder / "model.safetensors"
    raw = bytearray(path.read_bytes())
    size = 8 + int.from_bytes(raw[:8], "little")
    if generator.random() < 0.4:
        header = json.dumps(_mutate_json(json.loads(raw[8:size]), generator)).encode()
        path.write_bytes(len(header).to_bytes(8, "little") + header + raw[size:])
        return
    _mutate_bytes(raw, generator, size)
    path.write_bytes(raw)


def _bitsandbytes(tmp_path: Path, **how: Any) -> Path:
    pytest.importorskip("bitsandbytes")
    dense = tiny_folder(tmp_path / "tiny", **_SMALL)
    config = BitsAndBytesConfig(**how)
    model = AutoModelForCausalLM.from_pretrained(dense, quantization_config=config, dtype=torch.float32)
    model.save_pretrained(tmp_path / "packed")
    return tmp_path / "packed"


def _grouped(tmp_path: Path, method: str, **how: Any) -> Path:
    pack_folder(tiny_folder(tmp_path / "tiny", **_SMALL), tmp_path / "packed", method=method, **how)
    return tmp_path / "packed"


FOLDERS: dict[str, Callable[[Path], Path]] = {
    "dense": lambda path: tiny_folder(path / "packed", **_SMALL),
    "nf4-dq": lambda path: _bitsandbytes(path, load_in_4bit=True, bnb_4bit_use_double_quant=True),
    "int8": lambda path: _bitsandbytes(path, load_in_8bit=True),
    "gptq": lambda path: _grouped(path, "gptq", act_order=True, symmetric=False),
    "awq": lambda path: _grouped(path, "awq", symmetric=False),
}


def _attack(path: Path, count: int, mutate: Callable[[random.Random], None], seed: int) -> tuple[int, int]:
    """(files that could be used, files that were refused). Fails on anything else than one clear line within 2 s."""
    used = refused = 0
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    for number in range(count):
        generator = random.Random(seed * 1_000_000 + number)
        mutate(generator)
        began = time.perf_counter()
        try:
            _use(path)
            used += 1
        except SmidgenError as error:
            assert "\n" not in str(error), (number, str(error))
            refused += 1
        except Exception as error:
            raise AssertionError(f"file {number} of seed {seed}: {type(error).__name__}: {error}") from error
        assert time.perf_counter() - began < 2, f"file {number} of seed {seed} took too long"
    grown = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before
    assert grown < 1_000_000, f"memory grew by {grown} kB"
    return used, refused


@pytest.mark.slow
@pytest.mark.timeout(7200)
@pytest.mark.parametrize("kind", FOLDERS)
def test_folders(kind: str, tmp_path: Path) -> None:
    original = FOLDERS[kind](tmp_path)
    target = tmp_path / "attacked"

    def mutate(generator: random.Random) -> None:
        shutil.rmtree(target, ignore_errors=True)
        shutil.copytree(original, target)
        _mutate_folder(target, generator)

    used, refused = _attack(target, COUNT, mutate, seed=len(kind))
    assert used and refused


@pytest.mark.slow
@pytest.mark.timeout(7200)
@pytest.mark.parametrize("kinds", [("Q8_0", "Q4_0", "Q5_1", "F16"), ("Q4_K", "Q6_K", "Q2_K", "Q3_K"), ("Q5_K",) * 4])
def test_gguf(kinds: tuple[str, ...], tmp_path: Path) -> None:
    original = tmp_path / "tiny.gguf"
    wide = {} if kinds[0] == "Q8_0" else {"hidden_size": 256, "intermediate_size": 256, "head_dim": 64}
    folder = tiny_folder(tmp_path / "tiny", **_SMALL, **wide)
    parts = dict(zip(("attn_q", "attn_v", "ffn_up"), kinds[1:], strict=True))
    write_gguf(folder, original, parts, default=kinds[0])
    raw, target = original.read_bytes(), tmp_path / "attacked.gguf"
    header = raw.index(b"output_norm.weight") + 200

    def mutate(generator: random.Random) -> None:
        changed = bytearray(raw)
        _mutate_bytes(changed, generator, header)
        target.write_bytes(changed)

    used, refused = _attack(target, max(1, COUNT // 2), mutate, seed=len(kinds[0]))
    assert used and refused
