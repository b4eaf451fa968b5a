"""Models larger than their memory: LLaMA-7B to 65B in NF4-DQ, each in a memory cgroup that the page cache counts in.

Whole models of random packed weights (4 to 34 GB on disk, removed afterwards), rows of 512 tokens, LoRA of rank 8 on q
and v. 7B is also measured with every layer in memory; of the larger ones one step is made. Each is kept as soon as it
is done, in a file of its own, so that several can be measured by hand; a second start goes on with what is missing.
About an hour and a half on two cores.
"""

import argparse
import json
import tempfile
from pathlib import Path

from common import write_result

from smidgen.bench.memory import MemorySettings, bench_memory
from smidgen.checkpoint.hub import cache_folder
from smidgen.units import parse_bytes

KEPT = cache_folder() / "bench" / "limits"
TRAINED = {"llama-7b": "2GiB", "llama-13b": "2.5GiB", "llama-33b": "4GiB", "llama-65b": "6GiB"}
RESIDENT = "llama-7b"
ANSWERS = {"4.1GB": (16, 50), "1GiB": (32, 8)}  # budget -> tokens of the prompt, new ones

CASES = {
    f"train {RESIDENT}": MemorySettings(RESIDENT, recompute="full", repeats=0),
    **{
        f"train {shape} {size}": MemorySettings(
            shape, memory=parse_bytes(size), recompute="full", resident=first, repeats=int(first)
        )
        for first, (shape, size) in zip((True, False, False, False), TRAINED.items(), strict=True)
    },
    **{
        f"generate llama-7b {size}": MemorySettings(
            "llama-7b", mode="generate", memory=parse_bytes(size), seq_len=prompt, new_tokens=new
        )
        for size, (prompt, new) in ANSWERS.items()
    },
}

parser = argparse.ArgumentParser(description=__doc__)
parser.add_argument("--again", action="store_true", help="measure all of them anew")
parser.add_argument("--only", default="", help="those whose name contains this text")
given = parser.parse_args()
KEPT.mkdir(parents=True, exist_ok=True)
for name, settings in CASES.items():
    kept = KEPT / f"{name}.json"
    if given.only in name and (given.again or not kept.exists()):
        found = bench_memory(settings)
        kept.write_text(json.dumps(found), encoding="utf-8")
        print(f"{name}: {found['cgroup_peak_bytes']} bytes, {found['step_s']:.1f} s a step", flush=True)
runs = {
    name: json.loads(kept.read_text(encoding="utf-8")) for name in CASES if (kept := KEPT / f"{name}.json").exists()
}
with tempfile.TemporaryDirectory() as folder:
    write_result("limits", {"command": "python benchmarks/limits.py", "runs": runs}, Path(folder), shown=list(runs))
