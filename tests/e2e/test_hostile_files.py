"""Damaged and hostile model files, read down to the kernels: a result or one clear line, never a crash or a hang.

Every model is a real one, of which one file has random changes: bits, whole numbers, cuts, and in JSON other values in
the place of the right ones. Then it goes the whole way (hostile.py). Models made by hand after known defects are in
test_known_defects.py.

SMIDGEN_HOSTILE_FILES: how many for each reader. SMIDGEN_HOSTILE_RESULTS: a file that each reader's counts are added to,
a line of JSON each.
"""

import json
import mmap
import os
import random
import re
import signal
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

import pytest

from checkpoint.gguf_files import LLAMA, SENTENCEPIECE, gguf_bytes
from damage import damaged
from gguf_models import write_gguf
from hostile import (
    MOST_GROWN_KB,
    adapter_folder,
    bitsandbytes_model,
    dense_model,
    grouped_model,
    outcome,
    run_folder,
    run_watched,
    sharded_model,
    use,
    use_adapter,
    use_run,
    use_text,
    use_weights,
)

COUNT = int(os.environ.get("SMIDGEN_HOSTILE_FILES", "2000"))


class Kind(NamedTuple):
    """make: writes the sound model into a new folder. damaged: which of its files are, one at a time.
    share: of COUNT, less where another kind goes through the same reader, or a trial is a whole run's or adapter's.
    """

    make: Callable[[Path], Path]
    damaged: tuple[str, ...]
    way: Callable[[Path], None]
    share: float = 1.0


def _four_bit(path: Path, quant_type: str, *, nested: bool) -> Path:
    how = {"bnb_4bit_quant_type": quant_type, "bnb_4bit_use_double_quant": nested}
    return bitsandbytes_model(path, load_in_4bit=True, **how)


def _gguf(path: Path, *types: str) -> Path:
    wide = {} if types[0] == "Q8_0" else {"hidden_size": 256, "intermediate_size": 256, "head_dim": 64}
    parts: dict[str, str] = dict(zip(("attn_q", "attn_v", "ffn_up"), types[1:], strict=True))
    write_gguf(dense_model(path, **wide), path / "model.gguf", parts, default=types[0])
    return path / "model.gguf"


def _split_gguf(path: Path) -> Path:
    write_gguf(dense_model(path), path / "model.gguf", {}, tensors_of_part=7)
    return path / "model-00001-of-00002.gguf"


def _sentencepiece(path: Path) -> Path:
    template = "{% for m in messages %}{{ m['role'] + m['content'] + eos_token }}{% endfor %}"
    raw = gguf_bytes(LLAMA | SENTENCEPIECE | {"tokenizer.chat_template": template})
    (path / "model.gguf").write_bytes(raw)
    return path / "model.gguf"


_WEIGHTS = ("config.json", "model.safetensors", "model.safetensors")
_TEXT = ("tokenizer.json", "tokenizer.json", "tokenizer_config.json", "chat_template.jinja")
_STEP = "checkpoints/step-1/"
_RUN = (
    "smidgen.json", "settings.yaml", "metrics.jsonl",
    *(_STEP + name for name in ("manifest.json", "state.json", "state.safetensors", "adapter_model.safetensors")),
)  # fmt: skip
KINDS: dict[str, Kind] = {
    "dense": Kind(dense_model, _WEIGHTS, use_weights),
    "shards": Kind(sharded_model, ("model.safetensors.index.json", "model-00001-of-*.safetensors"), use_weights),
    "nf4": Kind(lambda path: _four_bit(path, "nf4", nested=False), _WEIGHTS, use_weights),
    "nf4-dq": Kind(lambda path: _four_bit(path, "nf4", nested=True), _WEIGHTS, use_weights),
    "fp4": Kind(lambda path: _four_bit(path, "fp4", nested=False), _WEIGHTS, use_weights, 0.5),
    "fp4-dq": Kind(lambda path: _four_bit(path, "fp4", nested=True), _WEIGHTS, use_weights),
    "int8": Kind(lambda path: bitsandbytes_model(path, load_in_8bit=True), _WEIGHTS, use_weights),
    "gptq": Kind(lambda path: grouped_model(path, "gptq", act_order=True, symmetric=False), _WEIGHTS, use_weights),
    "gptq-2": Kind(lambda path: grouped_model(path, "gptq", bits=2), _WEIGHTS, use_weights, 0.25),
    "gptq-3": Kind(lambda path: grouped_model(path, "gptq", bits=3), _WEIGHTS, use_weights, 0.25),
    "gptq-8": Kind(lambda path: grouped_model(path, "gptq", bits=8), _WEIGHTS, use_weights, 0.25),
    "awq": Kind(lambda path: grouped_model(path, "awq", symmetric=False), _WEIGHTS, use_weights),
    "tokenizer": Kind(dense_model, _TEXT, use_text),
    "gguf-plain": Kind(lambda path: _gguf(path, "Q8_0", "Q4_0", "Q5_1", "F16"), ("model.gguf",), use),
    "gguf-k": Kind(lambda path: _gguf(path, "Q4_K", "Q6_K", "Q2_K", "Q3_K"), ("model.gguf",), use),
    "gguf-5-bit": Kind(lambda path: _gguf(path, *("Q5_K",) * 4), ("model.gguf",), use),
    "gguf-sentencepiece": Kind(_sentencepiece, ("model.gguf",), use_text),
    "gguf-split": Kind(_split_gguf, ("*-00001-of-00002.gguf", "*-00002-of-00002.gguf"), use, 0.5),
    "adapter": Kind(adapter_folder, ("adapter_config.json", "adapter_model.safetensors"), use_adapter, 0.25),
    "run": Kind(run_folder, _RUN, use_run, 0.25),
}


