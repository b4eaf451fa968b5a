"""`smidgen plan MODEL [DATA]`."""

from collections.abc import Mapping
from typing import Any

from smidgen.cli.console import Console
from smidgen.cli.options import Flag, settings_flags, verb
from smidgen.cli.values import Given

__all__ = ["plan"]

_SETTINGS = settings_flags()
_IN_FILE = (Flag("out", str, None, ""),)
_GENERATE = Flag(
    "generate",
    int,
    None,
    "Forecast generation instead: N new tokens after a prompt of --seq-len.",
    "Generation",
    check=lambda value: value >= 1,
    expected="1 or more",
)


@verb(
    "plan",
    arguments=("model", "data"),
    optional=("data",),
    several=("data",),
    flags=(*_SETTINGS, _GENERATE),
    in_file=_IN_FILE,
)
def plan(console: Console, given: Given) -> Mapping[str, Any]:
    """Forecast memory, by parts, and time of a fine-tuning run; no weights are read.

    MODEL is what finetune takes, a config.json alone, or the name of a shape (llama-7b, llama-65b, llama-3-8b,
    qwen2.5-7b, ...). Without DATA every row has --seq-len tokens. With --memory the settings are chosen that fit and
    are fastest, as finetune chooses them. All flags of finetune are taken, and its --config files; some of them, as
    --learning-rate, change neither memory nor time. Of a shape DATA is not read. Beside --generate only --quantize,
    --compute-dtype, --device, --memory, --seq-len and --trust-remote-code are taken.

    \b
    Examples:
      smidgen plan smollm2-135m toolcalls
      smidgen plan llama-7b --memory 6GiB --seq-len 512 --micro-batch 1
      smidgen plan llama-65b --device cuda --rank 64
      smidgen plan llama-7b --generate 256 --seq-len 32 --memory 1GiB
      smidgen plan llama-7b --config recipes/alpaca-llama-7b.yaml
    """
    from smidgen import api

    settings = {flag.name: given[flag.name] for flag in _SETTINGS if flag.name in given.named}
    result = api.plan(
        given["model"], given["data"] or None, generate=given["generate"], report=console.report, **settings
    )
    console.close()
    console.forecast(result)
    return result
