"""One training step against PEFT + bitsandbytes: two shapes, with recomputation and without. Half an hour on two cores.

Without recomputation both sides keep everything; with it, theirs is gradient checkpointing. Each pair of sides runs
interleaved, as `smidgen bench step` does it; the dense twin for the 4-bit tax runs with the first pair of the small
shape.
"""

import tempfile
from pathlib import Path

from common import options, run_json, write_result

SHAPES = ("smollm2-135m", "tinyllama-1.1b")
PAIRS: list[tuple[str, str, list[str]]] = [  # (recompute, against, other flags)
    ("none", "peft-bnb", []),
    ("cheap", "peft-bnb-ckpt", ["--no-four-bit-tax"]),
]
KEYS = ("shape", "recompute", "against", "speedup", "step_s", "peer_step_s", "peak_rss_bytes", "peer_peak_rss_bytes")

given = options(__doc__)
runs = []
with tempfile.TemporaryDirectory() as name:
    folder = Path(name)
    # Steps of the larger shape take half a minute, and theirs in bfloat16 more than one: a few are enough to see it. A
    # third process beside its two, the dense twin of 4.4 GB, was seen to slow them down.
    few = {"tinyllama-1.1b": ["--repeats", str(min(3, given.repeats)), "--no-four-bit-tax"]}
    plan = [(shape, *pair, [*flags, *few.get(shape, [])]) for shape in SHAPES for *pair, flags in PAIRS]
    plan.append((SHAPES[0], "none", "peft-bnb-bf16", ["--no-four-bit-tax", "--repeats", str(min(2, given.repeats))]))
    for shape, recompute, against, flags in plan:
        words = ["bench", "step", "--shape", shape, "--recompute", recompute, "--against", against, *given.words]
        result = run_json([*words, *flags, "--keep", "weights"], folder)
        runs.append({"command": "smidgen " + " ".join([*words, *flags]), **result})
        # After each run, so that what was measured is not lost if a later one fails.
        write_result(f"step{given.suffix}", {"runs": runs}, folder, {key: result[key] for key in KEYS})