@pytest.fixture
def place() -> Iterator[Path]:
    """A folder in memory where there is one: every trial writes a file."""
    memory = Path("/dev/shm")
    with tempfile.TemporaryDirectory(dir=memory if memory.is_dir() else None) as folder:
        yield Path(folder)


def test_a_hang_in_native_code_ends_and_names_its_file(place: Path) -> None:
    def trials(say: Callable[[str], None]) -> None:
        say("sound.json")
        say("hangs.json")
        re.match("(a+)+b", "a" * 100)  # until the end of days, and no other thread of Python runs meanwhile

    with pytest.raises(AssertionError, match=r"sound.json\nhangs.json\nTimeout.*\n(.*\n)*.* in trials"):
        run_watched(trials, place / "said", longest_s=0.5)


def test_a_crash_names_its_file(place: Path) -> None:
    def trials(say: Callable[[str], None]) -> None:
        say("crashes.json")
        os.kill(os.getpid(), signal.SIGSEGV)

    with pytest.raises(AssertionError, match=r"crashes.json\nFatal Python error: Segmentation fault"):
        run_watched(trials, place / "said")


def test_memory_counts_for_the_file_that_took_it(place: Path) -> None:
    """The largest memory of a process never falls: what one file takes hid what every later one took."""

    def take(kb: int) -> None:
        memory = mmap.mmap(-1, kb << 10)  # not what this process has freed before and kept
        memory[:: mmap.PAGESIZE] = b"1" * (len(memory) // mmap.PAGESIZE)

    grown_kb = [outcome(place, lambda _, kb=kb: take(kb)).grown_kb for kb in (4, 99_000, 50_000, 4)]
    assert grown_kb == pytest.approx([0, 99_000, 50_000, 0], abs=4000)


@pytest.mark.slow
@pytest.mark.timeout(14400)
@pytest.mark.parametrize("name", KINDS)
def test_damaged_files_are_used_or_refused(name: str, place: Path) -> None:
    line = run_watched(lambda say: _try_kind(name, place, say), place / "said")[-1]
    print(line)
    if where := os.environ.get("SMIDGEN_HOSTILE_RESULTS"):
        with open(where, "a") as results:
            results.write(line + "\n")


def _try_kind(name: str, place: Path, say: Callable[[str], None]) -> None:
    """Says what comes next before each file, and at the end what came out of all, as JSON."""
    kind = KINDS[name]
    count = int(COUNT * kind.share)
    say(f"{name}, as it was made")
    model = kind.make(place)
    folder = model if model.is_dir() else place
    files = [next(iter(folder.glob(pattern))) for pattern in kind.damaged]
    sound = {path: path.read_bytes() for path in files}
    for _ in range(2):  # the second time with all that is read once
        assert outcome(model, kind.way).refused is None, "the sound model is refused"
    used, slowest, grown = 0, 0.0, 0
    for number in range(count):
        generator = random.Random(f"{name} {number}")
        path = generator.choice(files)
        say(f"{name} {number}, {path.name}")
        path.write_bytes(damaged(path, sound[path], generator))
        refused, seconds, grown_kb = outcome(model, kind.way)
        assert grown_kb < MOST_GROWN_KB, f"memory grew by {grown_kb} kB"
        path.write_bytes(sound[path])
        used, slowest, grown = used + (refused is None), max(slowest, seconds), max(grown, grown_kb)
    counts = {"kind": name, "files": count, "used": used, "refused": count - used}
    line = json.dumps({**counts, "slowest_s": round(slowest, 3), "grown_kb": grown})
    assert used < count and (used or count < 100), line  # of few runs each may be refused: all has to be as it was
    say(line)
