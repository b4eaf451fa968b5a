"""A loaded base quantised by GPTQ, one decoder layer at a time, on the activations of a little text.

Every layer sees what the quantised layers before it make of the text (sequential), and within a layer those linear
layers that share an input are quantised together, in the order in which they run, the later ones on what the earlier
have become: q, k and v; then o; then gate and up; then down. Which ones share an input is found by running the layer.

One thing is not in the paper. Attention heads that have nothing to look at look at the first token of a row, so that an
error of its key and value goes into nearly every token, while in H it is one token of many, and a peculiar one: GPTQ
pushes the errors right there. For q, k and v the first token therefore counts as a sixteenth of the row. With v_proj of
SmolLM2-135M alone in 4 bits a held-out loss of 3.960 becomes 4.211 without this and 3.966 with it (rounding to nearest:
4.028); for the layers after attention it would do harm.

In memory are the hidden states of the text, float32 [rows, tokens, hidden_size], overwritten layer by layer, and of one
layer the float weights and one H at a time. A row of held-out text can be sent along through the float layers and
through each way of quantising them, which gives their perplexities without a second model.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from smidgen.errors import ModelError
from smidgen.events import Progress, Report, Warned, silent
from smidgen.model.build import Base
from smidgen.model.experts import PackedExperts
from smidgen.model.fused import FusedLayer
from smidgen.quant.gptq import GptqSettings, Hessian, output_error, quantise_gptq, round_to_nearest
from smidgen.quant.grouped import GroupedMatrix
from smidgen.quant.linear import FrozenLinear
from smidgen.quant.matrix import dense, quantise

__all__ = ["GptqPass", "QuantisedLinear", "check_plain_layers", "quantise_base"]

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


class _Stop(Exception):
    """Ends a forward pass where its rest is not wanted."""


def check_plain_layers(base: Base, storage: str) -> None:
    """Raise ModelError for a model whose weights the standard packed folders cannot hold."""
    kind = type(base.model).__name__
    if any(isinstance(module, PackedExperts) for module in base.model.modules()):
        raise ModelError(
            f"{kind}: experts of a mixture cannot be written as {storage}",
            expected="a model of plain linear layers", cure="fine-tune it with --quantize nf4-dq, which packs them",
        )  # fmt: skip
    if any(linear.transposed for linear in base.linears.values()):
        raise ModelError(
            f"{kind} stores its layers transposed (Conv1D), which cannot be written as {storage}",
            expected="a model of plain linear layers", cure="fine-tune it with --quantize nf4-dq, which packs them",
        )  # fmt: skip


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
        self._layers = _decoder_layers(base)
        self._rows, self._held_out = rows, held_out
        self.perplexity: dict[str, float] = {}

    @property
    def names(self) -> list[str]:
        """The linear layers that will be quantised."""
        return [f"{prefix}.{name}" for prefix, layer in self._layers for name in _linears(layer)]

    @torch.no_grad()
    def layers(self, *, keep: bool) -> Iterator[list[QuantisedLinear]]:
        """The linear layers of each decoder layer in turn. keep: they stay in the model, else only until the next."""
        base, count = self._base, len(self._layers)
        self._report(Progress("gptq", 0, count))
        walk = _Walk(base, [layer for _, layer in self._layers], self._rows[0])
        hidden = torch.cat([walk.embed(row) for row in self._rows])
        shown = _HeldOut(walk, self._held_out, self._settings)
        for index, (prefix, layer) in enumerate(self._layers):
            floats = _linears(layer)
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
                _exchange(layer, floats)
            del floats, quantised
            base.checkpoint.release()
            self._report(Progress("gptq", index + 1, count))
        self.perplexity = shown.perplexity()
        if self._held_out is not None and not self.perplexity:
            kind = type(base.model).__name__
            self._report(Warned(f"no perplexity: it is not known what {kind} computes after its last layer"))

    def _quantise_group(
        self,
        walk: "_Walk",
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
            _exchange(layer, {name: FrozenLinear(matrix, floats[name].bias)})
        return result


def quantise_base(
    base: Base, rows: torch.Tensor, settings: GptqSettings, report: Report = silent
) -> list[QuantisedLinear]:
    """Quantise a base in place, on calibration text `rows` int64 [R, T]; `base.storage` becomes 'gptq'."""
    walk = GptqPass(base, rows, settings, report=report)
    result = [linear for layer in walk.layers(keep=True) for linear in layer]
    base.storage = "gptq"
    return result


class _Walk:
    """Runs single decoder layers as the model runs them: with the arguments that it was seen to give them."""

    def __init__(self, base: Base, layers: list[nn.Module], row: torch.Tensor) -> None:
        self.base, self._layers = base, layers
        self._arguments: list[tuple[tuple[Any, ...], dict[str, Any]]] = [((), {}) for _ in layers]
        self._tail: list[nn.Module] | None = []
        last: list[torch.Tensor] = []
        hooks = [
            layer.register_forward_pre_hook(self._remember(index), with_kwargs=True)
            for index, layer in enumerate(layers)
        ]
        hooks.append(layers[-1].register_forward_hook(lambda _m, _a, output: last.append(_hidden(output))))
        owner = _owner(base.model, layers)
        hooks += [
            child.register_forward_hook(lambda module, _a, _o: self._tail.append(module) if last else None)  # type: ignore[union-attr]
            for child in owner.children()
            if not isinstance(child, nn.ModuleList)
        ]
        end = base.hidden_of(row[None].to(base.device))
        for hook in hooks:
            hook.remove()
        found = self.finish(last[0])
        if found is None or not torch.allclose(found, end, rtol=1e-4, atol=1e-5):
            self._tail = None
        base.checkpoint.release()

    def _remember(self, index: int) -> Any:
        def hook(_module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            kwargs = dict(kwargs)
            kwargs.pop("hidden_states", None)
            self._arguments[index] = args[1:], kwargs

        return hook

    def embed(self, row: torch.Tensor) -> torch.Tensor:
        """Token ids int64 [T] -> what the first layer gets, [1, T, hidden_size]."""
        found: list[torch.Tensor] = []

        def hook(_module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            found.append(args[0] if args else kwargs["hidden_states"])
            raise _Stop

        handle = self._layers[0].register_forward_pre_hook(hook, with_kwargs=True)
        try:
            self.base.hidden_of(row[None].to(self.base.device))
        except _Stop:
            pass
        finally:
            handle.remove()
        return found[0]

    def run(self, index: int, hidden: torch.Tensor, *, by_modules: bool = False) -> torch.Tensor:
        """Layer `index` over hidden [1, T, hidden_size]. by_modules: through its submodules, whose hooks then run."""
        layer = self._layers[index]
        if by_modules and isinstance(layer, FusedLayer):
            layer = layer.original
        args, kwargs = self._arguments[index]
        return _hidden(layer(hidden, *args, **kwargs))

    def finish(self, hidden: torch.Tensor) -> torch.Tensor | None:
        """What the last layer gives -> the backbone's last hidden states; None where that is not known."""
        if self._tail is None:
            return None
        for module in self._tail:
            hidden = module(hidden)
        return hidden

    def groups(self, index: int, hidden: torch.Tensor) -> list[list[str]]:
        """Names of the layer's linear layers in the order in which they run, those with the same input together."""
        seen: list[tuple[torch.Tensor, list[str]]] = []
        linears = _linears(self._layers[index])

        def hook_of(name: str) -> Any:
            def hook(_module: nn.Module, args: tuple[Any, ...]) -> None:
                x = args[0]
                if seen and seen[-1][0].data_ptr() == x.data_ptr() and seen[-1][0].shape == x.shape:
                    seen[-1][1].append(name)
                else:
                    seen.append((x, [name]))  # x is held, so that its memory is not used again

            return hook

        hooks = [linear.register_forward_pre_hook(hook_of(name)) for name, linear in linears.items()]
        self.run(index, hidden, by_modules=True)
        for hook in hooks:
            hook.remove()
        called = [name for _, names in seen for name in names]
        if sorted(called) != sorted(linears):
            other = (sorted(set(linears) - set(called)) or called)[0]
            raise ModelError(f"{type(self.base.model).__name__}: layer {other} does not run once for each token")
        return [names for _, names in seen]

    def hessian(self, index: int, name: str, hidden: torch.Tensor, first: float) -> Hessian:
        """Of the inputs that linear layer `name` gets when layer `index` runs over hidden [R, T, hidden_size].

        first: see Hessian.add.
        """
        linear = _linears(self._layers[index])[name]
        result = Hessian(linear.in_features, self.base.device)

        def hook(_module: nn.Module, args: tuple[Any, ...]) -> None:
            result.add(args[0], first)
            raise _Stop

        handle = linear.register_forward_pre_hook(hook)
        try:
            for row in hidden:
                try:
                    self.run(index, row[None], by_modules=True)
                except _Stop:
                    continue
        finally:
            handle.remove()
        return result


