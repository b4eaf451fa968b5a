"""Known models as config.json would have them, so that their memory can be forecast without a file.

Sizes are those of the published configurations (LLaMA, arXiv 2302.13971; Llama 2, 2307.09288; Llama 3, 2407.21783;
Qwen2.5, 2412.15115; StableLM Base Alpha is a GPT-NeoX). Weights are 16-bit.
"""

from typing import Any

__all__ = ["SHAPES"]


def _llama(hidden: int, inner: int, layers: int, heads: int, kv_heads: int, vocab: int, **more: Any) -> dict[str, Any]:
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_size": hidden,
        "intermediate_size": inner,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "head_dim": hidden // heads,
        "vocab_size": vocab,
        "tie_word_embeddings": False,
        "max_position_embeddings": 2048,
        "rms_norm_eps": 1e-5,
        "hidden_act": "silu",
        "bos_token_id": 1,
        "eos_token_id": 2,
        "torch_dtype": "bfloat16",
        **more,
    }


def _qwen2(
    hidden: int, inner: int, layers: int, heads: int, kv_heads: int, vocab: int, *, tied: bool
) -> dict[str, Any]:
    return _llama(
        hidden, inner, layers, heads, kv_heads, vocab,
        architectures=["Qwen2ForCausalLM"], model_type="qwen2", tie_word_embeddings=tied, max_position_embeddings=32768,
        rope_theta=1e6, rms_norm_eps=1e-6,
    )  # fmt: skip


_LLAMA3 = {"max_position_embeddings": 8192, "rope_theta": 500000.0, "bos_token_id": 128000, "eos_token_id": 128001}
_STABLELM = {
    "architectures": ["GPTNeoXForCausalLM"],
    "model_type": "gpt_neox",
    "hidden_size": 4096,
    "intermediate_size": 16384,
    "num_hidden_layers": 16,
    "num_attention_heads": 32,
    "vocab_size": 50688,
    "rotary_pct": 0.25,
    "tie_word_embeddings": False,
    "max_position_embeddings": 4096,
    "use_parallel_residual": True,
    "torch_dtype": "bfloat16",
}

SHAPES: dict[str, dict[str, Any]] = {
    "tiny": _llama(64, 192, 2, 4, 2, 512, tie_word_embeddings=True),  # for the tests
    "smollm2-135m": _llama(
        576, 1536, 30, 9, 3, 49152, tie_word_embeddings=True, rope_theta=100000.0, max_position_embeddings=8192
    ),
    "smollm2-360m": _llama(
        960, 2560, 32, 15, 5, 49152, tie_word_embeddings=True, rope_theta=100000.0, max_position_embeddings=8192
    ),
    "smollm2-1.7b": _llama(
        2048, 8192, 24, 32, 32, 49152, tie_word_embeddings=True, rope_theta=130000.0, max_position_embeddings=8192
    ),
    "tinyllama-1.1b": _llama(2048, 5632, 22, 32, 4, 32000, rope_theta=10000.0),
    "llama-7b": _llama(4096, 11008, 32, 32, 32, 32000),
    "llama-13b": _llama(5120, 13824, 40, 40, 40, 32000),
    "llama-33b": _llama(6656, 17920, 60, 52, 52, 32000),
    "llama-65b": _llama(8192, 22016, 80, 64, 64, 32000),
    "llama-2-7b": _llama(4096, 11008, 32, 32, 32, 32000, max_position_embeddings=4096),
    "llama-2-13b": _llama(5120, 13824, 40, 40, 40, 32000, max_position_embeddings=4096),
    "llama-2-70b": _llama(8192, 28672, 80, 64, 8, 32000, max_position_embeddings=4096),
    "llama-3-8b": _llama(4096, 14336, 32, 32, 8, 128256, **_LLAMA3),
    "llama-3-70b": _llama(8192, 28672, 80, 64, 8, 128256, **_LLAMA3),
    "llama-3.2-1b": _llama(2048, 8192, 16, 32, 8, 128256, tie_word_embeddings=True, **_LLAMA3),
    "llama-3.2-3b": _llama(3072, 8192, 28, 24, 8, 128256, tie_word_embeddings=True, **_LLAMA3),
    "mistral-7b": _llama(
        4096, 14336, 32, 32, 8, 32000, architectures=["MistralForCausalLM"], model_type="mistral",
        max_position_embeddings=32768, sliding_window=None,
    ),
    "qwen2.5-0.5b": _qwen2(896, 4864, 24, 14, 2, 151936, tied=True),
    "qwen2.5-1.5b": _qwen2(1536, 8960, 28, 12, 2, 151936, tied=True),
    "qwen2.5-3b": _qwen2(2048, 11008, 36, 16, 2, 151936, tied=True),
    "qwen2.5-7b": _qwen2(3584, 18944, 28, 28, 4, 152064, tied=False),
    "qwen2.5-14b": _qwen2(5120, 13824, 48, 40, 8, 152064, tied=False),
    "qwen2.5-32b": _qwen2(5120, 27648, 64, 40, 8, 152064, tied=False),
    "qwen2.5-72b": _qwen2(8192, 29568, 80, 64, 8, 152064, tied=False),
    "stablelm-base-alpha-3b": _STABLELM,
}  # fmt: skip
