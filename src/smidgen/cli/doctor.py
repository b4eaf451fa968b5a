"""`smidgen doctor`."""

from collections.abc import Mapping
from typing import Any

from smidgen.cli.console import Console
from smidgen.cli.options import verb
from smidgen.cli.values import Given

__all__ = ["doctor"]


@verb("doctor")
def doctor(console: Console, given: Given) -> Mapping[str, Any]:
    """Say what this machine can do: versions, processor, memory, disk, GPUs, the fastest compute type.

    Every kernel and back end is checked against plain arithmetic, and a training step against its forecast of memory
    and time; where there is a GPU, a few steps on it against the same on the CPU. The exit code is 1 if something is
    wrong; put the output into a bug report.

    \b
    Examples:
      smidgen doctor
      smidgen doctor --json
    """
    from smidgen import api

    result = api.doctor(report=console.report)
    console.close()
    console.results(result)
    return result
