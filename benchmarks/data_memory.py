"""Peak memory of `smidgen data` and of a run over many rows: 200,000 and 1,000,000 of them, a tiny model.

The memory is the largest resident size of the command's process, the mapped pages of the token cache included. First
`smidgen data` reads, tokenises and caches the rows, then `smidgen finetune` takes their tokens from there and trains
for 50 steps, which is mostly preparation. Ten minutes or more on a core.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from common import SMIDGEN, write_result

sys.path.insert(0, str(Path(__file__).parent.parent / "tests"))
from tiny import tiny_folder


def write_rows(path: Path, count: int) -> None:
    """Short texts, no two of them alike; of plain text, as rendering chats takes several times as long."""
    with path.open("w", encoding="utf-8") as file:
        for number in range(count):
            file.write(json.dumps({"text": f"timer {number}: {number % 60} minutes"}) + "\n")


def measure(words: list[str], folder: Path) -> dict[str, Any]:
    """Wall time and peak memory of a command; the file cache and settings are those of `folder`."""
    started = time.perf_counter()
    environment = os.environ | {"SMIDGEN_CACHE": str(folder / "cache")}
    with (folder / "said.txt").open("w") as said:
        process = subprocess.Popen([*SMIDGEN, *words, "--json"], cwd=folder, env=environment, stdout=said, stderr=said)
        _, status, usage = os.wait4(process.pid, 0)
    if status:
        raise SystemExit((folder / "said.txt").read_text()[-2000:])
    return {"wall_s": round(time.perf_counter() - started, 1), "peak_rss_bytes": usage.ru_maxrss * 1024}


parser = argparse.ArgumentParser(description=__doc__)
parser.add_argument("--rows", type=int, nargs="+", default=[200_000, 1_000_000])
counts = parser.parse_args().rows
runs: dict[str, Any] = {}
with tempfile.TemporaryDirectory() as name:
    folder = Path(name)
    tiny_folder(folder / "model")
    for count in counts:
        write_rows(folder / "rows.jsonl", count)
        size = (folder / "rows.jsonl").stat().st_size
        found = {"file_bytes": size, "data": measure(["data", "model", "rows.jsonl"], folder)}
        words = ["finetune", "model", "rows.jsonl", "--out", f"run-{count}", "--max-steps", "50", "--rank", "2"]
        found["finetune_from_cache"] = measure([*words, "--compute-dtype", "float32"], folder)
        found["cache_bytes"] = sum(file.stat().st_size for file in (folder / "cache" / "tokens").glob("*"))
        for file in (folder / "cache" / "tokens").glob("*"):
            file.unlink()
        runs[f"{count:,} rows"] = found
        print(json.dumps({count: found}), flush=True)
    write_result("data_memory", {"runs": runs}, folder)
