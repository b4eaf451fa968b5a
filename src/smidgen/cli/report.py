"""`smidgen report RUN`."""

from collections.abc import Mapping
from typing import Any

from smidgen.cli.console import Console
from smidgen.cli.options import verb
from smidgen.cli.values import Given

__all__ = ["report"]


@verb("report", arguments=("run",))
def report(console: Console, given: Given) -> Mapping[str, Any]:
    """Write RUN/report.html: one file, without any network, that shows a run on a screen or a phone.

    It has the curves of loss, learning rate, speed and memory, statistics of the data, answers before and after,
    settings and versions. Every run that ends has it already; this one is for runs that go on or were interrupted.

    \b
    Examples:
      smidgen report runs/chats
    """
    from smidgen import api

    page = api.write_report(given["run"])
    console.results({"page": page, "bytes": page.stat().st_size})
    return {"page": str(page), "bytes": page.stat().st_size}
