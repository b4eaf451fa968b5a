"""GGUF architectures as a table: which metadata becomes which key of config.json, which tensor is which.

A new architecture is a new row of ARCHITECTURES. What a row cannot say (an odd rotary scaling, a fused or shifted
tensor) goes into a small function of its own, named in the row.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from smidgen.errors import ModelError

from .gguf_header import GgufHeader
from .gguf_rotary import rope_parameters

__all__ = [
    "ARCHITECTURES",
    "Architecture",
    "architecture_for",
    "architecture_of",
    "gguf_tensor_name",
    "make_config",
    "tensor_name",
]


@dataclass(frozen=True)
class Architecture:
    """How a GGUF architecture maps to transformers, in both directions: reading a file and writing one.

    integers, numbers: key of config.json -> metadata key below "<architecture>.".
    tensors, layer_tensors: GGUF module name -> Hugging Face module name, the latter below "model.layers.N.".
    permuted: layer modules whose rows GGUF keeps in pairs (2i, 2i+1) where transformers has halves -> the config key
    with their number of heads.
    finish: adds to the config what a table cannot say.
    shifted: norms that the file has as 1 + weight (Gemma).
    ignored: tensors that are no parameter of the model.
    """

    model_type: str
    class_name: str
    layer_tensors: dict[str, str]
    finish: Callable[[GgufHeader, str, dict[str, Any]], None]
    integers: dict[str, str] = field(default_factory=lambda: _INTEGERS)
    numbers: dict[str, str] = field(default_factory=lambda: _NUMBERS)
    tensors: dict[str, str] = field(default_factory=lambda: _TENSORS)
    permuted: dict[str, str] = field(default_factory=dict)
    shifted: tuple[str, ...] = ()
    ignored: tuple[str, ...] = ("rope_freqs.weight",)


_INTEGERS = {
    "hidden_size": "embedding_length",
    "intermediate_size": "feed_forward_length",
    "num_hidden_layers": "block_count",
    "num_attention_heads": "attention.head_count",
    "max_position_embeddings": "context_length",
}
_NUMBERS = {"rms_norm_eps": "attention.layer_norm_rms_epsilon"}
_TENSORS = {"token_embd": "model.embed_tokens", "output_norm": "model.norm", "output": "lm_head"}
_ATTENTION = {
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
}
_HEAD_NORMS = {"attn_q_norm": "self_attn.q_norm", "attn_k_norm": "self_attn.k_norm"}
_MLP = {"ffn_gate": "mlp.gate_proj", "ffn_up": "mlp.up_proj", "ffn_down": "mlp.down_proj"}
_NORMS = {"attn_norm": "input_layernorm", "ffn_norm": "post_attention_layernorm"}
_GEMMA_NORMS = {
    "attn_norm": "input_layernorm",
    "post_attention_norm": "post_attention_layernorm",
    "ffn_norm": "pre_feedforward_layernorm",
    "post_ffw_norm": "post_feedforward_layernorm",
}
_GEMMA_27B = {46: "gemma2", 62: "gemma3"}  # layers: of this size alone, attention is scaled by another number


def _finish_llama(header: GgufHeader, name: str, config: dict[str, Any]) -> None:
    metadata, tensors = header.metadata, header.tensors
    if metadata.integer(f"{name}.expert_count", 0):
        raise ModelError(f"{metadata.path} is a mixture of experts of architecture {name}, not read from GGUF yet")
    _whole_rotary(header, name, config)
    config["hidden_act"] = "silu"
    for key, probe, whole in (
        ("attention_bias", "attn_q", ("attn_q", "attn_k", "attn_v", "attn_output")),
        ("mlp_bias", "ffn_gate", ("ffn_gate", "ffn_up", "ffn_down")),
    ):
        config[key] = f"blk.0.{probe}.bias" in tensors
        if config[key] and (missing := [name for name in whole if f"blk.0.{name}.bias" not in tensors]):
            raise ModelError(f"{metadata.path} has a bias on {probe} but none on {missing[0]}, which Llama cannot have")


def _finish_qwen(header: GgufHeader, name: str, config: dict[str, Any]) -> None:
    _whole_rotary(header, name, config)
    config["hidden_act"] = "silu"
    if name == "qwen3":  # Qwen 2 always has one
        config["attention_bias"] = "blk.0.attn_q.bias" in header.tensors


def _finish_gemma2(header: GgufHeader, name: str, config: dict[str, Any]) -> None:
    metadata = header.metadata
    _finish_gemma(header, name, config)
    config["attn_logit_softcapping"] = metadata.number(f"{name}.attn_logit_softcapping", 50.0)
    config["final_logit_softcapping"] = metadata.number(f"{name}.final_logit_softcapping", 30.0)


def _finish_gemma3(header: GgufHeader, name: str, config: dict[str, Any]) -> None:
    metadata = header.metadata
    _finish_gemma(header, name, config)
    config["final_logit_softcapping"] = metadata.number(f"{name}.final_logit_softcapping", None)
    scaled = config["rope_parameters"] | {"rope_theta": metadata.number(f"{name}.rope.freq_base", 1_000_000.0)}
    local = {"rope_type": "default", "rope_theta": metadata.number(f"{name}.rope.freq_base_swa", 10_000.0)}
    config["rope_parameters"] = {"full_attention": scaled, "sliding_attention": local}
    pattern = metadata.integer(f"{name}.attention.sliding_window_pattern", 6, low=1)
    layers = range(1, config["num_hidden_layers"] + 1)
    config["layer_types"] = ["sliding_attention" if layer % pattern else "full_attention" for layer in layers]


def _finish_gemma(header: GgufHeader, name: str, config: dict[str, Any]) -> None:
    _whole_rotary(header, name, config)
    config["hidden_activation"] = "gelu_pytorch_tanh"
    config["sliding_window"] = header.metadata.integer(f"{name}.attention.sliding_window", low=1)
    is_27b = _GEMMA_27B.get(config["num_hidden_layers"]) == name
    config["query_pre_attn_scalar"] = (
        config["hidden_size"] // config["num_attention_heads"] if is_27b else config["head_dim"]
    )


def _finish_phi3(header: GgufHeader, name: str, config: dict[str, Any]) -> None:
    metadata = header.metadata
    config["hidden_act"] = "silu"
    config["sliding_window"] = metadata.integer(f"{name}.attention.sliding_window", 0) or None
    if (kind := config["rope_parameters"]["rope_type"]) != "default":
        raise ModelError(f"{metadata.path}: Phi-3 has no rotary scaling of this type", expected="longrope", found=kind)
    rotary = metadata.integer(f"{name}.rope.dimension_count", config["head_dim"], low=2, high=config["head_dim"])
    config["rope_parameters"]["partial_rotary_factor"] = rotary / config["head_dim"]
    key = f"{name}.rope.scaling.original_context_length"
    config["original_max_position_embeddings"] = metadata.integer(key, config["max_position_embeddings"], low=1)


def _whole_rotary(header: GgufHeader, name: str, config: dict[str, Any]) -> None:
    rotary = header.metadata.integer(f"{name}.rope.dimension_count", config["head_dim"])
    if rotary != config["head_dim"]:
        raise ModelError(
            f"{header.metadata.path}: rotary embedding over a part of the head",
            expected=f"{name}.rope.dimension_count = {config['head_dim']}",
            found=str(rotary),
        )


ARCHITECTURES: dict[str, Architecture] = {
    # SmolLM2, Llama 1-3, Mistral, TinyLlama, Yi and all that were exported as Llama.
    "llama": Architecture(
        model_type="llama",
        class_name="LlamaForCausalLM",
        layer_tensors=_NORMS | _ATTENTION | _MLP,
        permuted={"attn_q": "num_attention_heads", "attn_k": "num_key_value_heads"},
        finish=_finish_llama,
    ),
    "qwen2": Architecture(
        model_type="qwen2",
        class_name="Qwen2ForCausalLM",
        layer_tensors=_NORMS | _ATTENTION | _MLP,
        finish=_finish_qwen,
    ),
    "qwen3": Architecture(
        model_type="qwen3",
        class_name="Qwen3ForCausalLM",
        layer_tensors=_NORMS | _ATTENTION | _HEAD_NORMS | _MLP,
        finish=_finish_qwen,
    ),
    "gemma2": Architecture(
        model_type="gemma2",
        class_name="Gemma2ForCausalLM",
        layer_tensors=_GEMMA_NORMS | _ATTENTION | _MLP,
        shifted=("output_norm", *_GEMMA_NORMS),
        finish=_finish_gemma2,
    ),
    "gemma3": Architecture(
        model_type="gemma3_text",
        class_name="Gemma3ForCausalLM",
        layer_tensors=_GEMMA_NORMS | _ATTENTION | _HEAD_NORMS | _MLP,
        shifted=("output_norm", *_GEMMA_NORMS, *_HEAD_NORMS),
        finish=_finish_gemma3,
    ),
    "phi3": Architecture(
        model_type="phi3",
        class_name="Phi3ForCausalLM",
        layer_tensors=_NORMS
        | {"attn_qkv": "self_attn.qkv_proj", "attn_output": "self_attn.o_proj"}
        | {"ffn_up": "mlp.gate_up_proj", "ffn_down": "mlp.down_proj"},
        ignored=("rope_factors_long.weight", "rope_factors_short.weight"),
        finish=_finish_phi3,
    ),
}


def architecture_of(header: GgufHeader) -> tuple[str, Architecture]:
    """The row for this file. Refuses adapters and unknown architectures by name."""
    metadata = header.metadata
    path = metadata.path
    if metadata.text("general.type", "model") not in ("model", "finetune"):
        raise ModelError(f"{path} is no model", expected="general.type = model", found=metadata.text("general.type"))
    name = metadata.text("general.architecture")
    if name not in ARCHITECTURES:
        known = ", ".join(ARCHITECTURES)
        cure = "use the model's Hugging Face folder instead"
        raise ModelError(f"{path}: unknown GGUF architecture", expected=known, found=name[:60], cure=cure)
    return name, ARCHITECTURES[name]


def architecture_for(model_type: str) -> tuple[str, Architecture] | None:
    """The GGUF architecture that a Hugging Face model is written as; None if there is no row for it."""
    written = "llama" if model_type == "mistral" else model_type  # as llama.cpp's converter does
    return next(((name, row) for name, row in ARCHITECTURES.items() if row.model_type == written), None)


def make_config(header: GgufHeader) -> dict[str, Any]:
    """The content of config.json that stands for this file's metadata."""
    name, row = architecture_of(header)
    metadata = header.metadata
    config: dict[str, Any] = {"architectures": [row.class_name], "model_type": row.model_type}
    for key, suffix in row.integers.items():
        config[key] = metadata.integer(f"{name}.{suffix}", low=1)
    if config["num_hidden_layers"] > len(header.tensors):
        found, expected = str(config["num_hidden_layers"]), "as many layers as have tensors"
        raise ModelError(f"{metadata.path}: wrong {name}.block_count", expected=expected, found=found)
    for key, suffix in row.numbers.items():
        # The file has a 32-bit float; 7 digits give back the 1e-05 that config.json had.
        config[key] = float(f"{metadata.number(f'{name}.{suffix}'):.7g}")
    heads = config["num_attention_heads"]
    config["num_key_value_heads"] = metadata.integer(f"{name}.attention.head_count_kv", heads, low=1)
    config["head_dim"] = metadata.integer(f"{name}.attention.key_length", config["hidden_size"] // heads, low=1)
    if "token_embd.weight" not in header.tensors:
        raise ModelError(f"{metadata.path} has no tensor token_embd.weight")
    # The rows that there are, not what the metadata says: the two differ where a vocabulary was padded.
    config["vocab_size"] = header.tensors["token_embd.weight"].shape[0]
    config["tie_word_embeddings"] = "output.weight" not in header.tensors
    config["rope_parameters"] = rope_parameters(header, name, config)
    for key, suffix in (("bos_token_id", "bos"), ("eos_token_id", "eos"), ("pad_token_id", "padding")):
        config[key] = metadata.integer(f"tokenizer.ggml.{suffix}_token_id", None)
    row.finish(header, name, config)
    return config


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


def gguf_tensor_name(row: Architecture, name: str) -> str | None:
    """The reverse of tensor_name; None for a name that the architecture does not have.

    >>> gguf_tensor_name(ARCHITECTURES["llama"], "model.layers.3.self_attn.q_proj.weight")
    'blk.3.attn_q.weight'
    """
    module, _, kind = name.rpartition(".")
    theirs = next((theirs for theirs, ours in row.tensors.items() if ours == module), None)
    if theirs is None and module.startswith("model.layers."):
        number, _, part = module.removeprefix("model.layers.").partition(".")
        found = next((theirs for theirs, ours in row.layer_tensors.items() if ours == part), None)
        theirs = f"blk.{number}.{found}" if found else None
    return f"{theirs}.{kind}" if theirs and kind in ("weight", "bias") else None
