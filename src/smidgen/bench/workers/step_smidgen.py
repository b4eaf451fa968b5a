"""Our training step as a benchmark's worker: the functions that `smidgen finetune` calls, over a base on disk.

storage "none" is the dense twin for the 4-bit tax: the same code, every matrix of the decoder once turned to float32.
"""

import time
from pathlib import Path
from typing import Any

import torch

from smidgen.bench.workers.serving import peak_rss_bytes, reset_peak_rss, serve, timed_step, versions
from smidgen.checkpoint.open import open_checkpoint
from smidgen.data.batch import Batch
from smidgen.lora.attach import attach_lora
from smidgen.lora.targets import select_targets
from smidgen.model.build import Base
from smidgen.model.load import Source, load_base
from smidgen.model.recompute import set_recompute
from smidgen.quant.matrix import quantise
from smidgen.train.config import Settings
from smidgen.train.loss import batch_loss
from smidgen.train.optimizers import make_optimizer
from smidgen.train.step import optimizer_step

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
        self.settings = Settings(
            rank=rank, alpha=alpha, learning_rate=learning_rate, micro_batch=1, seq_len=len(input_ids)
        )
        names, _ = select_targets("all", base.linears, base.head_name)
        self.adapters = attach_lora(base.model, names, rank=rank, alpha=alpha, dropout=0.0, seed=0)
        set_recompute(base, recompute)
        self.base = base
        self.optimizer = make_optimizer(self.adapters, self.settings)
        ids = torch.tensor([input_ids])
        self.batch = Batch(ids, ids.clone(), torch.tensor([len(input_ids)]))
        self.probe_width = probe_width
        return {
            "load_s": load_s,
            "load_peak_rss_bytes": load_peak,
            "threads": torch.get_num_threads(),
            "cpu_capability": torch.backends.cpu.get_cpu_capability(),
            "trainable_parameters": sum(p.numel() for layer in self.adapters.values() for p in layer.parameters()),
            "versions": versions("smidgen", "torch", "transformers"),
        }

    def step(self) -> dict[str, Any]:
        return timed_step(self._step, self.probe_width)

    def _step(self) -> float:
        parameters = [parameter for group in self.optimizer.param_groups for parameter in group["params"]]
        self.base.model.train()
        result = optimizer_step(
            lambda batch: batch_loss(self.base, batch),
            [self.batch],
            parameters,
            self.optimizer,
            learning_rate=self.settings.learning_rate,
            clip=self.settings.clip,
        )
        self.base.model.eval()
        return result.loss


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
