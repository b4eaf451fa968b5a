"""Prefill and generation of SmolLM2-135M against llama.cpp and transformers. A few minutes on two cores."""

import tempfile
from pathlib import Path

from common import options, run_json, write_result

given = options(__doc__)
with tempfile.TemporaryDirectory() as name:
    words = ["bench", "decode", *given.words]
    result = run_json(words, Path(name))
    shown = {
        peer["name"]: {key: peer[key] for key in ("prefill_speedup", "decode_speedup")} for peer in result["peers"]
    }
    write_result(f"decode{given.suffix}", {"command": "smidgen " + " ".join(words), **result}, Path(name), shown)
