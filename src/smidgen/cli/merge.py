"""`smidgen merge RUN --out DIR`."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from smidgen.cli.console import Console, command
from smidgen.cli.options import Flag, base_flags, verb
from smidgen.cli.values import Given

__all__ = ["merge"]

_FLAGS = (
    Flag("out", str, None, "Folder for the model: a new or empty one.", "Merge", metavar="DIR"),
    Flag(
        "base",
        str,
        None,
        "Add the adapter to this 16-bit base instead of the de-quantised one that it was trained against.",
        "Merge",
        metavar="MODEL",
    ),
    Flag(
        "dtype",
        str,
        "auto",
        "Number type of the files. auto: the base's own, float16 for a GGUF base.",
        "Merge",
        choices=("auto", "bfloat16", "float16", "float32"),
    ),
    Flag(
        "memory",
        str,
        None,
        "Memory that this may take in all, e.g. 2GiB; by default what is free. Smaller files are written, and layers of"
        " the base are read from disk for each use, where that helps; what cannot fit is refused before weights are"
        " read.",
        "Merge",
        metavar="SIZE",
    ),
    *base_flags("trust_remote_code"),
)


def _check(given: Given) -> list[str]:
    return given.missing("out")


@verb("merge", arguments=("run",), flags=_FLAGS, check=_check)
def merge(console: Console, given: Given) -> Mapping[str, Any]:
    """Write a full Hugging Face model from a run: its base with the adapter added in.

    The files are written shard by shard, and the result is opened again to measure how far its outputs are from those
    of base + adapter.

    \b
    Examples:
      smidgen merge runs/demo --out models/demo
      smidgen merge runs/demo --out models/demo --base ./SmolLM2-135M-Instruct
      smidgen merge runs/llama-7b --out models/mine --memory 2GiB
    """
    from smidgen import api

    result = api.merge(
        given["run"],
        Path(given["out"]),
        base=given["base"],
        dtype=given["dtype"],
        memory=given["memory"],
        trust_remote_code=given["trust_remote_code"],
        report=console.report,
    )
    console.close()
    console.files()
    console.results(result)
    console.next(command("generate", given["out"], *given.own_code, "Hello!"))
    return result
