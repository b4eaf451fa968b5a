"""A model folder or GGUF file -> a causal LM whose base is frozen and packed.

transformers gives the architecture. Its skeleton is made on the meta device (no memory), every linear layer of the
decoder is replaced by a FrozenLinear and filled from the mapped file, one tensor at a time: float weights exist only
while they are being packed. Embeddings and head stay in their stored type. Nothing of transformers is patched; modules
are exchanged, and the base's own dropout is switched off in the config.

The head is applied by ourselves, in chunks (train/loss.py), so what an architecture does to its logits after the head
must be known: `logits_of` covers scaling and soft-capping, and every model is checked once against its own forward.
"""

import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, PretrainedConfig, PreTrainedModel
from transformers.models.auto.configuration_auto import CONFIG_MAPPING
from transformers.pytorch_utils import Conv1D

from smidgen.checkpoint.base import Checkpoint
from smidgen.errors import ModelError
from smidgen.events import Progress, Report, Warned, silent
from smidgen.kernels.pages import converted
from smidgen.kernels.sizes import TILE_TOKENS
from smidgen.model.device import padded_rows
from smidgen.model.experts import PackedExperts, is_experts
from smidgen.model.finite import find_not_finite
from smidgen.model.fused import fuse_layers, hidden_rows, is_fused
from smidgen.model.packing import PackedRows, pack_rows
from smidgen.model.pages import give_lookups_back, pages_given_back
from smidgen.model.segments import SegmentMasks, segment_attention
from smidgen.model.stored import StoredWeights, stored_weights
from smidgen.model.stream import LayerStream, layer_of
from smidgen.model.weights import Weights
from smidgen.quant.blocks import BlockMatrix
from smidgen.quant.linear import FrozenEmbedding, FrozenLinear
from smidgen.quant.matrix import DenseMatrix, FrozenMatrix, dense, quantise

__all__ = ["Base", "build_base", "heads_of_keys", "open_skeleton", "read_config", "skeleton"]

_LARGEST_UNPACKED_SHARE = 0.05
_LARGEST_BUFFER = 1 << 26  # numbers; a causal mask over 8,192 positions


def heads_of_keys(text: Any) -> tuple[int, int]:
    """(heads of keys, numbers in each) of a text model's config; values have as many."""
    heads = text.num_attention_heads
    kv_heads = getattr(text, "num_key_value_heads", None) or heads
    return kv_heads, getattr(text, "head_dim", None) or text.hidden_size // heads


