"""From a model or a run to something that answers: `smidgen.load`."""

import time
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from smidgen.data.render import Renderer
from smidgen.errors import DataError, RunError
from smidgen.events import Note, Report, silent
from smidgen.export.adapter import load_adapter, read_adapter
from smidgen.model.build import Base
from smidgen.model.device import choose_device, peak_rss_bytes
from smidgen.model.generate import Sampling, stream_text, stream_tokens
from smidgen.model.inventory import inventory_of
from smidgen.model.load import Decided, Source, decide, load_base, open_source
from smidgen.model.tokenizer import pieces_of_tokens
from smidgen.model.trained import attach_tokens, initialise_tokens
from smidgen.planning.generation import GenerationPlan, generation_plans, plan_generation
from smidgen.train.config import settings_from
from smidgen.train.memory import give_memory_back, process_now
from smidgen.train.run import Record, adapter_folder, read_record
from smidgen.units import parse_bytes

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
    plan: what a budget of memory has room for; None: without one.
    """

    def __init__(
        self, base: Base, tokenizer: Any, report: Report, system: str = "", plan: GenerationPlan | None = None
    ) -> None:
        self.base = base
        self.system = system
        self.plan = plan
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

    def memory(self) -> dict[str, int]:
        """Of this process so far, beside what was forecast for its budget."""
        assert self.plan is not None, "no budget was given"
        return {"forecast_peak_bytes": self.plan.forecast.peak_bytes, "peak_rss_bytes": peak_rss_bytes()}

    def _tokens(
        self, prompt: Prompt, raw: bool, sampling: Sampling
    ) -> tuple[list[int], Iterator[int], Callable[[], int]]:
        ids = _prompt_ids(prompt, self.tokenizer, self.renderer, self.system, raw=raw)
        if not ids:
            raise DataError("the prompt has no tokens", expected="some text")
        if self.plan is not None and len(ids) + sampling.max_new_tokens > self.plan.tokens:
            raise DataError(
                f"a prompt of {len(ids)} tokens with an answer of {sampling.max_new_tokens}",
                expected=f"at most {self.plan.tokens} together, for which the memory was planned",
                cure="load the model for a longer prompt or answer",
            )
        new = 0

        def counted() -> Iterator[int]:
            nonlocal new
            for token in stream_tokens(self.base, ids, self.renderer.end_ids, sampling, len(self.tokenizer)):
                new += 1
                yield token

        return ids, counted(), lambda: new

    def _decode(self, ids: list[int]) -> str:
        return self.tokenizer.decode(ids, skip_special_tokens=True)


def _prompt_ids(prompt: Prompt, tokenizer: Any, renderer: Renderer, system: str, *, raw: bool) -> list[int]:
    if raw:
        return tokenizer(prompt).input_ids
    messages = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else list(prompt)
    if system and messages and messages[0]["role"] != "system":
        messages.insert(0, {"role": "system", "content": system})
    return renderer.prompt_ids(messages)


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

    @property
    def system(self) -> str:
        """The system message of the training rows."""
        return self.record.system if self.record else ""


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
    plan: GenerationPlan | None = None,
    decided: Decided | None = None,
    report: Report = silent,
) -> LoadedModel:
    """The second half of `load`. streamed: decoder layers that are read from disk for each use (model/stream.py), where
    no `plan` says which. decided: how the base is stored and computed, where that is known already.
    """
    base = load_base(
        found.source,
        quantize=found.quantize,
        compute_dtype=found.compute_dtype,
        device=device,
        decided=decided,
        streamed=plan.streamed if plan else streamed,
        trust_remote_code=trust_remote_code,
        report=report,
    )
    if found.folder and adapter:
        load_adapter(base, found.folder)
    elif found.folder:
        _add_untrained_tokens(base, found.folder, found.source.tokenizer, are_new=found.record is not None)
    if plan is not None:
        base.cache_dtype = getattr(torch, plan.cache_dtype)
    if found.system:
        report(Note(f"system message of the training rows, used where none is given: {found.system!r}"))
    return LoadedModel(base, found.source.tokenizer, report, found.system, plan)


def load(
    model: str | Path,
    *,
    quantize: str = "auto",
    compute_dtype: str = "auto",
    device: str = "auto",
    trust_remote_code: bool = False,
    adapter: bool = True,
    memory: str | None = None,
    prompt: Prompt | int = 512,
    raw: bool = False,
    max_new_tokens: int = 256,
    report: Report = silent,
) -> LoadedModel:
    """A model (as in finetune), or a run, a checkpoint of it or another PEFT folder, whose base is found by itself.

    adapter=False: a run's base alone, stored and computed as for the run; its new tokens as they were before training.
    memory: of this process, as '4GiB', while it answers `prompt` (as generate takes it, or its tokens) with at most
    max_new_tokens. Where it does not suffice otherwise, keys and values wait in bfloat16, and layers are read from disk
    for each token. Raises RunError where the base is not the one that the adapter was trained on, SettingsError where
    nothing suffices, before weights are read.
    """
    found = find_model(model, quantize=quantize, compute_dtype=compute_dtype, device=device, report=report)
    how: dict[str, Any] = {"device": device, "trust_remote_code": trust_remote_code, "adapter": adapter}
    if memory is None:
        return load_found(found, **how, report=report)
    budget = parse_bytes(settings_from({"memory": memory}).memory or "")
    give_memory_back()
    decided = decide(found.source, found.quantize, found.compute_dtype, device, report)
    if not isinstance(prompt, int):
        renderer = Renderer(found.source.tokenizer)
        prompt = len(_prompt_ids(prompt, found.source.tokenizer, renderer, found.system, raw=raw))
    learnt = read_adapter(found.folder).nbytes if found.folder and adapter else 0
    plan = _plan(found, decided, budget, prompt, max_new_tokens, learnt, trust_remote_code, report)
    return load_found(found, **how, plan=plan, decided=decided, report=report)


def _plan(
    found: Found,
    decided: Decided,
    budget: int,
    prompt_tokens: int,
    new_tokens: int,
    adapter_bytes: int,
    trust_remote_code: bool,
    report: Report,
) -> GenerationPlan:
    checkpoint, on_cpu = found.source.checkpoint, decided.device.type == "cpu"
    model = inventory_of(
        checkpoint, checkpoint.config, decided.storage, name=checkpoint.path.name, itemsize=decided.dtype.itemsize,
        fuses=on_cpu, trust_remote_code=trust_remote_code,
    )  # fmt: skip
    ways = generation_plans(
        model, process_now(decided.device), prompt_tokens, new_tokens, decided.dtype.itemsize,
        adapter_bytes=adapter_bytes, can_stream=on_cpu,
    )  # fmt: skip
    plan = plan_generation(model, ways, budget)
    for line in plan.reasons(model, budget):
        report(Note(line))
    return plan


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
        return record.find_base(folder), record
    name = read_adapter(folder).config.get("base_model_name_or_path")
    if not name:
        raise RunError(f"{folder}/adapter_config.json names no base", expected="base_model_name_or_path")
    return str(name), None
