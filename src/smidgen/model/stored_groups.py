"""Bases quantised by GPTQ or AWQ: integers in groups, repacked exactly into rows (quant/grouped.py).

A GPTQ layer (AutoGPTQ, GPTQModel) X [N, K] of `bits` has, with each int32 a stretch of one stream, lowest bits first:
    X.qweight  int32 [ceil(K bits / 32), N]   codes, a stream along K for each output
    X.qzeros   int32 [G, ceil(N bits / 32)]   zero points, a stream along N for each group
    X.scales   float16 [G, N];   X.g_idx int32 [K], the group of each input (missing only without desc_act)
Format "gptq" (v1) holds each zero point less one, "gptq_v2" as it is. A symmetric quantiser always has 2^(bits - 1), by
which a wrong label is found out.

An AWQ layer ("gemm") has X.qweight int32 [K, N / 8] and X.qzeros int32 [G, N / 8]: eight outputs to a word, number
0, 2, 4, 6, 1, 3, 5, 7 of the eight from the lowest bits on; X.scales float16 [G, N].
"""

import json
import math
from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import Any

import torch

from smidgen.checkpoint.base import Checkpoint
from smidgen.errors import ModelError
from smidgen.events import Report, Warned
from smidgen.planning.inventory import grouped_bytes
from smidgen.quant.grouped import BITS, GroupedMatrix, pack, unpack

__all__ = ["AwqWeights", "GptqWeights"]

_PARTS = (".qweight", ".qzeros", ".scales", ".g_idx")
_AWQ_PLACES = [0, 4, 1, 5, 2, 6, 3, 7]  # of outputs 0 .. 7 among the eight fields of a word
_ROWS = 256  # repacked at once
_FLOATS = (torch.float16, torch.bfloat16, torch.float32)


class _GroupedWeights(ABC):
    """What both formats share: which tensors make up a weight, and the checks of their sizes."""

    def __init__(self, checkpoint: Checkpoint, quantised: dict[str, Any], bits: int) -> None:
        self._checkpoint, self.bits = checkpoint, bits
        size = quantised.get("group_size", 128)
        if not (isinstance(size, int) and (size == -1 or 0 < size < 1 << 20)):
            raise _refused(checkpoint, "group_size", "-1 or a positive number", size)
        self._group_size = size

    def parameter_of(self, tensor: str) -> str | None:
        part = next((part for part in _PARTS if tensor.endswith(part)), None)
        if part is None or f"{tensor.removesuffix(part)}.qweight" not in self._checkpoint.tensors:
            return tensor
        return f"{tensor.removesuffix(part)}.weight" if part == ".qweight" else None

    def matrix(self, name: str, shape: tuple[int, int]) -> GroupedMatrix | None:
        module = name.removesuffix(".weight")
        return self._matrix(module, *shape) if f"{module}.qweight" in self._checkpoint.tensors else None

    def size_of(self, name: str, shape: tuple[int, int]) -> tuple[int, bool] | None:
        """(bytes in memory of the packed parameter [N, K], whether it has act-order); None if it is stored as numbers.

        Reads no weights, only which input is in which group.
        """
        module, (outputs, inputs) = name.removesuffix(".weight"), shape
        scales = self._checkpoint.tensors.get(f"{module}.scales")
        if f"{module}.qweight" not in self._checkpoint.tensors or scales is None:
            return None
        ordered = self._order(module, inputs)[0] is not None
        size = grouped_bytes(
            outputs, inputs, bits=self.bits, group_size=self._group_size, ordered=ordered,
            scale_bytes=scales.nbytes // max(1, math.prod(scales.shape)),
        )  # fmt: skip
        return size, ordered

    def _order(self, module: str, inputs: int) -> tuple[torch.Tensor | None, torch.Tensor]:
        """(the input at each stored place, or None if they stay in order; where each group ends)."""
        size, groups = self._groups(inputs)
        return None, (torch.arange(1, groups + 1, dtype=torch.int32) * size).clamp_(max=inputs)

    @abstractmethod
    def _matrix(self, module: str, outputs: int, inputs: int) -> GroupedMatrix:
        """The weight [outputs, inputs] of a packed layer."""

    def _read(self, name: str, dtype: torch.dtype | None, shape: tuple[int, ...]) -> torch.Tensor:
        """A part of a weight; dtype None: any float type."""
        if name not in self._checkpoint.tensors:
            raise ModelError(f"{self._checkpoint.path} has no tensor {name}", cure="download it again")
        tensor = self._checkpoint.read(name)
        fits = tensor.dtype in _FLOATS if dtype is None else tensor.dtype == dtype
        if not fits or tuple(tensor.shape) != shape:
            kind = "float" if dtype is None else str(dtype).removeprefix("torch.")
            found = f"{str(tensor.dtype).removeprefix('torch.')} {list(tensor.shape)}"
            raise ModelError(
                f"{self._checkpoint.path}: tensor {name}", expected=f"{kind} {list(shape)}", found=found,
                cure="check that quantization_config belongs to these weights",
            )  # fmt: skip
        return tensor

    def _scales(self, module: str, groups: int, outputs: int) -> torch.Tensor:
        scales = self._read(f"{module}.scales", None, (groups, outputs))
        if not bool(scales.isfinite().all()):
            raise ModelError(f"{self._checkpoint.path}: {module}.scales holds a scale that is not finite")
        return scales.t().contiguous()

    def _groups(self, inputs: int) -> tuple[int, int]:
        """(inputs of a group, number of groups)."""
        size = inputs if self._group_size == -1 else self._group_size
        return size, math.ceil(inputs / size)


