"""The GGUF reader on files made byte by byte: what it reads. What it says about lies: e2e/test_known_defects.py."""

import math
import random
import struct
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tokenizers import Regex, pre_tokenizers
from transformers import LlamaConfig
from transformers.integrations.gguf.gguf_tokenizer_mapping import GGUF_PRE_TOKENIZER_SPLITS
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

from checkpoint.gguf_files import LLAMA, TENSORS, TOKENIZER, gguf_bytes, tensor_row, write_small_gguf
from smidgen.checkpoint.architectures import ARCHITECTURES, tensor_name
from smidgen.checkpoint.gguf import GgufCheckpoint, unpermute
from smidgen.checkpoint.gguf_header import BLOCK_TYPES
from smidgen.checkpoint.open import open_checkpoint
from smidgen.errors import ModelError
from smidgen.model.tokenizer import load_tokenizer
from smidgen.model.tokenizer_gguf import PRE_TOKENIZERS

TEXTS = (
    "Hello world! I'll say it's 12345 o'clock, isn't it? WE'RE 3.14159, and 1,000,000 late²½.",
    "  two  spaces\ttabs\t\t and\n\nnew lines \r\n  \n end   ",
    'def f(x_1):\n    return {"a": [1, 22, 333]}  # ok?!\n\nCamelCaseWord HTTPServer iPhone a/b /*\n/\n ... $100 #1',
    "naïve cafe\u0301 Ünïcode, 你好世界 2024年, Привет мир 42, हिन्दी, مرحبا, ひらがな123, ǅ, 🙂🙃",
)


def _refused(folder: Path, raw: bytes, says: str) -> None:
    path = write_small_gguf(folder, raw)
    began = time.perf_counter()
    with pytest.raises(ModelError, match=says) as caught:
        open_checkpoint(path)
    assert str(path) in str(caught.value)
    assert "\n" not in str(caught.value)
    assert time.perf_counter() - began < 2


def _with(changes: dict[str, Any]) -> bytes:
    return gguf_bytes({key: value for key, value in (LLAMA | TOKENIZER | changes).items() if value is not None})


def test_small_file_is_read(tmp_path: Path) -> None:
    checkpoint = open_checkpoint(write_small_gguf(tmp_path))
    assert checkpoint.format == "gguf"
    assert checkpoint.config["vocab_size"] == 261
    assert checkpoint.config["tie_word_embeddings"] is True
    assert checkpoint.config["num_key_value_heads"] == 2
    assert checkpoint.config["rms_norm_eps"] == 1e-5
    assert len(checkpoint.tensors) == len(TENSORS)
    dtypes = {checkpoint.read(name).dtype for name in checkpoint.tensors}
    assert dtypes == {torch.float32, torch.float16, torch.bfloat16}
    tokenizer = load_tokenizer(checkpoint.path)
    # smollm's rule: every digit alone, though the vocabulary has 12
    assert tokenizer("hello 12</s>").tokens() == ["hel", "l", "o", "Ġ", "1", "2", "</s>"]


def test_version_2_is_read_too(tmp_path: Path) -> None:
    head = b"GGUF" + struct.pack("<IQQ", 2, len(TENSORS), len(LLAMA) + len(TOKENIZER))
    assert open_checkpoint(write_small_gguf(tmp_path, gguf_bytes(head=head))).config["hidden_size"] == 32


