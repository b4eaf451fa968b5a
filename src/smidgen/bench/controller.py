"""The controller's side of a benchmark: workers are processes of their own, and one computes at a time.

What is compared runs in one session, interleaved A B A B: the speed of a shared machine drifts by tens of percent
within minutes, and the ratio of two neighbours says more than the ratio of two means.
"""

import json
import os
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from smidgen.errors import RunError
from smidgen.model.cgroups import MemoryGroup
from smidgen.units import format_bytes

__all__ = ["ISA_ENVIRONMENT", "WORKERS", "Worker", "start_worker"]

WORKERS = Path(__file__).parent / "workers"

# What keeps the libraries of all sides to an older instruction set than the machine has.
ISA_ENVIRONMENT: Mapping[str, Mapping[str, str]] = {
    "avx2": {
        "MKL_ENABLE_INSTRUCTIONS": "AVX2",
        "ATEN_CPU_CAPABILITY": "avx2",
        "ONEDNN_MAX_CPU_ISA": "AVX2",
        "SMIDGEN_ISA": "avx2",
    }
}
_ENVIRONMENT = {
    "TRANSFORMERS_VERBOSITY": "error",
    "TOKENIZERS_PARALLELISM": "false",
    "HF_HUB_OFFLINE": "1",
    "HF_HUB_DISABLE_PROGRESS_BARS": "1",
    "ONEDNN_PRIMITIVE_CACHE_CAPACITY": "64",
}
_QUIT_S = 20


class Worker:
    """One process that answers requests, one at a time."""

    def __init__(
        self, name: str, command: Sequence[str], environment: Mapping[str, str], group: MemoryGroup | None = None
    ) -> None:
        self.name, self._group = name, group
        self._errors = tempfile.TemporaryFile(mode="w+", encoding="utf-8", errors="replace")  # noqa: SIM115 (close)
        self._process = subprocess.Popen(
            list(command),
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._errors,
            env={**os.environ, **_ENVIRONMENT, **environment},
            text=True,
            encoding="utf-8",
        )
        if group is not None:  # before it has loaded anything: it waits for its first request
            (group.path / "cgroup.procs").write_text(str(self._process.pid))

    def ask(self, do: str, **values: Any) -> dict[str, Any]:
        """Send a request and wait for its answer. Raises RunError with what the worker says, or said last."""
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        try:
            self._process.stdin.write(json.dumps({"do": do, **values}) + "\n")
            self._process.stdin.flush()
            line = self._process.stdout.readline()
        except BrokenPipeError:
            line = ""
        if not line:
            raise RunError(f"benchmark {self.name}: its process ended during {do!r} ({self._last_words()})")
        answer = json.loads(line)
        if "error" in answer:
            raise RunError(f"benchmark {self.name}: {do} failed ({answer['error'].rstrip('.')})")
        return answer["ok"]

    def close(self) -> None:
        """End the process, kindly first. Safe to call twice."""
        if self._errors.closed:
            return
        try:
            self._process.communicate(json.dumps({"do": "quit"}) + "\n", timeout=_QUIT_S)
        except (subprocess.TimeoutExpired, OSError, ValueError):
            self._process.kill()
            self._process.wait()
        self._errors.close()

    def kill(self) -> None:
        """End the process at once."""
        self._process.kill()
        self.close()

    def _last_words(self) -> str:
        try:
            self._process.wait(_QUIT_S)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        self._errors.seek(0)
        lines = [line.strip() for line in self._errors.read().splitlines() if line.strip()]
        code = self._process.returncode
        how = f"exit code {code}" if code >= 0 else f"killed by {signal.Signals(-code).name}"
        if code == -signal.SIGKILL and self._group is not None:
            how += f"; its memory is limited to {format_bytes(self._group.limit_bytes)}"
        return f"{how}: {lines[-1][:300]}" if lines else how


@contextmanager
def start_worker(
    name: str,
    program: str,
    *,
    interpreter: Path | None = None,
    threads: int,
    isa: str = "",
    group: MemoryGroup | None = None,
) -> Iterator[Worker]:
    """A worker that ends with the block.

    program: the name of a module of `workers`. interpreter: runs it by its path, for peers; None: as a module of ours.
    group: that it is to live in.
    """
    if interpreter is None:
        command = [sys.executable, "-m", f"smidgen.bench.workers.{program}"]
    else:
        command = [str(interpreter), str(WORKERS / f"{program}.py")]
    worker = Worker(name, command, {"OMP_NUM_THREADS": str(threads), **ISA_ENVIRONMENT.get(isa, {})}, group)
    try:
        yield worker
    except BaseException:
        worker.kill()
        raise
    worker.close()