class GptqWeights(_GroupedWeights):
    """See StoredWeights. quantised: config.json's quantization_config, or quantize_config.json."""

    storage = "gptq"

    def __init__(self, checkpoint: Checkpoint, quantised: dict[str, Any], report: Report) -> None:
        bits = quantised.get("bits")
        if bits not in BITS:
            raise _refused(checkpoint, "bits", "2, 3, 4 or 8", bits)
        super().__init__(checkpoint, quantised, int(bits))
        self._format = quantised.get("checkpoint_format") or quantised.get("format") or "gptq"
        if self._format not in ("gptq", "gptq_v2"):
            raise _refused(checkpoint, "checkpoint_format", "gptq or gptq_v2", self._format)
        rules = quantised.get("dynamic") or {}
        if not isinstance(rules, dict) or not all(str(rule).startswith("-:") for rule in rules):  # "-:": left dense
            raise _refused(checkpoint, "dynamic", "one setting for all quantised layers", json.dumps(rules))
        self._is_symmetric = bool(quantised.get("sym", True))
        self._has_act_order = bool(quantised.get("desc_act"))
        self._report, self._warned = report, set[str]()

    def _matrix(self, module: str, outputs: int, inputs: int) -> GroupedMatrix:
        _, groups = self._groups(inputs)
        words = math.ceil(inputs * self.bits / 32)
        qweight = self._read(f"{module}.qweight", torch.int32, (words, outputs))
        scales = self._scales(module, groups, outputs)
        qzeros = self._read(f"{module}.qzeros", torch.int32, (groups, math.ceil(outputs * self.bits / 32)))
        zeros = self._zeros(module, unpack(qzeros.contiguous().view(torch.uint8), self.bits, outputs))
        order, ends = self._order(module, inputs)
        width = math.ceil(inputs / 8) * self.bits

        def rows(start: int, stop: int) -> torch.Tensor:
            stream = qweight[:, start:stop].t().contiguous().view(torch.uint8)
            if order is None:
                return stream[:, :width]
            return pack(unpack(stream, self.bits, inputs)[:, order], self.bits)

        codes = _by_rows(outputs, width, rows)
        return GroupedMatrix(inputs, self.bits, codes, scales, zeros.t().contiguous(), ends, order)

    def _zeros(self, module: str, stored: torch.Tensor) -> torch.Tensor:
        """Zero points as they are meant, uint8 [G, N], from those that are stored."""
        is_v1, middle = self._format == "gptq", 1 << (self.bits - 1)
        if self._is_symmetric:
            constant = int(stored.flatten()[0]) if bool((stored == stored.flatten()[0]).all()) else -1
            found = {middle - 1: True, middle: False}.get(constant)  # v1?
            if found is not None and found != is_v1:
                right = "gptq" if found else "gptq_v2"
                self._warn("label", f"{module} says format {self._format}, but its zero points are those of {right}")
            is_v1 = is_v1 if found is None else found
        return (stored + 1) & ((1 << self.bits) - 1) if is_v1 else stored

    def _warn(self, kind: str, text: str) -> None:
        """Once for each kind: what one layer has, hundreds have."""
        if kind not in self._warned:
            self._report(Warned(f"{text}: read so"))
        self._warned.add(kind)

    def _order(self, module: str, inputs: int) -> tuple[torch.Tensor | None, torch.Tensor]:
        _, groups = self._groups(inputs)
        if f"{module}.g_idx" not in self._checkpoint.tensors:
            if self._has_act_order and groups > 1:
                raise ModelError(
                    f"{self._checkpoint.path} has no tensor {module}.g_idx", expected="one, since desc_act is true",
                    cure="download it again",
                )  # fmt: skip
            return super()._order(module, inputs)
        group_of = self._read(f"{module}.g_idx", torch.int32, (inputs,)).long()
        if inputs and not (int(group_of.min()) >= 0 and int(group_of.max()) < groups):
            raise ModelError(
                f"{self._checkpoint.path}: {module}.g_idx", expected=f"groups from 0 to {groups - 1}",
                found=f"{int(group_of.min())} to {int(group_of.max())}", cure="download it again",
            )  # fmt: skip
        if groups > 1 and not bool(group_of.any()):  # a quantiser that never filled it in
            self._warn(
                "order", f"{module}.g_idx is all zeros, but there are {groups} groups: their inputs are in order"
            )
            return super()._order(module, inputs)
        ends = torch.bincount(group_of, minlength=groups).cumsum(0).to(torch.int32)
        in_order = bool((group_of.diff() >= 0).all())
        return None if in_order else torch.argsort(group_of, stable=True), ends


