"""Training steps or generation within a budget of memory as a benchmark's worker: forecast and measured peak."""

import threading
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from smidgen.bench.workers.serving import peak_rss_bytes, reset_peak_rss, serve, versions
from smidgen.bench.workers.stepper import Stepper
from smidgen.checkpoint.open import open_checkpoint
from smidgen.data.batch import Batch
from smidgen.model.device import swapped_bytes
from smidgen.model.generate import Sampling, stream_tokens
from smidgen.model.inventory import inventory_of
from smidgen.model.load import Decided, Source, load_base
from smidgen.planning.generation import generation_plans, plan_generation
from smidgen.planning.inventory import Inventory
from smidgen.planning.planner import Forecast, Machine
from smidgen.train.config import Settings
from smidgen.train.memory import give_memory_back, machine_now, plan_run, process_now, work_of

__all__ = ["MemoryWorker"]

_SAMPLE_S = 0.01
_NO_BUDGET = 1 << 50  # bytes


class _Anonymous:
    """The largest anonymous memory of this process, sampled; the kernel keeps no such peak."""

    def __init__(self) -> None:
        self.peak = 0
        threading.Thread(target=self._watch, daemon=True).start()

    def _watch(self) -> None:
        while True:
            with open("/proc/self/status", encoding="ascii", errors="replace") as file:
                text = file.read()
            now = sum(int(text.split(name)[1].split()[0]) * 1024 for name in ("RssAnon:", "RssShmem:"))
            self.peak = max(self.peak, now)
            time.sleep(_SAMPLE_S)


@dataclass(frozen=True)
class _How:
    """What a plan follows from, beside the model and the rows. budget: bytes; None: none."""

    storage: str
    budget: int | None
    train: bool
    recompute: str
    rank: int
    targets: str
    compute_dtype: str = "float32"
    activation_dtype: str = "auto"
    new_tokens: int = 0

    @property
    def dtype(self) -> torch.dtype:
        return getattr(torch, self.compute_dtype)

    def settings(self, lengths: list[int]) -> Settings:
        return Settings(
            rank=self.rank, alpha=2.0 * self.rank, learning_rate=1e-4, targets=self.targets, recompute=self.recompute,
            micro_batch=len(lengths), seq_len=max(8, lengths[0]), activation_dtype=self.activation_dtype,
        )  # fmt: skip

    def plan(self, model: Inventory, machine: Machine, lengths: list[int]) -> tuple[Forecast, str]:
        """(what fits, the type of the key cache). Raises SettingsError where nothing does, and for wrong settings."""
        settings, item = self.settings(lengths), self.dtype.itemsize
        work = work_of(model, settings, lengths, item)
        budget = _NO_BUDGET if self.budget is None else self.budget
        if self.train:
            return plan_run(model, work, machine, settings, (budget, "--memory")), "float32"
        found = plan_generation(model, generation_plans(model, machine, lengths[0], self.new_tokens, item), budget)
        return found.forecast, found.cache_dtype


class MemoryWorker:
    """check, or load, then step as often as wanted, or generate."""

    def check(self, name: str, config: dict[str, Any], lengths: list[int], **how: Any) -> dict[str, Any]:
        """Plan for a model that is not written yet."""
        from smidgen.bench.packed_model import packed_inventory  # not into the process that is measured

        given = _How(**how)
        model = packed_inventory(config, given.storage, name=name, itemsize=given.dtype.itemsize)
        given.plan(model, process_now(torch.device("cpu")), lengths)
        return {}

    def load(self, folder: str, input_ids: list[list[int]], **how: Any) -> dict[str, Any]:
        given, path, device = _How(**how), Path(folder), torch.device("cpu")
        give_memory_back()
        checkpoint, lengths = open_checkpoint(path), [len(ids) for ids in input_ids]
        model = inventory_of(
            checkpoint, checkpoint.config, given.storage, name=path.name, itemsize=given.dtype.itemsize
        )
        machine = machine_now(device, given.dtype, model, checkpoint, generates=not given.train)
        plan, cache = given.plan(model, machine, lengths)
        self.anonymous = _Anonymous()
        reset_peak_rss()
        decided = Decided(given.storage, given.dtype, device)
        self.base = load_base(
            Source(folder, checkpoint, tokenizer=None), decided=decided, streamed=plan.choice.streamed
        )
        self.base.cache_dtype = getattr(torch, cache)
        self.base.tile_tokens, self.base.loss_chunk = plan.choice.tile_tokens, plan.choice.loss_chunk
        size = plan.choice.micro_batch
        self.rows = torch.tensor(input_ids)
        if given.train:
            parts = self.rows.split(size)
            batches = [Batch(part, part.clone(), torch.full((len(part),), part.shape[1])) for part in parts]
            self.stepper = Stepper(self.base, given.settings(lengths), plan.choice.recompute, batches)
        return {
            "forecast_peak_bytes": plan.anonymous_bytes,
            "forecast_rss_bytes": plan.peak_bytes,
            "forecast_step_s": plan.step_s,
            "terms": plan.terms,
            "streamed_layers": len(plan.choice.streamed),
            "recompute": plan.choice.recompute_name,
            "cache_dtype": cache,
            "micro_batch": size,
            "tile_tokens": plan.choice.tile_tokens,
            "loss_chunk": plan.choice.loss_chunk,
            "disk_bytes_per_s": machine.disk_bytes_per_s,
            "threads": machine.threads,
            "versions": versions("smidgen", "torch", "transformers"),
        }

    def step(self) -> dict[str, Any]:
        """One optimizer step over all rows."""
        before, started = self._streamed(), time.perf_counter()
        loss = self.stepper.step()
        return self._measured(time.perf_counter() - started, before, 1) | {"loss": loss}

    def generate(self, tokens: int) -> dict[str, Any]:
        """So many new tokens after the first row; each of them is a step."""
        before, started = self._streamed(), time.perf_counter()
        sampling = Sampling(max_new_tokens=tokens)
        vocab = self.base.model.config.get_text_config().vocab_size
        new = list(stream_tokens(self.base, self.rows[0].tolist(), [], sampling, vocab))
        return self._measured(time.perf_counter() - started, before, max(1, len(new))) | {"new_tokens": len(new)}

    def _streamed(self) -> tuple[int, float]:
        """(bytes read, seconds waited) so far."""
        stream = self.base.stream
        return (stream.read_bytes, stream.wait_s) if stream else (0, 0.0)

    def _measured(self, seconds: float, before: tuple[int, float], steps: int) -> dict[str, Any]:
        """Time, bytes read and time waited for them of each of the steps that took so long; memory so far."""
        read, waited = self._streamed()
        return {
            "step_s": seconds / steps,
            "measured_peak_bytes": self.anonymous.peak,
            "peak_rss_bytes": peak_rss_bytes(),
            "swapped_bytes": swapped_bytes(),
            "read_bytes": round((read - before[0]) / steps),
            "wait_s": (waited - before[1]) / steps,
        }


if __name__ == "__main__":
    worker = MemoryWorker()
    serve({"check": worker.check, "load": worker.load, "step": worker.step, "generate": worker.generate})
