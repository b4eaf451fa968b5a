"""Which tensors of a checkpoint make up which parameter of a model.

Checkpoints on the hub keep the names of the day they were made; transformers' own table of renamings and conversions
(experts gathered into one tensor, prefixes added) says what they are called now. It is applied here one parameter at a
time, so that a model is never wholly in memory.
"""

import copy
import re
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import WeightConverter, WeightRenaming, dot_natural_key, rename_source_key

from smidgen.checkpoint.base import Checkpoint
from smidgen.errors import ModelError
from smidgen.model.stored import StoredWeights
from smidgen.quant.matrix import DenseMatrix, FrozenMatrix

__all__ = ["Weights"]

# Buffers that old exports wrote into checkpoints though every program computes them.
_COMPUTED = re.compile(
    r"(rotary_emb|rotary_pos_emb)\.(inv_freq|original_inv_freq)$|attn\.(masked_)?bias$|attention\.(masked_)?bias$"
)
_STACKED, _ON_TOP = ("MergeModulelist", 0), ("Concatenate", 1)  # transformers' steps, and along which dimension
_COMPARED_ROWS = 1024
_FLOATS = (torch.float32, torch.float16, torch.bfloat16, torch.float64)


@dataclass
class _Recipe:
    """One or more parameters from one conversion: the sources by the converter's pattern."""

    converter: WeightConverter | None
    sources: dict[str, list[str]] = field(default_factory=lambda: defaultdict(list))

    def names(self) -> list[str]:
        return [name for group in self.sources.values() for name in group]


