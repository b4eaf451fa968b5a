"""Parts of the base that learn beside the adapters, each around the frozen part that it stands for (`base`).

    TrainedModule   a whole embedding, head or norm, in float32 (PEFT's modules_to_save)
    TokenRows       rows of embedding and head for a few tokens, new ones or not (PEFT's trainable_token_indices). They
                    take the place of the base's rows; ids past its last row make the vocabulary larger. The base's
                    matrix is neither copied nor made dense.

Where head and embedding are one weight they stay one: the parameter is the embedding's, and the head's part has it too.
float32, since a step of the optimizer is often smaller than what 16 bits can tell apart.
"""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from torch.func import functional_call

from smidgen.errors import SettingsError
from smidgen.lora.linear import LoraLinear
from smidgen.model.build import Base
from smidgen.quant.linear import FrozenEmbedding, FrozenLinear
from smidgen.quant.matrix import dense

__all__ = [
    "DELTA", "Adapters", "Part", "TokenEmbedding", "TokenHead", "TokenRows", "TrainedModule", "attach_modules",
    "attach_tokens", "embedding_name", "initialise_tokens", "is_tied", "learning_parts", "trainable_names",
]  # fmt: skip

DELTA = "trainable_tokens_delta"


class TrainedModule(nn.Module):
    """A module whose every parameter is learnt. base: the frozen one; its values are where training starts."""

    def __init__(self, base: nn.Module, start: dict[str, torch.Tensor]) -> None:
        super().__init__()
        self.base = base
        for key, tensor in start.items():
            self.register_parameter(key, nn.Parameter(tensor))
        self.train(base.training)

    @property
    def trainable(self) -> dict[str, nn.Parameter]:
        """What is learnt, saved and resumed, by PEFT's names."""
        return dict(self.named_parameters(recurse=False))


class TrainedNorm(TrainedModule):
    """Computed as the base computes it, in the type of its input x."""

    weight: nn.Parameter

    def __init__(self, base: nn.Module) -> None:
        super().__init__(base, {key: p.detach().float().clone() for key, p in base.named_parameters(recurse=False)})

    @property
    def variance_epsilon(self) -> Any:
        return self.base.variance_epsilon

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        cast = {key: parameter.to(x.dtype) for key, parameter in self.trainable.items()}
        return functional_call(self.base, cast, (x,))


class TrainedEmbedding(TrainedModule):
    """weight: float32 [vocab_size, hidden_size], made dense where the base's is packed."""

    weight: nn.Parameter

    def __init__(self, base: nn.Module) -> None:
        super().__init__(base, {"weight": _dense_weight(base)})

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        """ids, integers [...] -> [..., hidden_size] of the compute type."""
        if isinstance(self.base, FrozenEmbedding):
            rows = F.embedding(ids, self.weight).to(self.base.dtype)
            return rows if self.base.scale == 1.0 else rows * torch.tensor(self.base.scale, dtype=rows.dtype)
        return functional_call(self.base, {"weight": self.weight}, (ids,))


class TrainedHead(TrainedModule):
    """weight: float32 [vocab_size, hidden_size], the embedding's where it is given; bias: [vocab_size] or None."""

    weight: nn.Parameter

    def __init__(self, base: FrozenLinear, embedding: TrainedModule | None = None) -> None:
        start = {} if base.bias is None else {"bias": base.bias.float().clone()}
        if embedding is None:
            start["weight"] = _dense_weight(base)
        super().__init__(base, start)
        if embedding is not None:
            self.weight = embedding.weight  # type: ignore[assignment]
        self.in_features, self.out_features = base.in_features, base.out_features

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        bias = self.trainable.get("bias")
        return F.linear(x, self.weight.to(x.dtype), None if bias is None else bias.to(x.dtype))


