"""The library's functions; the command line is a door to these and nothing else.

import smidgen

run = smidgen.finetune("smollm2-135m", "rows.jsonl", "runs/mine", epochs=2)
print(run.summary["loss_before"], "->", run.summary["loss_after"])
model = smidgen.load("runs/mine")
print(model.generate("Wake me in 20 minutes").text)
smidgen.merge("runs/mine", "models/mine")
"""

import os
import platform
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from smidgen.bench.doctor import check_disk, check_learning, check_step
from smidgen.checkpoint.hub import download as _download
from smidgen.data.records import as_specs
from smidgen.data.report import DataReport, build_report
from smidgen.errors import RunError, SettingsError
from smidgen.evaluation.evaluate import Evaluation
from smidgen.evaluation.evaluate import evaluate as _evaluate
from smidgen.events import Note, Report, Saved, silent
from smidgen.export.files import check_new, check_vacant, check_writable
from smidgen.export.forms import EXPORT_TYPES, EXPORTS, PACKED_FORMS
from smidgen.export.quantise import calibration_of, check_quantisable, quantise_model
from smidgen.exporting import export_as
from smidgen.kernels.library import describe_library
from smidgen.kernels.selfcheck import check_kernels
from smidgen.loading import Generation, LoadedModel, load
from smidgen.merging import merge_run
from smidgen.model.device import (
    choose_compute_dtype,
    choose_device,
    free_memory_bytes,
    measure_gflops,
    memory_limit_bytes,
    processor_name,
)
from smidgen.model.load import open_source
from smidgen.quant.gptq import GROUP_SIZES, GptqSettings
from smidgen.quant.grouped import BITS
from smidgen.quant.selfcheck import check_backends
from smidgen.report.page import PAGE, write_page
from smidgen.train.config import settings_from
from smidgen.train.finetune import Run, finished, run_finetune
from smidgen.train.finetune import resume as _resume
from smidgen.train.forecast import ANSWER_SETTINGS, plan_answers, plan_model
from smidgen.train.loop import Schedule
from smidgen.train.memory import give_memory_back
from smidgen.train.rows import read_rows
from smidgen.train.run import Record, adapter_folder
from smidgen.train.sharing import estimate_sharing
from smidgen.units import format_bytes, parse_bytes

__all__ = [
    "Generation",
    "LoadedModel",
    "Run",
    "doctor",
    "download",
    "evaluate",
    "export_run",
    "finetune",
    "inspect_data",
    "load",
    "merge",
    "plan",
    "quantize",
    "resume",
    "write_report",
]

_MERGE_DTYPES = ("auto", "bfloat16", "float16", "float32")


def finetune(
    model: str, data: str | Path | Sequence[str | Path], out: str | Path, *, report: Report = silent, **settings: Any
) -> Run:
    """Train LoRA adapters on `data` over the frozen, quantised `model`, into the new folder `out`.

    model: Hugging Face folder, .gguf file, built-in name or hub id. data: .json, .jsonl, .csv or .parquet file, folder
    with train and validation files, built-in name or hub id, or several of them, which `mix` may give weights to.
    settings: the fields of train.config.Settings.
    Raises SmidgenError, before anything is written, for settings, data or models that cannot work. Ctrl-C saves a
    checkpoint and raises KeyboardInterrupt; `resume` goes on from there.
    """
    return _with_page(run_finetune(str(model), as_specs(data), Path(out), settings_from(settings), report), report)


def resume(run: str | Path, *, report: Report = silent) -> Run:
    """Go on with an interrupted run, to the same adapter, bit for bit, as if it had not been interrupted.

    That holds on the same machine with the same number of threads. A finished run is returned as it is.
    """
    done = finished(Path(run))
    if done is None:
        return _with_page(_resume(Path(run), report), report)
    report(Note(f"{run} is finished: nothing to do"))
    return done if (done.path / PAGE).exists() else _with_page(done, report)


def write_report(run: str | Path) -> Path:
    """Make RUN/report.html, one file without any network: curves, data, answers, settings. Returns its path.

    A finished run has it already; a run in progress or one that was interrupted gets what there is so far.
    """
    return write_page(Path(run))


def _with_page(run: Run, report: Report) -> Run:
    page = write_page(run.path)
    report(Saved(page, page.stat().st_size))
    return run


