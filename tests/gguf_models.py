"""GGUF files of tiny models, written with the gguf package's own writer and name tables.

What the converter of llama.cpp does to the weights (rows of q and k in pairs for Llama, norms plus one for Gemma) is
done here from its description, so that the reader is not tested against itself.
"""

from pathlib import Path
from typing import Any

import gguf
import numpy as np
import torch
from gguf.constants import MODEL_ARCH_NAMES, GGMLQuantizationType
from safetensors.torch import load_file
from transformers import AutoConfig, AutoTokenizer

__all__ = ["ROTARY", "UNSAID", "random_blocks", "write_gguf"]

# What a GGUF file does not say, because every model of the family has it so.
UNSAID: dict[str, dict[str, Any]] = {
    "mistral": {"sliding_window": None},
    "gemma2": {"query_pre_attn_scalar": 16, "sliding_window": 8},
    "gemma3": {
        "query_pre_attn_scalar": 16,
        "num_hidden_layers": 7,
        "layer_types": ["sliding_attention"] * 5 + ["full_attention", "sliding_attention"],
    },
}

_YARN = {"rope_type": "yarn", "rope_theta": 10_000.0, "factor": 4.0, "original_max_position_embeddings": 64}
_LONGROPE = {
    "rope_type": "longrope", "rope_theta": 10_000.0, "partial_rotary_factor": 1.0,
    "short_factor": [1.0 + 0.1 * i for i in range(8)], "long_factor": [1.0 + 2.0 * i for i in range(8)],
}  # fmt: skip
# Rotary scalings: the architecture, and the changes of its configuration.
ROTARY: dict[str, tuple[str, dict[str, Any]]] = {
    "linear": ("llama", {"rope_parameters": {"rope_type": "linear", "rope_theta": 10_000.0, "factor": 4.0}}),
    "yarn": ("llama", {"rope_parameters": _YARN}),
    "yarn of Qwen": ("qwen2", {"rope_parameters": _YARN}),
    "yarn, mscale": ("llama", {"rope_parameters": _YARN | {"mscale": 0.7, "mscale_all_dim": 1.4}}),
    "yarn, attention_factor": ("llama", {"rope_parameters": _YARN | {"attention_factor": 1.75}}),
    "yarn, betas": ("llama", {"rope_parameters": _YARN | {"beta_fast": 4.0, "beta_slow": 2.0}}),
    "longrope": ("phi3", {"rope_parameters": _LONGROPE, "original_max_position_embeddings": 64}),
    "longrope, attention_factor": (
        "phi3", {"rope_parameters": _LONGROPE | {"attention_factor": 1.5}, "original_max_position_embeddings": 64},
    ),
    "linear of Gemma 3": (
        "gemma3",
        UNSAID["gemma3"]
        | {
            "rope_parameters": {
                "full_attention": {"rope_type": "linear", "rope_theta": 1_000_000.0, "factor": 8.0},
                "sliding_attention": {"rope_type": "default", "rope_theta": 10_000.0},
            }
        },
    ),
}  # fmt: skip

# Where a block's float16 scales lie, and how large they are for values of about 0.02.
_SCALES = {
    "Q2_K": ((80, 82), 1.5e-3),
    "Q3_K": ((108,), 5e-4),
    "Q4_K": ((0, 2), 1e-4),
    "Q5_K": ((0, 2), 5e-5),
    "Q6_K": ((208,), 1.5e-5),
}


