"""Load and quantise a 1.1B folder in bfloat16 against transformers + bitsandbytes. About five minutes on two cores."""

import tempfile
from pathlib import Path

from common import options, write_result

from smidgen.bench.load import bench_load
from smidgen.bench.step import StepSettings

given = options(__doc__)
settings = StepSettings("tinyllama-1.1b", repeats=given.repeats, against=("peft-bnb",), isa=given.isa or "")
result = bench_load(settings)
with tempfile.TemporaryDirectory() as name:
    shown = {key: result.get(key) for key in ("load_s", "peer_load_s", "time_ratio", "memory_ratio", "skipped")}
    write_result(f"load{given.suffix}", result, Path(name), shown)
