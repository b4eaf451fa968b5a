"""Where a figure was measured: processor, threads, versions, commit."""

import os
import platform
import subprocess
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import torch

from smidgen.bench.workers.serving import versions
from smidgen.model.device import processor_name

__all__ = ["describe", "read_commit"]

_PACKAGES = ("smidgen", "torch", "transformers", "tokenizers", "safetensors")


def describe(isa: str, threads: int, peer_versions: dict[str, str] | None = None) -> dict[str, Any]:
    """What every result carries beside its figures. isa: what --isa said, "" for all that the machine has."""
    return {
        "measured": datetime.now(timezone.utc).strftime("%Y-%m-%d %H:%M UTC"),
        "commit": read_commit(),
        "machine": {
            "processor": processor_name(),
            "cores": os.cpu_count(),
            "memory_bytes": os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGESIZE"),
            "threads": threads,
            "python": platform.python_version(),
            "system": platform.system(),
            "isa": isa or "as the machine has it",
            "cpu_capability": torch.backends.cpu.get_cpu_capability(),
        },
        "versions": {**(peer_versions or {}), **versions(*_PACKAGES)},
    }


def read_commit() -> str | None:
    """The commit of the checkout that this code lies in, with '+' where files differ; None for an installed package."""
    here = Path(__file__).parent
    try:
        commit = _git("rev-parse", "HEAD", folder=here)
        return commit + ("+" if _git("status", "--porcelain", "--", ".", folder=here.parent) else "")
    except (OSError, subprocess.SubprocessError):
        return None


def _git(*words: str, folder: Path) -> str:
    done = subprocess.run(["git", *words], cwd=folder, capture_output=True, text=True, check=True, timeout=30)
    return done.stdout.strip()