class _HeldOut:
    """Held-out text on its way through the layers, once for each way to store them."""

    def __init__(self, walk: _Walk, ids: torch.Tensor | None, settings: GptqSettings) -> None:
        self._walk, self._ids, self._settings = walk, ids, settings
        self._hidden: dict[str, torch.Tensor] = {}
        if ids is not None:
            start = torch.cat([walk.embed(row) for row in ids])
            self._hidden = {name: start.clone() for name in ("before", "gptq", "rtn", "nf4")}

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
            _exchange(layer, {key: FrozenLinear(made[key], f.bias) for key, f in floats.items()})
            self._run(name, index)
            _exchange(layer, floats)

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


def _decoder_layers(base: Base) -> list[tuple[str, nn.Module]]:
    """Name and module of each decoder layer: the list of modules that has most linear layers in it."""
    names = [name for name in base.linears if name != base.head_name]
    lists = [(name, module) for name, module in base.model.named_modules() if isinstance(module, nn.ModuleList)]
    inside = {name: sum(linear.startswith(f"{name}.") for linear in names) for name, _ in lists}
    best = max(lists, key=lambda item: inside[item[0]], default=None)
    if best is None or not inside[best[0]]:
        raise ModelError(f"{type(base.model).__name__} has no list of decoder layers", expected="a causal decoder")
    return [(f"{best[0]}.{key}", layer) for key, layer in best[1].named_children()]


def _owner(model: nn.Module, layers: list[nn.Module]) -> nn.Module:
    """The module that holds the list of layers."""
    for module in model.modules():
        for child in module.children():
            if isinstance(child, nn.ModuleList) and len(child) and child[0] is layers[0]:
                return module
    raise AssertionError("the layers come from the model")


def _linears(layer: nn.Module) -> dict[str, FrozenLinear]:
    return {name: module for name, module in layer.named_modules() if isinstance(module, FrozenLinear)}


def _exchange(layer: nn.Module, linears: dict[str, FrozenLinear]) -> None:
    for name, linear in linears.items():
        parent, _, last = name.rpartition(".")
        setattr(layer.get_submodule(parent), last, linear)


def _hidden(output: Any) -> torch.Tensor:
    return output[0] if isinstance(output, tuple) else output