class TokenRows(nn.Module):
    """token_ids: int64 [n]; rows: float32 [n, hidden_size], which the base's rows of these tokens give way to."""

    token_ids: torch.Tensor

    def __init__(self, base: nn.Module, token_ids: torch.Tensor, rows: nn.Parameter) -> None:
        super().__init__()
        self.base, self.rows = base, rows
        self.register_buffer("token_ids", token_ids)
        self.train(base.training)

    @property
    def trainable(self) -> dict[str, nn.Parameter]:
        return {DELTA: self.rows}

    def bare(self) -> "TokenRows":
        """The same with rows of zeros: the base without what was learnt, for token ids that it does not have too."""
        return type(self)(self.base, self.token_ids, nn.Parameter(torch.zeros_like(self.rows), requires_grad=False))

    def merge(self, weight: torch.Tensor) -> torch.Tensor:
        """W [vocab_size, hidden_size] of the base -> of the larger vocabulary, with these rows in it."""
        more = max(0, int(self.token_ids.max()) + 1 - len(weight))
        rows = self.rows.detach().to(weight)
        return F.pad(weight, (0, 0, 0, more)).index_copy_(0, self.token_ids.to(weight.device), rows)


class TokenEmbedding(TokenRows):
    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        """ids, integers [...] -> [..., hidden_size] of the compute type."""
        hits = ids[..., None] == self.token_ids
        found = hits.any(-1)
        others = self.base(ids.masked_fill(found, 0))  # the base has no row for an id past its last
        rows = F.embedding(hits.int().argmax(-1), self.rows).to(others.dtype)
        if (scale := _scale_of(self.base)) != 1.0:
            rows = rows * torch.tensor(scale, dtype=rows.dtype)
        return torch.where(found[..., None], rows, others)


