"""The safetensors reader: whole folders, and what is said about broken ones.

More of these are in e2e/test_known_defects.py.
"""

import json
import os
import random
import struct
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors import SafetensorError, deserialize
from safetensors.numpy import save as save_by_reference

from smidgen.checkpoint.base import DTYPES
from smidgen.checkpoint.open import open_checkpoint
from smidgen.errors import ModelError
from smidgen.events import Event, Warned

_CONFIG = {"model_type": "llama", "hidden_size": 4}


def _weights() -> dict[str, np.ndarray]:
    numbers = np.random.default_rng(3)
    return {
        "a": numbers.standard_normal((64, 32)).astype(np.float32),
        "b": numbers.standard_normal((3, 5)).astype(np.float16),
        "c": numbers.integers(0, 255, (7,), dtype=np.uint8),
        "empty": np.zeros((0, 4), dtype=np.float32),
        "scalar": np.array(2.5),
    }


def _folder(folder: Path, raw: bytes | None = None, config: Any = None) -> Path:
    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_text(json.dumps(_CONFIG if config is None else config))
    (folder / "model.safetensors").write_bytes(save_by_reference(_weights()) if raw is None else raw)
    return folder


def _sharded(folder: Path, weight_map: Any = None) -> Path:
    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_text(json.dumps({"dtype": "float32", **_CONFIG}))
    weights = _weights()
    shards = {"model-1.safetensors": ["a", "empty"], "model-2.safetensors": ["b", "c", "scalar"]}
    for name, tensors in shards.items():
        (folder / name).write_bytes(save_by_reference({tensor: weights[tensor] for tensor in tensors}))
    index = {tensor: name for name, tensors in shards.items() for tensor in tensors}
    content = json.dumps({"weight_map": index if weight_map is None else weight_map})
    (folder / "model.safetensors.index.json").write_text(content)
    return folder


def _header(entries: Any, data: bytes = b"", length: int | None = None) -> bytes:
    raw = entries if isinstance(entries, bytes) else json.dumps(entries).encode()
    return struct.pack("<Q", len(raw) if length is None else length) + raw + data


def _refused(folder: Path, says: str) -> None:
    with pytest.raises(ModelError, match=says) as caught:
        open_checkpoint(folder)
    assert "\n" not in str(caught.value)


def test_folder_gives_the_tensors_of_the_reference(tmp_path: Path) -> None:
    checkpoint = open_checkpoint(_folder(tmp_path / "m"))
    assert checkpoint.format == "safetensors"
    assert checkpoint.config == _CONFIG
    for name, expected in _weights().items():
        tensor = checkpoint.read(name)
        assert tensor.shape == expected.shape
        assert np.array_equal(tensor.numpy(), expected)


def test_every_dtype_keeps_its_bytes(tmp_path: Path) -> None:
    for dtype, (name, size) in DTYPES.items():
        data = bytes(range(1, 2 * size + 1)) if dtype != "BOOL" else b"\1\0"
        entries = {"x": {"dtype": dtype, "shape": [2], "data_offsets": [0, 2 * size]}}
        tensor = open_checkpoint(_folder(tmp_path, _header(entries, data))).read("x")
        assert tensor.dtype == getattr(torch, name)
        assert tensor.view(torch.uint8).numpy().tobytes() == data


def test_unaligned_tensors_are_read(tmp_path: Path) -> None:
    entries = {"x": {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}}
    raw = json.dumps(entries).encode()
    raw += b" " * (-(len(raw) + 8) % 4 + 1)  # the data start at an odd byte
    tensor = open_checkpoint(_folder(tmp_path, _header(raw, struct.pack("<f", 1.5)))).read("x")
    assert tensor.item() == 1.5
    assert tensor.data_ptr() % 4 == 0  # kernels may count on it


def test_shards_have_the_same_tensors_and_fingerprint_as_one_file(tmp_path: Path) -> None:
    whole, parts = open_checkpoint(_folder(tmp_path / "whole")), open_checkpoint(_sharded(tmp_path / "parts"))
    assert set(whole.tensors) == set(parts.tensors)
    assert all(torch.equal(whole.read(name), parts.read(name)) for name in whole.tensors)
    assert whole.fingerprint() == parts.fingerprint()
    assert whole.fingerprint().startswith("sha256:")


