"""A whole model as one GGUF file: base + adapters merged, tokenizer and chat template inside.

Tensors are made and written one after another. Matrices get the type that is asked for; norms and biases stay float32,
as llama.cpp wants them; with Q4_0 the embedding and the head are Q8_0, which costs little and spares the output most.
"""

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from smidgen.checkpoint.architectures import make_config
from smidgen.checkpoint.gguf import GgufCheckpoint
from smidgen.checkpoint.gguf_header import GgufHeader, GgufTensor, Metadata
from smidgen.errors import RunError
from smidgen.events import Progress, Report, Warned, silent
from smidgen.export.gguf_layout import GgufLayout, write_metadata
from smidgen.export.gguf_rotary import rotary_factors, rotary_metadata
from smidgen.export.gguf_tokenizer import tokenizer_metadata
from smidgen.export.merge import MergedParameter, merged_parameters
from smidgen.model.build import Base
from smidgen.model.tokenizer_gguf import USER_DEFINED
from smidgen.model.trained import TokenRows, learning_parts

__all__ = ["save_gguf"]

_FILE_TYPES = {"F16": 1, "Q4_0": 2, "Q8_0": 7, "BF16": 32}  # llama.cpp's numbers of them
_SIZES = {"F32": (1, 4), "F16": (1, 2), "BF16": (1, 2), "Q8_0": (32, 34), "Q4_0": (32, 18)}
_NOT_COPIED = (
    "general.architecture", "general.file_type", "general.quantization_version", "general.alignment", "split.",
    "quantize.",
)  # fmt: skip
_OPTIONAL = {  # key of config.json -> below "<architecture>.", where the model has it
    "gemma2": {
        "sliding_window": "attention.sliding_window",
        "attn_logit_softcapping": "attn_logit_softcapping",
        "final_logit_softcapping": "final_logit_softcapping",
    },
    "gemma3": {"sliding_window": "attention.sliding_window"},
    "phi3": {"sliding_window": "attention.sliding_window"},
}


