"""What a model is made of, as numbers: the tables that memory and time are computed from."""

import math
from dataclasses import dataclass
from functools import cached_property

__all__ = ["Inventory", "Linear", "ModuleKept", "grouped_bytes", "packed_bytes"]

_BLOCK, _OUTER = 64, 256  # weights that share a scale, scales that share one of their own


@dataclass(frozen=True)
class Linear:
    """A linear layer. layer: index of its decoder layer. nbytes: as it is stored."""

    name: str
    layer: int
    out_features: int
    in_features: int
    nbytes: int
    is_expert: bool = False  # of a mixture: has no adapter

    @property
    def weights(self) -> int:
        return self.out_features * self.in_features


@dataclass(frozen=True)
class ModuleKept:
    """What all layers of transformers together keep for the backward pass (model/kept.py): bytes for each token and for
    each pair of tokens of a row; windowed: the same where rows are longer than the window of their attention (0: none).
    idle: of the bytes for each token, what the first layer does not keep where nothing before its attention learns, nor
    beside it. inputs: (linear layer, number of its input) where an adapter would be the first to keep it; layers with
    the same input have the same number.
    """

    per_token: float
    per_pair: float
    idle: float
    inputs: tuple[tuple[str, int], ...]
    window: int
    windowed: tuple[float, float]

    def each_token(self, longest: int) -> float:
        """Bytes for each token of rows of at most `longest`."""
        is_windowed = 0 < self.window < longest
        per_token, per_pair = self.windowed if is_windowed else (self.per_token, self.per_pair)
        return per_token + per_pair * longest


@dataclass(frozen=True)
class Inventory:
    """A causal LM with its base stored in one way.

    linears: of the decoder, experts too. head_bytes: of an untied head as stored; 0 for a tied one. norm_bytes: norms,
    biases and other small parameters, in the compute type. mapped: whether the linear layers' bytes are views of the
    model file. fused: whether smidgen's own layers compute it (model/fused.py); kept: of others, where it is known.
    head_norms: of q and k, as in Qwen 3. modules: name and numbers of what can be trained whole: embeddings, head and
    norms. ordered: whether there are matrices with act-order, whose other factor is copied for each product.
    """

    name: str
    storage: str
    hidden_size: int
    intermediate_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    vocab_size: int
    linears: tuple[Linear, ...]
    embedding_bytes: int
    head_bytes: int
    norm_bytes: int
    mapped: bool
    fused: bool
    head_norms: bool
    head_name: str = "lm_head"
    modules: tuple[tuple[str, int], ...] = ()
    embedding_name: str = "model.embed_tokens"
    kept: ModuleKept | None = None
    ordered: bool = False

    @cached_property
    def layer_bytes(self) -> list[int]:
        """Packed bytes of each decoder layer."""
        sums = [0] * self.num_layers
        for linear in self.linears:
            sums[linear.layer] += linear.nbytes
        return sums

    @cached_property
    def packed_bytes(self) -> int:
        return sum(linear.nbytes for linear in self.linears)

    @cached_property
    def weights(self) -> int:
        """Numbers in the decoder's linear layers."""
        return sum(linear.weights for linear in self.linears)

    @cached_property
    def expert_share(self) -> float:
        """Of these numbers, those of a mixture's experts."""
        return sum(linear.weights for linear in self.linears if linear.is_expert) / self.weights


def packed_bytes(out_features: int, in_features: int, storage: str, itemsize: int = 2) -> int:
    """Bytes of a matrix in the form that `--quantize` names (quant/fourbit.py, matrix.py, grouped.py).

    itemsize: of the stored type, for 'none'. GPTQ: as model/calibration.py asks for it, with act-order.
    """
    count = out_features * in_features
    if storage == "none":
        return count * itemsize
    if storage == "int8":
        return count + 4 * out_features
    if storage in ("gptq", "awq"):
        return grouped_bytes(out_features, in_features, ordered=storage == "gptq")
    blocks = math.ceil(count / _BLOCK)
    scales = blocks + 4 * math.ceil(blocks / _OUTER) + 4 if storage.endswith("-dq") else 4 * blocks
    return math.ceil(count / 2) + scales


def grouped_bytes(
    out_features: int,
    in_features: int,
    *,
    bits: int = 4,
    group_size: int = 128,
    scale_bytes: int = 2,
    ordered: bool = False,
) -> int:
    """Bytes of a GroupedMatrix (quant/grouped.py). group_size -1: all inputs. ordered: its groups are scattered over
    the inputs (act-order), so that it has an order, and the way back, of 8 bytes an input each.
    """
    groups = 1 if group_size == -1 else math.ceil(in_features / group_size)
    rows = out_features * (math.ceil(in_features / 8) * bits + (scale_bytes + 1) * groups)
    return rows + 4 * groups + (16 * in_features if ordered else 0)
