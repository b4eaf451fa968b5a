"""Calls in a process of their own, which ends where it computes for too long or takes too much memory."""

import faulthandler
import os
import signal
import threading
import time
from pathlib import Path
from typing import Any

import pytest

from smidgen.bounded import MOST_GROWN_BYTES, MOST_S, Failed, OutOfBounds, bounded


def _call(function: Any, argument: Any = None) -> str:
    with bounded(function) as call:
        return call(argument)


def test_calls_share_a_process_that_has_what_this_one_had_and_changes_nothing_here() -> None:
    seen = ["before"]

    def function(word: str) -> str:
        seen.append(word)
        return f"{os.getpid()} {' '.join(seen)}"

    with bounded(function) as call:
        (first, *words), (second, *more) = call("one").split(), call("two \ud800").split()
    assert first == second != str(os.getpid())
    assert words == ["before", "one"] and more == ["before", "one", "two", "\ud800"]
    assert seen == ["before"]


def test_an_error_comes_back_as_its_first_line_and_the_next_call_works() -> None:
    with bounded(lambda number: str(1 // number)) as call:
        with pytest.raises(Failed, match=r"^integer division or modulo by zero$"):
            call(0)
        assert call(1) == "1"


@pytest.mark.parametrize(
    "function",
    [
        pytest.param(lambda _: str(9**9**9), id="native code"),
        pytest.param(lambda _: str(sum(iter(int, 1))), id="a loop"),
    ],
)
def test_computing_for_too_long_is_ended(function: Any) -> None:
    began = time.process_time()
    with pytest.raises(OutOfBounds, match="computes for more than 2 s"):
        _call(function)
    assert time.process_time() - began < 0.5, "it was computed here"
    assert MOST_S == 2


def test_each_call_has_its_own_time() -> None:
    def compute(seconds: float) -> str:
        end = time.process_time() + seconds
        while time.process_time() < end:
            pass
        return ""

    with bounded(compute) as call:
        for _ in range(3):
            call(MOST_S * 0.4)


def test_too_much_memory_is_refused_and_some_is_given() -> None:
    assert _call(lambda count: str(len(bytearray(count))), MOST_GROWN_BYTES // 2) == str(MOST_GROWN_BYTES // 2)
    with pytest.raises(OutOfBounds, match="takes more than 256 MiB of memory"):
        # far more, since memory that this process has freed and not given back is no growth
        _call(lambda count: str(len(bytearray(count))), 16 * MOST_GROWN_BYTES)


def test_a_crash_is_an_error_here() -> None:
    def crash(_: None) -> str:
        faulthandler.disable()  # pytest's would write the stack into its report
        return str(os.kill(os.getpid(), signal.SIGSEGV))

    with pytest.raises(OutOfBounds, match="ended its process"):
        _call(crash)


def test_it_works_in_a_thread_while_others_compute() -> None:
    found: list[str] = []
    threads = [threading.Thread(target=lambda: found.append(_call(lambda _: "done"))) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert found == ["done"] * 8


def test_no_process_is_left() -> None:
    _call(lambda _: "")
    with pytest.raises(OutOfBounds):
        _call(lambda _: os._exit(0))
    children = Path(f"/proc/self/task/{threading.get_native_id()}/children")
    assert children.read_text() == ""
