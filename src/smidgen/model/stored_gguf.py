"""Bases in the blocks of a GGUF file: a view of the mapped file for each weight, the embedding and the head too."""

from smidgen.checkpoint.gguf import GgufCheckpoint
from smidgen.errors import ModelError
from smidgen.quant.blocks import BlockMatrix
from smidgen.quant.matrix import FrozenMatrix

__all__ = ["GgufWeights"]

_NUMBERS = ("F32", "F16", "BF16")


class GgufWeights:
    """See StoredWeights."""

    def __init__(self, checkpoint: GgufCheckpoint) -> None:
        self._checkpoint = checkpoint
        has_blocks = any(info.dtype not in _NUMBERS for info in checkpoint.tensors.values())
        self.storage = "gguf" if has_blocks else "none"

    def parameter_of(self, tensor: str) -> str | None:
        return tensor

    def matrix(self, name: str, shape: tuple[int, int]) -> FrozenMatrix | None:
        checkpoint = self._checkpoint
        info, half = checkpoint.tensors[name], checkpoint.pair_width(name)
        if info.shape != shape:
            raise ModelError(
                f"{checkpoint.path}: tensor {name}", expected=f"shape {list(shape)}", found=str(list(info.shape))
            )
        if info.dtype in _NUMBERS and not half:
            return None
        return BlockMatrix(checkpoint.raw(name).view(shape[0], -1), info.dtype, half)
