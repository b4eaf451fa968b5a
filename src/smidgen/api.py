"""The library's functions; the command line is a door to these and nothing else.

import smidgen

run = smidgen.finetune("smollm2-135m", "rows.jsonl", "runs/mine", epochs=2)
print(run.summary["loss_before"], "->", run.summary["loss_after"])
model = smidgen.load("runs/mine")
print(model.generate("Wake me in 20 minutes").text)
smidgen.merge("runs/mine", "models/mine")
"""

import platform
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from smidgen.checkpoint.hub import download as _download
from smidgen.data.files import TEXT_SUFFIXES, read_text
from smidgen.data.records import read_data
from smidgen.data.render import Example, Renderer
from smidgen.data.report import DataReport, build_report
from smidgen.errors import DataError, RunError, SettingsError, SmidgenError
from smidgen.events import Note, Report, Warned, silent
from smidgen.export.adapter import is_adapter, load_adapter, read_adapter
from smidgen.export.compare import compare_models, plain_example
from smidgen.export.files import check_vacant, folder_bytes
from smidgen.export.merge import save_merged
from smidgen.export.quantise import PACKED_FORMS, calibration_of, check_quantisable, plain_dtype, quantise_model
from smidgen.export.verified import EXPORT_TYPES, EXPORTS, export_verified
from smidgen.kernels.library import describe_library
from smidgen.model.build import Base
from smidgen.model.device import choose_compute_dtype, choose_device, free_memory_bytes, measure_gflops
from smidgen.model.generate import Sampling, stream_text, stream_tokens
from smidgen.model.load import load_base, open_source
from smidgen.quant.gptq import GROUP_SIZES, GptqSettings
from smidgen.quant.grouped import BITS
from smidgen.quant.selfcheck import check_backends
from smidgen.train.config import settings_from
from smidgen.train.evaluate import PROTOCOLS, answer_rows, held_out_loss, rouge_l, text_perplexity
from smidgen.train.finetune import Run, run_finetune
from smidgen.train.finetune import resume as _resume
from smidgen.train.run import Record, RunFolder, read_record
from smidgen.train.state import latest_checkpoint

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
    "quantize",
    "resume",
]

Prompt = str | Sequence[dict[str, Any]]
_MERGE_DTYPES = ("auto", "bfloat16", "float16", "float32")
_COMPARED_ROWS = 16


def finetune(model: str, data: str, out: str | Path, *, report: Report = silent, **settings: Any) -> Run:
    """Train LoRA adapters on `data` over the frozen, quantised `model`, into the new folder `out`.

    model: Hugging Face folder, .gguf file, built-in name or hub id. data: .json, .jsonl, .csv or .parquet file, folder
    with train and validation files, built-in name or hub id. settings: the fields of train.config.Settings.
    Raises SmidgenError, before anything is written, for settings, data or models that cannot work. Ctrl-C saves a
    checkpoint and raises KeyboardInterrupt; `resume` goes on from there.
    """
    return run_finetune(str(model), str(data), Path(out), settings_from(settings), report)


def resume(run: str | Path, *, report: Report = silent) -> Run:
    """Go on with an interrupted run, to the same adapter, bit for bit, as if it had not been interrupted.

    That holds on the same machine with the same number of threads. A finished run is returned as it is.
    """
    return _resume(Path(run), report)


def download(spec: str, *, report: Report = silent) -> Path:
    """Fetch a hub model or a built-in model into its cache; returns where it lies."""
    return _download(spec, report)


def inspect_data(
    model: str, data: str, *, seq_len: int = 1024, train_on_prompt: bool = False, report: Report = silent
) -> DataReport:
    """How rows become tokens and labels for this model's tokenizer; nothing is trained and no weight is read."""
    source = open_source(str(model), report)
    rows = read_data(str(data), report=report)
    renderer = Renderer(source.tokenizer, train_on_prompt=train_on_prompt, seq_len=seq_len, report=report)
    everything = [*rows.train, *rows.validation, *rows.test]
    return build_report(renderer.render_all(everything, report), everything, source.tokenizer, layout=rows.layout)


@dataclass(frozen=True)
class Generation:
    """An answer. tokens_per_s counts new tokens, the prompt's time included."""

    text: str
    prompt_tokens: int
    new_tokens: int
    tokens_per_s: float


