"""What every benchmark writes beside its figures: where, when and with what they were measured."""

import argparse
import hashlib
import json
import subprocess
import sys
from collections.abc import Callable
from datetime import datetime, timezone
from pathlib import Path
from typing import Any, NoReturn

from smidgen.bench.machine import read_commit
from smidgen.checkpoint.hub import cache_folder

RESULTS = Path(__file__).parent / "results"
SMIDGEN = [sys.executable, "-m", "smidgen"]


class Kept:
    """Measurements by name, each in a file of the cache as soon as it is done: a second start goes on with the rest,
    and several can be measured at once by hand. Each has the commit that it was measured at; older ones have none.
    again: those of before do not count.
    """

    def __init__(self, benchmark: str, *, again: bool) -> None:
        self._folder, self._again = cache_folder() / "bench" / "kept" / benchmark, again
        self._commit = read_commit()
        self._folder.mkdir(parents=True, exist_ok=True)

    def get(self, name: str) -> Any:
        """None where it has not been measured."""
        file = self._file(name)
        return json.loads(file.read_text(encoding="utf-8")) if file.exists() else None

    def once(self, name: str, measure: Callable[[], dict[str, Any]]) -> dict[str, Any]:
        found = None if self._again else self.get(name)
        if found is None:
            found = {"commit": self._commit, **measure()}
            self._file(name).write_text(json.dumps(found), encoding="utf-8")
        return found

    def _file(self, name: str) -> Path:
        return self._folder / f"{hashlib.sha256(name.encode()).hexdigest()[:16]}.json"


def run_json(words: list[str], cwd: Path) -> dict[str, Any]:
    """Run a smidgen command with --json in its own process (its peak memory is its own) and return the object."""
    done = subprocess.run([*SMIDGEN, *words, "--json"], cwd=cwd, stdout=subprocess.PIPE, text=True, check=True)
    return json.loads(done.stdout.splitlines()[-1])


def write_result(name: str, figures: dict[str, Any], cwd: Path, shown: Any = None) -> None:
    """benchmarks/results/NAME.json with machine, versions and commit. shown: what to print if not all of it."""
    doctor = run_json(["doctor"], cwd)
    machine = {key: doctor[key] for key in ("processor", "threads", "python", "versions", "gflops")}
    when = datetime.now(timezone.utc).strftime("%Y-%m-%d %H:%M UTC")
    content = {"measured": when, "commit": read_commit(), "machine": machine, **figures}
    RESULTS.mkdir(exist_ok=True)
    (RESULTS / f"{name}.json").write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
    print(json.dumps(figures if shown is None else shown, indent=2))


def skip(why: str) -> NoReturn:
    """Leave without an error, so that `make proof` goes on with the other scripts."""
    print(f"skipped: {why}")
    sys.exit(0)


def options(about: str, *, repeats: int = 7) -> argparse.Namespace:
    """--repeats and --isa, which all comparisons take; --isa gives the result a name of its own."""
    parser = argparse.ArgumentParser(description=about)
    parser.add_argument("--repeats", type=int, default=repeats)
    parser.add_argument("--isa", choices=["avx2"], help="keep all sides to this older instruction set")
    given = parser.parse_args()
    given.words = ["--repeats", str(given.repeats), *(["--isa", given.isa] if given.isa else [])]
    given.suffix = f"-{given.isa}" if given.isa else ""
    return given