@dataclass
class Base:
    """A causal LM with a frozen, packed base.

    model: transformers' own class, `model(input_ids).logits`. linears: name -> FrozenLinear of every linear layer of
    the decoder, and of the head. storage: how the decoder's weights are stored ('nf4-dq', ..., 'none'). packs: whether
    transformers' layers are known to compute packed rows right (train/sharing.py finds out); fused layers always do.
    cache_dtype: that keys and values of fused layers wait in while text is generated, float32 or bfloat16.
    tile_tokens, loss_chunk: see train.config.Settings. packed: how the rows given last lie, None: as they were given.
    """

    model: PreTrainedModel
    checkpoint: Checkpoint
    storage: str
    compute_dtype: torch.dtype
    device: torch.device
    stream: LayerStream | None = None
    packs: bool = False
    cache_dtype: torch.dtype = torch.float32
    tile_tokens: int = TILE_TOKENS
    loss_chunk: int | None = None
    packed: PackedRows | None = None

    @property
    def backbone(self) -> nn.Module:
        """input_ids -> output with last_hidden_state."""
        return getattr(self.model, self.model.base_model_prefix)

    def hidden_of(self, input_ids: torch.Tensor) -> torch.Tensor:
        """input_ids [B, T] -> last hidden states [B, T, hidden_size]; causal, without a cache."""
        return self.backbone(input_ids=input_ids, use_cache=False)[0]

    def hidden_of_rows(
        self, input_ids: torch.Tensor, lengths: torch.Tensor, groups: Sequence[tuple[Sequence[int], int]] = ()
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """input_ids [B, T], padded on the right; lengths [B]; groups: (rows, how many tokens they begin with alike).

        Returns (last hidden states [tokens computed, hidden_size], int64 [sum of lengths]: which of them is that of
        each real token, row after row). Where rows are packed, padding is not computed, and a prefix once.
        """
        backbone: Any = self.backbone
        fused = is_fused(backbone) and not any(layer.needs_modules for layer in backbone.layers)
        if fused or self.packs:
            packed = self.packed = pack_rows(input_ids, lengths, groups, self.padded, self.tile_tokens)
            hidden = hidden_rows(backbone, packed) if fused else self._hidden_packed(packed)
            return hidden, packed.places.to(self.device)
        self.packed = None
        # attention is causal, so what counts sees no padding, and no mask is needed
        real = (torch.arange(input_ids.shape[1]) < lengths[:, None]).to(self.device)
        hidden = self.hidden_of(input_ids.to(self.device))[real]
        return hidden, torch.arange(len(hidden), device=self.device)

    def padded(self, rows: int) -> int:
        """How many rows a product takes for so many: see padded_rows."""
        return padded_rows(rows, self.compute_dtype, self.device)

    def _hidden_packed(self, packed: PackedRows) -> torch.Tensor:
        """Last hidden states [tokens computed, hidden_size], by transformers' layers."""
        ids, positions = (part[None].to(self.device) for part in (packed.ids, packed.positions))
        with segment_attention(self.model.config.get_text_config(), SegmentMasks(packed.segments)):
            return self.backbone(input_ids=ids, position_ids=positions, use_cache=False)[0][0]

    @property
    def max_positions(self) -> int:
        """The longest sequence, in tokens, that the model was made for; a learned position table ends there."""
        config = self.model.config.get_text_config()
        return int(getattr(config, "max_position_embeddings", None) or getattr(config, "n_positions", None) or 1 << 30)

    @property
    def streamed(self) -> dict[str, float]:
        """read_bytes and wait_s of streamed layers so far; nothing where there are none."""
        return {"read_bytes": self.stream.read_bytes, "wait_s": self.stream.wait_s} if self.stream else {}

    @property
    def key_bytes(self) -> int:
        """Of one token's keys and values in all layers, while text is generated."""
        config = self.model.config.get_text_config()
        kv_heads, width = heads_of_keys(config)
        item = (self.cache_dtype if is_fused(self.backbone) else self.compute_dtype).itemsize
        return 2 * item * kv_heads * width * config.num_hidden_layers

    @property
    def head(self) -> Any:
        """The output head: a FrozenLinear, or what learns over it (lora/linear.py, model/trained.py)."""
        return self.model.get_output_embeddings()

    @property
    def head_name(self) -> str:
        return next(name for name, module in self.model.named_modules() if module is self.head)

    @property
    def linears(self) -> dict[str, FrozenLinear]:
        return {name: module for name, module in self.model.named_modules() if isinstance(module, FrozenLinear)}

    def logits_of(self, hidden: torch.Tensor) -> torch.Tensor:
        """Last hidden states [..., hidden_size] -> logits [..., vocab_size], as the architecture computes them."""
        logits = self.head(hidden)
        config = self.model.config.get_text_config()
        if scale := getattr(config, "logit_scale", None):  # Cohere
            logits = logits * scale
        if scale := getattr(config, "logits_scaling", None):  # Granite
            logits = logits / scale
        if cap := getattr(config, "final_logit_softcapping", None):  # Gemma 2
            logits = torch.tanh(logits / cap) * cap
        return logits


def build_base(
    checkpoint: Checkpoint,
    *,
    storage: str,
    compute_dtype: torch.dtype,
    device: torch.device,
    stream: LayerStream | None = None,
    trust_remote_code: bool = False,
    report: Report = silent,
) -> Base:
    """Build and fill the model. storage: see quant.matrix.quantise. stream: the decoder layers not kept in memory.

    Raises ModelError for what cannot be trained on.
    """
    stored = stored_weights(checkpoint, report)
    model, weights = open_skeleton(checkpoint, compute_dtype, stored, trust_remote_code, report)
    _fill_buffers(model)
    is_kept = stored is not None and stored.storage == storage
    _fill(model, weights, storage, compute_dtype, device, stream, report, is_kept=is_kept)
    if device.type == "cpu":
        fuse_layers(model)
    base = Base(model, checkpoint, storage, compute_dtype, device, stream)
    model.requires_grad_(False)
    model.eval()
    _refuse_unpacked(base)
    _check_head(base)
    if device.type == "cpu" and not model.config.get_text_config().tie_word_embeddings:
        give_lookups_back(model.get_input_embeddings(), checkpoint)
    return base


def open_skeleton(
    checkpoint: Checkpoint,
    dtype: torch.dtype,
    stored: StoredWeights | None,
    trust_remote_code: bool = False,
    report: Report = silent,
) -> tuple[PreTrainedModel, Weights]:
    """The model on the meta device, and what fills it. Raises ModelError where they do not fit.

    Embedding and head are one where config.json says so, unless the file has two: what is there counts, as it does for
    transformers.
    """
    config = read_config(checkpoint.config, f"{checkpoint.path}/config.json", checkpoint, trust_remote_code)
    model = skeleton(config, dtype, trust_remote_code)
    weights = Weights(model, checkpoint, stored)
    if weights.has_other_head():
        unlike = "ties head and embedding (tie_word_embeddings), but the weights have a head of its own"
        report(Warned(f"{checkpoint.path}/config.json {unlike}: it is used"))
        config.tie_word_embeddings = config.get_text_config().tie_word_embeddings = False
        model = skeleton(config, dtype, trust_remote_code)
        weights = Weights(model, checkpoint, stored)
    return model, weights


def read_config(
    content: dict[str, Any], where: str, checkpoint: Checkpoint | None = None, trust_remote_code: bool = False
) -> PretrainedConfig:
    """What config.json holds -> transformers' configuration, without dropout. where: what to call it in an error.

    checkpoint: what it belongs to; None for a configuration alone. Raises ModelError.
    """
    content = dict(content)
    content.pop("quantization_config", None)  # the blocks are read by ourselves
    for key in ("num_hidden_layers", "n_layer", "num_layers"):  # modules are made before a weight is looked for
        most = 1000 if checkpoint is None else len(checkpoint.tensors)
        if isinstance(content.get(key), int) and content[key] > most:
            expected = "at most 1000" if checkpoint is None else f"at most the {most} tensors that there are"
            raise ModelError(f"{where}: wrong {key}", expected=expected, found=str(content[key])[:30])
    model_type = str(content.get("model_type"))
    if trust_remote_code and content.get("auto_map") and checkpoint is not None:
        config = AutoConfig.from_pretrained(checkpoint.path, trust_remote_code=True)
    elif model_type in CONFIG_MAPPING:
        try:
            config = CONFIG_MAPPING[model_type].from_dict(content)
        except Exception as error:  # each class checks its values in words of its own
            raise ModelError(f"{where}: {_one_line(error)}") from error
    else:
        cure = "update transformers"
        if content.get("auto_map"):
            cure = "the folder brings its own Python code: add --trust-remote-code if you trust its source"
        raise ModelError(f"{where}: model_type {model_type!r} is unknown to transformers", cure=cure)
    for key in [key for key in config.to_dict() if key.endswith(("dropout", "pdrop", "dropout_prob", "dropout_rate"))]:
        if isinstance(getattr(config, key, None), float):
            setattr(config, key, 0.0)
    return config


def _one_line(error: Exception) -> str:
    return (" ".join(str(error).split()) or type(error).__name__)[:200]


def skeleton(config: PretrainedConfig, dtype: torch.dtype, trust_remote_code: bool = False) -> PreTrainedModel:
    """The model on the meta device. Raises ModelError for what is no causal language model."""
    try:
        with torch.device("meta"), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            model = AutoModelForCausalLM.from_config(config, dtype=dtype, trust_remote_code=trust_remote_code)
    except Exception as error:  # whatever a model's code raises over sizes that do not fit together
        raise ModelError(f"config.json does not describe a causal language model: {_one_line(error)}") from error
    if model.get_output_embeddings() is None:
        raise ModelError(f"{type(model).__name__} has no output head, so it is no causal language model")
    if getattr(config, "is_encoder_decoder", False):
        raise ModelError(f"{type(model).__name__} is an encoder-decoder; smidgen trains decoder-only models")
    embedding, head = model.get_input_embeddings(), model.get_output_embeddings()
    # a text model within another is tied or not by the outer configuration
    model.config.get_text_config().tie_word_embeddings = head.weight is embedding.weight
    return model


def _fill_buffers(model: PreTrainedModel) -> None:
    """Computed buffers (rotary frequencies, causal masks) come from the model's own initialisation.

    Done while all parameters are still on the meta device, where initialising them costs and changes nothing.
    """
    for name, module in model.named_modules():
        buffers = {key: buffer for key, buffer in module.named_buffers(recurse=False) if buffer.is_meta}
        if not buffers:
            continue
        for key, buffer in buffers.items():
            if buffer.numel() > _LARGEST_BUFFER:
                raise ModelError(f"config.json asks for {buffer.numel():,} numbers in the buffer {name}.{key}"[:200])
            empty = torch.empty_like(buffer, device="cpu")
            module._buffers[key] = empty.fill_(torch.nan) if empty.is_floating_point() else empty
        owner: Any = model
        for parent, candidate in model.named_modules():
            if isinstance(candidate, PreTrainedModel) and (not parent or name.startswith(parent)):
                owner = candidate
        owner._init_weights(module)
        for key in buffers:
            if module._buffers[key].is_floating_point() and module._buffers[key].isnan().any():  # type: ignore[union-attr]
                raise ModelError(f"{type(model).__name__}: no rule how to compute the buffer {name}.{key}")


def _fill(
    model: PreTrainedModel,
    weights: Weights,
    storage: str,
    dtype: torch.dtype,
    device: torch.device,
    stream: LayerStream | None,
    report: Report,
    *,
    is_kept: bool,
) -> None:
    """Exchange and fill every module, in the order of the model; floats live only while they are packed.

    is_kept: `storage` is what the checkpoint has: its packed weights are taken as they are, and plain numbers stay.
    """
    head = model.get_output_embeddings()
    head_name = next(name for name, module in model.named_modules() if module is head)
    what = "load" if storage == "none" or is_kept else f"quantise to {storage}"
    modules = [(name, module) for name, module in model.named_modules() if list(module.parameters(recurse=False))]
    for done, (name, module) in enumerate(modules):
        report(Progress(what, done, len(modules)))
        if module is head:
            continue
        if isinstance(module, nn.Linear | Conv1D):
            model.set_submodule(
                name, _frozen_linear(module, name, weights, storage, dtype, device, is_kept=is_kept).to(device)
            )
            weights.checkpoint.release()
        elif is_experts(module):
            experts = _packed_experts(module, name, weights, storage, device, is_kept=is_kept)
            model.set_submodule(name, experts.to(device))
            weights.checkpoint.release()
        elif isinstance(module, nn.Embedding) and isinstance(matrix := weights.packed(f"{name}.weight"), BlockMatrix):
            if not matrix.has_finite_scales():
                raise _not_finite(f"{weights.checkpoint.path}: tensor {name}.weight")
            weights.checkpoint.release()
            scale = float(getattr(module, "scalar_embed_scale", 1.0))  # Gemma 3
            model.set_submodule(name, FrozenEmbedding(matrix.to(device), dtype, scale))
        else:
            _fill_module(module, name, weights, dtype, device)
        if stream is not None and (index := layer_of(name)) in stream.layers:
            for matrix in model.get_submodule(name).modules():
                if isinstance(matrix, FrozenMatrix):
                    stream.take(index, matrix)
    if stream is not None:
        stream.start()
    model.set_submodule(head_name, _frozen_head(model, head_name, weights, dtype).to(device))
    for buffer_name, buffer in list(model.named_buffers()):
        if buffer.device not in (device, torch.device("meta")):
            parent, _, last = buffer_name.rpartition(".")
            model.get_submodule(parent)._buffers[last] = buffer.to(device)
    report(Progress(what, len(modules), len(modules)))


def _frozen_linear(
    layer: nn.Module,
    name: str,
    weights: Weights,
    storage: str,
    dtype: torch.dtype,
    device: torch.device,
    *,
    is_kept: bool,
) -> FrozenLinear:
    transposed = isinstance(layer, Conv1D)
    matrix = weights.packed(f"{name}.weight") if is_kept and not transposed else None
    if matrix is None:
        weight = weights.read(f"{name}.weight").to(device)  # quantised where it will be
        matrix = quantise(weight.t() if transposed else weight, "none" if is_kept else storage)
        if not isinstance(matrix, DenseMatrix):
            _check_finite(matrix, f"{weights.checkpoint.path}: tensor {name}.weight")
    bias = None if layer.bias is None else weights.read(f"{name}.bias").to(dtype)
    return FrozenLinear(matrix, bias, transposed=transposed)  # type: ignore[arg-type]


def _check_finite(matrix: FrozenMatrix, what: str) -> None:
    """Of a matrix just quantised: one number that is not finite spoils the scales of many."""
    if not all(bool(buffer.isfinite().all()) for buffer in matrix.buffers() if buffer.is_floating_point()):
        raise _not_finite(what)


def _not_finite(what: str) -> ModelError:
    return ModelError(f"{what} holds numbers that are not finite", cure="download it again")


def _packed_experts(
    module: nn.Module, name: str, weights: Weights, storage: str, device: torch.device, *, is_kept: bool
) -> PackedExperts:
    packed: dict[str, list[list[FrozenMatrix]]] = {}
    for key in ("gate_up_proj", "down_proj"):
        as_stored = is_kept or storage == "none"
        found = weights.stored_experts(f"{name}.{key}") if as_stored else None
        if found is None:
            found = []
            for expert in weights.each_expert(f"{name}.{key}"):
                found.append([quantise(expert.to(device), "none" if as_stored else storage)])
                weights.checkpoint.release()
        packed[key] = found
    down = [matrix for (matrix,) in packed["down_proj"]]
    return PackedExperts(packed["gate_up_proj"], down, module.act_fn)  # type: ignore[arg-type]


def _frozen_head(model: PreTrainedModel, name: str, weights: Weights, dtype: torch.dtype) -> FrozenLinear:
    """The head in its stored type, or the embedding's weight where the two are one."""
    head: Any = model.get_output_embeddings()
    tied = model.config.get_text_config().tie_word_embeddings
    embedding: Any = model.get_input_embeddings()
    bias = weights.read(f"{name}.bias").to(dtype) if head.bias is not None else None
    if tied and isinstance(embedding, FrozenEmbedding):
        matrix = embedding.weight
    elif tied:
        matrix = DenseMatrix(embedding.weight.data)
    else:
        matrix = weights.packed(f"{name}.weight") or DenseMatrix(weights.read(f"{name}.weight"))
    return FrozenLinear(matrix, bias)


def _fill_module(module: nn.Module, name: str, weights: Weights, dtype: torch.dtype, device: torch.device) -> None:
    """Norms and other small parameters in the compute type; embeddings in their stored type, cast when looked up.

    A mixture's router is one of the small ones, also where it was packed with the other layers.
    """
    stored = isinstance(module, nn.Embedding)
    for key, _ in list(module.named_parameters(recurse=False)):
        full = f"{name}.{key}" if name else key
        matrix = None if stored else weights.packed(full)
        tensor = weights.read(full) if matrix is None else dense(matrix, dtype, device)
        tensor = tensor.to(device) if stored else tensor.to(device=device, dtype=dtype, copy=True)
        setattr(module, key, nn.Parameter(tensor, requires_grad=False))
    if stored:
        module.register_forward_hook(_cast_output(dtype))


def _cast_output(dtype: torch.dtype) -> Callable[..., torch.Tensor]:
    return lambda _module, _args, output: converted(output, dtype)


def _refuse_unpacked(base: Base) -> None:
    """A decoder whose weights mostly stay dense would silently need many times the memory that was promised."""
    if base.storage == "none":
        return
    packed = sum(m.out_features * m.in_features for m in base.model.modules() if isinstance(m, FrozenMatrix))
    unpacked = {
        name: parameter.numel()
        for name, parameter in base.model.named_parameters()
        if parameter.dim() > 1 and not isinstance(base.model.get_submodule(name.rpartition(".")[0]), nn.Embedding)
    }
    total = packed + sum(unpacked.values())
    if sum(unpacked.values()) > _LARGEST_UNPACKED_SHARE * total:
        largest = max(unpacked, key=lambda name: unpacked[name])
        raise ModelError(
            f"{type(base.model).__name__}: {sum(unpacked.values()) / total:.0%} of its weights would stay unpacked"
            f" (the largest is {largest})",
            expected=f"at most {_LARGEST_UNPACKED_SHARE:.0%}",
            cure="use --quantize none, which keeps every weight in its stored type",
        )


@torch.no_grad()
def _check_head(base: Base) -> None:
    """Our logits from the backbone's output must be the model's own logits, on three tokens."""
    captured: list[torch.Tensor] = []
    hook = base.backbone.register_forward_hook(lambda _m, _a, output: captured.append(output[0]))
    with pages_given_back(base.model, base.checkpoint):
        expected = base.model(input_ids=torch.arange(3, device=base.device)[None], use_cache=False).logits
    hook.remove()
    # A few models call a part of their backbone directly; then it has to run once more.
    hidden = captured[0] if captured else base.hidden_of(torch.arange(3, device=base.device)[None])
    ours = base.logits_of(hidden)
    if not expected.isfinite().all():
        name = find_not_finite(base.model)
        if name is not None:
            raise _not_finite(f"{base.checkpoint.path}: tensor {name}")
        raise ModelError(
            f"{base.checkpoint.path}: its weights give numbers that are not finite", cure="compute in float32"
        )
    if not torch.allclose(ours, expected.to(ours.dtype), rtol=1e-2, atol=1e-3 * float(expected.abs().max())):
        raise ModelError(
            f"{type(base.model).__name__} computes its logits in a way that is not known here",
            cure="report the model's name, it takes one line to add",
        )
