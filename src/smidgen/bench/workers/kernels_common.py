"""What both sides' kernel workers share: timing of one repeat, and the extra memory of a call."""

import time
from collections.abc import Callable
from typing import Any

if __package__:
    from smidgen.bench.workers.serving import current_rss_bytes, peak_rss_bytes, reset_peak_rss
else:
    from serving import current_rss_bytes, peak_rss_bytes, reset_peak_rss  # pyright: ignore[reportMissingImports]

__all__ = ["Kernels", "extra_memory"]

_SHORTEST_S = 0.1  # a repeat lasts at least this long, so that the clock and a stray interrupt do not matter
_MOST_CALLS = 500


class Kernels:
    """Named functions without arguments; `run` times a repeat of one of them and says how long a call took."""

    def __init__(self, functions: dict[str, Callable[[], Any]]) -> None:
        self.functions = functions
        self._calls: dict[str, int] = {}

    def run(self, case: str) -> dict[str, float]:
        function = self.functions[case]
        if case not in self._calls:
            function()  # what is made at the first call is no part of any
            once_s = self._seconds(function, 1)
            self._calls[case] = min(_MOST_CALLS, max(1, round(_SHORTEST_S / max(once_s, 1e-9))))
        calls = self._calls[case]
        return {"seconds": self._seconds(function, calls) / calls}

    def _seconds(self, function: Callable[[], Any], calls: int) -> float:
        started = time.perf_counter()
        for _ in range(calls):
            function()
        return time.perf_counter() - started


def extra_memory(function: Callable[[], Any]) -> int:
    """Bytes by which one call makes the process larger at its peak, its result included."""
    before = current_rss_bytes()
    reset_peak_rss()
    result = function()
    extra = peak_rss_bytes() - before
    del result
    return extra