class LoadedModel:
    """A model ready to talk. model: `model(input_ids).logits`; tokenizer: with the chat template that training used.

    system: the system message that a run's training rows began with; it is put before conversations that have none.
    """

    def __init__(self, base: Base, tokenizer: Any, report: Report, system: str = "") -> None:
        self.base = base
        self.system = system
        self.tokenizer = tokenizer
        self.renderer = Renderer(tokenizer, report=report)

    @property
    def model(self) -> nn.Module:
        return self.base.model

    def generate(self, prompt: Prompt, *, raw: bool = False, **sampling: Any) -> Generation:
        """Answer a prompt (a user's message), a list of chat messages, or with `raw` a text without the chat template.

        sampling: temperature, top_p, top_k, seed, max_new_tokens (model.generate.Sampling).
        """
        started, pieces = time.perf_counter(), []
        ids, tokens, count = self._tokens(prompt, raw, Sampling(**sampling))
        pieces = list(stream_text(tokens, self._decode))
        elapsed = time.perf_counter() - started
        return Generation("".join(pieces), len(ids), count(), round(count() / elapsed, 2))

    def stream(self, prompt: Prompt, *, raw: bool = False, **sampling: Any) -> Iterator[str]:
        """As generate, but yields pieces of text as they come."""
        _, tokens, _ = self._tokens(prompt, raw, Sampling(**sampling))
        return stream_text(tokens, self._decode)

    def _tokens(
        self, prompt: Prompt, raw: bool, sampling: Sampling
    ) -> tuple[list[int], Iterator[int], Callable[[], int]]:
        ids = self.tokenizer(prompt).input_ids if raw else self.renderer.prompt_ids(self._messages(prompt))
        if not ids:
            raise DataError("the prompt has no tokens", expected="some text")
        new = 0

        def counted() -> Iterator[int]:
            nonlocal new
            for token in stream_tokens(self.base, ids, self.renderer.end_ids, sampling, len(self.tokenizer)):
                new += 1
                yield token

        return ids, counted(), lambda: new

    def _messages(self, prompt: Prompt) -> list[dict[str, Any]]:
        messages = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else list(prompt)
        if self.system and messages and messages[0]["role"] != "system":
            messages.insert(0, {"role": "system", "content": self.system})
        return messages

    def _decode(self, ids: list[int]) -> str:
        return self.tokenizer.decode(ids, skip_special_tokens=True)


def load(
    model: str | Path,
    *,
    quantize: str = "auto",
    compute_dtype: str = "auto",
    device: str = "auto",
    trust_remote_code: bool = False,
    report: Report = silent,
) -> LoadedModel:
    """A model (as in finetune), or a run, a checkpoint of it or another PEFT folder, whose base is found by itself.

    Raises RunError where the base is not the one that the adapter was trained on.
    """
    wanted = settings_from({"quantize": quantize, "compute_dtype": compute_dtype, "device": device})
    quantize, compute_dtype = wanted.quantize, wanted.compute_dtype
    folder = _adapter_folder(Path(model), report)
    spec, record = _base_of(folder) if folder else (str(model), None)
    has_tokenizer = folder is not None and (folder / "tokenizer_config.json").is_file()
    source = open_source(spec, report, tokenizer_from=folder if has_tokenizer else None)
    if record and source.checkpoint.fingerprint() != record.base_fingerprint:
        raise RunError(
            f"{source.checkpoint.path} is not the base that {folder} was trained on (its weights differ)",
            cure="put the right base back, or train again on this one",
        )
    if record and quantize == "auto":
        quantize = record.storage
    if record and compute_dtype == "auto" and choose_device(device).type == "cpu":
        compute_dtype = record.compute_dtype  # what the adapter was trained with: no other rounding, nothing to measure
    base = load_base(
        source,
        quantize=quantize,
        compute_dtype=compute_dtype,
        device=device,
        trust_remote_code=trust_remote_code,
        report=report,
    )
    if folder:
        load_adapter(base, folder)
    system = record.system if record else ""
    if system:
        report(Note(f"system message of the training rows, used where none is given: {system!r}"))
    return LoadedModel(base, source.tokenizer, report, system)


def _adapter_folder(path: Path, report: Report) -> Path | None:
    """The PEFT folder that `path` means: itself, or the newest checkpoint of an unfinished run; None for a model."""
    if is_adapter(path):
        return path
    if read_record(path) is None:
        return None
    checkpoint = latest_checkpoint(path)
    if checkpoint is None:
        raise RunError(f"{path} has no adapter yet", cure=f"go on with it: smidgen finetune --resume {path}")
    report(Note(f"{path} is not finished: taking {checkpoint.name}"))
    return checkpoint


def _base_of(folder: Path) -> tuple[str, Record | None]:
    record = read_record(folder)
    if record:
        moved = not Path(record.model).exists() and Path(record.model_path).exists()
        return (record.model_path if moved else record.model), record
    config, _ = read_adapter(folder)
    name = config.get("base_model_name_or_path")
    if not name:
        raise RunError(f"{folder}/adapter_config.json names no base", expected="base_model_name_or_path")
    return str(name), None


