"""`smidgen download HUB_ID`."""

from collections.abc import Mapping
from typing import Any

from smidgen.cli.console import Console, command
from smidgen.cli.options import verb
from smidgen.cli.values import Given

__all__ = ["download"]


@verb("download", arguments=("hub_id",))
def download(console: Console, given: Given) -> Mapping[str, Any]:
    """Fetch a model into the cache, for later use without a network.

    HUB_ID is owner/name on the hub, or a built-in name. Only safetensors and text files are taken, never pickles.

    \b
    Examples:
      smidgen download smollm2-135m
      smidgen download Qwen/Qwen3-0.6B
    """
    from smidgen import api

    path = api.download(given["hub_id"], report=console.report)
    console.close()
    console.line(str(path))
    console.next(command("generate", given["hub_id"], "Hello!"))
    return {"path": str(path)}
