"""A run folder.

    RUN/
        settings.yaml               the run's settings, model and data; `--config RUN/settings.yaml` repeats it
        smidgen.json                the base (its place, fingerprint, how it is stored), versions
        data.json                   statistics of the training rows, as `smidgen data` shows them
        lock                        names the process that works here, if one does
        metrics.jsonl               a line for each step and each evaluation
        checkpoints/step-N/         PEFT folders with the training state
        adapter_config.json, adapter_model.safetensors, tokenizer files       the result
        summary.json, answers.jsonl (where answers were compared)

It is made before the first step and never overwritten.
"""

import json
import shutil
from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields
from datetime import date
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, get_origin, get_type_hints

import torch
import yaml

from smidgen.checkpoint.hub import BUILTIN_MODELS
from smidgen.errors import RunError
from smidgen.events import Note, Report, Saved
from smidgen.export.adapter import ADAPTER_CONFIG, ADAPTER_WEIGHTS, is_adapter, save_adapter
from smidgen.export.compare import check_saved_adapter
from smidgen.export.files import disk_errors, new_folder, read_object, replace_file, write_json
from smidgen.model.build import Base
from smidgen.model.trained import Adapters
from smidgen.train.config import Settings
from smidgen.train.lock import LOCK
from smidgen.train.state import Cursor, is_whole, latest_checkpoint, prune_checkpoints, save_state, write_manifest

__all__ = ["RECORD", "STATISTICS", "SUMMARY", "Record", "RunFolder", "adapter_folder", "open_run_of", "read_record"]

RECORD = "smidgen.json"
STATISTICS = "data.json"
SUMMARY = "summary.json"
_ANSWERS = "answers.jsonl"
_RESULT = ".result"  # before its files are moved to their places
_ANSWERED = {"prompt", "expected", "before", "after"}


@dataclass(frozen=True)
class Record:
    """What smidgen.json holds: enough to find the base again and to see that it is the same."""

    model: str
    model_path: str
    checkpoint_format: str
    base_fingerprint: str
    storage: str
    compute_dtype: str
    data_sha256: str
    versions: dict[str, str]
    threads: int
    system: str = ""  # the system message that all training rows begin with, if they do
    kernels: str = ""  # the native kernels' instruction set, as `smidgen doctor` names it
    processor: str = ""
    device: str = ""  # 'cpu', or the GPU's name
    started: str = ""  # the day, 2030-12-31: some chat templates write it

    @property
    def day(self) -> date | None:
        """When the run was started; None of a run that does not know it."""
        return date.fromisoformat(self.started) if self.started else None

    @property
    def peft_base(self) -> str:
        """What an adapter's base_model_name_or_path says: a name that other tools find the base by."""
        return BUILTIN_MODELS[self.model].hub_id if self.model in BUILTIN_MODELS else self.model

    def find_base(self, folder: Path) -> str:
        """What open_source finds the base by, of the run or checkpoint in `folder`: a local one lies where it was, or
        beside the run, where both were moved together. Raises RunError if it is in neither place.
        """
        model, is_local = Path(self.model), Path(self.model).is_absolute()
        beside = _run_of(folder.resolve()).parent / model.name
        for place in (model, Path(self.model_path), *([beside] if is_local else [])):
            if place.exists():
                return str(place)
        if is_local:
            what, cure = f"the base that {folder} was trained on is not there", "put it back in one of these places"
            raise RunError(what, expected=f"{model} or {beside}", cure=cure)
        return self.model

    @staticmethod
    def versions_now() -> dict[str, str]:
        names = ("smidgen", "torch", "transformers", "tokenizers", "safetensors")
        return {name: _version(name) for name in names}


def _version(name: str) -> str:
    try:
        return version(name)
    except PackageNotFoundError:
        return "unknown"


def read_record(folder: Path) -> Record | None:
    """The record of a run or of one of its checkpoints; None where there is none. Raises RunError if it is damaged."""
    file = folder / RECORD
    if not file.is_file():
        return None
    try:
        record = Record(**read_object(file))
    except TypeError as error:
        raise RunError(f"{file} cannot be read ({error})") from error
    for name, kind in get_type_hints(Record).items():
        kind, value = get_origin(kind) or kind, getattr(record, name)
        if not isinstance(value, kind):
            found = type(value).__name__
            raise RunError(f"{file}: wrong {name}", expected=f"{kind.__name__}", found=found, cure="copy the run again")
    try:
        _ = record.day
    except ValueError as error:
        raise RunError(f"{file}: wrong started ({error})", cure="copy the run again") from error
    return record


