"""stories260K, a real trained Llama of 1 MB, in the formats that smidgen reads.

Source: llama2.c's version 0 checkpoint and tokenizer, $SMIDGEN_TEST_DATA/models/stories260K. The checkpoint is seven
int32 (dim, hidden_dim, n_layers, n_heads, n_kv_heads, vocab_size, seq_len) and then float32 tensors, each kind for all
layers at once. Its q and k have rows that rotate in pairs, as GGUF has them; transformers wants halves.
"""

import json
import os
import struct
from pathlib import Path
from typing import Any

import numpy as np
import pytest

__all__ = ["stories_folder", "stories_gguf", "stories_golden_text", "stories_source"]

_LAYER_PARTS = {  # GGUF name -> Hugging Face name, in the order of the file
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_down": "mlp.down_proj",
    "ffn_up": "mlp.up_proj",
}


def stories_source() -> Path:
    """The folder with the files of llama2.c; skips the test if the data is not there."""
    data = os.environ.get("SMIDGEN_TEST_DATA")
    if not data:
        pytest.skip("SMIDGEN_TEST_DATA is not set: no stories260K")
    folder = Path(data) / "models" / "stories260K"
    if not folder.is_dir():
        pytest.skip(f"{folder} does not exist")
    return folder


def stories_golden_text() -> str:
    """What llama2.c's own program writes at temperature 0, from its notes."""
    notes = (stories_source() / "stories260K.md").read_text(encoding="utf-8")
    return notes.split("-t 0.0\n")[1].split("\n```")[0]


def stories_folder(folder: Path) -> Path:
    """Writes a Hugging Face folder (float32 safetensors, tokenizer) into `folder` / "stories260K" and returns it."""
    from safetensors.numpy import save_file

    from smidgen.checkpoint.gguf_header import Metadata
    from smidgen.model.tokenizer_gguf import tokenizer_from_metadata

    target = folder / "stories260K"
    target.mkdir(parents=True)
    shape, tensors = _read_llama2c()
    named = {_hugging_face_name(name): _halves(name, tensor, shape) for name, tensor in tensors.items()}
    save_file(named, target / "model.safetensors", metadata={"format": "pt"})
    (target / "config.json").write_text(json.dumps(_config(shape), indent=2), encoding="utf-8")
    tokenizer_from_metadata(Metadata(target, _tokenizer_metadata())).save_pretrained(target)
    return target


def stories_gguf(folder: Path, kind: str = "F16") -> Path:
    """Writes a GGUF file: matrices as F32, F16 or Q8_0 (F16 where 32 does not divide a row), norms as F32."""
    import gguf

    shape, tensors = _read_llama2c()
    path = folder / f"stories260K-{kind}.gguf"
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_context_length(shape["seq_len"])
    writer.add_embedding_length(shape["dim"])
    writer.add_block_count(shape["n_layers"])
    writer.add_feed_forward_length(shape["hidden_dim"])
    writer.add_head_count(shape["n_heads"])
    writer.add_head_count_kv(shape["n_kv_heads"])
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_rope_freq_base(10000.0)
    tokenizer = _tokenizer_metadata()
    writer.add_tokenizer_model("llama")
    writer.add_tokenizer_pre("default")
    writer.add_token_list(tokenizer["tokenizer.ggml.tokens"])
    writer.add_token_scores(tokenizer["tokenizer.ggml.scores"])
    writer.add_token_types(tokenizer["tokenizer.ggml.token_type"])
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    writer.add_unk_token_id(0)
    for name, tensor in tensors.items():
        stored, dtype = _stored(tensor, kind)
        writer.add_tensor(f"{name}.weight", stored, raw_dtype=dtype)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def _read_llama2c() -> tuple[dict[str, int], dict[str, np.ndarray]]:
    """(sizes, tensors by GGUF name without ".weight"); tied to the embedding, so there is no output matrix."""
    raw = (stories_source() / "stories260K.bin").read_bytes()
    names = ("dim", "hidden_dim", "n_layers", "n_heads", "n_kv_heads", "vocab_size", "seq_len")
    shape = dict(zip(names, struct.unpack_from("<7i", raw), strict=True))
    numbers = np.frombuffer(raw, dtype="<f4", offset=28)
    dim, hidden, layers = shape["dim"], shape["hidden_dim"], shape["n_layers"]
    narrow = dim // shape["n_heads"] * shape["n_kv_heads"]
    sizes: dict[str, tuple[int, ...]] = {
        "attn_norm": (dim,),
        "attn_q": (dim, dim),
        "attn_k": (narrow, dim),
        "attn_v": (narrow, dim),
        "attn_output": (dim, dim),
        "ffn_norm": (dim,),
        "ffn_gate": (hidden, dim),
        "ffn_down": (dim, hidden),
        "ffn_up": (hidden, dim),
    }
    at = 0

    def take(*size: int) -> np.ndarray:
        nonlocal at
        at += int(np.prod(size))
        return numbers[at - int(np.prod(size)) : at].reshape(size).copy()

    tensors = {"token_embd": take(shape["vocab_size"], dim)}
    for part in _LAYER_PARTS:
        block = take(layers, *sizes[part])
        tensors |= {f"blk.{layer}.{part}": block[layer] for layer in range(layers)}
    tensors["output_norm"] = take(dim)
    rotary_tables = shape["seq_len"] * dim // shape["n_heads"]  # cos and sin, half of it each: computed anew
    assert at + rotary_tables == len(numbers)
    return shape, tensors


