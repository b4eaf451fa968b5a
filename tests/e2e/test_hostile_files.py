"""Damaged and hostile model files, read down to the kernels: a result or one clear line, never a crash or a hang.

Every model is a real one, of which one file has random changes: bits, whole numbers, cuts, and in JSON other values in
the place of the right ones. Then it goes the whole way (hostile.py). Models made by hand after known defects are in
test_known_defects.py.

SMIDGEN_HOSTILE_FILES: how many for each reader. SMIDGEN_HOSTILE_RESULTS: a file that each reader's counts are added to,
a line of JSON each.
"""

import json
import os
import random
import struct
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pytest

from checkpoint.gguf_files import LLAMA, SENTENCEPIECE, gguf_bytes
from gguf_models import write_gguf
from hostile import (
    bitsandbytes_model,
    dense_model,
    grouped_model,
    outcome,
    peak_kb,
    sharded_model,
    use,
    use_text,
    use_weights,
)

COUNT = int(os.environ.get("SMIDGEN_HOSTILE_FILES", "2000"))
MOST_GROWN_KB = 256 << 10  # over all files of a reader, each of which is far smaller than a megabyte
_NUMBERS = (0, 1, 255, 1 << 15, 1 << 31, (1 << 32) - 1, 1 << 63, (1 << 64) - 1)
_VALUES: tuple[Any, ...] = (0, -1, 1, 3, 1 << 40, -(1 << 63), 0.5, 1e308, "", "x", "../../x", None, True, [], {}, [1])


class Kind(NamedTuple):
    """make: writes the sound model into a new folder. damaged: which of its files are, one at a time."""

    make: Callable[[Path], Path]
    damaged: tuple[str, ...]
    way: Callable[[Path], None]


def _four_bit(path: Path, quant_type: str, *, nested: bool) -> Path:
    how = {"bnb_4bit_quant_type": quant_type, "bnb_4bit_use_double_quant": nested}
    return bitsandbytes_model(path, load_in_4bit=True, **how)


def _gguf(path: Path, *types: str) -> Path:
    wide = {} if types[0] == "Q8_0" else {"hidden_size": 256, "intermediate_size": 256, "head_dim": 64}
    parts: dict[str, str] = dict(zip(("attn_q", "attn_v", "ffn_up"), types[1:], strict=True))
    write_gguf(dense_model(path, **wide), path / "model.gguf", parts, default=types[0])
    return path / "model.gguf"


def _sentencepiece(path: Path) -> Path:
    template = "{% for m in messages %}{{ m['role'] + m['content'] + eos_token }}{% endfor %}"
    raw = gguf_bytes(LLAMA | SENTENCEPIECE | {"tokenizer.chat_template": template})
    (path / "model.gguf").write_bytes(raw)
    return path / "model.gguf"


_WEIGHTS = ("config.json", "model.safetensors", "model.safetensors")
_TEXT = ("tokenizer.json", "tokenizer.json", "tokenizer_config.json", "chat_template.jinja")
KINDS: dict[str, Kind] = {
    "dense": Kind(dense_model, _WEIGHTS, use_weights),
    "shards": Kind(sharded_model, ("model.safetensors.index.json", "model-00001-of-*.safetensors"), use_weights),
    "nf4": Kind(lambda path: _four_bit(path, "nf4", nested=False), _WEIGHTS, use_weights),
    "nf4-dq": Kind(lambda path: _four_bit(path, "nf4", nested=True), _WEIGHTS, use_weights),
    "fp4-dq": Kind(lambda path: _four_bit(path, "fp4", nested=True), _WEIGHTS, use_weights),
    "int8": Kind(lambda path: bitsandbytes_model(path, load_in_8bit=True), _WEIGHTS, use_weights),
    "gptq": Kind(lambda path: grouped_model(path, "gptq", act_order=True, symmetric=False), _WEIGHTS, use_weights),
    "awq": Kind(lambda path: grouped_model(path, "awq", symmetric=False), _WEIGHTS, use_weights),
    "tokenizer": Kind(dense_model, _TEXT, use_text),
    "gguf-plain": Kind(lambda path: _gguf(path, "Q8_0", "Q4_0", "Q5_1", "F16"), ("model.gguf",), use),
    "gguf-k": Kind(lambda path: _gguf(path, "Q4_K", "Q6_K", "Q2_K", "Q3_K"), ("model.gguf",), use),
    "gguf-5-bit": Kind(lambda path: _gguf(path, *("Q5_K",) * 4), ("model.gguf",), use),
    "gguf-sentencepiece": Kind(_sentencepiece, ("model.gguf",), use_text),
}


