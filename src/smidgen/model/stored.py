"""Which form a base is stored in already, and who reads its packed weights as they are."""

from typing import Any, Protocol

from smidgen.checkpoint.base import Checkpoint
from smidgen.checkpoint.gguf import GgufCheckpoint
from smidgen.errors import ModelError
from smidgen.events import Report, silent
from smidgen.model.stored_bitsandbytes import BitsandbytesWeights
from smidgen.model.stored_gguf import GgufWeights
from smidgen.model.stored_groups import AwqWeights, GptqWeights
from smidgen.quant.matrix import FrozenMatrix

__all__ = ["StoredWeights", "stored_weights"]


class StoredWeights(Protocol):
    """The packed weights of a checkpoint.

    storage: the name of their form, as a run records it; 'none' for a GGUF file of plain numbers.
    """

    @property
    def storage(self) -> str: ...

    def parameter_of(self, tensor: str) -> str | None:
        """The parameter that a tensor of the file is, or is the main part of; None for the other parts of one."""
        ...

    def matrix(self, name: str, shape: tuple[int, int]) -> FrozenMatrix | None:
        """The packed parameter [N, K]; None if it is stored as numbers. Raises ModelError if its parts do not fit."""
        ...


def stored_weights(checkpoint: Checkpoint, report: Report = silent) -> StoredWeights | None:
    """None for a folder of plain numbers. Raises ModelError for a form that cannot be trained on in place."""
    if isinstance(checkpoint, GgufCheckpoint):
        return GgufWeights(checkpoint)
    quantised: dict[str, Any] = checkpoint.config.get("quantization_config") or {}
    if not quantised:
        return None
    method = quantised.get("quant_method")
    if quantised.get("load_in_4bit") or quantised.get("load_in_8bit") or method == "bitsandbytes":
        return BitsandbytesWeights(checkpoint, quantised)
    if method == "gptq":
        return GptqWeights(checkpoint, quantised, report)
    if method == "awq":
        return AwqWeights(checkpoint, quantised)
    raise ModelError(
        f"the base is quantised already ({str(method or 'an unnamed method')[:40]}), in a form that cannot be trained"
        " on in place",
        expected="bitsandbytes, gptq, awq or GGUF",
        cure="take the 16-bit model it was made from; smidgen quantises it while loading",
    )
