"""Training steps or generation within a budget of memory as a benchmark's worker: forecast and measured peak."""

import threading
import time
from pathlib import Path
from typing import Any

import torch

from smidgen.bench.workers.serving import current_rss_bytes, peak_rss_bytes, reset_peak_rss, serve, versions
from smidgen.bench.workers.stepper import Stepper
from smidgen.checkpoint.open import open_checkpoint
from smidgen.data.batch import Batch
from smidgen.model.device import choose_device, swapped_bytes
from smidgen.model.generate import Sampling, stream_tokens
from smidgen.model.inventory import inventory_of
from smidgen.model.load import Source, load_base
from smidgen.planning.generation import generation_plans, plan_generation
from smidgen.train.config import Settings
from smidgen.train.memory import give_memory_back, machine_now, plan_run, work_of

__all__ = ["MemoryWorker"]

_SAMPLE_S = 0.01


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


class MemoryWorker:
    """load, then step as often as wanted, or generate."""

    def load(
        self,
        folder: str,
        storage: str,
        input_ids: list[list[int]],
        budget: int | None,
        recompute: str,
        rank: int,
        targets: str,
        train: bool,
        compute_dtype: str = "float32",
        activation_dtype: str = "auto",
        new_tokens: int = 0,
        can_stream: bool = True,
    ) -> dict[str, Any]:
        settings = Settings(
            rank=rank, alpha=2.0 * rank, learning_rate=1e-4, targets=targets, recompute=recompute,
            micro_batch=len(input_ids), seq_len=max(8, len(input_ids[0])), activation_dtype=activation_dtype,
        )  # fmt: skip
        give_memory_back(tight=budget is not None)
        budget = budget or 1 << 50
        path = Path(folder)
        checkpoint = open_checkpoint(path)
        dtype, device = getattr(torch, compute_dtype), choose_device("cpu")
        model = inventory_of(checkpoint, checkpoint.config, storage, name=path.name, itemsize=dtype.itemsize)
        work = work_of(model, settings, [len(ids) for ids in input_ids], dtype.itemsize)
        largest = max(path.glob("*.safetensors"), key=lambda file: file.stat().st_size)
        machine = machine_now(device, dtype, largest, generates=not train)
        cache = "float32"
        if train:
            plan = plan_run(model, work, machine, settings, (budget, "--memory"), can_stream=can_stream)
        else:
            ways = generation_plans(model, machine, len(input_ids[0]), new_tokens, dtype.itemsize)
            found = plan_generation(model, ways, budget)
            plan, cache = found.forecast, found.cache_dtype
        self.anonymous = _Anonymous()
        reset_peak_rss()
        source = Source(folder, checkpoint, tokenizer=None)
        self.base = load_base(
            source, quantize=storage, compute_dtype=compute_dtype, device="cpu", streamed=plan.choice.streamed
        )
        self.base.cache_dtype = getattr(torch, cache)
        self.base.tile_tokens, self.base.loss_chunk = plan.choice.tile_tokens, plan.choice.loss_chunk
        load_peak = peak_rss_bytes()
        loaded = current_rss_bytes()
        size = plan.choice.micro_batch
        self.rows = torch.tensor(input_ids)
        if train:
            parts = self.rows.split(size)
            batches = [Batch(part, part.clone(), torch.full((len(part),), part.shape[1])) for part in parts]
            self.stepper = Stepper(self.base, settings, plan.choice.recompute, batches)
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
            "load_peak_rss_bytes": load_peak,
            "loaded_rss_bytes": loaded,
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
    serve({"load": worker.load, "step": worker.step, "generate": worker.generate})