@torch.no_grad()
def save_gguf(base: Base, tokenizer: Any, path: Path, kind: str, report: Report = silent) -> None:
    """kind: F16, BF16, Q8_0 or Q4_0. Raises RunError for an architecture or tokenizer that cannot be written."""
    import gguf

    layout = GgufLayout.of(base)
    parameters = list(merged_parameters(base))
    extra = rotary_factors(base)
    metadata = _metadata(base, layout, tokenizer, report)
    _check_unsaid(layout, metadata, parameters, extra)
    writer = gguf.GGUFWriter(None, layout.architecture)
    write_metadata(writer, metadata)
    write_metadata(writer, {"general.file_type": _FILE_TYPES[kind], "general.quantization_version": 2})
    kinds = {parameter.name: _kind_of(parameter, layout.name(parameter.name), kind) for parameter in parameters}
    for name, factors in extra.items():
        writer.add_tensor_info(name, factors.shape, factors.dtype, factors.nbytes)
    for parameter in parameters:
        own = kinds[parameter.name]
        block, size = _SIZES[own]
        nbytes = math.prod(parameter.shape) // block * size
        stored = np.dtype({"F32": np.float32, "F16": np.float16}.get(own, np.uint8))
        shape = (*parameter.shape[:-1], parameter.shape[-1] // block * size) if stored == np.uint8 else parameter.shape
        writer.add_tensor_info(
            layout.name(parameter.name), shape, stored, nbytes, raw_dtype=gguf.GGMLQuantizationType[own]
        )
    writer.write_header_to_file(path)
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    for factors in extra.values():
        writer.write_tensor_data(factors)
    for done, parameter in enumerate(parameters):
        report(Progress("writing GGUF", done, len(parameters)))
        tensor = layout.stored(parameter.name, parameter.make(torch.float32).cpu()).contiguous()
        raw = gguf.quants.quantize(tensor.numpy(), gguf.GGMLQuantizationType[kinds[parameter.name]])
        writer.write_tensor_data(np.ascontiguousarray(raw))
    report(Progress("writing GGUF", len(parameters), len(parameters)))
    writer.close()


_COMPUTING = (
    "head_dim", "num_key_value_heads", "layer_types", "query_pre_attn_scalar", "attn_logit_softcapping",
    "final_logit_softcapping", "attention_bias", "mlp_bias", "hidden_act", "hidden_activation", "rms_norm_eps",
    "tie_word_embeddings",
)  # fmt: skip


def _kind_of(parameter: MergedParameter, theirs: str, kind: str) -> str:
    if len(parameter.shape) < 2:
        return "F32"
    if len(parameter.shape) > 2:
        raise RunError(f"{parameter.name} has {len(parameter.shape)} dimensions, which is not written as GGUF here")
    if parameter.shape[-1] % _SIZES[kind][0]:
        return "F16"  # rows of no whole number of blocks
    return "Q8_0" if kind == "Q4_0" and theirs.startswith(("token_embd", "output")) else kind


def _metadata(base: Base, layout: GgufLayout, tokenizer: Any, report: Report) -> dict[str, Any]:
    if isinstance(base.checkpoint, GgufCheckpoint):
        values = base.checkpoint.header.metadata.values
        kept = {key: value for key, value in values.items() if not key.startswith(_NOT_COPIED)}
        if isinstance(tokenizer.chat_template, str):  # training may have set one
            kept["tokenizer.chat_template"] = tokenizer.chat_template
        if tokenizer.eos_token_id is not None:
            kept["tokenizer.ggml.eos_token_id"] = int(tokenizer.eos_token_id)
        return kept | _new_tokens(base, tokenizer, kept)
    name, row, config = layout.architecture, layout.row, layout.config
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    values: dict[str, Any] = {"general.type": "model"}
    values |= {f"{name}.{suffix}": int(getattr(config, key)) for key, suffix in row.integers.items()}
    values |= {f"{name}.{suffix}": float(getattr(config, key)) for key, suffix in row.numbers.items()}
    values |= {
        f"{name}.vocab_size": int(config.vocab_size),
        f"{name}.attention.head_count_kv": int(getattr(config, "num_key_value_heads", config.num_attention_heads)),
        f"{name}.attention.key_length": head_dim,
        f"{name}.attention.value_length": head_dim,
    }
    for key, suffix in _OPTIONAL.get(name, {}).items():
        if getattr(config, key, None):
            values[f"{name}.{suffix}"] = getattr(config, key)
    window = getattr(config, "sliding_window", None)
    if name == "llama" and window and window < config.max_position_embeddings:
        lost = f"GGUF has no sliding window for this model: beyond {window} tokens other programs see all of a text"
        report(Warned(lost))
    rotary = rotary_metadata(name, config, head_dim, report)
    return values | rotary | tokenizer_metadata(tokenizer, config.vocab_size)


def _new_tokens(base: Base, tokenizer: Any, values: dict[str, Any]) -> dict[str, Any]:
    """The vocabulary of the base's file with the tokens that training has added, which are never cut."""
    parts = [part for part in learning_parts(base.model).values() if isinstance(part, TokenRows)]
    if not parts:
        return {}
    lists = {"tokens": "", "token_type": USER_DEFINED, "scores": 0.0}
    found = {key: list(values[f"tokenizer.ggml.{key}"]) for key in lists if f"tokenizer.ggml.{key}" in values}
    for index in parts[0].token_ids.tolist():
        token = tokenizer.convert_ids_to_tokens(index)
        if index < len(found["tokens"]) and found["tokens"][index] == token:
            continue  # not a new one
        for key, entries in found.items():
            entries += [lists[key]] * (index + 1 - len(entries))
            entries[index] = token if key == "tokens" else lists[key]
    said: dict[str, Any] = {f"tokenizer.ggml.{key}": entries for key, entries in found.items()}
    sizes = [key for key in values if key.endswith(".vocab_size")]
    return said | dict.fromkeys(sizes, int(base.model.config.get_text_config().vocab_size))


def _check_unsaid(
    layout: GgufLayout, values: dict[str, Any], parameters: Sequence[MergedParameter], extra: dict[str, np.ndarray]
) -> None:
    """What readers of the file will take for the model's configuration must compute what the model computes.

    Much has no key of its own (which layers have a window, Gemma's scale of attention): it follows from the family.
    """
    tensors = {
        theirs: GgufTensor(theirs, "F32", parameter.shape, 0, 0)
        for parameter in parameters
        if (theirs := layout.name(parameter.name))
    }
    tensors |= {name: GgufTensor(name, "F32", factors.shape, 0, 0) for name, factors in extra.items()}
    stored = {"general.architecture": layout.architecture, "general.type": "model"} | values
    made = make_config(GgufHeader(3, Metadata(Path("export"), stored), tensors))
    again = CONFIG_MAPPING[layout.row.model_type].from_dict(made)
    for key in _COMPUTING:
        ours, theirs = getattr(layout.config, key, None), getattr(again, key, None)
        if ours is None and (not theirs or key == "head_dim"):  # a class without the key; its usual value
            continue
        if isinstance(ours, float) and isinstance(theirs, float) and math.isclose(ours, theirs, rel_tol=1e-5):
            continue
        if ours != theirs:
            raise RunError(
                f"{key} = {str(ours)[:80]} has no place in GGUF", expected=str(theirs)[:80], cure="use --to hf"
            )