def plan(
    model: str,
    data: str | Path | Sequence[str | Path] | None = None,
    *,
    generate: int | None = None,
    report: Report = silent,
    **settings: Any,
) -> dict[str, Any]:
    """Memory and time of a run before it is started; no weights are read.

    model: as in finetune, a config.json, or a name of planning.shapes.SHAPES. settings: as in finetune; with `memory`
    they are chosen to fit. Returns peak_bytes, anonymous_bytes (without what lies in files), terms (name -> bytes),
    host_bytes (of RAM, whatever the device), step_s (None for a device that is not here), settings, fits,
    smallest_bytes, what_if; during, 'GPTQ', where quantising the base takes more than training. Raises SmidgenError.

    generate: instead of a run, so many new tokens after a prompt of `seq_len`, as `load` and `generate` make them; a
    step is one token. There is no data then, and no setting but those of forecast.ANSWER_SETTINGS.
    """
    given = settings_from(settings)
    if generate is not None:
        others = [*(["data"] if data is not None else []), *sorted(settings.keys() - ANSWER_SETTINGS)]
        problems = [f"{name}: generation has none, leave it out" for name in others]
        if generate < 1:
            problems.append(f"generate: expected 1 or more, found {generate}")
        if problems:
            raise SettingsError(problems)
        return plan_answers(str(model), generate, given, report)
    return plan_model(str(model), None if data is None else as_specs(data), given, report)


def download(spec: str, *, report: Report = silent) -> Path:
    """Fetch a hub model or a built-in model into its cache; returns where it lies."""
    return _download(spec, report)


def inspect_data(
    model: str, data: str | Path | Sequence[str | Path], *, report: Report = silent, **settings: Any
) -> DataReport:
    """How rows become tokens and labels for this model's tokenizer; nothing is trained and no weight is read.

    data, settings: of the run that is planned, as in finetune; what shared prefixes save in it depends on micro_batch,
    accumulation, pack, share_prefix, dropout, neftune_alpha and group_by_length.
    """
    given = settings_from(settings)
    give_memory_back()
    source = open_source(str(model), report)
    rows = read_rows(source, as_specs(data), given, report, test=True)
    sharing = estimate_sharing(rows.train, Schedule(rows.train.lengths, given, rows.mixture))
    return build_report(rows.rendered, source.tokenizer, layout=rows.data.layout, sharing=sharing, mix=rows.mix)


def evaluate(
    model: str | Path,
    *data: str,
    against: str | Path | None = None,
    protocol: str | None = None,
    limit: int | None = None,
    answers: bool = True,
    max_new_tokens: int | None = None,
    batch_size: int = 16,
    seq_len: int | None = None,
    too_long: str | None = None,
    system: str | None = None,
    fill: dict[str, str] | None = None,
    train_on_prompt: bool | None = None,
    questions: str | Path | None = None,
    out: str | Path | None = None,
    quantize: str = "auto",
    compute_dtype: str = "auto",
    device: str = "auto",
    trust_remote_code: bool = False,
    report: Report = silent,
) -> dict[str, Any]:
    """Measure a model or a run on each of `data`, every figure with its 95 % confidence interval (measures.measure).

    data: rows as in finetune (the test rows, else the validation rows, else all; of a run's own data those that it held
    out, and training rows of it in other files are warned of): loss, perplexity and how greedy
    answers compare; plain UTF-8 text: perplexity by `protocol`, 'gptq' or 'llama.cpp'; multiple choice and last words
    (data.tasks): accuracy. limit: the first rows, windows or questions of each. against: 'base', the base that the run
    was trained on, or another model or run, measured on the same rows. questions: a file of open questions, answered
    into the new file `out`. max_new_tokens: of an answer; by default 8 more than the longest expected one has, of open
    questions 1,024. seq_len, too_long, system, fill, train_on_prompt: of rows, as in finetune; None: as `model` was
    trained if it is a run. quantize, compute_dtype, device, trust_remote_code: as in finetune; 'auto': as for a run's
    training.

    Returns model, against, data, a list of {data, kind, rows, figures} in their order (see measure.compare); with
    against also worse, a list of {data, kind, figure}: where the model is worse beyond the interval of the difference.
    """
    given = {"seq_len": seq_len, "too_long": too_long, "system": system, "fill": fill,
             "train_on_prompt": train_on_prompt}  # fmt: skip
    rows = {name: value for name, value in given.items() if value is not None}
    how = Evaluation(protocol, limit, answers, max_new_tokens, batch_size, rows)
    return _evaluate(
        str(model),
        data,
        how,
        against=None if against is None else str(against),
        questions=None if questions is None else str(questions),
        out=None if out is None else Path(out),
        report=report,
        loading={
            "quantize": quantize,
            "compute_dtype": compute_dtype,
            "device": device,
            "trust_remote_code": trust_remote_code,
        },
    )


