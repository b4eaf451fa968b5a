"""`smidgen quantize MODEL --to KIND --out DIR`."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from smidgen.cli.console import Console, command
from smidgen.cli.options import Flag, base_flags, verb
from smidgen.cli.values import Given
from smidgen.export.forms import PACKED_FORMS

__all__ = ["quantize"]

_FLAGS = (
    Flag(
        "to",
        str,
        None,
        "nf4-dq, nf4, fp4: bitsandbytes' 4-bit blocks (-dq: with 8-bit scales). int8: LLM.int8()'s rows. gptq:"
        " integers in groups, chosen on a calibration text.",
        "Quantise",
        choices=PACKED_FORMS,
    ),
    Flag("out", str, None, "Folder for the model: a new or empty one.", "Quantise", metavar="DIR"),
    Flag(
        "memory",
        str,
        None,
        "Memory that this may take in all, e.g. 2GiB; by default what is free. Smaller files are written where that"
        " helps; what cannot fit is refused before weights are read.",
        "Quantise",
        metavar="SIZE",
    ),
    *base_flags("trust_remote_code"),
)
_GPTQ_FLAGS = (
    Flag(
        "bits",
        int,
        4,
        "Bits of a weight.",
        "GPTQ",
        metavar="N",
        check=lambda v: v in (2, 3, 4, 8),
        expected="2, 3, 4 or 8",
    ),
    Flag(
        "group_size",
        int,
        128,
        "Inputs that share a scale; -1: all of them.",
        "GPTQ",
        metavar="N",
        check=lambda v: v in (32, 64, 128, -1),
        expected="32, 64, 128 or -1",
    ),
    Flag(
        "sym", bool, True, "The zero point is the middle of the codes; --asym: one for each group.", "GPTQ", no="--asym"
    ),
    Flag("act_order", bool, False, "Inputs with the largest activations first (desc_act).", "GPTQ"),
    Flag(
        "damp",
        float,
        0.01,
        "Added to the Hessian's diagonal, as a share of its mean; raised where that is too little.",
        "GPTQ",
        check=lambda v: 0 < v <= 1,
        expected="more than 0 and at most 1",
    ),
    Flag(
        "calibration",
        str,
        None,
        "Text to calibrate with: a plain text file (.txt, .raw, .md) or rows of data, as finetune takes them. Without"
        " it a small built-in sample.",
        "GPTQ",
        metavar="FILE",
    ),
    Flag(
        "calibration_rows",
        int,
        128,
        "Sequences to calibrate with, fewer where the text has no more.",
        "GPTQ",
        check=lambda v: v >= 1,
        expected="1 or more",
    ),
    Flag(
        "calibration_len",
        int,
        512,
        "Tokens of a sequence.",
        "GPTQ",
        check=lambda v: v >= 16,
        expected="16 or more",
    ),
    Flag("perplexity", bool, True, "Compare perplexities on a held-out piece of the calibration text.", "GPTQ"),
)


def _check(given: Given) -> list[str]:
    problems = given.missing("to", "out")
    if given["to"] and given["to"] != "gptq":
        unused = [flag.name for flag in _GPTQ_FLAGS if flag.name in given.named]
        problems += [f"{name}: only --to gptq has this, found --to {given['to']}" for name in unused]
    return problems


@verb("quantize", arguments=("model",), flags=(*_FLAGS, *_GPTQ_FLAGS), check=_check)
def quantize(console: Console, given: Given) -> Mapping[str, Any]:
    """Write a model with packed weights, as a folder that transformers opens and smidgen trains on in place.

    MODEL is a Hugging Face folder with 16- or 32-bit weights, a .gguf file, a built-in name or a hub id. Embedding,
    head and norms keep their type. The work goes through the model one decoder layer at a time.

    \b
    Examples:
      smidgen quantize ./SmolLM2-135M --to nf4-dq --out models/nf4
      smidgen quantize ./Llama-2-7b --to nf4-dq --out models/nf4 --memory 2GiB
      smidgen quantize smollm2-135m --to gptq --out models/gptq --calibration wiki.txt --act-order
    """
    from smidgen import api

    settings = given.pick(_GPTQ_FLAGS) if given["to"] == "gptq" else {}
    result = api.quantize(
        given["model"],
        Path(given["out"]),
        to=given["to"],
        memory=given["memory"],
        trust_remote_code=given["trust_remote_code"],
        report=console.report,
        **settings,
    )
    console.close()
    console.files()
    console.quantised(result)
    console.next(
        command("generate", given["out"], *given.own_code, "Hello!"),
        command("finetune", given["out"], "DATA", "--out", "RUN", *given.own_code),
    )
    return result
