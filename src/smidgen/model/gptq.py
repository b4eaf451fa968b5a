"""A loaded base quantised by GPTQ, one decoder layer at a time, on the activations of a little text.

Every layer sees what the quantised layers before it make of the text (sequential), and within a layer those linear
layers that share an input are quantised together, in the order in which they run, the later ones on what the earlier
have become: q, k and v; then o; then gate and up; then down. Which ones share an input is found by running the layer.

One thing is not in the paper. Attention heads that have nothing to look at look at the first token of a row, so that an
error of its key and value goes into nearly every token, while in H it is one token of many, and a peculiar one: GPTQ
pushes the errors right there. For q, k and v the first token therefore counts as a sixteenth of the row: SmolLM2-135M's
perplexity after GPTQ was a fifth higher without this (docs/log.md). For the layers after attention it would do harm.

In memory are the hidden states of the text, float32 [rows, tokens, hidden_size], overwritten layer by layer, and of one
layer the float weights and one H at a time. A row of held-out text can be sent along through the float layers and
through each way of quantising them, which gives their perplexities without a second model.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import nn

from smidgen.errors import ModelError
from smidgen.events import Progress, Report, Warned, silent
from smidgen.model.build import Base
from smidgen.model.experts import PackedExperts
from smidgen.model.walk import LayerWalk, decoder_layers, exchange, linears_of
from smidgen.quant.gptq import GptqSettings, output_error, quantise_gptq, round_to_nearest
from smidgen.quant.grouped import GroupedMatrix
from smidgen.quant.linear import FrozenLinear
from smidgen.quant.matrix import dense, quantise

__all__ = ["GptqPass", "QuantisedLinear", "check_plain_layers", "no_place", "quantise_base"]

_LOSS_TOKENS = 128  # logits computed at once
_FIRST_TOKEN_SHARE = 1 / 16


@dataclass(frozen=True)
class QuantisedLinear:
    """A linear layer's new matrix and its relative output errors |X (W - Q)ᵀ| / |X Wᵀ| on the calibration text, GPTQ's
    and that of rounding to nearest; first tokens count as described above.
    """

    name: str
    matrix: GroupedMatrix
    error: float
    rtn_error: float

    def figures(self) -> dict[str, float | str]:
        """Plain values for JSON."""
        return {"layer": self.name, "gptq": self.error, "rtn": self.rtn_error}


def check_plain_layers(base: Base, storage: str) -> None:
    """Raise ModelError for a model whose weights the standard packed folders cannot hold."""
    kind = type(base.model).__name__
    if any(isinstance(module, PackedExperts) for module in base.model.modules()):
        raise no_place(f"{kind}: experts of a mixture", storage)
    if any(linear.transposed for linear in base.linears.values()):
        raise no_place(f"{kind}: transposed layers (Conv1D)", storage)


def no_place(what: str, storage: str) -> ModelError:
    """What the standard packed folders cannot hold."""
    return ModelError(
        f"{what} cannot be written as {storage}",
        expected="a model of plain linear layers",
        cure="fine-tune it with --quantize nf4-dq, which packs them",
    )


class GptqPass:
    """One walk through the layers of `base`. rows int64 [R, T]: calibration text; held_out int64 [H, T] or None.

    perplexity: after the walk, that of `held_out` by 'before' (the base as it came), 'gptq', 'rtn' (round to nearest)
    and 'nf4'; empty without held-out text. Raises ModelError for models of another build.
    """

    def __init__(
        self,
        base: Base,
        rows: torch.Tensor,
        settings: GptqSettings,
        held_out: torch.Tensor | None = None,
        report: Report = silent,
    ) -> None:
        check_plain_layers(base, "gptq")
        self._base, self._settings, self._report = base, settings, report
        self._layers = decoder_layers(base)
        self._rows, self._held_out = rows, held_out
        self.perplexity: dict[str, float] = {}

    @property
    def names(self) -> list[str]:
        """The linear layers that will be quantised."""
        return [f"{prefix}.{name}" for prefix, layer in self._layers for name in linears_of(layer)]

    @torch.no_grad()
    def layers(self, *, keep: bool) -> Iterator[list[QuantisedLinear]]:
        """The linear layers of each decoder layer in turn. keep: they stay in the model, else only until the next."""
        base, count = self._base, len(self._layers)
        self._report(Progress("gptq", 0, count))
        walk = LayerWalk(base, [layer for _, layer in self._layers], self._rows[0])
        hidden = walk.embed_rows(self._rows)
        shown = _HeldOut(walk, self._held_out, self._settings)
        for index, (prefix, layer) in enumerate(self._layers):
            floats = linears_of(layer)
            shown.step(index, layer, floats)
            quantised: list[QuantisedLinear] = []
            first = 1.0 + _FIRST_TOKEN_SHARE * hidden.shape[1]  # of q, k and v, which run first
            for names in walk.groups(index, hidden[:1]):
                done = self._quantise_group(walk, index, layer, floats, names, hidden, first)
                first = 1.0
                quantised += [QuantisedLinear(f"{prefix}.{q.name}", q.matrix, q.error, q.rtn_error) for q in done]
            for row in hidden:
                row.copy_(walk.run(index, row[None])[0])
            shown.step_gptq(index)
            yield quantised
            if not keep:
                exchange(layer, floats)
            del floats, quantised
            base.checkpoint.release()
            self._report(Progress("gptq", index + 1, count))
        self.perplexity = shown.perplexity()
        if self._held_out is not None and not self.perplexity:
            kind = type(base.model).__name__
            self._report(Warned(f"no perplexity: it is not known what {kind} computes after its last layer"))

    def _quantise_group(
        self,
        walk: LayerWalk,
        index: int,
        layer: nn.Module,
        floats: dict[str, FrozenLinear],
        names: list[str],
        hidden: torch.Tensor,
        first: float,
    ) -> list[QuantisedLinear]:
        hessian = walk.hessian(index, names[0], hidden, first).matrix
        weights = [dense(floats[name].weight, torch.float32, self._base.device) for name in names]
        result = []
        for name, weight, matrix in zip(
            names, weights, quantise_gptq(weights, hessian, self._settings, self._report), strict=True
        ):
            rtn = round_to_nearest(weight, self._settings)
            errors = output_error(weight, matrix, hessian), output_error(weight, rtn, hessian)
            result.append(QuantisedLinear(name, matrix, *errors))
            exchange(layer, {name: FrozenLinear(matrix, floats[name].bias)})
        return result


def quantise_base(
    base: Base, rows: torch.Tensor, settings: GptqSettings, report: Report = silent
) -> list[QuantisedLinear]:
    """Quantise a base in place, on calibration text `rows` int64 [R, T]; `base.storage` becomes 'gptq'."""
    walk = GptqPass(base, rows, settings, report=report)
    result = [linear for layer in walk.layers(keep=True) for linear in layer]
    base.storage = "gptq"
    return result


class _HeldOut:
    """Held-out text on its way through the layers, once for each way to store them."""

    def __init__(self, walk: LayerWalk, ids: torch.Tensor | None, settings: GptqSettings) -> None:
        self._walk, self._ids, self._settings = walk, ids, settings
        self._hidden: dict[str, torch.Tensor] = {}
        if ids is not None:
            self._hidden = {name: walk.embed_rows(ids) for name in ("before", "gptq", "rtn", "nf4")}

    def step(self, index: int, layer: nn.Module, floats: dict[str, FrozenLinear]) -> None:
        """Through the layer as it came, rounded to nearest, and as NF4."""
        if not self._hidden:
            return
        self._run("before", index)
        for name, make in (
            ("rtn", lambda weight: round_to_nearest(weight, self._settings)),
            ("nf4", lambda weight: quantise(weight, "nf4")),
        ):
            device = self._walk.base.device
            made = {key: make(dense(f.weight, torch.float32, device)) for key, f in floats.items()}
            exchange(layer, {key: FrozenLinear(made[key], f.bias) for key, f in floats.items()})
            self._run(name, index)
            exchange(layer, floats)

    def step_gptq(self, index: int) -> None:
        """Through the layer as it is now."""
        if self._hidden:
            self._run("gptq", index)

    def _run(self, name: str, index: int) -> None:
        for row in self._hidden[name]:
            row.copy_(self._walk.run(index, row[None])[0])

    def perplexity(self) -> dict[str, float]:
        if self._ids is None:
            return {}
        result = {}
        for name, hidden in self._hidden.items():
            total, tokens = 0.0, 0
            for row, ids in zip(hidden, self._ids.to(hidden.device), strict=True):
                last = self._walk.finish(row[None])
                if last is None:
                    return {}
                for part, labels in zip(last[0, :-1].split(_LOSS_TOKENS), ids[1:].split(_LOSS_TOKENS), strict=True):
                    logits = self._walk.base.logits_of(part).float()
                    total += float(nn.functional.cross_entropy(logits, labels, reduction="sum"))
                    tokens += len(labels)
            result[name] = math.exp(min(total / tokens, 700.0))
        return result
