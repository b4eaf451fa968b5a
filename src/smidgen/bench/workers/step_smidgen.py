"""Our training step as a benchmark's worker: the functions that `smidgen finetune` calls, over a base on disk.

storage "none" is the dense twin for the 4-bit tax: the same code, every matrix of the decoder once turned to float32.
"""

import time
from pathlib import Path
from typing import Any

import torch

from smidgen.bench.workers.serving import peak_rss_bytes, reset_peak_rss, serve, timed_step, versions
from smidgen.bench.workers.stepper import Stepper
from smidgen.checkpoint.open import open_checkpoint
from smidgen.data.batch import Batch
from smidgen.model.build import Base
from smidgen.model.load import Source, load_base
from smidgen.quant.matrix import quantise
from smidgen.train.config import Settings

__all__ = ["StepWorker"]


class StepWorker:
    """load, then step as often as wanted."""

    def load(
        self,
        folder: str,
        input_ids: list[int],
        storage: str,
        compute_dtype: str,
        recompute: str,
        rank: int,
        alpha: float,
        learning_rate: float,
        probe_width: int,
    ) -> dict[str, Any]:
        reset_peak_rss()
        started = time.perf_counter()
        base = _load(Path(folder), storage, compute_dtype)
        load_s, load_peak = time.perf_counter() - started, peak_rss_bytes()
        if storage == "none":
            _to_float32(base)
        settings = Settings(rank=rank, alpha=alpha, learning_rate=learning_rate, micro_batch=1, seq_len=len(input_ids))
        ids = torch.tensor([input_ids])
        batch = Batch(ids, ids.clone(), torch.tensor([len(input_ids)]))
        self.stepper = Stepper(base, settings, recompute, [batch])
        self.probe_width = probe_width
        return {
            "load_s": load_s,
            "load_peak_rss_bytes": load_peak,
            "threads": torch.get_num_threads(),
            "cpu_capability": torch.backends.cpu.get_cpu_capability(),
            "trainable_parameters": sum(parameter.numel() for parameter in self.stepper.parameters),
            "versions": versions("smidgen", "torch", "transformers"),
        }

    def step(self) -> dict[str, Any]:
        return timed_step(self.stepper.step, self.probe_width)


def _load(folder: Path, storage: str, compute_dtype: str) -> Base:
    source = Source(str(folder), open_checkpoint(folder), tokenizer=None)  # the steps take token ids
    return load_base(source, quantize=storage, compute_dtype=compute_dtype, device="cpu")


@torch.no_grad()
def _to_float32(base: Base) -> None:
    for name, linear in base.linears.items():
        if name != base.head_name:
            dense = linear.weight.rows(0, linear.out_features, torch.float32).clone()
            linear.weight = quantise(dense, "none")


if __name__ == "__main__":
    worker = StepWorker()
    serve({"load": worker.load, "step": worker.step})
