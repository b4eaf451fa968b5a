"""What tests of whole runs share."""

import os
import signal
from collections.abc import Callable
from pathlib import Path

from smidgen.events import Event, Step

__all__ = ["adapter_bytes", "stop_after"]


def adapter_bytes(run: Path) -> bytes:
    """The adapter that a run left."""
    return (run / "adapter_model.safetensors").read_bytes()


def stop_after(step: int) -> Callable[[Event], None]:
    """A report that presses Ctrl-C after this optimizer step."""

    def report(event: Event) -> None:
        if isinstance(event, Step) and event.step == step:
            os.kill(os.getpid(), signal.SIGINT)

    return report
