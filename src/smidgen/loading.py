"""From a model or a run to something that answers: `smidgen.load`."""

import time
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import nn

from smidgen.data.render import Renderer
from smidgen.errors import DataError, RunError
from smidgen.events import Note, Report, silent
from smidgen.export.adapter import load_adapter, read_adapter
from smidgen.model.build import Base
from smidgen.model.device import choose_device
from smidgen.model.generate import Sampling, stream_text, stream_tokens
from smidgen.model.load import Source, load_base, open_source
from smidgen.model.tokenizer import pieces_of_tokens
from smidgen.model.trained import attach_tokens, initialise_tokens
from smidgen.train.config import settings_from
from smidgen.train.run import Record, adapter_folder, read_record

__all__ = ["Found", "Generation", "LoadedModel", "find_model", "load", "load_found"]

Prompt = str | Sequence[dict[str, Any]]


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


@dataclass(frozen=True)
class Found:
    """A model or run that has been found and opened; no weights are read yet.

    folder: of the adapter, None for a bare model. quantize, compute_dtype: as load_base takes them.
    """

    folder: Path | None
    source: Source
    record: Record | None
    quantize: str
    compute_dtype: str


def find_model(
    model: str | Path,
    *,
    quantize: str = "auto",
    compute_dtype: str = "auto",
    device: str = "auto",
    report: Report = silent,
) -> Found:
    """The first half of `load`. Raises RunError where the base is not the one that the adapter was trained on."""
    wanted = settings_from({"quantize": quantize, "compute_dtype": compute_dtype, "device": device})
    quantize, compute_dtype = wanted.quantize, wanted.compute_dtype
    folder = adapter_folder(Path(model), report)
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
    return Found(folder, source, record, quantize, compute_dtype)


def load_found(
    found: Found,
    *,
    device: str = "auto",
    trust_remote_code: bool = False,
    adapter: bool = True,
    streamed: Collection[int] = (),
    report: Report = silent,
) -> LoadedModel:
    """The second half of `load`. streamed: decoder layers that are read from disk for each use (model/stream.py)."""
    base = load_base(
        found.source,
        quantize=found.quantize,
        compute_dtype=found.compute_dtype,
        device=device,
        streamed=streamed,
        trust_remote_code=trust_remote_code,
        report=report,
    )
    if found.folder and adapter:
        load_adapter(base, found.folder)
    elif found.folder:
        _add_untrained_tokens(base, found.folder, found.source.tokenizer, are_new=found.record is not None)
    system = found.record.system if found.record else ""
    if system:
        report(Note(f"system message of the training rows, used where none is given: {system!r}"))
    return LoadedModel(base, found.source.tokenizer, report, system)


def load(
    model: str | Path,
    *,
    quantize: str = "auto",
    compute_dtype: str = "auto",
    device: str = "auto",
    trust_remote_code: bool = False,
    adapter: bool = True,
    report: Report = silent,
) -> LoadedModel:
    """A model (as in finetune), or a run, a checkpoint of it or another PEFT folder, whose base is found by itself.

    adapter=False: a run's base alone, stored and computed as for the run; its new tokens as they were before training.
    Raises RunError where the base is not the one that the adapter was trained on.
    """
    found = find_model(model, quantize=quantize, compute_dtype=compute_dtype, device=device, report=report)
    return load_found(found, device=device, trust_remote_code=trust_remote_code, adapter=adapter, report=report)


def _add_untrained_tokens(base: Base, folder: Path, tokenizer: Any, *, are_new: bool) -> None:
    """The tokens that the adapter in `folder` has rows for, with the rows that training started from: its text has
    them. are_new: as a run's are; of another adapter's only if the base has too few rows for them.
    """
    token_ids = read_adapter(folder).token_ids
    ids = next(iter(token_ids.values()), [])
    if ids and (are_new or max(ids) >= base.head.out_features):
        pieces = pieces_of_tokens(tokenizer, tokenizer.convert_ids_to_tokens(ids))
        initialise_tokens(attach_tokens(base, token_ids), pieces)
        base.model.requires_grad_(False)


def _base_of(folder: Path) -> tuple[str, Record | None]:
    record = read_record(folder)
    if record:
        moved = not Path(record.model).exists() and Path(record.model_path).exists()
        return (record.model_path if moved else record.model), record
    name = read_adapter(folder).config.get("base_model_name_or_path")
    if not name:
        raise RunError(f"{folder}/adapter_config.json names no base", expected="base_model_name_or_path")
    return str(name), None
