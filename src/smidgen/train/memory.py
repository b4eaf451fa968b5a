"""What a run will need, and which settings fit: from settings, data and this machine to a forecast of planning/."""

import ctypes
import os
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from tempfile import NamedTemporaryFile

import numpy as np
import torch

from smidgen.checkpoint.base import Checkpoint
from smidgen.errors import SettingsError
from smidgen.events import Note, Report, silent
from smidgen.kernels.sizes import MAPPED_BYTES
from smidgen.lora.targets import check_pattern, fields_of, match_pattern, select_modules, select_targets
from smidgen.model.device import (
    budget_on,
    compiles_products,
    measure_gflops,
    measure_weights_read,
    resident_bytes,
)
from smidgen.model.load import spill_folder
from smidgen.model.stream import layer_of
from smidgen.planning.budget import too_little
from smidgen.planning.inventory import Inventory
from smidgen.planning.planner import Choice, Forecast, Machine, fastest, forecast, forecasts, reasons, smallest
from smidgen.planning.work import Rows, Work
from smidgen.train.config import Settings
from smidgen.train.optimizers import STATE_BYTES
from smidgen.units import format_bytes, parse_bytes

__all__ = [
    "COMPUTED_AT_ONCE",
    "CUDA_CONTEXT_BYTES",
    "budget_of",
    "choice_of",
    "estimate_host",
    "give_memory_back",
    "machine_now",
    "measure_disk",
    "plan_run",
    "probe_disk",
    "process_now",
    "settings_for",
    "with_trained_norms",
    "work_of",
]

COMPUTED_AT_ONCE = ("micro_batch", "pack", "tile_tokens", "loss_chunk")  # settings that a plan makes smaller
CUDA_CONTEXT_BYTES = 800_000_000  # with bitsandbytes' kernels loaded; 0.79 GB on an H100 with CUDA 13
_CUDA_HOST_BYTES = 1_500_000_000  # libraries and buffers that CUDA has in RAM: assumed, not measured
_DISK_BYTES_PER_S = 1e9  # of a disk that cannot be measured
_PROBE_BYTES, _WRITTEN_BYTES, _PIECE_BYTES = 1 << 28, 1 << 26, 1 << 23
_OF_FUSED_LAYERS = {"activation_dtype": "bfloat16", "recompute": "cheap"}  # what transformers' own layers cannot do
_M_MMAP_THRESHOLD = -3  # glibc's malloc.h


def work_of(model: Inventory, settings: Settings, rows: Rows | Sequence[int], itemsize: int) -> Work:
    """rows: or the tokens of each, in the steps' order. itemsize: of the compute type.

    Raises SettingsError for wrong targets and patterns, and for what these layers cannot do.
    """
    _check_layers(model, settings)
    by_name = {linear.name: linear for linear in model.linears if not linear.is_expert}
    names, _ = select_targets(settings.targets, [*by_name, model.head_name], model.head_name)
    for setting in ("rank_pattern", "alpha_pattern"):
        check_pattern(setting, getattr(settings, setting) or {}, names)
    of_layer = [0] * model.num_layers
    parameters, head_parameters = _beside_lora(model, settings)
    for name in names:
        pattern = match_pattern(settings.rank_pattern or {}, name)
        rank = settings.rank if pattern is None else (settings.rank_pattern or {})[pattern]
        linear = by_name.get(name)  # None: the head
        n, k = (linear.out_features, linear.in_features) if linear else (model.vocab_size, model.hidden_size)
        numbers = rank * (n + k) + settings.use_dora * n
        parameters += numbers
        if linear:
            of_layer[linear.layer] += rank
        else:
            head_parameters += numbers
    return Work(
        rows=rows if isinstance(rows, Rows) else Rows(np.asarray(rows, np.int32)),
        rows_per_step=settings.micro_batch * settings.accumulation,
        parameters=parameters,
        ranks=max(of_layer),
        itemsize=itemsize,
        state_bytes=STATE_BYTES[settings.optimizer],
        head_parameters=head_parameters,
        inputs=_adapter_inputs(model, names, use_dora=settings.use_dora),
        idle=_idle(model, settings, names),
        kept_item=None if settings.activation_dtype == "auto" else getattr(torch, settings.activation_dtype).itemsize,
    )


