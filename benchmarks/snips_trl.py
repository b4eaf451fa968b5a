"""SNIPS, the first 300 rows, one epoch, against TRL + PEFT + bitsandbytes NF4. Twenty minutes on two cores.

The same base (the GGUF file's weights, written for TRL as a float32 folder), rows, rank, rates and number of updates;
afterwards the same held-out loss over the same tokens, on the first 100 validation rows. smidgen runs as it is, and
with each row computed by itself; TRL at its best on a CPU (adapters cast back to float32 by hand) in turn with both,
and once as it is shipped (adapters in bfloat16).

Data: $SMIDGEN_TEST_DATA/sft/snips_{train,valid}.jsonl, chat rows made from sonos/nlu-benchmark (CC0-1.0).
SNIPS_ROWS and SNIPS_HELD_OUT make it smaller, to try it out.
"""

import json
import os
import subprocess
import tempfile
from pathlib import Path
from statistics import median
from typing import Any

from common import options, run_json, skip, write_result

from smidgen.bench.controller import ISA_ENVIRONMENT
from smidgen.bench.figures import paired_ratio, spread
from smidgen.bench.peers import peer_interpreter
from smidgen.bench.workers.serving import measure_sgemm_gflops
from smidgen.data.records import read_data
from smidgen.data.render import Renderer
from smidgen.errors import RunError
from smidgen.export.merge import write_merged
from smidgen.model.load import load_base, open_source

MODEL = "smollm2-135m"
SETTINGS = {"micro_batch": 4, "learning_rate": 1e-3, "rank": 16, "alpha": 32, "warmup_steps": 5, "seed": 0}
TRAIN_ROWS, HELD_OUT_ROWS = int(os.environ.get("SNIPS_ROWS", "300")), int(os.environ.get("SNIPS_HELD_OUT", "100"))
PEER = Path(__file__).parent / "peers" / "sft_trl.py"


def read_rows(part: str, count: int) -> list[dict[str, Any]]:
    source = Path(os.environ["SMIDGEN_TEST_DATA"]) / "sft" / f"snips_{part}.jsonl"
    return [json.loads(line) for line in source.read_text(encoding="utf-8").splitlines()[:count]]


def write_rows(file: Path, rows: list[dict[str, Any]]) -> None:
    file.parent.mkdir(exist_ok=True)
    file.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")


def write_base(folder: Path) -> None:
    """The GGUF file's weights as a folder that transformers reads, in float32: nothing is rounded on the way."""
    import torch

    source = open_source(MODEL)
    base = load_base(source, quantize="none", compute_dtype="float32")
    write_merged(base, folder, torch.float32, source.tokenizer)


def held_out_examples(data: Path) -> list[dict[str, list[int]]]:
    """Token ids and labels as smidgen sees them: both sides are judged on the same tokens."""
    renderer = Renderer(open_source(MODEL).tokenizer)
    examples = renderer.render_all(read_data(str(data)).validation)
    return [{"input_ids": example.input_ids, "labels": example.labels} for example in examples]


def run_ours(share_prefix: str, number: int, folder: Path) -> dict[str, Any]:
    steps = -(-TRAIN_ROWS // SETTINGS["micro_batch"])
    run = f"run-{share_prefix}-{number}"
    words = ["finetune", MODEL, "snips", "--out", run, "--quantize", "nf4-dq", "--compute-dtype", "float32"]
    words += ["--share-prefix", share_prefix]
    for name in ("micro_batch", "learning_rate", "rank", "alpha", "seed"):
        words += ["--" + name.replace("_", "-"), str(SETTINGS[name])]
    summary = run_json([*words, "--warmup", f"{SETTINGS['warmup_steps'] / steps:.4f}"], folder)
    lines = (folder / run / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    logged = [json.loads(line) for line in lines]
    return {
        **{key: summary[key] for key in ("loss_before", "loss_after", "steps", "tokens", "wall_s", "peak_rss_bytes")},
        "train_s": next(line["train_s"] for line in reversed(logged) if "train_s" in line),
        "held_out_tokens": next(line["held_out_tokens"] for line in logged if "held_out_tokens" in line),
    }


def run_theirs(python: Path, job: dict[str, Any], folder: Path) -> dict[str, Any]:
    file = folder / "job.json"
    file.write_text(json.dumps(job), encoding="utf-8")
    done = subprocess.run([str(python), str(PEER), str(file)], stdout=subprocess.PIPE, text=True, check=True)
    return json.loads(done.stdout.splitlines()[-1])


def probed(run: Any, *words: Any) -> dict[str, Any]:
    """A run with the machine's float32 speed before and after it."""
    before = measure_sgemm_gflops()
    result = run(*words)
    return {**result, "sgemm_gflops": [before, measure_sgemm_gflops()]}


def main() -> None:
    given = options(str(__doc__), repeats=2)
    if given.isa:  # bitsandbytes has no such switch; what it gains is theirs
        os.environ.update(ISA_ENVIRONMENT[given.isa])
    try:
        python = peer_interpreter("trl", ("trl", "peft", "accelerate", "bitsandbytes", "datasets"), print)
    except RunError as error:
        skip(str(error))
    train, held_out = read_rows("train", TRAIN_ROWS), read_rows("valid", HELD_OUT_ROWS)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        write_rows(folder / "snips" / "train.jsonl", train)
        write_rows(folder / "snips" / "valid.jsonl", held_out)
        write_base(folder / "base")
        job = {
            "folder": str(folder / "base"),
            "rows": train,
            "held_out": held_out_examples(folder / "snips"),
            "settings": SETTINGS,
        }
        ours: list[dict[str, Any]] = []
        alone: list[dict[str, Any]] = []  # every row by itself: what they begin with alike is computed for each
        best: list[dict[str, Any]] = []
        for number in range(given.repeats):
            ours.append(probed(run_ours, "auto", number, folder))
            alone.append(probed(run_ours, "off", number, folder))
            best.append(probed(run_theirs, python, {**job, "adapters": "float32"}, folder))
        # Some updates are enough to see its speed; a whole epoch would take longer than all the others.
        few = {"rows": train[: TRAIN_ROWS // 5], "held_out": job["held_out"][:5], "adapters": "as shipped"}
        shipped = probed(run_theirs, python, {**job, **few}, folder)
        train_s = [run["train_s"] for run in ours]
        figures = {
            "isa": given.isa or "",
            "rows": TRAIN_ROWS,
            "held_out_rows": HELD_OUT_ROWS,
            "settings": SETTINGS,
            **spread(train_s, "train_s"),
            **spread([run["train_s"] for run in best], "trl_best_train_s"),
            "trl_shipped_train_s_a_fifth_of_the_rows": shipped["train_s"],
            "speedup_over_best": paired_ratio([run["train_s"] for run in best], train_s),
            "speedup_over_best_without_sharing": paired_ratio(
                [run["train_s"] for run in best], [run["train_s"] for run in alone]
            ),
            "speedup_over_shipped": 5 * shipped["train_s"] / median(train_s),
            "memory_ratio": max(run["peak_rss_bytes"] for run in ours) / max(run["peak_rss_bytes"] for run in best),
            "loss_after": ours[0]["loss_after"],
            "trl_loss_after": best[0]["loss_after"],
        }
        content = {
            **figures,
            "smidgen": ours,
            "smidgen_without_sharing": alone,
            "trl_best": best,
            "trl_shipped": shipped,
        }
        write_result(f"snips_trl{given.suffix}", content, folder, figures)


if "SMIDGEN_TEST_DATA" not in os.environ:
    skip("SMIDGEN_TEST_DATA does not say where sft/snips_train.jsonl lies")
main()
