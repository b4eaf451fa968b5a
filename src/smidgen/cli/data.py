"""`smidgen data MODEL DATA`."""

from collections.abc import Mapping
from typing import Any

from smidgen.cli.console import Console
from smidgen.cli.options import base_flags, verb
from smidgen.cli.values import Given

__all__ = ["data"]

_FLAGS = base_flags(
    *("seq_len", "too_long", "mix", "limit", "system", "fill", "token_cache", "train_on_prompt"),
    *("micro_batch", "accumulation", "pack", "share_prefix", "dropout", "neftune_alpha", "group_by_length"),
)


@verb("data", arguments=("model", "data"), several=("data",), flags=_FLAGS)
def data(console: Console, given: Given) -> Mapping[str, Any]:
    """Show how DATA's rows become tokens and labels for MODEL; nothing is trained.

    It prints a row with its trained tokens marked, how long rows are, the share of tokens that the loss counts, rows
    that are cut off or look wrong, and how many tokens a run saves by computing once what rows begin with alike.

    \b
    Examples:
      smidgen data smollm2-135m toolcalls
      smidgen data ./Qwen3-0.6B chats.jsonl --seq-len 512
      smidgen data ./Qwen3-0.6B a.jsonl b.jsonl --mix 2,1
    """
    from smidgen import api

    report = api.inspect_data(given["model"], given["data"], report=console.report, **given.pick(_FLAGS))
    console.close()
    console.data_report(report)
    return report.as_dict()
