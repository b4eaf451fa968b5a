"""The compiled kernels (csrc/), loaded with ctypes: a plain C interface that fits every PyTorch.

PyTorch's own OpenMP runtime and BLAS are found by their symbols in the libraries it has loaded, and handed in: one
thread pool, nothing linked. Without the library (no compiler at installation) everything works in plain PyTorch, more
slowly. SMIDGEN_ISA=plain|avx2|avx512|neon takes an instruction set below the best one; SMIDGEN_BACKEND=torch does
without the library.
"""

import ctypes
import os
from collections.abc import Iterable, Sequence
from functools import cache
from pathlib import Path
from typing import Any

import torch

from smidgen.checkpoint.base import MappedFile, changed_file
from smidgen.errors import SettingsError

__all__ = ["ISAS", "MISSING", "TYPES", "describe_library", "native", "native_library", "watch_mapped"]

_PATH = Path(__file__).parent / "lib" / "libsmidgen.so"  # in a folder, or Python takes it for a module
_INTERFACE = 9
ISAS = ("plain", "avx2", "avx512", "neon")
MISSING = (
    "the native kernels are not installed: training works, but several times more slowly."
    " Install a C++ compiler (g++ or clang++), then reinstall smidgen"
)
TYPES = {torch.float32: 0, torch.bfloat16: 1}

_pointer, _integer, _float, _int = ctypes.c_void_p, ctypes.c_int64, ctypes.c_float, ctypes.c_int
_LETTERS = {"p": _pointer, "i": _integer, "f": _float, "t": _int}
# Arguments of each function of api.cpp: p pointer, i int64, f float, t int (a type or a flag).
_SIGNATURES = {
    "smidgen_rms_norm": "ppppiift",
    "smidgen_rms_norm_backward": "ppppppiit",
    "smidgen_rotate": "pppiiiiift",
    "smidgen_swiglu": "ppiit",
    "smidgen_swiglu_backward": "ppppiit",
    "smidgen_cross_entropy": "pppiitt",
    "smidgen_panel_product": "pppp" + "iiiiiiiii" + "tt",
    "smidgen_attention": "pppppppp" + "iiiiiiiif",
    "smidgen_attention_backward": "ppppppppppppppppp" + "iiiiiiiiif",
    "smidgen_attention_decode": "pppppppiiiiiiiift",
    "smidgen_quantise_4bit": "pppppiit",
    "smidgen_quantise_int8": "pppiit",
    "smidgen_dequantise": "piiipt",
    "smidgen_product": "pppiiiii",
    "smidgen_watch": "pip",
}


@cache
def native_library() -> Any:
    """The loaded library, or None where it was not built. Raises SettingsError for an impossible SMIDGEN_ISA."""
    wanted = os.environ.get("SMIDGEN_ISA", "")
    if wanted and wanted not in ISAS:
        raise SettingsError([f"SMIDGEN_ISA: expected one of {', '.join(ISAS)}, found {wanted!r}"])
    try:
        library = ctypes.CDLL(str(_PATH))
    except OSError:
        return None
    if library.smidgen_interface() != _INTERFACE:
        return None  # left over from another version
    library.smidgen_isa.restype = ctypes.c_char_p
    for name, letters in _SIGNATURES.items():
        function = getattr(library, name)
        function.argtypes, function.restype = [_LETTERS[letter] for letter in letters], None
    if wanted and not library.smidgen_use_isa(wanted.encode()):
        best = library.smidgen_isa().decode()
        raise SettingsError([f"SMIDGEN_ISA: this machine has no {wanted}; its best is {best}"])
    # The program's own symbols come first: a runtime that was preloaded is the one that PyTorch uses. Opening PyTorch's
    # libraries again, by their path, gives the very ones that are loaded.
    folder = Path(torch.__file__).parent / "lib"
    torch_cpu = folder / "libtorch_cpu.so"
    runtimes = [path for pattern in ("libgomp*.so*", "libomp*", "libiomp*") for path in folder.glob(pattern)]
    if team := _symbol([None, torch_cpu, *runtimes], "GOMP_parallel"):
        library.smidgen_use_threads(team)
    if gemm := _symbol([torch_cpu], "sgemm_"):
        library.smidgen_use_sgemm(gemm)
    return library


def _symbol(paths: Sequence[Path | None], name: str) -> ctypes.c_void_p | None:
    """The address of a symbol in the first of the libraries that has it; None stands for the program itself."""
    for path in paths:
        try:
            return ctypes.cast(getattr(ctypes.CDLL(None if path is None else str(path)), name), _pointer)
        except (OSError, AttributeError):
            continue
    return None


def native(*tensors: torch.Tensor) -> Any:
    """The library if it can work on these tensors (CPU, and wanted), else None: then the caller takes its twin."""
    if (os.environ.get("SMIDGEN_BACKEND") or "native") != "native":
        return None
    if any(tensor.device.type != "cpu" for tensor in tensors):
        return None
    return native_library()


def watch_mapped(files: Iterable[MappedFile]) -> None:
    """A file that is shortened while its mapped pages are read ends the process with a line and exit code 2: without
    the library it would be SIGBUS, of which a process dies without a word (csrc/mapped.cpp).
    """
    library = native_library()
    if library is None:
        return
    for file in files:
        error = changed_file(file.path, "it was shortened, or its disk cannot be read")
        library.smidgen_watch(file.address, len(file), f"\nsmidgen: error: {error}\n".encode())


def describe_library() -> str:
    """For `smidgen doctor`: the instruction set and what was found, or that there is none."""
    library = native_library()
    if library is None:
        return "not installed"
    unused = os.environ.get("SMIDGEN_BACKEND") or "native"
    return (
        library.smidgen_isa().decode()
        + ("" if library.smidgen_has_sgemm() else ", without BLAS")
        + ("" if library.smidgen_has_threads() else ", one thread")
        + ("" if unused == "native" else f" (not used: SMIDGEN_BACKEND={unused})")
    )