def _mutate_bytes(raw: bytes, generator: random.Random, limit: int) -> bytes:
    """limit: how far from the start most changes are (the header, where lies do most)."""
    changed = bytearray(raw)
    for _ in range(generator.choice((1, 1, 1, 2, 8))):
        at = generator.randrange(limit if generator.random() < 0.7 else len(changed))
        changed[at] = generator.choice((0, 255, 127, changed[at] ^ 1 << generator.randrange(8)))
    if generator.random() < 0.2:
        at = generator.randrange(max(1, limit - 8))
        changed[at : at + 8] = struct.pack("<Q", generator.choice(_NUMBERS))
    if generator.random() < 0.1:
        del changed[generator.randrange(len(changed)) :]
    return bytes(changed)


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


def _damage(path: Path, raw: bytes, generator: random.Random) -> bytes:
    """What the file `raw` becomes."""
    if path.suffix == ".json" and generator.random() < 0.8:
        return json.dumps(_mutate_json(json.loads(raw), generator)).encode()
    limit = len(raw)
    if path.suffix == ".gguf":
        limit = raw.index(b"output_norm.weight") + 200
    elif path.suffix == ".safetensors":
        limit = 8 + int.from_bytes(raw[:8], "little")
        if generator.random() < 0.4:
            header = json.dumps(_mutate_json(json.loads(raw[8:limit]), generator)).encode()
            return len(header).to_bytes(8, "little") + header + raw[limit:]
    return _mutate_bytes(raw, generator, limit)


@pytest.fixture
def place() -> Iterator[Path]:
    """A folder in memory where there is one: every trial writes a file."""
    memory = Path("/dev/shm")
    with tempfile.TemporaryDirectory(dir=memory if memory.is_dir() else None) as folder:
        yield Path(folder)


@pytest.mark.slow
@pytest.mark.timeout(14400)
@pytest.mark.parametrize("name", KINDS)
def test_damaged_files_are_used_or_refused(name: str, place: Path) -> None:
    kind = KINDS[name]
    model = kind.make(place)
    folder = model if model.is_dir() else place
    files = [next(iter(folder.glob(pattern))) for pattern in kind.damaged]
    sound = {path: path.read_bytes() for path in files}
    assert outcome(model, kind.way)[0] is None, "the sound model is refused"
    used, slowest, before = 0, 0.0, peak_kb()
    for number in range(COUNT):
        generator = random.Random(f"{name} {number}")
        path = generator.choice(files)
        path.write_bytes(_damage(path, sound[path], generator))
        try:
            refused, seconds = outcome(model, kind.way)
        except BaseException as error:  # a panic of the Rust tokenizers is no Exception
            raise AssertionError(f"{name} {number}, {path.name}: {type(error).__name__}: {error}") from error
        path.write_bytes(sound[path])
        used, slowest = used + (refused is None), max(slowest, seconds)
    grown = peak_kb() - before
    counts = {"kind": name, "files": COUNT, "used": used, "refused": COUNT - used}
    line = json.dumps({**counts, "slowest_s": round(slowest, 3), "grown_kb": grown})
    print(line)
    if where := os.environ.get("SMIDGEN_HOSTILE_RESULTS"):
        with open(where, "a") as results:
            results.write(line + "\n")
    assert 0 < used < COUNT, line
    assert grown < MOST_GROWN_KB, line
