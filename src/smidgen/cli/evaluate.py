"""`smidgen evaluate MODEL|RUN DATA`."""

from collections.abc import Mapping
from typing import Any

from smidgen.cli.console import Console
from smidgen.cli.options import BASE_FLAGS, Flag, base_flags, verb
from smidgen.cli.values import Given

__all__ = ["evaluate"]


def _positive(value: int) -> bool:
    return value >= 1


_EVALUATION = (
    Flag(
        "protocol",
        str,
        None,
        "Perplexity of a plain text file. gptq: windows of 2048, every token; llama.cpp: of 512, their second half.",
        "Evaluation",
        choices=("gptq", "llama.cpp"),
    ),
    Flag("limit", int, None, "Only the first N rows or windows.", "Evaluation", check=_positive, expected="1 or more"),
    Flag("answers", bool, True, "Also answer the rows and compare: exact match, valid JSON, ROUGE-L.", "Evaluation"),
    Flag("max_new_tokens", int, 128, "Longest answer in tokens.", "Evaluation", check=_positive, expected="1 or more"),
    Flag("batch_size", int, 16, "Rows computed at once.", "Evaluation", check=_positive, expected="1 or more"),
    *base_flags("seq_len", "train_on_prompt"),
)


@verb("evaluate", arguments=("model_run", "data"), flags=(*_EVALUATION, *BASE_FLAGS))
def evaluate(console: Console, given: Given) -> Mapping[str, Any]:
    """Measure a model or a run on DATA: loss and perplexity weighted by token, and how its answers compare.

    Of a data set with several parts the test rows are taken, else the validation rows. A plain text file gets its
    perplexity, by the protocol that the papers or llama.cpp use.

    \b
    Examples:
      smidgen evaluate runs/demo toolcalls --limit 50
      smidgen evaluate smollm2-135m wiki.test.raw --protocol llama.cpp
    """
    from smidgen import api

    result = api.evaluate(
        given["model_run"],
        given["data"],
        report=console.report,
        **given.pick(_EVALUATION),
        **given.pick(BASE_FLAGS),
    )
    console.close()
    console.some_answers()
    console.results(result)
    return result