class TokenHead(TokenRows):
    def __init__(self, base: FrozenLinear, token_ids: torch.Tensor, rows: nn.Parameter) -> None:
        super().__init__(base, token_ids, rows)
        self.in_features = base.in_features
        self.out_features = max(base.out_features, int(token_ids.max()) + 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """x [..., hidden_size] -> logits [..., out_features]."""
        y = self.base(x)
        if self.out_features > y.shape[-1]:
            y = F.pad(y, (0, self.out_features - y.shape[-1]))
        return y.index_copy_(-1, self.token_ids, x @ self.rows.t().to(x.dtype))


Part = LoraLinear | TrainedModule | TokenRows
Adapters = Mapping[str, Part]  # by the name of the module that each stands for


def learning_parts(model: nn.Module) -> Adapters:
    """Everything put around modules of the base, in the model's order; a tied head among them."""
    kinds = (LoraLinear, TrainedModule, TokenRows)
    return {name: module for name, module in model.named_modules() if isinstance(module, kinds)}


def trainable_names(model: Any) -> list[str]:
    """Names of the modules that attach_modules can train, of a base or of a skeleton: embeddings, head and norms."""
    ends = (model.get_input_embeddings(), model.get_output_embeddings())
    return [name for name, module in model.named_modules() if module in ends or _is_plain(module)]


def _is_plain(module: nn.Module) -> bool:
    """A table that is looked up by ids, or a module of vectors alone, as norms are."""
    parameters = list(module.parameters(recurse=False))
    vectors = bool(parameters) and all(p.dim() == 1 for p in parameters) and not list(module.children())
    return vectors or type(module) in (nn.Embedding, FrozenEmbedding)


def embedding_name(base: Base) -> str:
    embedding = base.model.get_input_embeddings()
    return next(name for name, module in base.model.named_modules() if module is embedding)


def is_tied(base: Base) -> bool:
    """Whether embedding and head compute with one weight: as the model has it, if training has not parted them."""
    if not base.model.config.get_text_config().tie_word_embeddings:
        return False
    ends = (base.model.get_input_embeddings(), base.head)
    learnt = [end.trainable for end in ends if isinstance(end, TrainedModule | TokenRows)]
    if not learnt:
        return isinstance(base.head, FrozenLinear)
    first, *others = ({id(parameter) for parameter in parts.values()} for parts in learnt)
    return len(others) == 1 and first <= others[0]


def attach_modules(base: Base, names: Iterable[str], *, keep_tied: bool = True) -> Adapters:
    """Train the named modules whole; returns name -> module. keep_tied: a weight that embedding and head share is
    trained as one, whichever of them is named, and returned under the embedding's name; else the two part.

    Raises SettingsError where a module has an adapter already.
    """
    names, head_name, first = list(names), base.head_name, embedding_name(base)
    tied = bool(base.model.config.get_text_config().tie_word_embeddings)
    shares = keep_tied and tied and bool({head_name, first} & set(names))
    if shares:
        names = [first, *(name for name in names if name not in (head_name, first))]
    if (shares or head_name in names) and not isinstance(base.head, FrozenLinear):
        raise SettingsError([f"modules_to_save: {head_name} has an adapter already; take head out of the targets"])
    if shares and base.head.bias is not None:
        raise SettingsError([f"modules_to_save: {head_name} has a bias, but shares its weight; that is not known here"])
    attached: dict[str, Part] = {}
    for name in names:
        module = base.model.get_submodule(name)
        if name == head_name:
            attached[name] = TrainedHead(module)  # type: ignore[arg-type]
        elif isinstance(module, nn.Embedding | FrozenEmbedding):
            attached[name] = TrainedEmbedding(module)
        else:
            attached[name] = TrainedNorm(module)
        base.model.set_submodule(name, attached[name])
    if shares:
        base.model.set_submodule(head_name, TrainedHead(base.head, attached[first]))  # type: ignore[arg-type]
    return attached


def attach_tokens(base: Base, token_ids: Mapping[str, Sequence[int]]) -> Adapters:
    """Rows of zeros for tokens, by the names of embedding and head; a tied head takes the embedding's. The model's
    vocabulary grows to the largest id. Raises SettingsError where a module learns in another way already.
    """
    head_name, first = base.head_name, embedding_name(base)
    shares = is_tied(base) and first in token_ids
    names = [first] if shares else list(token_ids)
    for name in [first, head_name] if shares else names:
        module = base.model.get_submodule(name)
        if not isinstance(module, nn.Embedding | FrozenEmbedding | FrozenLinear):
            raise SettingsError(
                [f"new_tokens: {name} has an adapter or is trained whole; take it out of targets and modules_to_save"]
            )
        if isinstance(module, FrozenLinear) and module.bias is not None:
            raise SettingsError([f"new_tokens: {name} has a bias, which PEFT's format of trained tokens leaves out"])
    attached: dict[str, Part] = {}
    for name in names:
        ids = torch.tensor(list(token_ids[name]), device=base.device)
        rows = nn.Parameter(torch.zeros(len(ids), base.head.in_features, device=base.device))
        module: Any = base.model.get_submodule(name)
        attached[name] = (TokenHead if name == head_name else TokenEmbedding)(module, ids, rows)
        base.model.set_submodule(name, attached[name])
        if shares:
            base.model.set_submodule(head_name, TokenHead(base.head, ids, rows))
    config = base.model.config.get_text_config()
    config.vocab_size = max(config.vocab_size, *(max(ids) + 1 for ids in token_ids.values()))
    return attached


@torch.no_grad()
def initialise_tokens(attached: Adapters, pieces: Sequence[Sequence[int]]) -> None:
    """Each row becomes the mean of the base's rows of `pieces`: ids of what the token's text was cut into before. The
    mean of all rows where there is none.
    """
    for part in attached.values():
        assert isinstance(part, TokenRows)
        for row, ids in zip(part.rows, pieces, strict=True):
            row.copy_(_rows_of(part.base, ids).mean(0))


def _rows_of(module: Any, ids: Sequence[int]) -> torch.Tensor:
    """Rows of an embedding's or a head's weight, float32 [n, hidden_size]; all of them for no ids."""
    if not ids:
        return _dense_weight(module)
    if isinstance(module, nn.Embedding):
        return module.weight[torch.tensor(ids, device=module.weight.device)].float()
    return torch.cat([module.weight.rows(index, index + 1, torch.float32).clone() for index in ids])


def _dense_weight(module: Any) -> torch.Tensor:
    """A copy of an embedding's or a head's weight, float32 [vocab_size, hidden_size]."""
    if isinstance(module, nn.Embedding):
        return module.weight.detach().float().clone()
    return dense(module.weight, torch.float32, module.weight.rows(0, 1, torch.float32).device)


def _scale_of(embedding: Any) -> float:
    """What an embedding multiplies its rows by: Gemma 3."""
    if isinstance(embedding, FrozenEmbedding):
        return embedding.scale
    return float(getattr(embedding, "scalar_embed_scale", 1.0))
