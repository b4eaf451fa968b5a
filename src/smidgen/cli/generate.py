"""`smidgen generate MODEL|RUN "prompt"`."""

import sys
from collections.abc import Mapping
from dataclasses import asdict
from functools import partial
from typing import Any

from smidgen.cli.console import Console
from smidgen.cli.options import BASE_FLAGS, Flag, verb
from smidgen.cli.sampling import sampling_flags
from smidgen.cli.values import Given
from smidgen.errors import DataError
from smidgen.units import format_bytes

__all__ = ["generate", "read_prompt"]

_SAMPLING = sampling_flags(temperature=0.0, max_new_tokens=256)
_MEMORY = Flag(
    "memory",
    str,
    None,
    "What the process may have, as 1GiB: if need be layers are read from disk for each token.",
    "Model",
    metavar="SIZE",
)
_RAW = Flag("raw", bool, False, "The prompt goes in as it is, without the model's chat template.", "Sampling")


def _check(given: Given) -> list[str]:
    return ["--raw: has no place for --system"] if given["raw"] and given["system"] else []


@verb(
    "generate",
    arguments=("model_run", "prompt"),
    optional=("prompt",),
    flags=(*_SAMPLING, _RAW, _MEMORY, *BASE_FLAGS),
    check=_check,
)
def generate(console: Console, given: Given) -> Mapping[str, Any]:
    """Answer one prompt with a model, or with a run's adapter over the base that it was trained on.

    The answer is streamed to standard output as it comes. Without PROMPT, or with -, the prompt is read from standard
    input.

    \b
    Examples:
      smidgen generate runs/demo "wake me at half past six"
      smidgen generate smollm2-135m --temperature 0.7 --seed 1 - < question.txt
      smidgen generate models/llama-7b --memory 1GiB "Where do llamas live?"
    """
    from smidgen import api

    prompt = read_prompt(console, given["prompt"])
    sampling = {flag.name: given[flag.name] for flag in _SAMPLING if flag.name != "system"}
    question: Any = prompt
    if given["system"]:
        question = [{"role": "system", "content": given["system"]}, {"role": "user", "content": prompt}]
    how = given.pick(BASE_FLAGS)
    if given["memory"]:
        how |= {"memory": given["memory"], "prompt": question, "raw": given["raw"]}
        how |= {"max_new_tokens": given["max_new_tokens"]}
    model = api.load(given["model_run"], report=console.report, **how)
    if console.as_json:
        answer = asdict(model.generate(question, raw=given["raw"], **sampling))
        return answer | (model.memory() if given["memory"] else {})
    _, complete = console.stream(partial(model.stream, question, raw=given["raw"], **sampling))
    if not complete:
        raise KeyboardInterrupt
    if given["memory"]:
        sizes = {name: format_bytes(size) for name, size in model.memory().items()}
        console.note("memory: peak {peak_rss_bytes}, forecast {forecast_peak_bytes}".format_map(sizes))
    return {}


def read_prompt(console: Console, word: str | None) -> str:
    """The prompt itself, or standard input's text for - or nothing."""
    prompt = word
    if prompt is None or prompt == "-":
        if sys.stdin.isatty():
            console.note("Reading the prompt from standard input; end it with Ctrl-D.")
        try:
            prompt = sys.stdin.buffer.read().decode("utf-8").removesuffix("\n")
        except UnicodeDecodeError as error:
            found = f"byte {error.object[error.start]:#04x} at offset {error.start}"
            raise DataError("standard input", expected="UTF-8 text", found=found) from None
    if not prompt.strip():
        raise DataError("the prompt is empty", expected="some text, as PROMPT or on standard input")
    return prompt
