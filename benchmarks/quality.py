"""How good fine-tuning gets on each stored form of one model: held-out loss on SNIPS and WikiSQL, mean over seeds.

Forms: the model's own numbers in float32, NF4 double quantised, int8, GPTQ in 4 bits, and the blocks of its GGUF file
in place. Data: $SMIDGEN_TEST_DATA/sft/{snips,wikisql}_{train,valid}.jsonl. All compute in float32. GPTQ is done once
for each data set, on its training rows, as `finetune --quantize gptq` does it. Hours on two cores with all seeds; every
run is kept as soon as it is done, and a second start goes on with what is missing.
"""

import argparse
import json
import os
import statistics
import tempfile
from pathlib import Path

from common import RESULTS, run_json, skip, write_result

FORMS = {"float32": "none", "nf4-dq": "nf4-dq", "int8": "int8", "gptq-4": "gptq", "gguf in place": "keep"}
SETTINGS = [
    *("--micro-batch", "4", "--learning-rate", "1e-3", "--rank", "16", "--alpha", "32", "--warmup", "0.0667"),
    *("--compute-dtype", "float32", "--compare", "0"),
]
HELD_OUT = 64  # rows


def summary_of(values: list[float]) -> dict[str, float]:
    spread = statistics.stdev(values) if len(values) > 1 else 0.0
    return {"mean": statistics.mean(values), "spread": spread, "seeds": len(values)}


parser = argparse.ArgumentParser(description=__doc__)
parser.add_argument("--seeds", type=int, default=5)
parser.add_argument("--rows", type=int, default=128, help="training rows")
given = parser.parse_args()
if "SMIDGEN_TEST_DATA" not in os.environ:
    skip("SMIDGEN_TEST_DATA does not say where sft/snips_train.jsonl lies")
source = Path(os.environ["SMIDGEN_TEST_DATA"]) / "sft"

earlier = RESULTS / "quality.json"
kept = json.loads(earlier.read_text(encoding="utf-8"))["runs"] if earlier.exists() else []
runs = [run for run in kept if run["rows"] == given.rows]
with tempfile.TemporaryDirectory() as name:
    folder = Path(name)
    for data in ("snips", "wikisql"):
        (folder / data).mkdir()
        for part, rows in (("train", given.rows), ("valid", HELD_OUT)):
            lines = (source / f"{data}_{part}.jsonl").read_text(encoding="utf-8").splitlines()[:rows]
            (folder / data / f"{part}.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")
    # Seeds outside, so that what was measured is a table of fewer seeds at any time.
    for seed in range(given.seeds):
        for data in ("snips", "wikisql"):
            for form, quantize in FORMS.items():
                if any((run["data"], run["form"], run["seed"]) == (data, form, seed) for run in runs):
                    continue
                base = ["smollm2-135m", data, "--quantize", quantize]
                if quantize == "gptq":
                    packed = f"{data}-gptq"
                    if not (folder / packed).exists():
                        how = ["--calibration", f"{data}/train.jsonl", "--act-order", "--no-perplexity"]
                        run_json(["quantize", "smollm2-135m", "--to", "gptq", "--out", packed, *how], folder)
                    base = [packed, data]
                words = ["finetune", *base, "--out", f"{data}-{quantize}-{seed}", "--seed", str(seed), *SETTINGS]
                summary = run_json(words, folder)
                figures = {key: summary[key] for key in ("loss_before", "loss_after")}
                runs.append({"data": data, "form": form, "seed": seed, "rows": given.rows, **figures})
                losses: dict[str, dict[str, list[float]]] = {}
                for run in runs:
                    losses.setdefault(run["data"], {}).setdefault(run["form"], []).append(run["loss_after"])
                table = {
                    each: {form: summary_of(values) for form, values in forms.items()} for each, forms in losses.items()
                }
                content = {"command": "smidgen " + " ".join(words), "table": table, "runs": runs}
                write_result("quality", content, folder, table)
