"""Tiny random models of many architectures, as the folders that transformers itself writes."""

import copy
import json
from pathlib import Path
from typing import Any

import torch
import transformers
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import AutoModelForCausalLM, PretrainedConfig, PreTrainedTokenizerFast

transformers.logging.set_verbosity_error()
transformers.logging.disable_progress_bar()

VOCAB_SIZE = 272
_SMALL = {
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "vocab_size": VOCAB_SIZE,
    "max_position_embeddings": 256,
    "bos_token_id": 256,
    "eos_token_id": 257,
    "pad_token_id": 258,
}
_GROUPED = _SMALL | {"num_key_value_heads": 2}
_GPT2 = {"n_embd": 64, "n_layer": 2, "n_head": 4, "n_positions": 256, "vocab_size": VOCAB_SIZE}
_ENDS = {"bos_token_id": 256, "eos_token_id": 257, "pad_token_id": 258}

CONFIGS: dict[str, PretrainedConfig] = {
    "llama": transformers.LlamaConfig(**_GROUPED),
    "llama-tied": transformers.LlamaConfig(**_GROUPED, tie_word_embeddings=True),
    "llama-odd": transformers.LlamaConfig(**_GROUPED | {"intermediate_size": 72}),  # blocks cross the rows of down_proj
    "mistral": transformers.MistralConfig(**_GROUPED, sliding_window=8),
    "qwen2": transformers.Qwen2Config(**_GROUPED),
    "qwen3-one-key-head": transformers.Qwen3Config(**_SMALL, num_key_value_heads=1, head_dim=16),
    "qwen3": transformers.Qwen3Config(**_GROUPED, head_dim=16),
    "gemma3": transformers.Gemma3TextConfig(
        **_GROUPED, head_dim=16, sliding_window=8, layer_types=["sliding_attention", "full_attention"]
    ),
    "gpt-neox": transformers.GPTNeoXConfig(**_SMALL),
    "gpt2": transformers.GPT2Config(**_GPT2, **_ENDS),
    "mixtral": transformers.MixtralConfig(**_GROUPED, num_local_experts=4),
    "phi3": transformers.Phi3Config(**_GROUPED),
    "falcon": transformers.FalconConfig(
        hidden_size=64, num_hidden_layers=2, num_attention_heads=4, vocab_size=VOCAB_SIZE, **_ENDS
    ),
    "granite": transformers.GraniteConfig(**_GROUPED, logits_scaling=3.0),
    "gemma2": transformers.Gemma2Config(**_GROUPED, head_dim=16, final_logit_softcapping=5.0),
    "stablelm": transformers.StableLmConfig(**_GROUPED),
    "olmo": transformers.OlmoConfig(**_GROUPED, clip_qkv=0.5),  # which cuts some of the values; norms without weights
    "olmo2": transformers.Olmo2Config(**_GROUPED),
    "qwen2-moe": transformers.Qwen2MoeConfig(
        **_GROUPED, num_experts=4, moe_intermediate_size=32, shared_expert_intermediate_size=64, num_experts_per_tok=2
    ),
    "opt": transformers.OPTConfig(
        hidden_size=64, ffn_dim=96, num_hidden_layers=2, num_attention_heads=4, vocab_size=VOCAB_SIZE,
        max_position_embeddings=256, word_embed_proj_dim=64, **_ENDS,
    ),
}  # fmt: skip

CHATML = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def byte_tokenizer() -> PreTrainedTokenizerFast:
    """One token a byte, four special ones and "zq", since readers expect a merge; any text comes back."""
    tokens = [*sorted(pre_tokenizers.ByteLevel.alphabet()), "<s>", "<|im_end|>", "<pad>", "<|im_start|>", "zq"]
    vocab = {token: index for index, token in enumerate(tokens)}
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=[("z", "q")]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<s>", eos_token="<|im_end|>", pad_token="<pad>"
    )
    fast.add_special_tokens({"additional_special_tokens": ["<|im_start|>"]})
    fast.chat_template = CHATML
    return fast


def tiny_folder(
    path: Path, architecture: str = "llama", dtype: torch.dtype = torch.float32, seed: int = 0, **changes: Any
) -> Path:
    """A model folder with random weights (norms too, so that nothing cancels) and the byte tokenizer.

    changes: of the configuration.
    """
    torch.manual_seed(seed)
    config = copy.deepcopy(CONFIGS[architecture])
    for key, value in changes.items():
        setattr(config, key, value)
    model = AutoModelForCausalLM.from_config(config)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * (0.1 if parameter.dim() == 1 else 0.05))
    model.to(dtype).save_pretrained(path)
    byte_tokenizer().save_pretrained(path)
    return path


def write_rows(path: Path, count: int = 24) -> Path:
    """A .jsonl of small chats whose answers follow from their questions."""
    lines = []
    for index in range(count):
        word = ("red", "green", "blue", "grey")[index % 4]
        messages = [
            {"role": "user", "content": f"say {word} {index % 3}"},
            {"role": "assistant", "content": f'{{"say": "{word}"}}'},
        ]
        lines.append(json.dumps({"messages": messages}))
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return path


def build(
    path: Path, storage: str = "none", dtype: torch.dtype = torch.float32, device: torch.device | str = "cpu"
) -> Any:
    """The folder as a smidgen Base."""
    from smidgen.checkpoint.open import open_checkpoint
    from smidgen.model.build import build_base

    return build_base(open_checkpoint(path), storage=storage, compute_dtype=dtype, device=torch.device(device))
