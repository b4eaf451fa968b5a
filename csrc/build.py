"""Compile csrc/ into src/smidgen/kernels/lib/libsmidgen.so with the machine's C++ compiler.

The package's build runs this (hatch_build.py), and so can anyone: python csrc/build.py. Only the C++ standard library
and the C interface of OpenMP's and BLAS's entry points are used, both handed in at run time: nothing is linked.
"""

import os
import platform
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

SOURCE = Path(__file__).parent
LIBRARY = SOURCE.parent / "src" / "smidgen" / "kernels" / "lib" / "libsmidgen.so"

# -ffp-contract=off: a * b + c is rounded twice, as PyTorch does it, unless the source says fma.
FLAGS = ["-std=c++17", "-O3", "-fPIC", "-ffp-contract=off", "-fvisibility=hidden", "-fno-exceptions", "-fno-rtti"]
WARNINGS = ["-Wall", "-Wextra", "-Wno-psabi", "-Wno-maybe-uninitialized"]  # the last: GCC's own AVX-512 header
_X86 = {
    "isa_plain.cpp": [],
    "isa_avx2.cpp": ["-mavx2", "-mfma", "-mf16c"],
    "isa_avx512.cpp": ["-mavx512f", "-mavx512bw", "-mavx512dq", "-mavx512vl", "-mavx2", "-mfma", "-mf16c"],
}
_ARM = {"isa_plain.cpp": [], "isa_neon.cpp": []}


def sources(machine: str) -> dict[str, list[str]]:
    """File -> flags of its own, for a machine as platform.machine() names it."""
    sets = {"x86_64": _X86, "amd64": _X86, "aarch64": _ARM, "arm64": _ARM}.get(machine.lower(), {"isa_plain.cpp": []})
    return {"api.cpp": [], "mapped.cpp": [], **sets}


def find_compiler() -> list[str] | None:
    """$CXX, or the first of c++, g++, clang++ that is installed."""
    if "CXX" in os.environ:
        return os.environ["CXX"].split()
    found = next(filter(None, map(shutil.which, ("c++", "g++", "clang++"))), None)
    return [found] if found else None


def build(library: Path, compiler: list[str], *, machine: str = "", extra: tuple[str, ...] = ()) -> None:
    """Compile and link; `library` is replaced at once. Raises CalledProcessError with the compiler's words."""
    with tempfile.TemporaryDirectory() as name:
        compiles = []
        for source, flags in sources(machine or platform.machine()).items():
            object_file = str(Path(name) / f"{source}.o")
            command = [*compiler, *FLAGS, *WARNINGS, *flags, *extra, "-c", str(SOURCE / source), "-o", object_file]
            compiles.append((command, object_file, subprocess.Popen(command, stderr=subprocess.PIPE, text=True)))
        for command, _, process in compiles:
            _, words = process.communicate()
            if process.returncode:
                raise subprocess.CalledProcessError(process.returncode, command, stderr=words)
        linked = str(Path(name) / "linked.so")
        link = [*compiler, "-shared", *extra, *(object_file for _, object_file, _ in compiles), "-o", linked]
        subprocess.run(link, check=True, capture_output=True, text=True)
        library.parent.mkdir(parents=True, exist_ok=True)
        staged = library.with_name(f".{library.name}.{os.getpid()}")
        shutil.copyfile(linked, staged)
        os.replace(staged, library)


if __name__ == "__main__":
    compiler = find_compiler()
    if compiler is None:
        sys.exit("no C++ compiler found: install g++ or clang++, or name one in CXX")
    try:
        build(LIBRARY, compiler)
    except OSError as error:
        sys.exit(f"the C++ compiler {compiler[0]} cannot be run: {error}")
    except subprocess.CalledProcessError as error:
        sys.exit(f"{' '.join(error.cmd)}\n{error.stderr}")