def merge(
    run: str | Path,
    out: str | Path,
    *,
    base: str | None = None,
    dtype: str = "auto",
    memory: str | None = None,
    trust_remote_code: bool = False,
    report: Report = silent,
) -> dict[str, Any]:
    """Write base + adapter as a full Hugging Face folder, and measure how far its outputs are from base + adapter.

    base: add the adapter to this 16-bit model instead of the de-quantised one. dtype: 'bfloat16', 'float16', 'float32',
    or 'auto': the base's own, float16 for a GGUF base. memory: what this process may have in all ('2GiB'), by default
    what is free: smaller files are written, and layers of the base are read from disk for each use, where that helps.

    Returns out, dtype, bytes, max_logit_difference, mean_kl, same_top_token, peak_rss_bytes, forecast_peak_bytes.
    Raises SettingsError, before weights are read, where `memory` is too little; RunError, and nothing is kept, where
    the weights are too large for `dtype`.
    """
    problems = []
    if dtype not in _MERGE_DTYPES:
        problems.append(f"dtype: expected one of {', '.join(_MERGE_DTYPES)}, found {dtype!r}")
    limit = _size(memory, problems)
    if problems:
        raise SettingsError(problems)
    out = Path(out)
    check_vacant(out)
    check_writable(out)
    _folder_of_run(run, report)
    give_memory_back()
    return merge_run(run, out, base=base, dtype=dtype, memory=limit, trust_remote_code=trust_remote_code, report=report)


def _size(memory: str | None, problems: list[str]) -> int | None:
    """Bytes of a `memory` that was given; what is wrong with it is added to the problems."""
    try:
        return None if memory is None else parse_bytes(memory)
    except ValueError as error:
        problems.append(f"memory: {error}")
        return None


def _folder_of_run(run: str | Path, report: Report) -> Path:
    """Where a run's adapter lies. Raises RunError for anything that is no run."""
    folder = adapter_folder(Path(run), report)
    if folder is None:
        raise RunError(f"{run} is no run", expected="a folder with adapter_config.json")
    return folder


def export_run(
    run: str | Path,
    out: str | Path,
    *,
    to: str,
    type: str = "auto",
    trust_remote_code: bool = False,
    report: Report = silent,
) -> dict[str, Any]:
    """Write a run for other programs; the file is opened again and compared with the run before it is kept.

    to: 'gguf-lora' (an adapter for llama.cpp), 'gguf' (the merged model), 'ollama' (the same in a folder with a
    Modelfile), 'hf' (a folder of 16 bits, or of 32 as the base), 'bnb-4bit'. type: of the numbers: GGUF's F16, BF16,
    Q8_0 or Q4_0 (auto: Q8_0); float16, bfloat16 or float32 of a folder (auto: as merge); nf4-dq, nf4 or fp4 of
    'bnb-4bit' (auto: nf4-dq).
    Returns out, to, type and what export.verified measures. Raises RunError where the fine-tune did not survive.
    """
    if to not in EXPORTS:
        raise SettingsError([f"to: expected one of {', '.join(EXPORTS)}, found {to!r}"])
    types = EXPORT_TYPES[to]
    if type != "auto" and type not in types:
        raise SettingsError([f"type: expected auto, {', '.join(types)} with --to {to}, found {type!r}"])
    out = Path(out)
    if to in ("gguf", "gguf-lora"):
        if out.suffix != ".gguf":
            raise SettingsError([f"out: expected a name that ends in .gguf, found {str(out)!r}"])
        check_new(out)
    else:
        check_vacant(out)
    check_writable(out)
    _folder_of_run(run, report)
    return export_as(Path(run), out, to, type, trust_remote_code=trust_remote_code, report=report)


