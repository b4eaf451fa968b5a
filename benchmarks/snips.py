"""SNIPS, the first 300 rows, one epoch: held-out loss, exact match, speed and memory. About six minutes on two cores.

Data: $SMIDGEN_TEST_DATA/sft/snips_{train,valid,test}.jsonl, chat rows made from sonos/nlu-benchmark (CC0-1.0).
"""

import os
import tempfile
from pathlib import Path

from common import run_json, skip, write_result

if "SMIDGEN_TEST_DATA" not in os.environ:
    skip("SMIDGEN_TEST_DATA does not say where sft/snips_train.jsonl lies")
SOURCE = Path(os.environ["SMIDGEN_TEST_DATA"]) / "sft"
# 75 updates of 4 rows at 1e-3, rank 16, alpha 32: what the other tools' figures for this data were taken with.
SETTINGS = ["--micro-batch", "4", "--learning-rate", "1e-3", "--rank", "16", "--alpha", "32", "--warmup", "0.0667"]

with tempfile.TemporaryDirectory() as name:
    folder = Path(name)
    (folder / "snips").mkdir()
    for part, rows in (("train", 300), ("valid", 100)):
        lines = (SOURCE / f"snips_{part}.jsonl").read_text(encoding="utf-8").splitlines()[:rows]
        (folder / "snips" / f"{part}.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")
    test = (SOURCE / "snips_test.jsonl").read_text(encoding="utf-8").splitlines()
    (folder / "snips" / "test.jsonl").write_text("\n".join(test[:: len(test) // 100][:100]) + "\n", encoding="utf-8")
    words = ["finetune", "smollm2-135m", "snips", "--out", "run", "--compare", "100"]
    words += ["--quantize", "nf4-dq", *SETTINGS]
    write_result("snips", {"command": "smidgen " + " ".join(words), "summary": run_json(words, folder)}, folder)
