"""Perplexity of SmolLM2-135M as it comes and as NF4, rounded to nearest and by GPTQ. About half an hour on two cores.

Text: $SMIDGEN_TEST_DATA/text/wiki.test.raw (WikiText-2, CC BY-SA): its first 64k tokens are measured in windows of 2048
that count every token but the first, with --full all of it that is not calibrated on: GPTQ is calibrated on the text's
last 32 rows of 512 tokens. The base is the built-in GGUF file: "float32" stands for the numbers that its
blocks decode to, "gguf" for the blocks themselves; these two agree up to rounding, and the other forms add errors.
--tokens makes it smaller, to try it out.
"""

import argparse
import os
import tempfile
from pathlib import Path
from typing import Any

import torch
from common import skip, write_result

from smidgen.model.calibration import cut_rows
from smidgen.model.gptq import quantise_base
from smidgen.model.load import Source, load_base, open_source
from smidgen.quant.gptq import GptqSettings, round_to_nearest
from smidgen.quant.linear import FrozenLinear
from smidgen.train.evaluate import text_perplexity

MODEL, PROTOCOL, WINDOW = "smollm2-135m", "gptq", 2048
FORMS = {
    "float32": None,
    "gguf": None,
    "nf4": None,
    "nf4-dq": None,
    "rtn-4 g128": GptqSettings(),
    "gptq-4 g128": GptqSettings(),
    "gptq-4 g128 act-order": GptqSettings(act_order=True),
}

parser = argparse.ArgumentParser(description=__doc__)
parser.add_argument("--full", action="store_true", help="all of the text that is not calibrated on")
parser.add_argument("--tokens", type=int, default=64 * 1024, help="how much of the text is measured")
parser.add_argument("--rows", type=int, default=32, help="rows of 512 tokens to calibrate with")
given = parser.parse_args()
if "SMIDGEN_TEST_DATA" not in os.environ:
    skip("SMIDGEN_TEST_DATA does not say where text/wiki.test.raw lies")
TEXT = (Path(os.environ["SMIDGEN_TEST_DATA"]) / "text" / "wiki.test.raw").read_text(encoding="utf-8")


def load_form(source: Source, name: str, calibration: torch.Tensor) -> Any:
    """The base in one of FORMS."""
    stored = {"gguf": "keep", "nf4": "nf4", "nf4-dq": "nf4-dq"}.get(name, "none")
    base = load_base(source, quantize=stored, compute_dtype="float32", device="cpu")
    settings = FORMS[name]
    if name.startswith("gptq"):
        quantise_base(base, calibration, settings)
    elif settings is not None:
        for linear_name, linear in base.linears.items():
            if linear_name != base.head_name:
                weight = linear.weight.rows(0, linear.out_features, torch.float32).clone()
                nearest = FrozenLinear(round_to_nearest(weight, settings), linear.bias)
                base.model.set_submodule(linear_name, nearest)
    return base


source = open_source(MODEL)
ids = source.tokenizer(TEXT, verbose=False).input_ids
calibration = cut_rows(
    ids[-given.rows * 512 :], rows=given.rows, length=512, held_out=False, source="the end of the text"
).rows
windows = (len(ids) - given.rows * 512) // WINDOW if given.full else max(1, given.tokens // WINDOW)
figures: dict[str, Any] = {}
for name in FORMS:
    measured = text_perplexity(load_form(source, name, calibration), source.tokenizer, TEXT, PROTOCOL, windows)
    figures[name] = {"perplexity": measured.perplexity, "loss": measured.loss, "tokens": measured.tokens}
    print(f"{name:24} {measured.perplexity:.3f}", flush=True)
with tempfile.TemporaryDirectory() as folder:
    about = {"model": MODEL, "text": "wiki.test.raw", "protocol": PROTOCOL, "windows": windows, "rows": given.rows}
    write_result("gptq_quality", {**about, "forms": figures}, Path(folder), figures)
