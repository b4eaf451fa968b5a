"""The kernels' own tests once more, with every access to memory checked and every undefined operation found.

The library is compiled anew with AddressSanitizer and UndefinedBehaviorSanitizer and takes the built one's place in a
Python of its own. That process is started with AddressSanitizer's allocator, so that PyTorch's tensors are fenced too:
a kernel that reads or writes one byte beside a tensor ends it.
"""

import os
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest

ROOT = Path(__file__).parents[2]
FLAGS = (
    *("-fsanitize=address,undefined", "-fno-sanitize-recover=all", "-fno-omit-frame-pointer", "-g", "-O1"),
    "-fno-sanitize=vptr",  # needs the run-time type information that the kernels are built without
)
_RUN = """
import sys
from pathlib import Path
from smidgen.kernels import library
library._PATH = Path(sys.argv[1])
assert library.native_library() is not None
import pytest
sys.exit(pytest.main(sys.argv[2:]))
"""


def _compiler(build_kernels: ModuleType) -> list[str]:
    compiler = build_kernels.find_compiler()
    if compiler is None:
        pytest.skip("no C++ compiler")
    return compiler


def _found(compiler: list[str], name: str) -> str | None:
    path = subprocess.run([*compiler, f"-print-file-name={name}"], capture_output=True, text=True).stdout.strip()
    return str(Path(path).resolve()) if Path(path).is_absolute() and Path(path).exists() else None


def _runtime(compiler: list[str]) -> str:
    """AddressSanitizer's run-time library, which has to be the first that the process loads, and C++'s, in which it
    looks at its own start for what throws exceptions.
    """
    for name in ("libasan.so", "libclang_rt.asan-x86_64.so", "libclang_rt.asan-aarch64.so"):
        if path := _found(compiler, name):
            return " ".join(filter(None, [path, _found(compiler, "libstdc++.so")]))
    pytest.skip("the compiler has no AddressSanitizer library")


@pytest.fixture(scope="module")
def sanitised(build_kernels: ModuleType, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """(the library compiled with the sanitisers, AddressSanitizer's run-time library)."""
    compiler = _compiler(build_kernels)
    library = tmp_path_factory.mktemp("sanitised") / "libsmidgen.so"
    build_kernels.build(library, compiler, extra=FLAGS)
    return library, _runtime(compiler)


def _run_sanitised(sanitised: tuple[Path, str], *arguments: str, **variables: str) -> subprocess.CompletedProcess[str]:
    library, runtime = sanitised
    environment = {key: value for key, value in os.environ.items() if not key.startswith("SMIDGEN_")}
    environment |= {
        "LD_PRELOAD": runtime,
        "ASAN_OPTIONS": "detect_leaks=0:verify_asan_link_order=0:abort_on_error=0:exitcode=99",  # Python leaks at exit
        "UBSAN_OPTIONS": "print_stacktrace=1",
        "OMP_NUM_THREADS": "2",
        "PYTHONPATH": os.pathsep.join(filter(None, [str(ROOT / "src"), os.environ.get("PYTHONPATH")])),
        **variables,
    }
    return subprocess.run(
        [sys.executable, "-c", _RUN, str(library), "-q", "-x", "-s", "-p", "no:cacheprovider", *arguments],
        capture_output=True, text=True, cwd=ROOT, env=environment, timeout=1700,
    )  # fmt: skip


def _check(run: subprocess.CompletedProcess[str]) -> None:
    found = [words for words in ("ERROR: AddressSanitizer", "runtime error:") if words in run.stderr]
    start = run.stderr.index(found[0]) if found else 0
    assert run.returncode == 0, run.stdout[-3000:] + run.stderr[start : start + 3000]
    assert " passed" in run.stdout


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_the_kernels_touch_nothing_beside_their_arguments(sanitised: tuple[Path, str]) -> None:
    files = [str(path) for path in sorted(Path(__file__).parent.glob("test_*.py")) if path != Path(__file__)]
    _check(_run_sanitised(sanitised, "-m", "not slow", *files))


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_damaged_model_files_lead_them_nowhere_else(sanitised: tuple[Path, str]) -> None:
    hostile = str(ROOT / "tests" / "e2e" / "test_hostile_files.py")
    _check(_run_sanitised(sanitised, "-m", "slow", hostile, SMIDGEN_HOSTILE_FILES="100"))  # others crash on purpose
