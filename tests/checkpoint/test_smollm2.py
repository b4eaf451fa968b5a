"""The built-in model itself: fetched or found in the cache, read in seconds, and right."""

import time
from pathlib import Path

import pytest
import torch

from smidgen.checkpoint.gguf import GgufCheckpoint
from smidgen.checkpoint.hub import resolve_model
from smidgen.errors import ModelError
from smidgen.model.tokenizer import load_tokenizer


@pytest.fixture(scope="module")
def model_file() -> Path:
    try:
        return resolve_model("smollm2-135m")
    except ModelError as error:
        pytest.skip(f"SmolLM2 cannot be had here: {error}")


def test_it_opens_and_decodes_in_a_few_seconds(model_file: Path) -> None:
    began = time.perf_counter()
    checkpoint = GgufCheckpoint(model_file)
    assert time.perf_counter() - began < 2  # 0.1 s alone; the gguf package's own reader takes 5
    tokenizer = load_tokenizer(model_file)
    numbers = sum(checkpoint.read(name).numel() for name in checkpoint.tensors)
    assert time.perf_counter() - began < 20  # 2 s alone; transformers' loader takes 25 to 30
    assert numbers == 134_515_008
    assert len(tokenizer) == checkpoint.config["vocab_size"] == 49_152
    assert {info.dtype for info in checkpoint.tensors.values()} == {"F32", "Q4_1", "Q8_0"}


def test_config_reaches_transformers_whole(model_file: Path) -> None:
    from transformers import LlamaConfig

    config = LlamaConfig(**GgufCheckpoint(model_file).config)
    assert config.rope_parameters == {"rope_type": "default", "rope_theta": 100000.0}
    assert (config.hidden_size, config.num_hidden_layers, config.num_key_value_heads) == (576, 30, 3)
    assert config.tie_word_embeddings is True
    assert config.rms_norm_eps == 1e-5
    assert (config.bos_token_id, config.eos_token_id) == (1, 2)


@pytest.mark.parametrize(
    ("text", "pieces"),
    [
        ("a 12 345", ["a", "Ġ", "1", "2", "Ġ", "3", "4", "5"]),
        ("<|im_start|>user\nHi<|im_end|>", ["<|im_start|>", "user", "Ċ", "Hi", "<|im_end|>"]),
        ("don't  stop\n\n", ["don", "'t", "Ġ", "Ġstop", "ĊĊ"]),
    ],
)
def test_pieces_of_text(text: str, pieces: list[str], model_file: Path) -> None:
    assert load_tokenizer(model_file)(text).tokens() == pieces


def test_text_comes_back_as_it_was(model_file: Path) -> None:
    tokenizer = load_tokenizer(model_file)
    for text in (
        "naïve café über 日本語 🙂👍🏽",
        "  two  spaces \n\n x\t\r\n",
        "٣٤ ² 3.14",
        "\u00a0\u200b\x00\x7f",
        " don't , y .",
        "",
    ):
        assert tokenizer.decode(tokenizer(text)["input_ids"]) == text


def test_special_tokens_and_template(model_file: Path) -> None:
    tokenizer = load_tokenizer(model_file)
    assert (tokenizer.bos_token, tokenizer.eos_token, tokenizer.unk_token) == (
        "<|im_start|>",
        "<|im_end|>",
        "<|endoftext|>",
    )
    assert tokenizer.pad_token != tokenizer.eos_token
    assert tokenizer("x")["input_ids"] == [tokenizer.convert_tokens_to_ids("x")], "no BOS is added"
    ids = tokenizer.apply_chat_template(
        [{"role": "user", "content": "hi"}], add_generation_prompt=True, return_dict=False
    )
    assert tokenizer.decode(ids).endswith("<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\n")


def test_the_model_knows_a_fact(model_file: Path) -> None:
    """All of it at once: names, row order, rotary base, tokenizer. A wrong one gives babble."""
    from transformers import LlamaConfig, LlamaForCausalLM

    checkpoint = GgufCheckpoint(model_file)
    with torch.device("meta"):
        model = LlamaForCausalLM(LlamaConfig(**checkpoint.config))
    model = model.to_empty(device="cpu").eval()
    model.model.rotary_emb = type(model.model.rotary_emb)(config=model.config)
    state = {name: checkpoint.read(name) for name in checkpoint.tensors}
    missing = model.load_state_dict(state, strict=False, assign=True)
    assert missing.unexpected_keys == [] and missing.missing_keys == ["lm_head.weight"]
    model.tie_weights()
    tokenizer = load_tokenizer(model_file)
    ids = tokenizer("The capital of France is", return_tensors="pt")["input_ids"]
    with torch.inference_mode():
        best = model(ids).logits[0, -1].argmax()
    assert tokenizer.decode(best) == " Paris"


@pytest.mark.slow  # transformers' GGUF loader alone takes half a minute
def test_tensors_and_tokens_equal_transformers_own_conversion(model_file: Path) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    checkpoint = GgufCheckpoint(model_file)
    folder, name = str(model_file.parent), model_file.name
    state = AutoModelForCausalLM.from_pretrained(folder, gguf_file=name, dtype=torch.float32).state_dict()
    for tensor in checkpoint.tensors:
        assert torch.equal(checkpoint.read(tensor).float(), state[tensor]), tensor
    ours, reference = load_tokenizer(model_file), AutoTokenizer.from_pretrained(folder, gguf_file=name)
    texts = [
        "Hello world",
        "  two  spaces \n\n\ttab\r\n x",
        "naïve 日本語 🙂👍🏽 Ελληνικά",
        "WE'RE don't",
        "<repo_name>x<|im_end|>",
    ]
    # Without digits: the conversion of transformers leaves out that every digit stands alone.
    for text in texts:
        assert ours(text)["input_ids"] == reference(text)["input_ids"], text
