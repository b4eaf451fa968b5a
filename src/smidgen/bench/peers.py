"""Other tools: where to run them, and with which settings.

Each runs in this interpreter if it is importable here, else in an environment of its own in the cache, which is made
once. That environment sees this interpreter's packages, so that PyTorch is the same file for both sides.
"""

import shutil
import subprocess
import sys
import sysconfig
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from smidgen.checkpoint.hub import cache_folder
from smidgen.errors import RunError
from smidgen.events import Note, Report, silent

__all__ = ["REQUIREMENTS", "STEP_PEERS", "StepPeer", "peer_interpreter"]

# Import name -> what pip installs: the releases that the published figures were taken with.
REQUIREMENTS = {
    "accelerate": "accelerate==1.15.0",
    "bitsandbytes": "bitsandbytes==0.50.2",
    "datasets": "datasets==5.2.0",
    "peft": "peft==0.21.2",
    "trl": "trl==1.16.0",
    "xllamacpp": "xllamacpp==2026.10.11549",
}
_PIP_TIMEOUT_S = 1800


@dataclass(frozen=True)
class StepPeer:
    """Settings of workers/step_peft.py. needs: import names. what: the settings in words, for tables."""

    name: str
    what: str
    settings: dict[str, Any]
    needs: tuple[str, ...] = ("peft", "accelerate", "bitsandbytes")


STEP_PEERS = {
    peer.name: peer
    for peer in (
        StepPeer(
            "peft-bnb",
            "PEFT + bitsandbytes NF4-DQ, float32, no checkpointing (its best here)",
            {"quantized": True, "compute_dtype": "float32", "checkpointing": False},
        ),
        StepPeer(
            "peft-bnb-ckpt",
            "PEFT + bitsandbytes NF4-DQ, float32, gradient checkpointing",
            {"quantized": True, "compute_dtype": "float32", "checkpointing": True},
        ),
        StepPeer(
            "peft-bnb-bf16",
            "PEFT + bitsandbytes NF4-DQ, bfloat16 compute type (as most tutorials have it)",
            {"quantized": True, "compute_dtype": "bfloat16", "checkpointing": False},
        ),
        StepPeer(
            "peft-fp32",
            "PEFT, not quantised, float32, no checkpointing",
            {"quantized": False, "compute_dtype": "float32", "checkpointing": False},
            needs=("peft", "accelerate"),
        ),
    )
}


def peer_interpreter(name: str, needs: Sequence[str], report: Report = silent) -> Path:
    """The Python that can import `needs`: this one, or that of an environment `name` in the cache, made if need be.

    Raises RunError where it cannot be made.
    """
    missing = [package for package in needs if not _importable(package)]
    if not missing:
        return Path(sys.executable)
    folder = cache_folder() / "bench" / f"{name}-py{sys.version_info.major}.{sys.version_info.minor}"
    python = folder / ("Scripts/python.exe" if sys.platform == "win32" else "bin/python")
    wanted = [REQUIREMENTS[package] for package in missing]
    stamp, content = folder / "installed.txt", "\n".join([sysconfig.get_path("purelib"), *wanted]) + "\n"
    if stamp.is_file() and stamp.read_text(encoding="utf-8") == content:
        return python
    report(Note(f"{name} is not importable here: installing {', '.join(wanted)} into {folder}"))
    try:
        shutil.rmtree(folder, ignore_errors=True)
        folder.parent.mkdir(parents=True, exist_ok=True)
        _run([sys.executable, "-m", "venv", str(folder)])
        # Our packages come after its own: what is there already is used, above all PyTorch.
        purelib = _run([str(python), "-c", "import sysconfig; print(sysconfig.get_path('purelib'))"]).strip()
        (Path(purelib) / "ours.pth").write_text(sysconfig.get_path("purelib") + "\n", encoding="utf-8")
        _run([str(python), "-m", "pip", "install", "--quiet", "--disable-pip-version-check", "--no-input", *wanted])
        stamp.write_text(content, encoding="utf-8")
    except (OSError, subprocess.SubprocessError) as error:
        words = str(getattr(error, "stderr", "") or error).strip().splitlines() or ["no reason given"]
        raise RunError(
            f"{name} cannot be installed into {folder} ({words[-1][:200].rstrip('.')})",
            cure=f"with a network try again, or install it yourself: pip install {' '.join(wanted)}",
        ) from error
    return python


def _importable(package: str) -> bool:
    """An installed package; a mere folder of that name on the path (a namespace package) is none."""
    found = find_spec(package)
    return found is not None and found.origin is not None


def _run(command: list[str]) -> str:
    return subprocess.run(command, check=True, capture_output=True, text=True, timeout=_PIP_TIMEOUT_S).stdout