def evaluate(
    model: str | Path,
    data: str,
    *,
    protocol: str | None = None,
    limit: int | None = None,
    answers: bool = True,
    max_new_tokens: int = 128,
    batch_size: int = 16,
    seq_len: int = 1024,
    train_on_prompt: bool = False,
    report: Report = silent,
    **loading: Any,
) -> dict[str, Any]:
    """Loss and perplexity weighted by token, and how answers compare with the data's; or the perplexity of a text file.

    data: as in finetune; its test rows, else its validation rows, else all. With `protocol` ('gptq', 'llama.cpp') a
    plain UTF-8 text. Returns rows, tokens, loss, perplexity, and exact_match, valid_json, rouge_l where they apply.
    """
    if protocol is None and Path(data).suffix in TEXT_SUFFIXES:
        protocol = "gptq"
        report(Note(f"{data} is plain text: perplexity by protocol gptq (windows of 2048, every token)"))
    if protocol and protocol not in PROTOCOLS:
        raise SettingsError([f"protocol: expected one of {', '.join(PROTOCOLS)}, found {protocol!r}"])
    if protocol:
        text = read_text(Path(data))
        loaded = load(model, report=report, **loading)
        result = text_perplexity(loaded.base, loaded.tokenizer, text, protocol, limit, report)
        return {"protocol": protocol} | result.as_dict()
    parts = read_data(str(data), hold_out=False, report=report)
    rows = (parts.test or parts.validation or parts.train)[:limit]
    loaded = load(model, report=report, **loading)
    seq_len = min(seq_len, loaded.base.max_positions)
    renderer = Renderer(loaded.tokenizer, train_on_prompt=train_on_prompt, seq_len=seq_len, report=report)
    held_out = held_out_loss(loaded.base, renderer.render_all(rows), batch_size, report)
    scores = held_out.as_dict()
    if answers and any(row.messages for row in rows):
        given = answer_rows(
            loaded.base,
            renderer,
            rows,
            when="given",
            max_new_tokens=max_new_tokens,
            batch_size=batch_size,
            report=report,
        )
        report(given)
        scores["exact_match"] = given.exact_match
        if given.valid_json is not None:
            scores["valid_json"] = given.valid_json
        else:
            try:
                scores["rouge_l"] = rouge_l(given.rows)
            except ImportError:
                report(Warned("ROUGE-L is left out: it needs pip install 'smidgen[eval]'"))
    return scores


def merge(
    run: str | Path, out: str | Path, *, base: str | None = None, dtype: str = "auto", report: Report = silent
) -> dict[str, Any]:
    """Write base + adapter as a full Hugging Face folder, and measure how far its outputs are from base + adapter.

    base: add the adapter to this 16-bit model instead of the de-quantised one. dtype: 'bfloat16', 'float16', 'float32',
    or 'auto': the base's own, float16 for a GGUF base. Returns out, dtype, bytes, max_logit_difference, same_top_token.
    """
    if dtype not in _MERGE_DTYPES:
        raise SettingsError([f"dtype: expected one of {', '.join(_MERGE_DTYPES)}, found {dtype!r}"])
    out = Path(out)
    check_vacant(out)
    folder = _adapter_folder(Path(run), report)
    if folder is None:
        raise RunError(f"{run} is no run", expected="a folder with adapter_config.json")
    trained = load(run, compute_dtype="float32")
    target = trained.base
    if base is not None:
        source = open_source(base, report, tokenizer_from=folder)
        target = load_base(source, quantize="none", compute_dtype="float32")
        load_adapter(target, folder)
    chosen = plain_dtype(target) if dtype == "auto" else getattr(torch, dtype)
    save_merged(target, out, chosen, trained.tokenizer, report)
    merged = load(out, quantize="none", compute_dtype="float32")
    return {
        "out": str(out),
        "dtype": str(chosen).removeprefix("torch."),
        "bytes": folder_bytes(out),
        **compare_models(trained.base, merged.base, trained.tokenizer),
    }


