"""A training step on a CUDA card, ours and PEFT + bitsandbytes', over the same packed folder, in turn.

NF4 double quantised, computed in bfloat16, LoRA of rank 16 on all linear layers, one row of 512 tokens or eight. Each
side runs in a process of its own, two rounds A B A B; a round is the median of ten steps after four. Memory is what
PyTorch's allocator held at most in those steps, and our forecast of it. Needs a card, peft and bitsandbytes.
"""

import argparse
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from statistics import median
from typing import Any

import torch
from common import skip, write_result

# shape, layers (0: all), recompute, tokens of a row, rows
CASES = [
    ("tinyllama-1.1b", 0, "none", 512, 1),
    ("tinyllama-1.1b", 0, "none", 512, 4),
    ("tinyllama-1.1b", 0, "full", 2048, 2),
    ("llama-7b", 0, "none", 512, 1),
    ("llama-7b", 0, "full", 512, 1),
    ("llama-7b", 0, "full", 512, 8),
    ("stablelm-base-alpha-3b", 0, "full", 512, 4),
]
RANK, ROUNDS, WARM_UP, STEPS = 16, 2, 4, 10
SIDES = ("peft-bnb", "smidgen")


def folder_of(keep: Path, shape: str, layers: int) -> Path:
    from smidgen.bench.packed_model import write_packed_model
    from smidgen.planning.shapes import SHAPES

    config = SHAPES[shape] | ({"num_hidden_layers": layers} if layers else {})
    folder = keep / f"{shape}-{config['num_hidden_layers']}"
    return folder if (folder / "config.json").exists() else write_packed_model(config, folder, "nf4-dq")


def ours(folder: Path, recompute: str, ids: torch.Tensor) -> tuple[Any, int]:
    """(a function that takes a step and returns its loss, the forecast of the allocator's peak in bytes)."""
    from smidgen.bench.workers.stepper import Stepper, forecast_on_card
    from smidgen.checkpoint.open import open_checkpoint
    from smidgen.data.batch import Batch
    from smidgen.model.load import Source, load_base
    from smidgen.train.config import Settings

    checkpoint = open_checkpoint(folder)
    settings = Settings(rank=RANK, alpha=2 * RANK, learning_rate=1e-4, micro_batch=len(ids), seq_len=ids.shape[1])
    expected = forecast_on_card(checkpoint, "nf4-dq", settings, ids, 2, recompute)
    base = load_base(Source(str(folder), checkpoint, tokenizer=None), compute_dtype="bfloat16", device="cuda")
    batch = Batch(ids, ids.clone(), torch.full((len(ids),), ids.shape[1]))
    return Stepper(base, settings, recompute, [batch]).step, expected


def theirs(folder: Path, recompute: str, ids: torch.Tensor) -> tuple[Any, None]:
    import peft
    import transformers

    model = transformers.AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.bfloat16, attn_implementation="sdpa", device_map={"": 0}
    )
    model.config.use_cache = False
    model = peft.prepare_model_for_kbit_training(model, use_gradient_checkpointing=False)
    if recompute == "full":
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    lora = peft.LoraConfig(r=RANK, lora_alpha=2 * RANK, target_modules="all-linear", task_type="CAUSAL_LM")
    model = peft.get_peft_model(model, lora)
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=1e-4, weight_decay=0.0, fused=True)
    ids = ids.cuda()
    model.train()

    def step() -> float:
        loss = model(input_ids=ids, labels=ids).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        return float(loss.detach())

    return step, None


def measure(side: str, folder: Path, recompute: str, tokens: int, rows: int) -> dict[str, Any]:
    vocab = json.loads((folder / "config.json").read_text())["vocab_size"]
    ids = torch.randint(vocab, (rows, tokens), generator=torch.Generator().manual_seed(1))
    started = time.perf_counter()
    step, expected = (ours if side == "smidgen" else theirs)(folder, recompute, ids)
    torch.cuda.synchronize()
    load_s = time.perf_counter() - started
    losses = [step() for _ in range(WARM_UP)]
    torch.cuda.reset_peak_memory_stats()
    times = []
    for _ in range(STEPS):
        torch.cuda.synchronize()
        started = time.perf_counter()
        losses.append(step())
        torch.cuda.synchronize()
        times.append(time.perf_counter() - started)
    return {
        "load_s": load_s,
        "step_s": median(times),
        "steps_s": times,
        "peak_bytes": torch.cuda.max_memory_allocated(),
        "reserved_bytes": torch.cuda.max_memory_reserved(),
        "forecast_bytes": expected,
        "loss": [losses[0], losses[-1]],
        "device": torch.cuda.get_device_name(),
        "torch": torch.__version__,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--keep", type=Path, help="folder for the random weights")
    parser.add_argument("--out", type=Path, help="where to write the JSON, instead of benchmarks/results")
    parser.add_argument("--one", help=argparse.SUPPRESS)
    given = parser.parse_args()
    if not torch.cuda.is_available():
        skip("there is no CUDA device")
    if given.one:
        side, folder, *rest = json.loads(given.one)
        print(json.dumps(measure(side, Path(folder), *rest)))
        return
    with tempfile.TemporaryDirectory() as name:
        keep = given.keep or Path(name)
        rows = []
        for shape, layers, recompute, tokens, count in CASES:
            folder = folder_of(keep, shape, layers)
            found: dict[str, list[dict[str, Any]]] = {side: [] for side in SIDES}
            for _ in range(ROUNDS):
                for side in SIDES:
                    words = json.dumps([side, str(folder), recompute, tokens, count])
                    done = subprocess.run([sys.executable, __file__, "--one", words], capture_output=True, text=True)
                    if done.returncode:
                        raise SystemExit(f"{side}: {done.stderr.strip().splitlines()[-1]}")
                    found[side].append(json.loads(done.stdout.splitlines()[-1]))
            pairs = zip(found["peft-bnb"], found["smidgen"], strict=True)
            row: dict[str, Any] = {
                "shape": shape, "layers": layers, "recompute": recompute, "tokens": tokens, "rows": count,
                "speedup": median(peer["step_s"] / own["step_s"] for peer, own in pairs),
                "memory_ratio": found["smidgen"][0]["peak_bytes"] / found["peft-bnb"][0]["peak_bytes"],
                "forecast_ratio": found["smidgen"][0]["forecast_bytes"] / found["smidgen"][0]["peak_bytes"],
                **found,
            }  # fmt: skip
            rows.append(row)
            print(json.dumps({key: row[key] for key in list(row)[:8]}), flush=True)
            if given.out:
                given.out.write_text(json.dumps({"rows": rows}, indent=1) + "\n", encoding="utf-8")
        if not given.out:
            write_result("cuda_step", {"rows": rows}, keep)


main()
