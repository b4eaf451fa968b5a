"""What `smidgen doctor` measures: the disk, a training step against its forecast, and learning on a card."""

import shutil
from pathlib import Path
from typing import Any

import torch

from smidgen.bench.memory import MemorySettings, bench_memory
from smidgen.bench.packed_model import write_packed_model
from smidgen.bench.places import passing_folder
from smidgen.bench.workers.stepper import Stepper, forecast_on_card
from smidgen.checkpoint.hub import cache_folder
from smidgen.checkpoint.open import open_checkpoint
from smidgen.data.batch import Batch
from smidgen.errors import SmidgenError, first_line
from smidgen.events import Report, silent
from smidgen.model.load import Decided, Source, load_base
from smidgen.planning.shapes import SHAPES
from smidgen.train.config import Settings
from smidgen.train.memory import probe_disk

__all__ = ["check_disk", "check_learning", "check_step"]

_SHAPE, _LAYERS, _TOKENS = "smollm2-135m", 4, 256
_STORAGE, _STEPS = "nf4-dq", 5
_CPU = torch.device("cpu")
# Relative distance from float32 on a CPU that is left to another order of sums, and to rounding: of the losses, and of
# what the adapters have learnt. Adam divides each gradient by its own size, so that the smallest ones, which are mostly
# rounding, count as much as the others. An H100 was 3e-7 and 1e-4 away in float32, 2e-4 and 0.06 in bfloat16.
_TOLERANCES = {torch.float32: (1e-5, 5e-3), torch.bfloat16: (2e-3, 0.2)}


def check_disk() -> dict[str, Any]:
    """The folder that downloads and streamed layers go to: its free space, and how fast it is read.

    verdict: 'ok', or what is wrong.
    """
    folder = cache_folder()
    try:
        read = round(probe_disk(folder))
        free = shutil.disk_usage(folder).free
    except OSError as error:
        cure = "Set SMIDGEN_CACHE to a folder that can be written"
        return {"folder": str(folder), "verdict": f"fails: {folder}: {error.strerror}. {cure}"}
    return {"folder": str(folder), "free_bytes": free, "read_bytes_per_s": read, "verdict": "ok"}


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


def check_learning(device: torch.device, dtype: torch.dtype) -> dict[str, Any]:
    """A few optimizer steps over packed weights on `device`, and the same on the CPU in float32: losses, adapters, and
    on CUDA the allocator's peak beside its forecast, which is rough and judged by nobody.

    verdict: 'ok', or what is wrong.
    """
    config = SHAPES[_SHAPE] | {"num_hidden_layers": _LAYERS}
    try:
        with passing_folder("doctor") as place:
            folder = write_packed_model(config, place / _SHAPE, _STORAGE)
            exact, there = _learn(folder, _CPU, torch.float32), _learn(folder, device, dtype)
    except Exception as error:  # a broken installation is what a doctor is to find, whatever it raises
        return {"verdict": f"fails: {first_line(error)}"}
    of_loss, of_adapters = _TOLERANCES[dtype]
    apart = max(abs(a - b) / abs(a) for a, b in zip(exact["loss"], there["loss"], strict=True))
    learnt = exact["adapters"] - exact["start"]
    distance = float((there["adapters"] - exact["adapters"]).norm() / learnt.norm())
    verdict = "ok"
    if not apart <= of_loss:  # so that NaN is found too
        verdict = f"wrong: losses are {apart:.1e} apart, expected at most {of_loss:g}"
    elif not distance <= of_adapters:
        verdict = f"wrong: what the adapters learnt is {distance:.1e} apart, expected at most {of_adapters:g}"
    return {
        "what": f"{_STEPS} steps of {_LAYERS} layers of {_SHAPE}, {_TOKENS} tokens",
        "loss": there["loss"],
        "loss_on_cpu": exact["loss"],
        "loss_distance": apart,
        "adapter_distance": distance,
        "forecast_peak_bytes": there["forecast_peak_bytes"],
        "measured_peak_bytes": there["measured_peak_bytes"],
        "verdict": verdict,
    }


def _learn(folder: Path, device: torch.device, dtype: torch.dtype) -> dict[str, Any]:
    """loss of each step; the adapters before and after, [all numbers]; memory on CUDA, elsewhere None."""
    checkpoint, on_card = open_checkpoint(folder), device.type == "cuda"
    settings = Settings(learning_rate=1e-3, micro_batch=1, seq_len=_TOKENS)
    ids = torch.randint(checkpoint.config["vocab_size"], (1, _TOKENS), generator=torch.Generator().manual_seed(1))
    expected = forecast_on_card(checkpoint, _STORAGE, settings, ids, dtype.itemsize, "none") if on_card else None
    if on_card:
        torch.cuda.reset_peak_memory_stats(device)
    before = torch.cuda.memory_allocated(device) if on_card else 0
    base = load_base(Source(str(folder), checkpoint, tokenizer=None), decided=Decided(_STORAGE, dtype, device))
    stepper = Stepper(base, settings, "none", [Batch(ids, ids.clone(), torch.tensor([_TOKENS]))])

    def adapters() -> torch.Tensor:
        return torch.cat([parameter.detach().flatten().double().cpu() for parameter in stepper.parameters])

    start = adapters()
    losses = [stepper.step() for _ in range(_STEPS)]
    return {
        "loss": losses,
        "start": start,
        "adapters": adapters(),
        "forecast_peak_bytes": expected,
        "measured_peak_bytes": torch.cuda.max_memory_allocated(device) - before if on_card else None,
    }