def _check_layers(model: Inventory, settings: Settings) -> None:
    """Raise SettingsError where transformers' own layers are to do what smidgen's do."""
    problems = [
        f"{name}: {value} is for layers of the Llama family without dropout or trained norms, but those of"
        f" {model.name or 'this model'} are transformers' own; leave it out"
        for name, value in _OF_FUSED_LAYERS.items()
        if getattr(settings, name) == value and not model.fused
    ]
    if problems:
        raise SettingsError(problems)


def _adapter_inputs(model: Inventory, names: Sequence[str], *, use_dora: bool) -> int:
    """Numbers a token that one of transformers' layers keeps because adapters learn from them: inputs, and of DoRA what
    is scaled.
    """
    group = dict(model.kept.inputs) if model.kept else {}
    linears = {linear.name: linear for linear in model.linears}
    chosen = {group[name]: linears[name].in_features for name in names if name in group and name in linears}
    scaled = sum(linears[name].out_features for name in names if name in linears) if use_dora else 0
    return -(-(sum(chosen.values()) + scaled) // model.num_layers)


def _idle(model: Inventory, settings: Settings, names: Sequence[str]) -> int:
    """Bytes a token that the first of transformers' layers does not keep with these adapters."""
    first = [{*fields_of(name, model.head_name)} for name in names if layer_of(name) == 0]
    in_attention = all(fields and fields <= {*"qkvo"} for fields in first)
    if model.kept is None or settings.whole_modules or settings.tokens or not in_attention:
        return 0
    return int(model.kept.idle)


def _beside_lora(model: Inventory, settings: Settings) -> tuple[int, int]:
    """(trained numbers of whole modules and of new tokens, those that the head computes with)."""
    numbers, is_tied = dict(model.modules), not model.head_bytes
    chosen = set(select_modules(settings.whole_modules, numbers))
    ends = {model.head_name, model.embedding_name}
    if is_tied and chosen & ends:  # one weight
        chosen = chosen - ends | {model.embedding_name}
    rows = len(settings.tokens) * model.hidden_size
    of_head = sum(numbers[name] for name in chosen & {model.embedding_name if is_tied else model.head_name})
    return sum(numbers[name] for name in chosen) + rows * (1 if is_tied else 2), of_head + rows


def with_trained_norms(model: Inventory, settings: Settings) -> Inventory:
    """The model as it is computed with these settings: layers whose norms learn are transformers' own."""
    chosen = select_modules(settings.whole_modules, [name for name, _ in model.modules])
    in_layers = any(layer_of(f"{name}.") is not None for name in chosen)
    return replace(model, fused=model.fused and not in_layers)


def machine_now(
    device: torch.device,
    dtype: torch.dtype,
    model: Inventory,
    checkpoint: Checkpoint | None,
    *,
    generates: bool = False,
    report: Report = silent,
) -> Machine:
    """This machine and process. Takes about a second. model, checkpoint: whose layers would be streamed. generates: not
    many tokens at once are what it is for, but one after the other.
    """
    speeds = {}
    if device.type == "cpu":
        speeds["disk_bytes_per_s"] = _measure_stream(model, checkpoint, report)
    if generates:
        speeds["weights_per_s"] = measure_weights_read(dtype, device)
    else:
        speeds["gflops"] = measure_gflops(dtype, device)
    return replace(process_now(device), **speeds)


def process_now(device: torch.device) -> Machine:
    """The same, its speed not measured: enough where nothing has to be traded for memory."""
    memory = resident_bytes() if device.type == "cpu" else (CUDA_CONTEXT_BYTES, 0)
    on_cpu = device.type == "cpu"
    return Machine(1.0, 1.0, _DISK_BYTES_PER_S, *memory, torch.get_num_threads(), on_cpu, compiles_products())


def _measure_stream(model: Inventory, checkpoint: Checkpoint | None, report: Report) -> float:
    """Bytes a second that streamed layers are read with: from the model file where it holds them as they are used, else
    from the cache folder (model/stream.py), where the model would be too if it is not there yet.
    """
    spill = spill_folder()
    place = spill if spill.is_dir() else spill.parent
    try:
        if checkpoint is None or not model.mapped:
            return probe_disk(place)
        place = max(checkpoint.files, key=len).path
        return measure_disk(place)
    except OSError as error:
        assumed = format_bytes(_DISK_BYTES_PER_S)
        report(Note(f"{place} cannot be measured ({error.strerror}): its disk is taken to give {assumed}/s"))
        return _DISK_BYTES_PER_S


def measure_disk(file: Path, budget_s: float = 0.5) -> float:
    """Bytes a second that are read from the file's disk; the page cache is left out of it."""
    descriptor = os.open(file, os.O_RDONLY)
    try:
        size = min(os.fstat(descriptor).st_size, _PROBE_BYTES)
        os.posix_fadvise(descriptor, 0, size, os.POSIX_FADV_DONTNEED)
        buffer = bytearray(_PIECE_BYTES)
        started, done = time.perf_counter(), 0
        while done < size and time.perf_counter() - started < budget_s:
            count = os.preadv(descriptor, [buffer], done)
            if not count:
                break
            done += count
        os.posix_fadvise(descriptor, 0, size, os.POSIX_FADV_DONTNEED)
        return done / max(1e-9, time.perf_counter() - started) if done >= 1 << 24 else _DISK_BYTES_PER_S
    finally:
        os.close(descriptor)


def probe_disk(folder: Path) -> float:
    """The same of the disk that a folder lies on, which is made if need be. Raises OSError."""
    folder.mkdir(parents=True, exist_ok=True)
    with NamedTemporaryFile(dir=folder, prefix="probe-") as file:
        piece = os.urandom(_PIECE_BYTES)
        for _ in range(_WRITTEN_BYTES // _PIECE_BYTES):
            file.write(piece)
        file.flush()
        os.fsync(file.fileno())  # or it would be read from the page cache
        return measure_disk(Path(file.name))


def estimate_host(model: Inventory) -> int:
    """RAM beside a card: this process, CUDA's own, and the largest matrix on its way in float32. Left out: pages of
    the model file, which the system takes back as it needs them.
    """
    largest = max(linear.weights for linear in model.linears)
    return sum(resident_bytes()) + _CUDA_HOST_BYTES + 4 * max(largest, model.vocab_size * model.hidden_size)


def budget_of(settings: Settings, device: torch.device) -> tuple[int, str]:
    """(bytes that this process may have in all, the words for where the number comes from)."""
    memory = None if settings.memory is None else parse_bytes(settings.memory)
    return budget_on(device, memory, f"--memory {settings.memory}")


def plan_run(
    model: Inventory,
    work: Work,
    machine: Machine,
    settings: Settings,
    budget: tuple[int, str],
    *,
    can_stream: bool = True,
    probe: Callable[[], Machine] | None = None,
    report: Report = silent,
) -> Forecast:
    """The fastest way that fits, each choice reported. Raises SettingsError with the smallest budget that would do.

    probe: measures the machine, where its speed decides; without it `machine` has been measured.
    """
    given = choice_of(model, settings)
    found: Forecast | None = forecast(model, work, machine, given)
    if found.peak_bytes > budget[0]:
        machine = probe() if probe else machine
        every = forecasts(model, work, machine, given, recompute=settings.recompute, can_stream=can_stream)
        least, found = smallest(every), fastest(every, budget[0])
    if found is None:
        choice = least.choice
        pack = "" if choice.pack is None else f" --pack {choice.pack},"
        more = (
            f" with micro-batch {choice.micro_batch},{pack} rows of {work.rows.longest} tokens and recompute"
            f" {choice.recompute_name}; a shorter --seq-len or a lower --rank needs less"
        )
        raise SettingsError([too_little(*budget, f"for {model.name or 'this model'}", least.peak_bytes, more)])
    for line in reasons(model, found, work, given, budget[0]):
        report(Note(line))
    return found


def choice_of(model: Inventory, settings: Settings) -> Choice:
    """The settings as a run takes them where there is memory enough."""
    plain = "none" if settings.recompute == "auto" else settings.recompute
    layers = (plain,) * model.num_layers
    sizes = {name: getattr(settings, name) for name in COMPUTED_AT_ONCE}
    return Choice(accumulation=settings.accumulation, recompute=layers, **sizes)


def settings_for(settings: Settings, found: Forecast) -> Settings:
    """The settings with the sizes that fit; the optimizer steps stay the same."""
    sizes = {name: getattr(found.choice, name) for name in COMPUTED_AT_ONCE}
    return replace(settings, accumulation=found.choice.accumulation, **sizes)


def give_memory_back() -> None:
    """Have freed tensors go back to the system at once, so that a process needs what its tensors need.

    glibc raises the size from which it maps memory on its own with each such piece that is freed, and then keeps tens
    of megabytes between steps; a fixed limit (mallopt, M_MMAP_THRESHOLD) ends that. Elsewhere nothing is done.
    """
    with suppress(OSError, AttributeError):
        ctypes.CDLL(None).mallopt(_M_MMAP_THRESHOLD, MAPPED_BYTES)
