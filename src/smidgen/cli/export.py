"""`smidgen export RUN --to KIND --out PATH`."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from smidgen.cli import views
from smidgen.cli.console import Console, command
from smidgen.cli.options import Flag, base_flags, verb
from smidgen.cli.values import Given
from smidgen.export.forms import EXPORTS

__all__ = ["export"]

_FLAGS = (
    Flag(
        "to",
        str,
        None,
        "gguf-lora: an adapter for llama.cpp. gguf: the merged model in one file. ollama: the same with a Modelfile."
        " hf: a folder of 16-bit weights, of float32 ones where the base has those. bnb-4bit: a folder in bitsandbytes'"
        " 4-bit blocks.",
        "Export",
        choices=EXPORTS,
    ),
    Flag("out", str, None, "File (.gguf) or folder to write: a new one.", "Export", metavar="PATH"),
    Flag(
        "type",
        str,
        "auto",
        "Type of the numbers. GGUF: F16, BF16, Q8_0, Q4_0 (auto: Q8_0). hf: float16, bfloat16, float32 (auto: the"
        " base's own). bnb-4bit: nf4-dq, nf4, fp4 (auto: nf4-dq).",
        "Export",
    ),
    *base_flags("trust_remote_code"),
)


def _check(given: Given) -> list[str]:
    return given.missing("to", "out")


@verb("export", arguments=("run",), flags=_FLAGS, check=_check)
def export(console: Console, given: Given) -> Mapping[str, Any]:
    """Write a run as a file that other programs open: llama.cpp, Ollama, transformers.

    What is written is opened again and compared with the run on held-out rows before it is kept. An export in which the
    fine-tune got lost is an error.

    \b
    Examples:
      smidgen export runs/demo --to gguf-lora --out demo-lora.gguf
      smidgen export runs/demo --to ollama --out models/demo
      smidgen export runs/demo --to gguf --type Q4_0 --out demo.gguf
    """
    from smidgen import api

    result = api.export_run(
        given["run"],
        Path(given["out"]),
        to=given["to"],
        type=given["type"],
        trust_remote_code=given["trust_remote_code"],
        report=console.report,
    )
    console.close()
    console.files()
    console.results({key: result[key] for key in ("out", "to", "type", "bytes")})
    console.line(
        f"Opened again and compared with the run on {result['compared_tokens']} held-out tokens: mean KL divergence"
        f" {result['mean_kl']:.2g} nats (of the bare base: {result['base_kl']:.2g}), the same top token"
        f" {views.percent(result['same_top_token'])}."
    )
    if given["to"] == "ollama":
        console.next(f"ollama create {Path(given['out']).name} -f {Path(given['out']) / 'Modelfile'}")
    elif given["to"] != "gguf-lora":
        own_code = given.own_code if given["to"] == "hf" else []
        console.next(command("generate", given["out"], *own_code, "Hello!"))
    return result