def random_blocks(kind: str, rows: int, width: int, seed: int) -> np.ndarray:
    """uint8 [rows, bytes] of a K-quant, for which the gguf package has no quantiser; values of about 0.02."""
    block, nbytes = gguf.GGML_QUANT_SIZES[GGMLQuantizationType[kind]]
    generator = np.random.default_rng(seed)
    raw = generator.integers(0, 256, (rows, width // block, nbytes), dtype=np.uint8)
    places, largest = _SCALES[kind]
    for at in places:
        scale = generator.uniform(0.2, 1, (rows, width // block, 1)).astype(np.float32) * largest
        raw[:, :, at : at + 2] = scale.astype(np.float16).view(np.uint8)
    return raw.reshape(rows, -1)


def _in_pairs(weight: torch.Tensor, heads: int) -> torch.Tensor:
    """Rows of a head from halves (0 .. h/2, h/2 .. h) to pairs, as the converter stores them for Llama."""
    return weight.view(heads, 2, weight.shape[0] // heads // 2, -1).swapaxes(1, 2).reshape(weight.shape)


def _halves(weight: torch.Tensor, heads: int) -> torch.Tensor:
    return weight.view(heads, weight.shape[0] // heads // 2, 2, -1).swapaxes(1, 2).reshape(weight.shape)


def _metadata(writer: gguf.GGUFWriter, config: Any, folder: Path, *, template: bool) -> None:
    arch = writer.arch
    rope = config.rope_parameters
    writer.add_block_count(config.num_hidden_layers)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_freq_base(float(rope.get("full_attention", rope)["rope_theta"]))
    if getattr(config, "head_dim", None):
        writer.add_key_length(config.head_dim)
        writer.add_value_length(config.head_dim)
    if arch.startswith("gemma") or (arch == "phi3" and config.sliding_window):
        writer.add_sliding_window(config.sliding_window)
    if arch == "gemma2":
        writer.add_attn_logit_softcapping(config.attn_logit_softcapping)
        writer.add_final_logit_softcapping(config.final_logit_softcapping)
    if arch == "phi3":
        head = config.hidden_size // config.num_attention_heads
        writer.add_rope_dimension_count(int(head * rope["partial_rotary_factor"]))
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokens = [token for token, _ in sorted(tokenizer.get_vocab().items(), key=lambda item: item[1])]
    tokens += [f"<unused{i}>" for i in range(config.vocab_size - len(tokens))]
    special = set(tokenizer.all_special_tokens)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("gpt-2")
    writer.add_token_list(tokens)
    writer.add_token_types([3 if token in special else 1 for token in tokens])
    writer.add_token_merges(["z q"])
    writer.add_bos_token_id(tokenizer.bos_token_id)
    writer.add_eos_token_id(tokenizer.eos_token_id)
    writer.add_pad_token_id(tokenizer.pad_token_id)
    writer.add_add_bos_token(False)
    if template:
        writer.add_chat_template(tokenizer.chat_template)


def write_gguf(
    folder: Path,
    out: Path,
    kinds: dict[str, str],
    default: str = "Q8_0",
    tensors_of_part: int = 0,
    *,
    template: bool = True,
    alignment: int = 32,
) -> dict[str, torch.Tensor]:
    """A Hugging Face folder as one file, or as parts. kinds: part of a GGUF name -> its type; norms and biases are F32.

    Returns the numbers that the file then stands for, by their Hugging Face names.
    """
    config = AutoConfig.from_pretrained(folder)
    arch = {"gemma3_text": "gemma3", "mistral": "llama"}.get(config.model_type, config.model_type)
    number = next(number for number, name in MODEL_ARCH_NAMES.items() if name == arch)
    names = gguf.get_tensor_name_map(number, config.num_hidden_layers)
    writer = gguf.GGUFWriter(str(out), arch, split_max_tensors=tensors_of_part)
    if alignment != 32:
        writer.add_custom_alignment(alignment)
    _metadata(writer, config, folder, template=template)
    dense: dict[str, torch.Tensor] = {}
    for index, (name, weight) in enumerate(load_file(folder / "model.safetensors").items()):
        theirs = names.get_name(name, try_suffixes=(".weight", ".bias"))
        assert theirs, name
        heads = {"attn_q": config.num_attention_heads, "attn_k": config.num_key_value_heads}.get(theirs.split(".")[-2])
        is_paired = arch == "llama" and heads is not None
        stored = _in_pairs(weight.float(), heads) if is_paired and heads else weight.float()
        if stored.dim() == 1:
            shift = 1.0 if arch.startswith("gemma") and theirs.endswith("norm.weight") else 0.0
            writer.add_tensor(theirs, (stored + shift).numpy())
            dense[name] = (stored + shift) - shift
            continue
        kind = next((kind for part, kind in kinds.items() if part in theirs), default)
        if kind in _SCALES:
            raw = random_blocks(kind, *stored.shape, index)
        else:
            raw = gguf.quants.quantize(stored.numpy(), GGMLQuantizationType[kind])
        decoded = raw.astype(np.float32) if kind in ("F32", "F16") else gguf.dequantize(raw, GGMLQuantizationType[kind])
        writer.add_tensor(theirs, raw, raw_dtype=GGMLQuantizationType[kind])
        values = torch.from_numpy(decoded).view(stored.shape)
        dense[name] = _halves(values, heads) if is_paired and heads else values
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return dense
