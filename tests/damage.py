"""Random damage to one file of a model: bits, whole numbers, cuts, other values in JSON."""

import json
import random
import struct
from pathlib import Path
from typing import Any

__all__ = ["damaged"]

_NUMBERS = (0, 1, 255, 1 << 15, 1 << 31, (1 << 32) - 1, 1 << 63, (1 << 64) - 1)
_VALUES: tuple[Any, ...] = (0, -1, 1, 3, 1 << 40, -(1 << 63), 0.5, 1e308, "", "x", "../../x", None, True, [], {}, [1])


def damaged(path: Path, raw: bytes, generator: random.Random) -> bytes:
    """What the file `raw` becomes."""
    if path.suffix == ".json" and generator.random() < 0.8:
        return json.dumps(_mutate_json(json.loads(raw), generator)).encode()
    limit = len(raw)
    if path.suffix == ".gguf":
        limit = raw.rindex(b".weight") + 100  # in the table of tensors
    elif path.suffix == ".safetensors":
        limit = 8 + int.from_bytes(raw[:8], "little")
        if generator.random() < 0.4:
            header = json.dumps(_mutate_json(json.loads(raw[8:limit]), generator)).encode()
            return len(header).to_bytes(8, "little") + header + raw[limit:]
    return _mutate_bytes(raw, generator, limit)


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
