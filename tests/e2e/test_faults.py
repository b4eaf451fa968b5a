"""Disks that fail and processes that are killed, at every change of a file that a checkpoint or the result makes."""

import json
import os
import shutil
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest

from tiny import tiny_folder, write_rows

HERE = Path(__file__).parent
_FINISHED = {"done": "checkpoints/.tmp-step-4", "kill": ".tmp-report.html-"}


@pytest.mark.slow
@pytest.mark.timeout(1500)
def test_every_change_that_a_save_makes_may_fail_or_be_the_last(tmp_path: Path) -> None:
    """With ENOSPC, EIO or SIGKILL, or with each of them where SMIDGEN_ALL_FAULTS is set: the newest whole checkpoint
    stays, and `resume` comes to the same end.
    """
    compiler = shutil.which("cc") or shutil.which("gcc")
    if compiler is None or not sys.platform.startswith("linux"):
        pytest.skip("needs a C compiler and LD_PRELOAD")
    shim = tmp_path / "faults.so"
    subprocess.run([compiler, "-shared", "-fPIC", "-O1", "-o", shim, HERE / "faults.c", "-ldl"], check=True)
    words = [sys.executable, HERE / "faults.py", tiny_folder(tmp_path / "base"), write_rows(tmp_path / "rows.jsonl")]
    done = subprocess.run(
        [*map(str, words), str(tmp_path)], env=os.environ | {"LD_PRELOAD": str(shim)}, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    cases = [json.loads(line) for line in done.stdout.splitlines()]
    changes = {case["saved"]: case["changes"] for case in cases}
    kinds = 3 if os.environ.get("SMIDGEN_ALL_FAULTS") else 1
    # a checkpoint: eleven files, each made, written and flushed, and the folders; the result: another, and itself
    assert changes["result"] > changes["checkpoint"] >= 40 and len(cases) == kinds * sum(changes.values())
    for case in cases:
        said = f"{case}\n{done.stderr}"
        # of a run that is finished nothing is tidied up: not what could not be removed when its last step was saved,
        # nor the page that was being written when it was killed
        left = [name for name in case["left"] if not name.startswith(_FINISHED.get(case["ended"], "/"))]
        assert case["same"] and not left, said
        assert case["ended"] == "kill" if case["kind"] == "kill" else case["ended"] in ("RunError", "done"), said
        # before the save, after it; or the fault did not matter
        newest = ("step-4", "step-5") if case["saved"] == "result" else ("step-2", "step-3")
        assert case["newest"] in (newest if case["ended"] != "done" else ("step-5",)), said
    ended = Counter((case["kind"], case["ended"]) for case in cases)
    # what may fail without harm is the removal of old checkpoints
    assert all(ended[kind, "RunError"] > len(cases) / 6 for kind in ("ENOSPC", "EIO")), ended


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_ten_processes_killed_at_random_moments_change_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(HERE.parents[1] / "benchmarks"))
    from kills import killed_and_whole

    found = killed_and_whole(tmp_path, kills=10, seed=1)
    assert found["same_bytes"] and found["same_log"] and not found["remains"], found