def adapter_folder(path: Path, report: Report) -> Path | None:
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


def open_run_of(path: Path) -> "tuple[RunFolder, Settings, str, str | list[str]] | None":
    """RunFolder.open of a run, or of the run of a checkpoint; None for anything else. Raises RunError if that cannot be
    read.
    """
    run = _run_of(path)
    return RunFolder.open(run) if (run / RECORD).is_file() else None


def _run_of(path: Path) -> Path:
    """The run that a checkpoint is of; any other folder itself."""
    return path.parent.parent if path.parent.name == "checkpoints" else path


@dataclass(frozen=True)
class RunFolder:
    """Writes everything that a run leaves behind."""

    path: Path
    record: Record

    @classmethod
    def create(
        cls,
        path: Path,
        settings: Settings,
        model: str,
        data: Sequence[str],
        record: Record,
        statistics: dict[str, Any],
        tokenizer: Any,
    ) -> "RunFolder":
        """Make the folder with settings, record, statistics of the data and tokenizer. Raises RunError if there is
        anything at `path`.
        """
        with new_folder(path) as staging:
            content = {"model": model, "data": data[0] if len(data) == 1 else list(data), **asdict(settings)}
            (staging / "settings.yaml").write_text(yaml.safe_dump(content, sort_keys=False), encoding="utf-8")
            (staging / RECORD).write_text(json.dumps(asdict(record), indent=2) + "\n", encoding="utf-8")
            (staging / STATISTICS).write_text(json.dumps(statistics, indent=2) + "\n", encoding="utf-8")
            tokenizer.save_pretrained(staging)
            (staging / "checkpoints").mkdir()
        return cls(path, record)

    @classmethod
    def open(cls, path: Path) -> tuple["RunFolder", Settings, str, str | list[str]]:
        """(the folder, its settings, model, data, a list where there are several). Raises RunError if it is no run."""
        record = read_record(path)
        try:
            content = yaml.safe_load((path / "settings.yaml").read_text(encoding="utf-8"))
            model, data = content.pop("model"), content.pop("data")
        except (OSError, ValueError, yaml.YAMLError, AttributeError, KeyError, TypeError, RecursionError):
            record = None
        if record is None:
            cure = "give the folder that finetune --out wrote"
            raise RunError(f"{path} is no run folder", expected=f"settings.yaml and {RECORD} in it", cure=cure)
        unknown = sorted(map(str, content.keys() - {field.name for field in fields(Settings)}))
        if unknown:
            raise RunError(f"{path}/settings.yaml: unknown settings {', '.join(unknown)}", cure="take them out")
        return cls(path, record), Settings(**content), model, data

    def save_checkpoint(
        self,
        base: Base,
        adapters: Adapters,
        optimizer: torch.optim.Optimizer,
        cursor: Cursor,
        tokenizer: Any,
        keep: int,
        best: int | None = None,
    ) -> Path:
        """checkpoints/step-N, whole or not at all; a whole one that is there stays. It is read again, and only then are
        all but the newest `keep` and that of step `best` removed. Raises RunError if it reads otherwise than it was
        written, if its adapter computes something else than the one in memory, or if the base's files changed.
        """
        base.checkpoint.check_unchanged()
        folder = self.path / "checkpoints" / f"step-{cursor.step}"
        if not is_whole(folder):
            shutil.rmtree(folder, ignore_errors=True)  # a damaged one, which `resume` has passed over
            with new_folder(folder) as staging:
                save_adapter(staging, base, adapters, self.record.peft_base)
                check_saved_adapter(base, adapters, staging)
                save_state(staging, cursor, adapters, optimizer)
                tokenizer.save_pretrained(staging)
                (staging / RECORD).write_text(json.dumps(asdict(self.record), indent=2) + "\n", encoding="utf-8")
                write_manifest(staging)
            if not is_whole(folder):
                cure = "look after the disk; older ones stay"
                raise RunError(f"{folder} reads otherwise than it was written", cure=cure)
        with disk_errors(self.path / "checkpoints"):
            prune_checkpoints(self.path, keep, best)
        return folder

    def save_result(
        self,
        base: Base,
        adapters: Adapters,
        summary: dict[str, Any],
        answers: list[dict[str, Any]],
        report: Report,
    ) -> None:
        """The adapter into RUN itself, then answers.jsonl and summary.json. Raises RunError as save_checkpoint."""
        base.checkpoint.check_unchanged()
        staging = self.path / _RESULT
        with new_folder(staging) as folder:
            save_adapter(folder, base, adapters, self.record.peft_base)
            check_saved_adapter(base, adapters, folder)
        with disk_errors(self.path):
            for file in sorted(staging.iterdir(), key=lambda file: file.name == ADAPTER_CONFIG):  # it marks a result
                file.replace(self.path / file.name)
            staging.rmdir()
        if answers:
            self.save_answers(answers)
        write_json(self.path / SUMMARY, summary)
        for file in sorted(self.path.iterdir()):
            if file.is_file() and file.name != LOCK:
                report(Saved(file, file.stat().st_size))

    def withdraw_result(self) -> None:
        """Take away what save_result wrote, but for the answers, since the run goes on from a checkpoint; and what a
        process left that was killed while it wrote.
        """
        with disk_errors(self.path):
            for name in (ADAPTER_CONFIG, ADAPTER_WEIGHTS, SUMMARY):  # without the first it is no result
                (self.path / name).unlink(missing_ok=True)
            for remains in (self.path / _RESULT, *self.path.glob(".tmp-*")):
                shutil.rmtree(remains) if remains.is_dir() else remains.unlink(missing_ok=True)

    def save_answers(self, answers: list[dict[str, Any]]) -> None:
        """answers.jsonl: prompt, expected, before, after."""
        lines = (json.dumps(answer, ensure_ascii=False) + "\n" for answer in answers)
        replace_file(self.path / _ANSWERS, "".join(lines))

    def answers(self) -> list[dict[str, Any]]:
        """What save_answers wrote; nothing where it has not. Raises RunError as logged."""
        file = self.path / _ANSWERS
        answers = _read_lines(file)
        if not all(line.keys() >= _ANSWERED for line in answers):
            raise RunError(f"{file}: a line is no answer", cure="copy the run again")
        return answers

    def log(self, line: dict[str, Any]) -> None:
        """Append a line to metrics.jsonl."""
        file = self.path / "metrics.jsonl"
        with disk_errors(file), open(file, "a", encoding="utf-8") as stream:
            stream.write(json.dumps(line) + "\n")

    def logged(self) -> list[dict[str, Any]]:
        """The lines of metrics.jsonl. Raises RunError where one cannot be read."""
        file = self.path / "metrics.jsonl"
        logged = _read_lines(file)
        if not all(type(line.get("step")) is int for line in logged):
            raise RunError(f"{file}: a line has no step", cure="copy the run again")
        return logged

    def logged_at(self, step: int) -> dict[str, Any]:
        """Everything that was logged at a step, in one dictionary."""
        merged: dict[str, Any] = {}
        for line in self.logged():
            if line["step"] == step:
                merged |= line
        return merged

    def rewind_log(self, step: int) -> None:
        """Drop what was logged after `step`: those steps will be done again."""
        kept = [line for line in self.logged() if line["step"] <= step]
        replace_file(self.path / "metrics.jsonl", "".join(json.dumps(line) + "\n" for line in kept))


def _read_lines(file: Path) -> list[dict[str, Any]]:
    """A JSON object a line; nothing where there is no file. A last line that a crash cut off is passed over."""
    try:
        # not splitlines: a text may hold one of the other signs that end a line
        lines = file.read_text(encoding="utf-8", errors="replace").split("\n")
        return [json.loads(line) for line in lines if line.endswith("}")]
    except FileNotFoundError:
        return []
    except (OSError, ValueError, RecursionError) as error:
        raise RunError(f"{file} cannot be read ({error})", cure="copy the run again") from error