def export_run(
    run: str | Path, out: str | Path, *, to: str, type: str = "auto", report: Report = silent
) -> dict[str, Any]:
    """Write a run for other programs; the file is opened again and compared with the run before it is kept.

    to: 'gguf-lora' (an adapter for llama.cpp), 'gguf' (the merged model), 'ollama' (the same in a folder with a
    Modelfile), 'hf' (a 16-bit folder), 'bnb-4bit'. type: of the numbers: GGUF's F16, BF16, Q8_0 or Q4_0 (auto: Q8_0);
    float16, bfloat16 or float32 of a folder (auto: as merge); nf4-dq, nf4 or fp4 of 'bnb-4bit' (auto: nf4-dq).
    Returns out, to, type and what export.verified measures. Raises RunError where the fine-tune did not survive.
    """
    if to not in EXPORTS:
        raise SettingsError([f"to: expected one of {', '.join(EXPORTS)}, found {to!r}"])
    types = EXPORT_TYPES[to]
    if type != "auto" and type not in types:
        raise SettingsError([f"type: expected auto, {', '.join(types)} with --to {to}, found {type!r}"])
    folder = _adapter_folder(Path(run), report)
    if folder is None:
        raise RunError(f"{run} is no run", expected="a folder with adapter_config.json")
    out = Path(out)
    if to in ("gguf", "gguf-lora"):
        if out.suffix != ".gguf":
            raise SettingsError([f"out: expected a name that ends in .gguf, found {str(out)!r}"])
        if out.exists():
            raise RunError(f"{out} exists already", cure="choose another name, or remove it first")
    else:
        check_vacant(out)
    trained = load(run, compute_dtype="float32", report=report)
    examples = _held_out(Path(run), trained, report)
    automatic = str(plain_dtype(trained.base)).removeprefix("torch.") if to == "hf" else types[0]
    kind = automatic if type == "auto" else type
    figures = export_verified(
        trained.base, trained.tokenizer, examples, to, out, kind=kind, system=trained.system, report=report
    )
    return {"out": str(out), "to": to, "type": kind, **figures}


def _held_out(run: Path, trained: LoadedModel, report: Report) -> list[Example]:
    """Rows that the run did not train on, or a plain text where they cannot be had."""
    try:
        _, settings, _, data = RunFolder.open(run)
        rows = read_data(data)
    except SmidgenError:
        report(Note("the run's data is not there: the export is compared on a plain text"))
        return [plain_example(trained.tokenizer)]
    renderer = Renderer(
        trained.tokenizer, train_on_prompt=settings.train_on_prompt,
        seq_len=min(settings.seq_len, trained.base.max_positions),
    )  # fmt: skip
    return renderer.render_all((rows.test or rows.validation or rows.train)[:_COMPARED_ROWS])


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
    trust_remote_code: bool = False,
    report: Report = silent,
) -> dict[str, Any]:
    """Write a model with packed weights, as a folder that transformers opens and that can be trained on in place.

    to: 'nf4-dq', 'nf4', 'fp4', 'int8' (bitsandbytes' layouts) or 'gptq', which the settings after it are for; see
    quant.gptq.GptqSettings and export.quantise.calibration_of. perplexity: measure it on held-out calibration text.
    Returns out, to, bytes, wall_s, peak_rss_bytes; for 'gptq' also errors ({layer, gptq, rtn} of each linear
    layer: relative errors of its outputs by GPTQ and by rounding to nearest), their means as mean_error, and
    perplexity (before, gptq, rtn, nf4). Raises ModelError for a base that is quantised already.
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
               "damp": (damp, 0.01), "calibration": (calibration, None)}  # fmt: skip
        problems += [f"{name}: only to='gptq' has this" for name, (value, unset) in own.items() if value != unset]
    if not 0 < damp <= 1:
        problems.append(f"damp: expected more than 0 and at most 1, found {damp!r}")
    if problems:
        raise SettingsError(problems)
    out = Path(out)
    check_vacant(out)
    source = open_source(str(model), report)
    check_quantisable(source)
    if to != "gptq":
        return quantise_model(source, out, to, trust_remote_code=trust_remote_code, report=report)
    text = calibration_of(
        calibration, source, rows=calibration_rows, length=calibration_len, held_out=perplexity, report=report
    )
    settings = GptqSettings(bits, group_size, sym, act_order, damp)
    return quantise_model(
        source, out, to, settings=settings, calibration=text, trust_remote_code=trust_remote_code, report=report
    )


def _processor_name() -> str:
    try:
        return Path("/proc/cpuinfo").read_text().split("model name")[1].split(":", 1)[1].split("\n")[0].strip()
    except (OSError, IndexError):
        return platform.processor() or platform.machine()


def doctor(*, report: Report = silent) -> dict[str, Any]:
    """Versions, device, threads, the measured compute type, and a check of packed operations on every back end here."""
    device = choose_device("auto")
    dtype, why = choose_compute_dtype("auto", device)
    report(Note(why))
    speeds = {str(t).removeprefix("torch."): round(measure_gflops(t, device)) for t in (torch.float32, torch.bfloat16)}
    return {
        "versions": Record.versions_now(),
        "python": platform.python_version(),
        "processor": _processor_name(),
        "free_memory_bytes": free_memory_bytes(),
        "device": str(device) + (f" ({torch.cuda.get_device_name(device)})" if device.type == "cuda" else ""),
        "cpu_capability": torch.backends.cpu.get_cpu_capability(),
        "threads": torch.get_num_threads(),
        "compute_dtype": str(dtype).removeprefix("torch."),
        "gflops": speeds,
        "native_kernels": describe_library(),
        "backends": check_backends(device),
    }