class AwqWeights(_GroupedWeights):
    """See StoredWeights. quantised: config.json's quantization_config."""

    storage = "awq"

    def __init__(self, checkpoint: Checkpoint, quantised: dict[str, Any]) -> None:
        bits = quantised.get("bits", quantised.get("w_bit", 4))
        if bits != 4:
            raise _refused(checkpoint, "bits", "4", bits)
        version = str(quantised.get("version", "gemm")).lower()
        if version != "gemm":
            raise _refused(checkpoint, "version", "gemm", version)
        super().__init__(checkpoint, {"group_size": quantised.get("group_size", quantised.get("q_group_size", 128))}, 4)

    def _matrix(self, module: str, outputs: int, inputs: int) -> GroupedMatrix:
        _, groups = self._groups(inputs)
        words = math.ceil(outputs / 8)
        qweight = self._read(f"{module}.qweight", torch.int32, (inputs, words))
        scales = self._scales(module, groups, outputs)
        zeros = _awq_fields(self._read(f"{module}.qzeros", torch.int32, (groups, words)))[:, :outputs]

        def rows(start: int, stop: int) -> torch.Tensor:
            some = qweight[:, start // 8 : math.ceil(stop / 8)]
            return pack(_awq_fields(some)[:, : stop - start].t().contiguous(), 4)

        codes = _by_rows(outputs, math.ceil(inputs / 8) * 4, rows)
        return GroupedMatrix(inputs, 4, codes, scales, zeros.t().contiguous(), self._order(module, inputs)[1])


def _awq_fields(words: torch.Tensor) -> torch.Tensor:
    """int32 [n, N / 8] -> uint8 [n, N]: the eight outputs of each word in their order."""
    fields = unpack(words.contiguous().view(torch.uint8), 4, words.shape[1] * 8)
    return fields.view(*words.shape, 8)[..., _AWQ_PLACES].flatten(-2)


def _by_rows(outputs: int, width: int, rows: Callable[[int, int], torch.Tensor]) -> torch.Tensor:
    """uint8 [outputs, width], made `_ROWS` rows at a time so that nothing larger is ever in memory."""
    codes = torch.empty(outputs, width, dtype=torch.uint8)
    for start in range(0, outputs, _ROWS):
        stop = min(start + _ROWS, outputs)
        codes[start:stop] = rows(start, stop)
    return codes


def _refused(checkpoint: Checkpoint, key: str, expected: str, found: Any) -> ModelError:
    return ModelError(
        f"{checkpoint.path}: quantization_config has a {key} that is not read here",
        expected=expected,
        found=str(found)[:60],
        cure="take the 16-bit model it was made from; smidgen quantises it while loading",
    )