def _hugging_face_name(name: str) -> str:
    if name in ("token_embd", "output_norm"):
        return {"token_embd": "model.embed_tokens.weight", "output_norm": "model.norm.weight"}[name]
    _, layer, part = name.split(".")
    return f"model.layers.{layer}.{_LAYER_PARTS[part]}.weight"


def _halves(name: str, tensor: np.ndarray, shape: dict[str, int]) -> np.ndarray:
    heads = {"attn_q": shape["n_heads"], "attn_k": shape["n_kv_heads"]}.get(name.split(".")[-1])
    if heads is None:
        return tensor
    rows = np.arange(len(tensor)).reshape(heads, -1, 2)
    return np.ascontiguousarray(tensor[np.concatenate([rows[:, :, 0], rows[:, :, 1]], axis=1).ravel()])


def _stored(tensor: np.ndarray, kind: str) -> tuple[np.ndarray, Any]:
    import gguf

    types = gguf.GGMLQuantizationType
    if tensor.ndim == 1 or kind == "F32":
        return tensor, types.F32
    if kind == "F16" or tensor.shape[-1] % 32:
        return tensor.astype(np.float16), types.F16
    return gguf.quants.quantize(tensor, types[kind]), types[kind]


def _config(shape: dict[str, int]) -> dict[str, Any]:
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_size": shape["dim"],
        "intermediate_size": shape["hidden_dim"],
        "num_hidden_layers": shape["n_layers"],
        "num_attention_heads": shape["n_heads"],
        "num_key_value_heads": shape["n_kv_heads"],
        "vocab_size": shape["vocab_size"],
        "max_position_embeddings": shape["seq_len"],
        "rms_norm_eps": 1e-5,
        "rope_theta": 10000.0,
        "tie_word_embeddings": True,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "torch_dtype": "float32",
    }


def _tokenizer_metadata() -> dict[str, Any]:
    """tok512.bin (int32 longest, then float32 score, int32 length, bytes each) under GGUF's keys."""
    raw = (stories_source() / "tok512.bin").read_bytes()
    tokens, scores, at = [], [], 4
    while at < len(raw):
        score, length = struct.unpack_from("<fi", raw, at)
        tokens.append(raw[at + 8 : at + 8 + length].decode().replace(" ", "▁"))
        scores.append(score)
        at += 8 + length
    tokens[:3] = ["<unk>", "<s>", "</s>"]
    kinds = [2, 3, 3] + [6 if token.startswith("<0x") else 1 for token in tokens[3:]]
    return {
        "tokenizer.ggml.model": "llama",
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.scores": tuple(scores),
        "tokenizer.ggml.token_type": tuple(kinds),
        "tokenizer.ggml.bos_token_id": 1,
        "tokenizer.ggml.eos_token_id": 2,
        "tokenizer.ggml.unknown_token_id": 0,
    }
