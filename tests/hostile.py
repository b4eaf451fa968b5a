"""The whole way of a stranger's model to the first gradient, and what it may end in: a result or one clear line.

For tests with damaged files, and the sound models that these are made from. Numbers may come out wrong or not finite;
memory outside the file may not be read, which the checks before the kernels see to.
"""

import faulthandler
import time
import traceback
from collections.abc import Callable
from multiprocessing import get_context
from pathlib import Path
from typing import Any, NamedTuple, TextIO

import pytest
import torch
from transformers import AutoModelForCausalLM, BitsAndBytesConfig

from packers import pack_folder
from runs import stop_after
from smidgen.api import finetune, load
from smidgen.checkpoint.base import Checkpoint
from smidgen.checkpoint.open import open_checkpoint
from smidgen.data.gate import check_examples
from smidgen.data.layouts import Row
from smidgen.data.render import Renderer
from smidgen.errors import SmidgenError
from smidgen.export.adapter import load_adapter, save_adapter
from smidgen.lora.attach import attach_lora
from smidgen.model.build import build_base
from smidgen.model.load import Source, choose_storage
from smidgen.model.tokenizer import load_tokenizer
from smidgen.train.optimizers import make_optimizer
from smidgen.train.run import RunFolder
from smidgen.train.state import load_state
from tiny import VOCAB_SIZE, build, tiny_folder, write_rows

__all__ = [
    "MOST_GROWN_KB",
    "Outcome",
    "adapter_folder",
    "bitsandbytes_model",
    "dense_model",
    "grouped_model",
    "outcome",
    "run_folder",
    "run_watched",
    "sharded_model",
    "use",
    "use_adapter",
    "use_run",
    "use_text",
    "use_weights",
]

LONGEST_S = 2.0
MOST_GROWN_KB = 64 << 10  # of a model of less than a megabyte; nothing may be allocated because a file says so
_LONGEST_WALL_S = 120.0  # a busy machine is no hang
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


def adapter_folder(path: Path) -> Path:
    """Of a PEFT adapter whose base lies beside it, with other ranks and alphas for one layer."""
    base = build(dense_model(path))
    adapters = attach_lora(base.model, ["model.layers.0.self_attn.q_proj"], rank=2, alpha=4, dropout=0.0, seed=0)
    adapters |= attach_lora(base.model, ["model.layers.0.mlp.up_proj"], rank=3, alpha=5, dropout=0.0, seed=0)
    for layer in adapters.values():
        torch.nn.init.normal_(layer.lora_B)
    (path / "adapter").mkdir()
    save_adapter(path / "adapter", base, adapters, str(path / "model"))
    return path / "adapter"


def run_folder(path: Path) -> Path:
    """Of a run that was interrupted after its first step."""
    rows = write_rows(path / "rows.jsonl", 8)
    with pytest.raises(KeyboardInterrupt):
        finetune(str(dense_model(path)), rows, path / "run", report=stop_after(1), rank=2, micro_batch=2)
    return path / "run"


def use_adapter(folder: Path) -> None:
    """Its base is found and it is put on it."""
    base = load(folder, compute_dtype="float32").base
    base.logits_of(base.hidden_of(_IDS))


def use_run(run: Path) -> None:
    """All that is read to go on with a run, and to talk to what it has learnt so far."""
    folder, settings, *_ = RunFolder.open(run)
    checkpoint = run / "checkpoints" / "step-1"
    base = build(Path(folder.record.model_path))
    adapters = load_adapter(base, checkpoint)
    load_state(checkpoint, adapters, make_optimizer(adapters, settings))
    folder.rewind_log(1)
    use_adapter(run)


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


class Outcome(NamedTuple):
    """refused: the error that the model is refused with, None if it can be used. seconds: of computing. grown_kb: the
    most memory that this process had meanwhile, more than before."""

    refused: SmidgenError | None
    seconds: float
    grown_kb: int


def outcome(path: Path, way: Callable[[Path], None] = use) -> Outcome:
    """Fails on anything but a SmidgenError of one line, and on more than LONGEST_S."""
    Path("/proc/self/clear_refs").write_text("5")  # VmHWM begins anew at the present size
    before, began = _status_kb("VmRSS"), time.process_time()
    refused = None
    try:
        way(path)
    except SmidgenError as error:
        refused = error
    found = Outcome(refused, time.process_time() - began, max(0, _status_kb("VmHWM") - before))
    assert refused is None or "\n" not in str(refused), str(refused)
    assert found.seconds < LONGEST_S, f"{found.seconds:.1f} s: {refused}"
    return found


def _status_kb(name: str) -> int:
    return int(Path("/proc/self/status").read_text().split(f"{name}:")[1].split()[0])


def run_watched(
    trials: Callable[[Callable[[str], None]], None], log: Path, longest_s: float = _LONGEST_WALL_S
) -> list[str]:
    """Runs `trials` in a process of its own, which is ended when one takes longer than `longest_s` by the clock, even
    within native code. `trials` gets a function to say with what it is about to do; all that was said is returned.

    Fails with what was said last, and the stack, where that process ends in any other way than by returning.
    """
    process = get_context("fork").Process(target=_run_and_tell, args=(trials, log, longest_s))
    process.start()
    process.join()
    said = log.read_text().splitlines()
    assert process.exitcode == 0, "\n".join(said[-60:])
    return said


def _run_and_tell(trials: Callable[[Callable[[str], None]], None], log: Path, longest_s: float) -> None:
    with log.open("w", buffering=1) as told:
        faulthandler.enable(told)
        try:
            trials(lambda line: _say(line, told, longest_s))
        except BaseException:
            traceback.print_exc(file=told)
            raise SystemExit(1) from None


def _say(line: str, told: TextIO, longest_s: float) -> None:
    told.write(f"{line}\n")
    faulthandler.dump_traceback_later(longest_s, exit=True, file=told)
