"""`smidgen doctor`."""

from collections.abc import Mapping
from typing import Any

from smidgen.cli.console import Console
from smidgen.cli.options import verb
from smidgen.cli.values import Given

__all__ = ["doctor"]


@verb("doctor")
def doctor(console: Console, given: Given) -> Mapping[str, Any]:
    """Say what this machine can do: versions, processor, threads, the fastest compute type, back ends.

    A small self-check of the packed operations runs too; put its output into a bug report.

    \b
    Examples:
      smidgen doctor
    """
    from smidgen import api

    result = api.doctor(report=console.report)
    console.close()
    console.results(result)
    return result
