"""No kernel touches a byte beside its tensors, whatever their shape: see guard_pages.py, which runs apart."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


def _run(*arguments: str) -> subprocess.CompletedProcess[str]:
    paths = [str(ROOT / "src"), os.environ.get("PYTHONPATH", "")]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, paths)), "OMP_NUM_THREADS": "1"}
    for name in ("SMIDGEN_BACKEND", "LD_PRELOAD"):  # the second: AddressSanitizer, which would catch the signal
        environment.pop(name, None)
    script = str(Path(__file__).with_name("guard_pages.py"))
    return subprocess.run(
        [sys.executable, script, *arguments], capture_output=True, text=True, env=environment, timeout=250
    )


def test_kernels_touch_nothing_beside_their_tensors(isa: str) -> None:
    run = _run(isa)
    assert run.returncode == 0, "\n".join([*run.stdout.splitlines()[-1:], run.stderr[-2000:]])
    assert run.stdout.splitlines()[-1].endswith("passed")


@pytest.mark.parametrize("place", ["behind", "before", "attention"])
def test_a_row_that_is_not_there_ends_the_process(isa: str, place: str) -> None:
    """Or the test above would prove nothing."""
    assert _run(isa, place).returncode == -signal.SIGSEGV
