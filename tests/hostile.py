"""The whole way of a stranger's model to the first gradient, and what it may end in: a result or one clear line.

For tests with damaged files, and the sound models that these are made from. Numbers may come out wrong or not finite;
memory outside the file may not be read, which the checks before the kernels see to.
"""

import resource
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, BitsAndBytesConfig

from packers import pack_folder
from smidgen.checkpoint.base import Checkpoint
from smidgen.checkpoint.open import open_checkpoint
from smidgen.data.gate import check_examples
from smidgen.data.layouts import Row
from smidgen.data.render import Renderer
from smidgen.errors import SmidgenError
from smidgen.lora.attach import attach_lora
from smidgen.model.build import build_base
from smidgen.model.load import Source, choose_storage
from smidgen.model.tokenizer import load_tokenizer
from tiny import VOCAB_SIZE, tiny_folder

__all__ = [
    "bitsandbytes_model",
    "dense_model",
    "grouped_model",
    "outcome",
    "peak_kb",
    "sharded_model",
    "use",
    "use_text",
    "use_weights",
]

LONGEST_S = 2.0
_IDS = torch.randint(0, VOCAB_SIZE, (1, 20), generator=torch.Generator().manual_seed(0))
_CHAT = (
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": "1 + 1 = ?\n\tschön 你好 \U0001f600"},
    {"role": "assistant", "content": "2, zq"},
)
_ROWS = (Row(_CHAT, None, None, "chat:1"), Row((), "plain text 12", None, "text:1"))


def dense_model(path: Path, **how: Any) -> Path:
    return tiny_folder(path / "model", num_hidden_layers=1, **how)


def sharded_model(path: Path) -> Path:
    folder = dense_model(path)
    model = AutoModelForCausalLM.from_pretrained(folder)
    (folder / "model.safetensors").unlink()
    model.save_pretrained(folder, max_shard_size="100KB")
    assert len(list(folder.glob("model-*.safetensors"))) > 1
    return folder


def bitsandbytes_model(path: Path, **how: Any) -> Path:
    """Packed and written by bitsandbytes itself."""
    pytest.importorskip("bitsandbytes")
    folder, config = dense_model(path), BitsAndBytesConfig(**how)
    model = AutoModelForCausalLM.from_pretrained(folder, quantization_config=config, dtype=torch.float32)
    model.save_pretrained(folder)
    return folder


def grouped_model(path: Path, method: str, **how: Any) -> Path:
    pack_folder(dense_model(path), path / "packed", method=method, **how)
    return path / "packed"


def use(path: Path) -> None:
    """All that training does with a model before its second step."""
    use_text(path)
    use_weights(path)


def use_text(path: Path) -> None:
    """Tokenizer and chat template: rows become tokens, which have to fit the model, and text again."""
    checkpoint = open_checkpoint(path)
    source = Source(str(path), checkpoint, load_tokenizer(path))
    renderer = Renderer(source.tokenizer, seq_len=512)
    examples = [renderer.render(row) for row in _ROWS]
    check_examples(examples, source.tokenizer, source.vocab_size, renderer.end_ids)
    renderer.prompt_ids(_CHAT)
    for example in examples:
        source.tokenizer.decode(example.input_ids, skip_special_tokens=True)


def use_weights(path: Path) -> None:
    """Packed weights, a loss, a gradient."""
    checkpoint: Checkpoint = open_checkpoint(path)
    storage, _ = choose_storage("auto", checkpoint)
    base = build_base(checkpoint, storage=storage, compute_dtype=torch.float32, device=torch.device("cpu"))
    names = [name for name in base.linears if name != base.head_name]
    adapters = attach_lora(base.model, names, rank=2, alpha=2, dropout=0.0, seed=0)
    ids = _IDS % base.head.out_features
    logits = base.logits_of(base.hidden_of(ids))
    torch.nn.functional.cross_entropy(logits[0, :-1], ids[0, 1:]).backward()
    assert all(layer.lora_B.grad is not None for layer in adapters.values())
    checkpoint.fingerprint()


def outcome(path: Path, way: Callable[[Path], None] = use) -> tuple[SmidgenError | None, float]:
    """(the error that the model is refused with, None if it can be used; seconds of computing).

    Fails on anything but a SmidgenError of one line, and on more than LONGEST_S.
    """
    began = time.process_time()  # of computing: a busy machine is no hang
    refused = None
    try:
        way(path)
    except SmidgenError as error:
        refused = error
    seconds = time.process_time() - began
    assert refused is None or "\n" not in str(refused), str(refused)
    assert seconds < LONGEST_S, f"{seconds:.1f} s: {refused}"
    return refused, seconds


def peak_kb() -> int:
    """The most memory that this process has had so far, kB."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