def quantize(
    model: str,
    out: str | Path,
    *,
    to: str,
    bits: int = 4,
    group_size: int = 128,
    sym: bool = True,
    act_order: bool = False,
    damp: float = 0.01,
    calibration: str | None = None,
    calibration_rows: int = 128,
    calibration_len: int = 512,
    perplexity: bool = True,
    memory: str | None = None,
    trust_remote_code: bool = False,
    report: Report = silent,
) -> dict[str, Any]:
    """Write a model with packed weights, as a folder that transformers opens and that can be trained on in place.

    to: 'nf4-dq', 'nf4', 'fp4', 'int8' (bitsandbytes' layouts) or 'gptq', which the settings after it are for; see
    quant.gptq.GptqSettings and export.quantise.calibration_of. perplexity: measure it on held-out calibration text.
    memory: what this process may have in all ('2GiB'), by default what is free: smaller files are written where that
    helps.

    Returns out, to, bytes, wall_s, peak_rss_bytes, forecast_peak_bytes; for 'gptq' also errors ({layer, gptq, rtn} of
    each linear layer: relative errors of its outputs by GPTQ and by rounding to nearest), their means as mean_error,
    and perplexity (before, gptq, rtn, nf4). Raises ModelError for a base that is quantised already, SettingsError where
    `memory` is too little.
    """
    problems = []
    choices: tuple[tuple[str, Any, Sequence[Any]], ...] = (
        ("to", to, PACKED_FORMS),
        ("bits", bits, BITS),
        ("group_size", group_size, GROUP_SIZES),
    )
    for name, value, allowed in choices:
        if value not in allowed:
            problems.append(f"{name}: expected one of {', '.join(map(str, allowed))}, found {value!r}")
    for name, value, least in (("calibration_rows", calibration_rows, 1), ("calibration_len", calibration_len, 16)):
        if value < least:
            problems.append(f"{name}: expected {least} or more, found {value!r}")
    if to in PACKED_FORMS and to != "gptq":
        own = {"bits": (bits, 4), "group_size": (group_size, 128), "sym": (sym, True), "act_order": (act_order, False),
               "damp": (damp, 0.01), "calibration": (calibration, None), "calibration_rows": (calibration_rows, 128),
               "calibration_len": (calibration_len, 512), "perplexity": (perplexity, True)}  # fmt: skip
        problems += [f"{name}: only to='gptq' has this" for name, (value, unset) in own.items() if value != unset]
    limit = _size(memory, problems)
    if not 0 < damp <= 1:
        problems.append(f"damp: expected more than 0 and at most 1, found {damp!r}")
    if problems:
        raise SettingsError(problems)
    out = Path(out)
    check_vacant(out)
    check_writable(out)
    source = open_source(str(model), report)
    check_quantisable(source, to)
    give_memory_back()
    if to != "gptq":
        return quantise_model(source, out, to, memory=limit, trust_remote_code=trust_remote_code, report=report)
    text = calibration_of(
        calibration, source, rows=calibration_rows, length=calibration_len, held_out=perplexity, report=report
    )
    settings = GptqSettings(bits, group_size, sym, act_order, damp)
    return quantise_model(
        source, out, to, settings=settings, calibration=text, memory=limit, trust_remote_code=trust_remote_code,
        report=report,
    )  # fmt: skip


def doctor(*, report: Report = silent) -> dict[str, Any]:
    """Versions, what this machine has (cores, memory, disk, GPUs), the measured compute type, a check of every kernel
    and back end here against plain arithmetic, and a training step against its forecast of memory and time. Where there
    is a GPU, a few training steps on it against the same on the CPU, in float32 and in the type it is fastest at.

    failed: the names of the checks that did not end well.
    """
    device = choose_device("auto")
    dtype, why = choose_compute_dtype("auto", device)
    report(Note(why))
    speeds = {str(t).removeprefix("torch."): round(measure_gflops(t, device)) for t in (torch.float32, torch.bfloat16)}
    gpus = [torch.cuda.get_device_properties(index) for index in range(torch.cuda.device_count())]
    backends, kernels, disk, step = check_backends(device), check_kernels(), check_disk(), check_step(report)
    types = () if device.type == "cpu" else dict.fromkeys((torch.float32, dtype))
    there = {str(t).removeprefix("torch."): check_learning(device, t) for t in types}
    verdicts = {**backends, **kernels, "disk": disk["verdict"], "training step": step["verdict"]}
    verdicts |= {f"training on {device} in {name}": found["verdict"] for name, found in there.items()}
    return {
        "versions": Record.versions_now(),
        "python": platform.python_version(),
        "processor": processor_name(),
        "cores": os.cpu_count(),
        "cpu_capability": torch.backends.cpu.get_cpu_capability(),
        "threads": torch.get_num_threads(),
        "memory_bytes": os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGESIZE"),
        "memory_limit_bytes": memory_limit_bytes(),
        "free_memory_bytes": free_memory_bytes(),
        "gpus": [f"{gpu.name}, {format_bytes(gpu.total_memory)}" for gpu in gpus],
        "device": str(device) + (f" ({torch.cuda.get_device_name(device)})" if device.type == "cuda" else ""),
        "compute_dtype": str(dtype).removeprefix("torch."),
        "gflops": speeds,
        "disk": disk,
        "native_kernels": describe_library(),
        "kernels": kernels,
        "backends": backends,
        "training_step": step,
        "training_on_device": there,
        "failed": [name for name, verdict in verdicts.items() if verdict.startswith(("wrong", "fails"))],
    }
