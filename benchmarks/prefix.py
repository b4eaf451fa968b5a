"""Shared prefixes against the same rows without, in turn: a step's time, beside the ideal N (P + R) / (P + N R).

On SmolLM2-135M, for made rows (N rows of R tokens after a prefix of P) and for rows of SNIPS. Three minutes on a core.
The ratio is of processor time, which other programs on the machine disturb least; OMP_NUM_THREADS=1 makes it exact.
"""

import os
import tempfile
import time
from pathlib import Path
from statistics import median
from typing import Any

import torch
from common import options, write_result

from smidgen.data.batch import make_batch
from smidgen.data.prefix import computed_tokens
from smidgen.data.records import read_data
from smidgen.data.render import Example, Renderer
from smidgen.lora.attach import attach_lora
from smidgen.lora.targets import select_targets
from smidgen.model.load import load_base, open_source
from smidgen.train.loss import batch_loss

SHAPES = ((160, 40, 8), (320, 80, 8), (64, 64, 4))  # P, R, N


def _made_rows(prefix_tokens: int, row_tokens: int, count: int) -> list[Example]:
    """Every token of a row's own part is a label."""
    generator = torch.Generator().manual_seed(0)
    prefix = torch.randint(0, 40_000, (prefix_tokens,), generator=generator).tolist()
    own = torch.randint(0, 40_000, (count, row_tokens), generator=generator).tolist()
    return [Example(prefix + ids, [-100] * prefix_tokens + ids, False, "") for ids in own]


def _step_s(base: Any, examples: list[Example], *, share: bool) -> tuple[float, float]:
    """(processor seconds, wall seconds) of forward and backward."""
    batch = make_batch(examples, share_prefix=share)
    processor_s, wall_s = time.process_time(), time.perf_counter()
    batch_loss(base, batch).backward()
    return time.process_time() - processor_s, time.perf_counter() - wall_s


def _measure(base: Any, examples: list[Example], repeats: int) -> dict[str, Any]:
    rows = [example.input_ids for example in examples]
    tokens, computed = sum(map(len, rows)), computed_tokens(rows)
    times: dict[bool, list[tuple[float, float]]] = {False: [], True: []}
    for number in range(repeats + 1):
        for share in (False, True):
            measured = _step_s(base, examples, share=share)
            if number:  # the first round warms up
                times[share].append(measured)
    ratios = [apart[0] / shared[0] for apart, shared in zip(times[False], times[True], strict=True)]
    ideal, ratio = tokens / computed, median(ratios)
    return {
        "tokens": tokens,
        "computed_tokens": computed,
        "ideal": ideal,
        "speedup": ratio,
        "share_of_ideal": ratio / ideal,
        "apart_s": times[False],
        "shared_s": times[True],
    }


given = options(__doc__ or "", repeats=2)
source = open_source("smollm2-135m")
base = load_base(source, quantize="auto", compute_dtype="float32")
names, _ = select_targets("all", base.linears, base.head_name)
attach_lora(base.model, names, rank=16, alpha=32.0, dropout=0.0, seed=0)
base.model.train()
results = {}
for P, R, N in SHAPES:
    results[f"P={P} R={R} N={N}"] = _measure(base, _made_rows(P, R, N), given.repeats)
if "SMIDGEN_TEST_DATA" in os.environ:
    data = read_data(str(Path(os.environ["SMIDGEN_TEST_DATA"]) / "sft" / "snips_train.jsonl"))
    renderer = Renderer(source.tokenizer)
    results["SNIPS, 16 rows"] = _measure(base, renderer.render_all(data.train[:16]), given.repeats)
with tempfile.TemporaryDirectory() as name:
    shown = {key: {k: v for k, v in of.items() if not k.endswith("_s")} for key, of in results.items()}
    write_result("prefix", {"recompute": "none", "compute_dtype": "float32", "runs": results}, Path(name), shown)