@pytest.mark.parametrize("name", [name for name, block, _ in BLOCK_TYPES.values() if block > 1])
def test_block_types_are_decoded_as_by_the_reference(name: str, tmp_path: Path) -> None:
    import gguf

    kind = gguf.GGMLQuantizationType[name]
    block, nbytes = gguf.GGML_QUANT_SIZES[kind]
    width, head_rows = 256, 4
    random_bytes = np.random.default_rng(7).integers(0, 120, (head_rows, width // block * nbytes), dtype=np.uint8)
    row = tensor_row("token_embd.weight", (width, head_rows), int(kind), 0)
    others = {name: sizes for name, (sizes, _) in TENSORS.items() if name != "token_embd.weight"}
    rows, at = [row], -(-random_bytes.nbytes // 32) * 32
    for other, sizes in others.items():
        rows.append(tensor_row(other, sizes, 0, at))
        at += int(np.prod(sizes)) * 4
    raw = bytearray(gguf_bytes(rows=rows, data_bytes=at))
    start = len(raw) - at
    raw[start : start + random_bytes.nbytes] = random_bytes.tobytes()
    checkpoint = GgufCheckpoint(write_small_gguf(tmp_path, bytes(raw)))
    expected = gguf.quants.dequantize(random_bytes, kind)
    assert torch.equal(checkpoint.read("model.embed_tokens.weight"), torch.from_numpy(expected))


def test_unpermute_turns_pairs_into_halves() -> None:
    # One head of width 6: pairs (0,1)(2,3)(4,5) become the halves 0,2,4 and 1,3,5; a second head stays apart.
    rows = torch.arange(12).reshape(12, 1)
    assert unpermute(rows, 2).flatten().tolist() == [0, 2, 4, 1, 3, 5, 6, 8, 10, 7, 9, 11]


def test_tensor_names_outside_the_layers_are_not_known() -> None:
    row = ARCHITECTURES["llama"]
    assert tensor_name(row, "blk.1.ffn_up.weight", 2) == "model.layers.1.mlp.up_proj.weight"
    for name in (
        "blk.2.ffn_up.weight",
        "blk.01.ffn_up.weight",
        "blk.-1.ffn_up.weight",
        "blk.1.ffn_up",
        "blk.²",
        "x.weight",
    ):
        assert tensor_name(row, name, 2) is None


def test_llama_3_rotary_scaling_arrives(tmp_path: Path) -> None:
    rope = {"rope_type": "llama3", "rope_theta": 500000.0, "factor": 32.0, "low_freq_factor": 1.0}
    rope |= {"high_freq_factor": 4.0, "original_max_position_embeddings": 8192}
    config = LlamaConfig(hidden_size=32, num_attention_heads=2, rope_parameters=dict(rope))
    scaled, _ = ROPE_INIT_FUNCTIONS["llama3"](config, torch.device("cpu"))
    plain = 1 / 500000.0 ** (torch.arange(0, 16, 2) / 16)
    factors = (plain / scaled).float().numpy().tobytes()
    raw = bytearray(gguf_bytes(LLAMA | {"llama.rope.freq_base": 500000.0}, TENSORS | {"rope_freqs.weight": ((8,), 0)}))
    raw[-32:] = factors
    found = open_checkpoint(write_small_gguf(tmp_path, bytes(raw))).config["rope_parameters"]
    assert found == rope
    raw[-32:-28] = struct.pack("<f", 5.0)
    _refused(tmp_path, bytes(raw), "rotary scaling that is not Llama 3's")
    both = gguf_bytes(LLAMA | {"llama.rope.scaling.factor": 2.0}, TENSORS | {"rope_freqs.weight": ((8,), 0)})
    _refused(tmp_path, both, "rope_freqs.weight beside a rotary scaling of another type")


_YARN = {"rope_type": "yarn", "rope_theta": 10_000.0, "factor": 4.0, "original_max_position_embeddings": 4096}
_YARN_KEYS = {"scaling.type": "yarn", "scaling.factor": 4.0, "scaling.original_context_length": 4096}
_LINEAR = {"rope_type": "linear", "rope_theta": 10_000.0, "factor": 4.0}
_PLAIN = {"rope_type": "default", "rope_theta": 10_000.0}


@pytest.mark.parametrize(
    ("keys", "rope"),
    [
        ({"scaling.type": "linear", "scaling.factor": 4.0}, _LINEAR),
        ({"scaling.factor": 4.0}, _LINEAR),  # which was not scaled at all
        ({"scale_linear": 4.0}, _LINEAR),
        ({"scaling.factor": 0.0}, _PLAIN),  # as llama.cpp writes a model without scaling
        ({"scaling.type": "none", "scaling.factor": 4.0}, _PLAIN),
        ({"scaling.attn_factor": 1.0}, _PLAIN),
        (_YARN_KEYS, _YARN),
        (_YARN_KEYS | {"scaling.yarn_ext_factor": 1.0, "scaling.yarn_log_multiplier": 0.0}, _YARN),
        (
            _YARN_KEYS | {"scaling.yarn_beta_fast": 8.0, "scaling.yarn_beta_slow": 4.0},
            _YARN | {"beta_fast": 8, "beta_slow": 4},
        ),
        (_YARN_KEYS | {"scaling.yarn_log_multiplier": 0.5}, _YARN | {"mscale": 1.0, "mscale_all_dim": 0.5}),
        (_YARN_KEYS | {"scaling.attn_factor": 0.5}, _YARN | {"attention_factor": 0.5 * (0.1 * math.log(4) + 1)}),
        (_YARN_KEYS | {"scaling.yarn_attn_factor": 1.75}, _YARN | {"attention_factor": 1.75}),
    ],
)
def test_rotary_scalings_are_computed_as_by_transformers(
    keys: dict[str, Any], rope: dict[str, Any], tmp_path: Path
) -> None:
    raw = _with({f"llama.rope.{key}": value for key, value in keys.items()})
    found = open_checkpoint(write_small_gguf(tmp_path, raw)).config["rope_parameters"]
    ours, theirs, plain = (
        LlamaRotaryEmbedding(LlamaConfig(hidden_size=32, num_attention_heads=2, rope_parameters=dict(parameters)))
        for parameters in (found, rope, _PLAIN)
    )
    assert torch.equal(ours.inv_freq, theirs.inv_freq)
    assert ours.attention_scaling == pytest.approx(theirs.attention_scaling, rel=1e-6)
    assert torch.equal(ours.inv_freq, plain.inv_freq) == (rope is _PLAIN)


@pytest.mark.parametrize(
    ("keys", "says"),
    [
        (_YARN_KEYS | {"scaling.yarn_ext_factor": 0.5}, "yarn_ext_factor, expected 1, as transformers.*found 0.5"),
        (
            {"scaling.factor": 4.0, "scaling.attn_factor": 0.5},
            "attn_factor = 0.5 beside a rotary scaling of type linear",
        ),
        ({"scaling.type": "longrope"}, "unknown rotary scaling"),
    ],
)
def test_rotary_scalings_that_transformers_does_not_have_are_refused(
    keys: dict[str, Any], says: str, tmp_path: Path
) -> None:
    _refused(tmp_path, _with({f"llama.rope.{key}": value for key, value in keys.items()}), says)


def test_bos_is_added_as_the_file_says(tmp_path: Path) -> None:
    def first(changes: dict[str, Any]) -> str:
        return load_tokenizer(write_small_gguf(tmp_path, _with(changes)))("hel").tokens()[0]

    assert first({}) == "hel"
    assert first({"tokenizer.ggml.add_bos_token": True}) == "<s>"
    assert first({"tokenizer.ggml.pre": "llama-bpe"}) == "<s>"
    assert first({"tokenizer.ggml.pre": "llama-bpe", "tokenizer.ggml.add_bos_token": False}) == "hel"


@pytest.mark.parametrize("name", [name for name in PRE_TOKENIZERS if name != "default"])
def test_words_are_cut_as_by_the_pipelines_of_the_models(name: str, tmp_path: Path) -> None:
    """transformers' table of expressions; what is not in it is GPT-2's, digits apart or not."""
    split = (GGUF_PRE_TOKENIZER_SPLITS | {"stablelm2": GGUF_PRE_TOKENIZER_SPLITS["qwen2"]}).get(name)
    steps: list[Any] = [pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=split is None)]
    if split:
        steps.insert(0, pre_tokenizers.Split(Regex(split), "isolated"))
    elif name in ("smollm", "starcoder", "refact", "command-r", "codeshell", "minerva-7b"):
        steps.insert(0, pre_tokenizers.Digits(individual_digits=True))
    theirs = pre_tokenizers.Sequence(steps)
    ours: Any = load_tokenizer(write_small_gguf(tmp_path, _with({"tokenizer.ggml.pre": name}))).backend_tokenizer
    for text in TEXTS:
        assert ours.pre_tokenizer.pre_tokenize_str(text) == theirs.pre_tokenize_str(text)


def test_a_file_is_known_by_what_it_begins_with(tmp_path: Path) -> None:
    """Ollama's own files have no ending: blobs/sha256-..."""
    write_small_gguf(tmp_path).rename(tmp_path / "sha256-2bada8a7")
    checkpoint = open_checkpoint(tmp_path / "sha256-2bada8a7")
    assert checkpoint.format == "gguf" and len(load_tokenizer(checkpoint.path)) == 261
    (tmp_path / "sha256-0").write_bytes(b"GGU")
    with pytest.raises(ModelError, match="is no model, expected a folder or a GGUF file"):
        open_checkpoint(tmp_path / "sha256-0")
    _refused(tmp_path, b"PK  ", "is not a GGUF file.*found b'PK  '")


def test_padding_is_not_the_end_token_where_another_will_do(tmp_path: Path) -> None:
    changes = {"tokenizer.ggml.padding_token_id": 257, "tokenizer.ggml.unknown_token_id": 256}
    tokenizer = load_tokenizer(write_small_gguf(tmp_path, _with(changes)))
    assert (tokenizer.pad_token, tokenizer.eos_token) == ("<s>", "</s>")


def test_every_cut_off_file_is_refused(tmp_path: Path) -> None:
    raw = gguf_bytes()
    for size in sorted({*range(0, 200), *range(200, len(raw), 997), len(raw) - 1 - len(raw) % 32}):
        with pytest.raises(ModelError):
            open_checkpoint(write_small_gguf(tmp_path, raw[:size]))


def test_500_random_mutations_end_in_success_or_a_clear_error(tmp_path: Path) -> None:
    """Bits, bytes and fields of the header at random; what opens must also be readable to the last tensor."""
    original, generator, opened = gguf_bytes(), random.Random(20), 0
    header_bytes = len(original) - 24_000
    began = time.perf_counter()
    for _ in range(500):
        raw = bytearray(original)
        for _ in range(generator.choice((1, 1, 1, 2, 8))):
            at = generator.randrange(header_bytes)
            raw[at : at + 1] = generator.choice(
                (b"\0", b"\xff", b"\x7f", bytes([raw[at] ^ 1 << generator.randrange(8)]))
            )
        if generator.random() < 0.2:
            at = generator.randrange(header_bytes)
            raw[at : at + 8] = struct.pack("<Q", generator.choice((0, 1, 1 << 31, 1 << 63, (1 << 64) - 1)))
        if generator.random() < 0.1:
            del raw[generator.randrange(len(raw)) :]
        path = write_small_gguf(tmp_path, bytes(raw))
        try:
            checkpoint = open_checkpoint(path)
            for name, info in checkpoint.tensors.items():
                assert checkpoint.read(name).shape == info.shape
            checkpoint.fingerprint()
            load_tokenizer(path)
            opened += 1
        except ModelError as error:
            assert "\n" not in str(error)
    assert 20 < opened < 480  # neither everything refused nor everything believed
    assert time.perf_counter() - began < 30
