"""Requests, answers, errors and deaths of workers."""

import sys
from pathlib import Path

import pytest

from smidgen.bench.controller import WORKERS, Worker, start_worker
from smidgen.bench.workers.serving import current_rss_bytes, peak_rss_bytes, reset_peak_rss
from smidgen.errors import RunError
from smidgen.model.cgroups import MemoryGroup, memory_group

PROGRAM = f"""
import os, sys
sys.path.insert(0, {str(WORKERS)!r})
from serving import serve

def fail(): raise ValueError("first line\\nsecond")
def die(): print("last words", file=sys.stderr); sys.stderr.flush(); os._exit(7)
def talk():
    print("what a library prints")
    os.system("echo and its children")
    return {{"threads": os.environ["OMP_NUM_THREADS"]}}
def eat(): return {{"bytes": len(b"x" * (1 << 30))}}

serve({{"add": lambda a, b: {{"sum": a + b}}, "fail": fail, "die": die, "talk": talk, "eat": eat}})
"""


def _start(folder: Path, group: MemoryGroup | None = None) -> Worker:
    program = folder / "worker.py"
    program.write_text(PROGRAM, encoding="utf-8")
    return Worker("tester", [sys.executable, str(program)], {"OMP_NUM_THREADS": "1"}, group)


@pytest.fixture
def worker(tmp_path: Path):
    worker = _start(tmp_path)
    yield worker
    worker.close()


def test_answers_come_in_order_whatever_libraries_print(worker: Worker) -> None:
    assert worker.ask("add", a=1, b=2) == {"sum": 3}
    assert worker.ask("talk") == {"threads": "1"}
    assert worker.ask("add", a=2, b=2) == {"sum": 4}


def test_an_error_is_one_line_and_the_worker_goes_on(worker: Worker) -> None:
    with pytest.raises(RunError, match=r"benchmark tester: fail failed \(ValueError: first line\)\.$"):
        worker.ask("fail")
    assert worker.ask("add", a=1, b=1) == {"sum": 2}


def test_a_dead_worker_is_said_with_its_last_words(worker: Worker) -> None:
    with pytest.raises(RunError, match=r"its process ended during 'die' \(exit code 7: last words\)"):
        worker.ask("die")


def test_a_worker_that_its_limit_ended_is_said_with_the_limit(tmp_path: Path) -> None:
    try:
        with memory_group("smidgen-test", 100_000_000) as group:
            worker = _start(tmp_path, group)
            said = r"ended during 'eat' \(killed by SIGKILL; its memory is limited to 100.0 MB\)"
            with pytest.raises(RunError, match=said):
                worker.ask("eat")
            worker.close()
    except OSError as error:
        pytest.skip(f"no memory cgroup can be made here: {error}")


def test_closing_twice_is_no_error(worker: Worker) -> None:
    worker.close()
    worker.close()
    assert worker._process.returncode == 0


def test_an_error_in_the_block_ends_the_worker() -> None:
    with pytest.raises(KeyError), start_worker("ours", "kernels_smidgen", threads=1) as worker:
        raise KeyError
    assert worker._process.returncode is not None


def test_isa_and_threads_reach_the_process(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "shows.py").write_text(
        f"import os, sys\nsys.path.insert(0, {str(WORKERS)!r})\nfrom serving import serve\n"
        "serve({'show': lambda names: {name: os.environ.get(name) for name in names}})\n",
        encoding="utf-8",
    )
    monkeypatch.setattr("smidgen.bench.controller.WORKERS", tmp_path)
    names = ["OMP_NUM_THREADS", "MKL_ENABLE_INSTRUCTIONS", "ATEN_CPU_CAPABILITY", "ONEDNN_MAX_CPU_ISA", "SMIDGEN_ISA"]
    with start_worker("shows", "shows", interpreter=Path(sys.executable), threads=3, isa="avx2") as worker:
        assert worker.ask("show", names=names) == dict(zip(names, ["3", "AVX2", "avx2", "AVX2", "avx2"], strict=True))


@pytest.mark.skipif(sys.platform != "linux", reason="VmHWM is Linux's")
def test_the_peak_of_a_phase_forgets_the_one_before() -> None:
    block = bytearray(200_000_000)
    block[::4096] = b"x" * len(block[::4096])
    assert peak_rss_bytes() >= 200_000_000
    del block
    reset_peak_rss()
    assert peak_rss_bytes() < current_rss_bytes() + 50_000_000
    assert peak_rss_bytes() >= current_rss_bytes() - 50_000_000
