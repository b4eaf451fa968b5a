"""The optimizer steps of `smidgen finetune` over a base in memory, for workers that measure them, and what they need of
a card.
"""

from collections.abc import Sequence

import torch

from smidgen.checkpoint.base import Checkpoint
from smidgen.data.batch import Batch
from smidgen.kernels.pages import ReusedPages
from smidgen.lora.attach import attach_lora
from smidgen.lora.targets import select_targets
from smidgen.model.build import Base
from smidgen.model.fused import is_fused
from smidgen.model.inventory import inventory_of
from smidgen.model.recompute import set_recompute
from smidgen.planning.planner import Choice, Machine, forecast
from smidgen.train.config import Settings
from smidgen.train.loss import batch_loss
from smidgen.train.memory import work_of
from smidgen.train.optimizers import make_optimizer
from smidgen.train.step import optimizer_step

__all__ = ["Stepper", "forecast_on_card"]


def forecast_on_card(
    checkpoint: Checkpoint, storage: str, settings: Settings, rows: torch.Tensor, itemsize: int, recompute: str
) -> int:
    """Bytes that a GPU's allocator holds at most in a step over `rows` [N, T]; left out: CUDA itself."""
    model = inventory_of(checkpoint, checkpoint.config, storage, itemsize=itemsize, fuses=False)
    work = work_of(model, settings, [rows.shape[1]] * len(rows), itemsize)
    nothing_yet = Machine(1.0, 1.0, 1.0, framework_bytes=0, library_bytes=0, threads=0, is_cpu=False)
    return forecast(model, work, nothing_yet, Choice(len(rows), 1, (recompute,) * model.num_layers)).peak_bytes


class Stepper:
    """Adapters as the settings say on `base`, and their optimizer; a step accumulates all batches."""

    def __init__(
        self, base: Base, settings: Settings, recompute: str | Sequence[str], batches: Sequence[Batch]
    ) -> None:
        self.base, self.settings, self.batches = base, settings, list(batches)
        names, _ = select_targets(settings.targets, base.linears, base.head_name)
        adapters = attach_lora(
            base.model, names, rank=settings.rank, alpha=settings.alpha, dropout=0.0, seed=settings.seed
        )
        set_recompute(base, recompute, settings.activation_dtype)
        self.parameters = [parameter for layer in adapters.values() for parameter in layer.parameters()]
        self.optimizer = make_optimizer(adapters, settings)
        self.pages = ReusedPages(is_fused(base.backbone))

    def step(self) -> float:
        """One step; returns its loss."""
        self.base.model.train()
        with self.pages:
            result = optimizer_step(
                lambda batch: batch_loss(self.base, batch),
                self.batches,
                self.parameters,
                self.optimizer,
                learning_rate=self.settings.learning_rate,
                clip=self.settings.clip,
            )
        self.base.model.eval()
        return result.loss
