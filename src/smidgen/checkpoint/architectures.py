"""GGUF architectures as a table: which metadata becomes which key of config.json, which tensor is which.

A new architecture is a new row of ARCHITECTURES. What a row cannot say (an odd rotary scaling, a fused or shifted
tensor) goes into a small function of its own, named in the row.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from smidgen.errors import ModelError

from .gguf_header import GgufHeader

__all__ = ["ARCHITECTURES", "Architecture", "architecture_of", "make_config", "tensor_name"]


@dataclass(frozen=True)
class Architecture:
    """How a GGUF architecture maps to transformers.

    integers, numbers: key of config.json -> metadata key below "<architecture>.".
    tensors, layer_tensors: GGUF module name -> Hugging Face module name, the latter below "model.layers.N.".
    permuted: layer modules whose rows GGUF keeps in pairs (2i, 2i+1) where transformers has halves -> the config key
    with their number of heads.
    ignored: tensors that are no parameter of the model.
    finish: adds to the config what a table cannot say.
    """

    model_type: str
    class_name: str
    integers: dict[str, str]
    numbers: dict[str, str]
    tensors: dict[str, str]
    layer_tensors: dict[str, str]
    permuted: dict[str, str]
    ignored: tuple[str, ...]
    finish: Callable[[GgufHeader, dict[str, Any]], None]


_INTEGERS = {
    "hidden_size": "embedding_length",
    "intermediate_size": "feed_forward_length",
    "num_hidden_layers": "block_count",
    "num_attention_heads": "attention.head_count",
    "max_position_embeddings": "context_length",
}
_TENSORS = {"token_embd": "model.embed_tokens", "output_norm": "model.norm", "output": "lm_head"}
_LAYER_TENSORS = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}


def _finish_llama(header: GgufHeader, config: dict[str, Any]) -> None:
    metadata, tensors = header.metadata, header.tensors
    if metadata.integer("llama.expert_count", 0):
        raise ModelError(f"{metadata.path} is a mixture of experts of architecture llama, not read from GGUF yet")
    rotary = metadata.integer("llama.rope.dimension_count", config["head_dim"])
    if rotary != config["head_dim"]:
        raise ModelError(
            f"{metadata.path}: rotary embedding over a part of the head",
            expected=f"llama.rope.dimension_count = {config['head_dim']}",
            found=str(rotary),
        )
    # The file has a 32-bit float; 7 digits give back the 1e-05 that config.json had.
    config["rms_norm_eps"] = float(f"{metadata.number('llama.attention.layer_norm_rms_epsilon'):.7g}")
    config["hidden_act"] = "silu"
    for key, probe, whole in (
        ("attention_bias", "attn_q", ("attn_q", "attn_k", "attn_v", "attn_output")),
        ("mlp_bias", "ffn_gate", ("ffn_gate", "ffn_up", "ffn_down")),
    ):
        config[key] = f"blk.0.{probe}.bias" in tensors
        if config[key] and (missing := [name for name in whole if f"blk.0.{name}.bias" not in tensors]):
            raise ModelError(f"{metadata.path} has a bias on {probe} but none on {missing[0]}, which Llama cannot have")


ARCHITECTURES: dict[str, Architecture] = {
    # SmolLM2, Llama 1-3, Mistral, TinyLlama, Yi and all that were exported as Llama.
    "llama": Architecture(
        model_type="llama",
        class_name="LlamaForCausalLM",
        integers=_INTEGERS,
        numbers={},
        tensors=_TENSORS,
        layer_tensors=_LAYER_TENSORS,
        permuted={"attn_q": "num_attention_heads", "attn_k": "num_key_value_heads"},
        ignored=("rope_freqs.weight",),
        finish=_finish_llama,
    ),
}


def architecture_of(header: GgufHeader) -> tuple[str, Architecture]:
    """The row for this file. Refuses adapters, parts of split files and unknown architectures by name."""
    metadata = header.metadata
    path = metadata.path
    if metadata.text("general.type", "model") not in ("model", "finetune"):
        raise ModelError(f"{path} is no model", expected="general.type = model", found=metadata.text("general.type"))
    if metadata.integer("split.count", 1) > 1:
        raise ModelError(
            f"{path} is one of {metadata.integer('split.count')} parts of a model",
            cure="join them with `llama-gguf-split --merge FIRST_PART OUT.gguf`",
        )
    name = metadata.text("general.architecture")
    if name not in ARCHITECTURES:
        known = ", ".join(ARCHITECTURES)
        cure = "use the model's Hugging Face folder instead"
        raise ModelError(f"{path}: unknown GGUF architecture", expected=known, found=name[:60], cure=cure)
    return name, ARCHITECTURES[name]


def make_config(header: GgufHeader) -> dict[str, Any]:
    """The content of config.json that stands for this file's metadata."""
    name, row = architecture_of(header)
    metadata = header.metadata
    config: dict[str, Any] = {"architectures": [row.class_name], "model_type": row.model_type}
    for key, suffix in row.integers.items():
        config[key] = metadata.integer(f"{name}.{suffix}", low=1)
    for key, suffix in row.numbers.items():
        config[key] = metadata.number(f"{name}.{suffix}")
    heads = config["num_attention_heads"]
    config["num_key_value_heads"] = metadata.integer(f"{name}.attention.head_count_kv", heads, low=1)
    config["head_dim"] = metadata.integer(f"{name}.attention.key_length", config["hidden_size"] // heads, low=1)
    if "token_embd.weight" not in header.tensors:
        raise ModelError(f"{metadata.path} has no tensor token_embd.weight")
    # The rows that there are, not what the metadata says: the two differ where a vocabulary was padded.
    config["vocab_size"] = header.tensors["token_embd.weight"].shape[0]
    config["tie_word_embeddings"] = "output.weight" not in header.tensors
    config["rope_parameters"] = _rope_parameters(header, name, config)
    for key, suffix in (("bos_token_id", "bos"), ("eos_token_id", "eos")):
        config[key] = metadata.integer(f"tokenizer.ggml.{suffix}_token_id", None)
    row.finish(header, config)
    return config


def _rope_parameters(header: GgufHeader, name: str, config: dict[str, Any]) -> dict[str, Any]:
    metadata = header.metadata
    rope: dict[str, Any] = {"rope_type": "default", "rope_theta": metadata.number(f"{name}.rope.freq_base", 10_000.0)}
    scaling = metadata.text(f"{name}.rope.scaling.type", "none")
    if scaling == "linear":
        rope |= {"rope_type": "linear", "factor": float(metadata.number(f"{name}.rope.scaling.factor"))}
    elif scaling == "yarn":
        rope |= {"rope_type": "yarn", "factor": float(metadata.number(f"{name}.rope.scaling.factor"))}
        key = f"{name}.rope.scaling.original_context_length"
        rope["original_max_position_embeddings"] = metadata.integer(key, config["max_position_embeddings"], low=1)
    elif scaling != "none":
        raise ModelError(
            f"{metadata.path}: unknown rotary scaling", expected="none, linear or yarn", found=scaling[:40]
        )
    return rope


def tensor_name(row: Architecture, name: str, layers: int) -> str | None:
    """GGUF tensor name -> Hugging Face name, None for a name that this architecture does not have.

    >>> tensor_name(ARCHITECTURES["llama"], "blk.3.attn_q.weight", 4)
    'model.layers.3.self_attn.q_proj.weight'
    """
    module, _, kind = name.rpartition(".")
    if kind not in ("weight", "bias"):
        return None
    if module in row.tensors:
        return f"{row.tensors[module]}.{kind}"
    block, _, rest = module.partition(".")
    number, _, part = rest.partition(".")
    if block != "blk" or part not in row.layer_tensors or not (number.isascii() and number.isdigit()):
        return None
    if str(int(number)) != number or int(number) >= layers:
        return None
    return f"model.layers.{number}.{row.layer_tensors[part]}.{kind}"
