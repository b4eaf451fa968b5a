"""`smidgen chat MODEL|RUN`."""

from collections.abc import Mapping
from functools import partial
from typing import Any

from smidgen.cli.console import Console
from smidgen.cli.options import BASE_FLAGS, verb
from smidgen.cli.sampling import sampling_flags
from smidgen.cli.values import Given

__all__ = ["chat"]

_SAMPLING = sampling_flags(temperature=0.7, max_new_tokens=512)
_HELP = "/reset starts anew, /exit or Ctrl-D leaves, Ctrl-C stops an answer."


@verb("chat", arguments=("model_run",), flags=(*_SAMPLING, *BASE_FLAGS))
def chat(console: Console, given: Given) -> Mapping[str, Any]:
    """Talk with a model, or with a run's adapter over the base that it was trained on.

    The conversation is kept until /reset; Ctrl-C stops an answer, Ctrl-D leaves. With --json the messages are printed
    at the end.

    \b
    Examples:
      smidgen chat runs/demo
      smidgen chat smollm2-135m --system "You answer in one sentence."
    """
    from smidgen import api

    model = api.load(given["model_run"], report=console.report, **given.pick(BASE_FLAGS))
    sampling = {flag.name: given[flag.name] for flag in _SAMPLING if flag.name != "system"}
    start = [{"role": "system", "content": given["system"]}] if given["system"] else []
    messages: list[dict[str, Any]] = list(start)
    console.note(_HELP)
    while True:
        try:
            asked = console.ask("> ").strip()
        except EOFError:
            console.note("")
            break
        except KeyboardInterrupt:
            console.note("")
            continue
        if asked == "/exit":
            break
        if asked == "/reset":
            messages = list(start)
            console.note("A new conversation.")
        elif asked.startswith("/"):
            console.note(_HELP)
        elif asked:
            messages.append({"role": "user", "content": asked})
            answer, complete = console.stream(partial(model.stream, messages, **sampling))
            # What was said before Ctrl-C is part of the conversation, as the user has read it.
            messages.append({"role": "assistant", "content": answer})
            if not complete:
                console.note("(stopped)")
            sampling["seed"] += 1  # the same words again shall not get the same answer
    return {"messages": messages}
