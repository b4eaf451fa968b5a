"""`smidgen demo` as the README shows it: wall time, before / after, peak memory. About five minutes on two cores."""

import tempfile
from pathlib import Path

from common import run_json, write_result

with tempfile.TemporaryDirectory() as folder:
    summary = run_json(["demo", "--out", "run"], Path(folder))
    write_result("demo", {"command": "smidgen demo", "summary": summary}, Path(folder))
