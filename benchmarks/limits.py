"""Models larger than their memory: LLaMA-7B to 65B in NF4-DQ, each in a memory cgroup that the page cache counts in.

Whole models of random packed weights (4 to 34 GB on disk, removed afterwards), rows of 512 tokens, LoRA of rank 8 on q
and v. 7B is also measured with every layer in memory; of the larger ones one step is made. Each is kept as soon as it
is done; a second start goes on with what is missing.
About an hour and a half on two cores.
"""

import argparse
import tempfile
from functools import partial
from pathlib import Path

from common import Kept, write_result

from smidgen.bench.memory import MemorySettings, bench_memory
from smidgen.units import parse_bytes

TRAINED = {"llama-7b": "2GiB", "llama-13b": "2.5GiB", "llama-33b": "4GiB", "llama-65b": "6GiB"}
RESIDENT = "llama-7b"
ANSWERS = [("nf4", "4.4GB", 16, 50), ("nf4-dq", "4.1GB", 16, 50), ("nf4-dq", "1GiB", 32, 8)]  # tokens: prompt, new

CASES = {
    f"train {RESIDENT}": MemorySettings(RESIDENT, recompute="full", repeats=0),
    **{
        f"train {shape} {size}": MemorySettings(
            shape,
            memory=parse_bytes(size),
            recompute="full",
            resident=shape == RESIDENT,
            repeats=int(shape == RESIDENT),
        )
        for shape, size in TRAINED.items()
    },
    **{
        f"generate {RESIDENT} {form} {size}": MemorySettings(
            RESIDENT, form, "generate", memory=parse_bytes(size), seq_len=prompt, new_tokens=new, repeats=0
        )
        for form, size, prompt, new in ANSWERS
    },
}

parser = argparse.ArgumentParser(description=__doc__)
parser.add_argument("--again", action="store_true", help="measure all of them anew")
parser.add_argument("--only", default="", help="those whose name contains this text")
given = parser.parse_args()
kept = Kept("limits", again=given.again)
for name, settings in CASES.items():
    if given.only in name:
        found = kept.once(name, partial(bench_memory, settings))
        print(f"{name}: {found['peak_rss_bytes'] / 1e9:.2f} GB, {found['step_s']:.1f} s a step", flush=True)
runs = {name: found for name in CASES if (found := kept.get(name))}
with tempfile.TemporaryDirectory() as folder:
    write_result("limits", {"command": "python benchmarks/limits.py", "runs": runs}, Path(folder), shown=list(runs))
