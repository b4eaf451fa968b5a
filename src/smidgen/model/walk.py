"""The decoder layers of a base, run one at a time and taken apart: what quantising layer by layer needs."""

from typing import Any

import torch
from torch import nn

from smidgen.errors import ModelError
from smidgen.model.build import Base
from smidgen.model.fused import FusedLayer
from smidgen.model.pages import pages_given_back
from smidgen.quant.gptq import Hessian
from smidgen.quant.linear import FrozenLinear

__all__ = ["LayerWalk", "decoder_layers", "exchange", "linears_of"]


class _Stop(Exception):
    """Ends a forward pass where its rest is not wanted."""


class LayerWalk:
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
        with pages_given_back(base.model, base.checkpoint):
            end = base.hidden_of(row[None].to(base.device))
        for hook in hooks:
            hook.remove()
        found = self.finish(last[0])
        if found is None or not torch.allclose(found, end, rtol=1e-4, atol=1e-5):
            self._tail = None

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

    def embed_rows(self, rows: torch.Tensor) -> torch.Tensor:
        """Token ids int64 [R, T] -> what the first layer gets, [R, T, hidden_size]; nothing is held twice."""
        first = self.embed(rows[0])
        hidden = first.new_empty(len(rows), *first.shape[1:])
        for row, ids in enumerate(rows):
            hidden[row] = self.embed(ids)[0]
        return hidden

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
        linears = linears_of(self._layers[index])

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
        linear = linears_of(self._layers[index])[name]
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


def decoder_layers(base: Base) -> list[tuple[str, nn.Module]]:
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


def linears_of(layer: nn.Module) -> dict[str, FrozenLinear]:
    """The linear layers inside a decoder layer, by their names there."""
    return {name: module for name, module in layer.named_modules() if isinstance(module, FrozenLinear)}


def exchange(layer: nn.Module, linears: dict[str, FrozenLinear]) -> None:
    """Put `linears` where those of the same names are."""
    for name, linear in linears.items():
        layer.set_submodule(name, linear)


def _hidden(output: Any) -> torch.Tensor:
    return output[0] if isinstance(output, tuple) else output