def test_fingerprint_changes_with_weights_names_and_config_only(tmp_path: Path) -> None:
    def fingerprint(change: Any = None, config: Any = None) -> str:
        weights = _weights()
        if change:
            change(weights)
        return open_checkpoint(_folder(tmp_path / "m", save_by_reference(weights), config)).fingerprint()

    def one_value(weights: dict[str, np.ndarray]) -> None:
        weights["a"][-1, -1] += 1

    same = fingerprint()
    idle = {"transformers_version": "9", "torch_dtype": "float16", "_name_or_path": "x", "use_cache": False}
    assert fingerprint(config={**_CONFIG, **idle, "architectures": ["B", "A"]}) == same
    assert fingerprint(one_value) != same
    assert fingerprint(lambda weights: weights.update(z=weights.pop("a"))) != same
    assert fingerprint(config={**_CONFIG, "rope_theta": 5.0}) != same


def test_truncated_files_say_how_much_is_missing(tmp_path: Path) -> None:
    raw = save_by_reference(_weights())
    _refused(_folder(tmp_path, raw[:-100]), rf"model.safetensors.*expected {len(raw)} bytes, found {len(raw) - 100}")
    for size in (*range(12), 100, len(raw) - 1):
        _refused(_folder(tmp_path, raw[:size]), "model.safetensors")


def test_pickles_are_refused_with_the_way_out(tmp_path: Path) -> None:
    folder = _folder(tmp_path / "m")
    (folder / "model.safetensors").unlink()
    _refused(folder, "has no weights")
    (folder / "pytorch_model.bin").write_bytes(b"\x80\x04")
    _refused(folder, r"pickle \(pytorch_model.bin\).*save_pretrained")


def test_one_file_of_another_name_is_taken_two_are_not(tmp_path: Path) -> None:
    folder = _folder(tmp_path / "m")
    (folder / "model.safetensors").rename(folder / "weights.safetensors")
    assert set(open_checkpoint(folder).tensors) == set(_weights())
    (folder / "more.safetensors").write_bytes(save_by_reference({}))
    _refused(folder, "2 .safetensors files and no index")


def test_code_of_a_model_folder_is_not_run_and_it_is_said(tmp_path: Path) -> None:
    events: list[Event] = []
    config = {**_CONFIG, "auto_map": {"AutoModel": "evil.Model"}}
    folder = _folder(tmp_path / "m", config=config)
    (folder / "evil.py").write_text("raise SystemExit")
    open_checkpoint(folder, events.append)
    assert [type(event) for event in events] == [Warned]


def test_what_is_no_model_is_refused(tmp_path: Path) -> None:
    folder = _folder(tmp_path / "m")
    _refused(tmp_path / "nothing", "does not exist")
    _refused(folder / "model.safetensors", f"give the folder that it lies in: {folder}|Give the folder")
    _refused(folder / "config.json", "is no model")
    os.mkfifo(tmp_path / "pipe.gguf")
    _refused(tmp_path / "pipe.gguf", "not a regular file")
    (folder / "config.json").unlink()
    (folder / "adapter_config.json").write_text("{}")
    _refused(folder, "holds an adapter")


def test_500_random_mutations_agree_with_the_reference_reader(tmp_path: Path) -> None:
    """What it accepts, we accept with the same values; what we accept, it accepts."""
    original, generator, opened = save_by_reference(_weights()), random.Random(11), 0
    header_bytes = 8 + int.from_bytes(original[:8], "little")
    began = time.perf_counter()
    for _ in range(500):
        raw = bytearray(original)
        for _ in range(generator.choice((1, 1, 2, 5))):
            at = generator.randrange(header_bytes)
            raw[at : at + 1] = generator.choice(
                (b"0", b"9", b"}", b'"', b" ", bytes([raw[at] ^ 1 << generator.randrange(8)]))
            )
        if generator.random() < 0.1:
            del raw[generator.randrange(len(raw)) :]
        try:
            reference = {name: tuple(entry["shape"]) for name, entry in deserialize(bytes(raw))}
        except SafetensorError:
            reference = None
        try:
            checkpoint = open_checkpoint(_folder(tmp_path / "m", bytes(raw)))
            tensors = {name: checkpoint.read(name) for name in checkpoint.tensors}
            checkpoint.fingerprint()
            opened += 1
        except ModelError as error:
            assert "\n" not in str(error)
            assert reference is None, f"refused though whole: {error}"
            continue
        assert {name: tuple(tensor.shape) for name, tensor in tensors.items()} == reference
    assert 10 < opened < 480
    assert time.perf_counter() - began < 30