class Weights:
    """The parameters of `model` (a skeleton on the meta device) as they can be read from `checkpoint`.

    Raises ModelError at once, naming every tensor, when parameters are missing, tensors are left over or shapes differ.
    """

    def __init__(self, model: nn.Module, checkpoint: Checkpoint, stored: StoredWeights | None = None) -> None:
        self._model, self.checkpoint, self._stored = model, checkpoint, stored
        self.shapes = {name: tuple(parameter.shape) for name, parameter in model.named_parameters()}
        self._recipes = self._find_recipes()
        self._check_complete()

    def _find_recipes(self) -> dict[str, _Recipe]:
        transforms = get_model_conversion_mapping(self._model)  # type: ignore[arg-type]
        converters = [t for t in transforms if isinstance(t, WeightConverter)]
        renamings = [t for t in transforms if isinstance(t, WeightRenaming)]
        expected = dict(self._model.named_parameters(remove_duplicate=False)) | dict(self._model.named_buffers())
        prefix: Any = self._model.base_model_prefix
        by_pattern = {pattern: converter for converter in converters for pattern in converter.source_patterns}
        recipes: dict[str, _Recipe] = {}
        stored = self._stored
        tensors = (tensor if stored is None else stored.parameter_of(tensor) for tensor in self.checkpoint.tensors)
        for source in sorted((tensor for tensor in tensors if tensor is not None), key=dot_natural_key):
            name, pattern = rename_source_key(source, renamings, converters, prefix, expected)  # type: ignore[arg-type]
            if pattern is None and source in expected:
                name = source
            recipe = recipes.setdefault(name, _Recipe(by_pattern[pattern] if pattern else None))
            recipe.sources[pattern or ""].append(source)
        for name, recipe in list(recipes.items()):
            for other in _other_targets(name, recipe.converter):
                recipes[other] = recipe
        return recipes

    def _check_complete(self) -> None:
        where = self.checkpoint.path
        missing = [name for name in self.shapes if name not in self._recipes]  # a weight that two share has one name
        if missing:
            raise ModelError(
                f"{where}: {_listed(missing)} missing",
                expected=f"the {len(self.shapes)} parameters of {type(self._model).__name__}",
                cure="download the model again, or check that config.json belongs to these weights",
            )
        ignored = [re.compile(p) for p in getattr(self._model, "_keys_to_ignore_on_load_unexpected", None) or ()]
        known = set(self.shapes) | {n for n, _ in self._model.named_parameters(remove_duplicate=False)}
        extra = [
            name
            for name in self._recipes
            if name not in known and not _COMPUTED.search(name) and not any(p.search(name) for p in ignored)
        ]
        weights = {source for name in self.shapes if name in self._recipes for source in self.sources(name)}
        extra = [name for name in extra if not self._is_idle_bias(name, weights)]
        if extra:
            raise ModelError(
                f"{where}: {_listed(extra)} left over",
                expected=f"only the parameters of {type(self._model).__name__}",
                cure="check that config.json belongs to these weights",
            )

        for name, shape in self.shapes.items():
            recipe = self._recipes.get(name)
            sources = recipe.names() if recipe and recipe.converter is None else []
            info = self.checkpoint.tensors.get(sources[0]) if sources else None
            # bytes have a shape of their own, which their reader checks; a GGUF file tells that of the numbers
            is_packed = self._stored is not None and len(shape) == 2 and self.checkpoint.format != "gguf"
            if info is not None and info.shape != shape and not is_packed:
                raise self._wrong_shape(name, shape, info.shape)

    def _is_idle_bias(self, name: str, weights: set[str]) -> bool:
        """All zeros beside a packed weight whose layer has no bias: AutoGPTQ wrote one for every layer, experts too.

        weights: the tensors of all parameters.
        """
        source, *others = self.sources(name)
        module, _, part = source.rpartition(".")
        if self._stored is None or part != "bias" or others or f"{module}.weight" not in weights:
            return False
        return not bool(self.checkpoint.read(source).any())

    def _wrong_shape(self, name: str, shape: tuple[int, ...], found: tuple[int, ...]) -> ModelError:
        is_gguf = self.checkpoint.format == "gguf"
        return ModelError(
            f"{self.checkpoint.path}: tensor {name}",
            expected=f"shape {list(shape)} by {'the metadata' if is_gguf else 'config.json'}",
            found=str(list(found)),
            cure="download it again" if is_gguf else "check that config.json belongs to these weights",
        )

    def __contains__(self, name: str) -> bool:
        return name in self._recipes

    def has_other_head(self) -> bool:
        """Whether the checkpoint has a head of other numbers than the embedding, though the model has them as one."""
        model: Any = self._model
        names = {module: f"{name}.weight" for name, module in model.named_modules()}
        embedding, head = names[model.get_input_embeddings()], names[model.get_output_embeddings()]
        if head in self.shapes or head not in self:
            return False
        sources = [self.sources(name)[0] for name in (embedding, head)]
        if not self.checkpoint.tensors.keys() >= set(sources):  # packed
            return True
        first, second = map(self.checkpoint.read, sources)
        return first.shape != second.shape or any(
            not torch.equal(one.float(), other.float())
            for one, other in zip(self._panels(first), self._panels(second), strict=True)
        )

    def _panels(self, matrix: torch.Tensor) -> Iterator[torch.Tensor]:
        """Some rows at a time, so that little of the file is in memory."""
        for panel in matrix.split(_COMPARED_ROWS):
            yield panel
            self.checkpoint.release()

    def sources(self, name: str) -> list[str]:
        """The checkpoint's tensors that make up this parameter."""
        return self._recipes[name].names()

    def packed(self, name: str) -> FrozenMatrix | None:
        """The parameter as the checkpoint has packed it already; None if it is stored as numbers."""
        if self._stored is None or self._recipes[name].converter is not None or len(self.shapes.get(name, ())) != 2:
            return None
        out_features, in_features = self.shapes[name]
        return self._stored.matrix(self.sources(name)[0], (out_features, in_features))

    def experts(self, name: str) -> list[list[str]] | None:
        """Of a parameter [E, N, K] that is E experts, each of them one or several linear layers on top of one another
        (gate, then up): the checkpoint's tensors of each expert, in order. None where it is built in another way.
        """
        recipe = self._recipes[name]
        if recipe.converter is None:
            return None
        steps = [(type(step).__name__, getattr(step, "dim", None)) for step in recipe.converter.operations]
        if steps not in ([_STACKED], [_STACKED, _ON_TOP]):
            return None
        parts = [recipe.sources.get(pattern, []) for pattern in recipe.converter.source_patterns]
        counts = {len(part) for part in parts}
        if counts != {self.shapes[name][0]}:
            raise ModelError(
                f"{self.checkpoint.path}: tensors of {name}", expected=f"{self.shapes[name][0]} experts of each kind",
                found=" and ".join(map(str, sorted(counts))), cure="download the model again",
            )  # fmt: skip
        return [list(expert) for expert in zip(*parts, strict=True)]

    def stored_experts(self, name: str) -> list[list[FrozenMatrix]] | None:
        """The matrices of each of `experts` in their stored form: as the checkpoint packed them, else views of it."""
        experts = self.experts(name)
        if experts is None:
            return None
        _, rows, inputs = self.shapes[name]
        shape = (rows // len(experts[0]), inputs)
        return [[self._stored_matrix(source, shape) for source in expert] for expert in experts]

    def each_expert(self, name: str) -> Iterator[torch.Tensor]:
        """Of a parameter [E, N, K]: each expert [N, K] in its stored type. Of `experts` one is in memory at a time."""
        experts = self.experts(name)
        if experts is None:
            yield from self.read(name)
            return
        _, rows, inputs = self.shapes[name]
        for sources in experts:
            self._check_numbers(sources)
            shape = (rows // len(sources), inputs)
            parts = [self._checked(source, self.checkpoint.read(source), shape) for source in sources]
            yield torch.cat(parts) if len(parts) > 1 else parts[0]

    def _stored_matrix(self, source: str, shape: tuple[int, int]) -> FrozenMatrix:
        packed = None if self._stored is None else self._stored.matrix(source, shape)
        return packed or DenseMatrix(self._checked(source, self.checkpoint.read(source), shape))

    def read(self, name: str) -> torch.Tensor:
        """The parameter in its stored type: a view of the mapped file where no conversion is needed."""
        recipe = self._recipes[name]
        self._check_numbers(recipe.names())
        if recipe.converter is None:
            tensor = self.checkpoint.read(recipe.names()[0])
        else:
            converter = copy.deepcopy(recipe.converter)
            first = _first_target(name, converter)
            for pattern, sources in recipe.sources.items():
                for source in sources:
                    converter.add_tensor(first, source, pattern, self.checkpoint.read(source))  # type: ignore[arg-type]
            converted = converter.convert(first, model=self._model, config=self._model.config)
            tensor = converted[name]
            tensor = tensor[0] if isinstance(tensor, list) else tensor
        return self._checked(name, tensor, self.shapes.get(name, tuple(tensor.shape)))

    def _check_numbers(self, sources: list[str]) -> None:
        packed = [source for source in sources if source not in self.checkpoint.tensors]
        if packed:
            raise ModelError(
                f"{self.checkpoint.path}: {packed[0]} is packed, where only numbers can be read",
                cure="take the 16-bit model it was made from; smidgen quantises it while loading",
            )

    def _checked(self, name: str, tensor: torch.Tensor, shape: tuple[int, ...]) -> torch.Tensor:
        """The tensor, if it is numbers of this shape."""
        if tensor.dtype not in _FLOATS:
            found = str(tensor.dtype).removeprefix("torch.")
            raise ModelError(
                f"{self.checkpoint.path}: tensor {name} is no weight",
                expected="float32, float16 or bfloat16, or a packed form with all of its parts",
                found=found,
                cure="download it again, or take the 16-bit model",
            )
        if tuple(tensor.shape) != shape:
            raise self._wrong_shape(name, shape, tuple(tensor.shape))
        return tensor


def _other_targets(name: str, converter: WeightConverter | None) -> list[str]:
    if converter is None or len(converter.target_patterns) < 2:
        return []
    first, *others = converter.target_patterns
    return [name.replace(first, other) for other in others]


def _first_target(name: str, converter: WeightConverter) -> str:
    first, *others = converter.target_patterns
    hit = next((other for other in others if other in name and first not in name), None)
    return name.replace(hit, first) if hit else name


def _listed(names: list[str], limit: int = 4) -> str:
    """'a.weight, b.weight and 3 more tensors'."""
    shown = ", ".join(sorted(names)[:limit])
    rest = len(names) - limit
    return f"{shown} and {rest} more tensors" if rest > 0 else ("tensor " if len(names) == 1 else "tensors ") + shown
