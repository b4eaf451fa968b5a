"""A stranger's program, run so that it can neither go on for ever nor take all memory.

Chat templates are programs, and a tokenizer's regular expressions may take exponential time; both come with a model.
They run in a forked copy of this process, where they are loaded as they are here. It may compute for MOST_S in one call
and grow by MOST_GROWN_BYTES; the system ends it where it goes on. Why not within this process: a timer here would not
interrupt native code, in which one operation may last for hours, and a limit on memory would hold for every thread.

A fork takes some tens of milliseconds, more in a process with more memory, so calls may share one. Where there is none,
as anywhere but on Linux, they are made here without bounds.
"""

import gc
import os
import signal
import sys
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from multiprocessing import Pipe
from multiprocessing.connection import Connection
from typing import Any, NoReturn

from smidgen.errors import first_line

__all__ = ["MOST_GROWN_BYTES", "MOST_S", "Failed", "OutOfBounds", "bounded"]

MOST_S = 2.0  # of computing, so that a busy machine refuses nothing; a template takes a thousandth of it
MOST_GROWN_BYTES = 256 << 20
_LONGEST_WAIT_S = 300.0  # by the clock, should the copy have stopped without computing
_OK, _FAILED, _NO_MEMORY = b"\0", b"\1", b"\2"


class Failed(Exception):
    """The call raised; the text is its error's first line."""


class OutOfBounds(Exception):
    """The call was ended; the text says what it did."""


@contextmanager
def bounded(function: Callable[[Any], str]) -> Iterator[Callable[[Any], str]]:
    """Within, the function given calls `function` as it was at the beginning, on an argument that can be pickled.

    It raises Failed where `function` raised and OutOfBounds where it was ended; after that no call can be made.
    """
    ours, theirs = Pipe()
    copy = _fork()
    if copy is None:
        yield lambda argument: _call_here(function, argument)
        return
    if not copy:
        ours.close()
        _serve(theirs, function)
    theirs.close()
    try:
        yield lambda argument: _ask(copy, ours, argument)
    finally:
        ours.close()
        with suppress(ProcessLookupError, ChildProcessError):
            os.kill(copy, signal.SIGKILL)
            os.waitpid(copy, 0)


def _fork() -> int | None:
    """As os.fork; None where there is no such thing, or no memory for it."""
    if sys.platform != "linux":
        return None
    with warnings.catch_warnings():
        # From Python 3.12 on, where there are threads: the copy has this one alone, and asks nothing of the others.
        warnings.simplefilter("ignore", DeprecationWarning)
        with suppress(OSError):
            return os.fork()
    return None


def _call_here(function: Callable[[Any], str], argument: Any) -> str:
    try:
        return function(argument)
    except Exception as error:
        raise Failed(first_line(error)) from error


def _ask(copy: int, pipe: Connection, argument: Any) -> str:
    try:
        pipe.send(argument)
        if not pipe.poll(_LONGEST_WAIT_S):
            raise OutOfBounds(f"has not answered within {_LONGEST_WAIT_S:.0f} s")
        answer = pipe.recv_bytes()
    except (EOFError, OSError):  # it has ended
        raise OutOfBounds(_how_it_ended(copy)) from None
    kind, text = answer[:1], answer[1:].decode("utf-8", "surrogatepass")
    if kind == _NO_MEMORY:
        raise OutOfBounds(f"takes more than {MOST_GROWN_BYTES >> 20} MiB of memory")
    if kind == _FAILED:
        raise Failed(text)
    return text


def _how_it_ended(copy: int) -> str:
    with suppress(ChildProcessError):
        ended = os.waitid(os.P_PID, copy, os.WEXITED | os.WNOWAIT)
        if ended and ended.si_status == signal.SIGPROF:
            return f"computes for more than {MOST_S:.0f} s"
    return "ended its process"


def _serve(pipe: Connection, function: Callable[[Any], str]) -> NoReturn:
    """What the copy does until the other end of the pipe is closed."""
    try:
        gc.freeze()  # a collection would write to, and so copy, every page that both processes share
        os.environ["TOKENIZERS_PARALLELISM"] = "false"  # its threads are not here
        with open(os.devnull, "w") as nowhere:  # a library in Rust would print the stack of a panic
            os.dup2(nowhere.fileno(), 2)
        signal.signal(signal.SIGINT, signal.SIG_IGN)
        signal.signal(signal.SIGPROF, signal.SIG_DFL)  # ends the process, whatever it is in the middle of
        _limit_memory()
        while True:
            argument = pipe.recv()
            signal.setitimer(signal.ITIMER_PROF, MOST_S)
            answer = _answer(function, argument)
            signal.setitimer(signal.ITIMER_PROF, 0)
            pipe.send_bytes(answer)
    finally:
        os._exit(0)  # nothing of the other process is flushed or closed


def _answer(function: Callable[[Any], str], argument: Any) -> bytes:
    try:
        return _OK + function(argument).encode("utf-8", "surrogatepass")
    except MemoryError:
        return _NO_MEMORY
    except BaseException as error:
        return _FAILED + first_line(error).encode("utf-8", "surrogatepass")


def _limit_memory() -> None:
    import resource  # not on Windows

    with open("/proc/self/statm", "rb") as file:
        now = int(file.read().split()[0]) * resource.getpagesize()
    soft, hard = resource.getrlimit(resource.RLIMIT_AS)
    most = now + MOST_GROWN_BYTES
    resource.setrlimit(resource.RLIMIT_AS, (most if soft == resource.RLIM_INFINITY else min(soft, most), hard))
