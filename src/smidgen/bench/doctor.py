"""What `smidgen doctor` measures: the disk, and a real training step against its forecast."""

import os
import shutil
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from smidgen.bench.memory import MemorySettings, bench_memory
from smidgen.bench.packed_model import drop_page_cache
from smidgen.checkpoint.hub import cache_folder
from smidgen.errors import SmidgenError
from smidgen.events import Report, silent
from smidgen.train.memory import measure_disk

__all__ = ["check_disk", "check_step"]

_PROBE_BYTES = 1 << 26
_SHAPE, _LAYERS, _TOKENS = "smollm2-135m", 4, 256


def check_disk() -> dict[str, Any]:
    """The folder that downloads and streamed layers go to: its free space, and how fast it is read."""
    folder = cache_folder()
    folder.mkdir(parents=True, exist_ok=True)
    found: dict[str, Any] = {"folder": str(folder), "free_bytes": shutil.disk_usage(folder).free}
    with TemporaryDirectory(dir=folder, prefix="doctor-") as place:
        file = Path(place) / "probe"
        try:
            file.write_bytes(os.urandom(_PROBE_BYTES))
            drop_page_cache(file)
            return found | {"read_bytes_per_s": round(measure_disk(file))}
        except OSError as error:
            return found | {"read_bytes_per_s": f"fails: {error.strerror}"}


def check_step(report: Report = silent) -> dict[str, Any]:
    """A training step of four layers with random weights in a process of its own, on the CPU: forecast and measured.

    verdict: 'ok', or what is wrong; memory above its forecast is. Times are shown and judged by nobody: other programs
    slow a machine down.
    """
    settings = MemorySettings(_SHAPE, layers=_LAYERS, seq_len=_TOKENS)
    try:
        found = bench_memory(settings, report)
    except SmidgenError as error:
        return {"verdict": f"fails: {error}"}
    forecast, measured = found["forecast_rss_bytes"], found["peak_rss_bytes"]
    verdict = "ok" if measured <= forecast else "wrong: more memory than was forecast"
    return {
        "what": f"{_LAYERS} layers of {_SHAPE}, {_TOKENS} tokens",
        "forecast_peak_bytes": forecast,
        "measured_peak_bytes": measured,
        "forecast_step_s": found["forecast_step_s"],
        "measured_step_s": found["step_s"],
        "verdict": verdict,
    }
