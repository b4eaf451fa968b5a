"""`smidgen evaluate MODEL|RUN DATA...`."""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from smidgen.cli.console import Console
from smidgen.cli.options import BASE_FLAGS, Flag, base_flags, verb
from smidgen.cli.values import Given

__all__ = ["evaluate"]


def _positive(value: int) -> bool:
    return value >= 1


_EVALUATION = (
    Flag(
        "against",
        str,
        None,
        "Measure this on the same rows too, and show the differences: base (that the run was trained on), or a model"
        " or run.",
        "Evaluation",
        metavar="base|MODEL|RUN",
    ),
    Flag(
        "protocol",
        str,
        None,
        "Perplexity of a plain text file. gptq: windows of 2048, every token; llama.cpp: of 512, their second half.",
        "Evaluation",
        choices=("gptq", "llama.cpp"),
    ),
    Flag(
        "limit",
        int,
        None,
        "Only the first N rows, windows or questions of each file.",
        "Evaluation",
        check=_positive,
        expected="1 or more",
    ),
    Flag("answers", bool, True, "Also answer the rows and compare the answers with the data's.", "Evaluation"),
    Flag(
        "max_new_tokens",
        int,
        None,
        "Longest answer in tokens.  [default: 8 more than any expected one; to open questions 1024]",
        "Evaluation",
        check=_positive,
        expected="1 or more",
    ),
    Flag("batch_size", int, 16, "Rows computed at once.", "Evaluation", check=_positive, expected="1 or more"),
    Flag(
        "questions",
        str,
        None,
        "Answer the open questions of this file (MT-bench, Vicuna) into --out.",
        "Evaluation",
        metavar="FILE",
    ),
    Flag("out", str, None, "New file for the answers, a JSON object a line.", "Evaluation", metavar="FILE"),
)
_ROWS = tuple(
    # not given: the run's, which only api knows
    replace(
        flag, default=None, help=flag.help + (f"  [default: the run's, else {flag.default}]" if flag.default else "")
    )
    for flag in base_flags("seq_len", "too_long", "system", "fill", "train_on_prompt")
)


def _check(given: Given) -> list[str]:
    problems = []
    if not given["data"] and not given["questions"]:
        problems.append("data: missing")
    for name, other in (("questions", "out"), ("out", "questions")):
        if given[name] and not given[other]:
            problems.append(f"{name}: needs --{other} FILE beside it")
    return problems


@verb(
    "evaluate",
    arguments=("model_run", "data"),
    optional=("data",),
    several=("data",),
    flags=(*_EVALUATION, *_ROWS, *BASE_FLAGS),
    check=_check,
)
def evaluate(console: Console, given: Given) -> Mapping[str, Any]:
    """Measure a model or a run on DATA, each figure with its 95 % confidence interval.

    Rows to train on: loss, perplexity, and how answers compare. Plain text: perplexity, by the protocol that the papers
    or llama.cpp use. Multiple choice (ARC, PIQA, MMLU files): accuracy. Last words (LAMBADA): accuracy. With --against
    base a run stands beside its base, and what it has forgotten is said. Of a data set with several parts the test rows
    are taken, else the validation rows; of a run's own data those that it held out. Rows become tokens as the run had
    them trained (--system, --fill, --seq-len, --too-long, --train-on-prompt), where no flag says otherwise.

    \b
    Examples:
      smidgen evaluate runs/demo toolcalls --limit 50
      smidgen evaluate smollm2-135m wiki.test.raw --protocol llama.cpp
      smidgen evaluate runs/demo toolcalls arc_easy.jsonl --against base --limit 200
      smidgen evaluate runs/demo --questions mt_bench.jsonl --out answers.jsonl
    """
    from smidgen import api

    result = api.evaluate(
        given["model_run"],
        *given["data"],
        report=console.report,
        **given.pick(_EVALUATION),
        **given.pick(_ROWS),
        **given.pick(BASE_FLAGS),
    )
    console.close()
    console.some_answers()
    console.evaluation(result)
    console.files()
    return result
