"""The GGUF reader on files made byte by byte: what it reads, and what it says about every kind of lie."""

import random
import struct
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from checkpoint.gguf_files import LLAMA, TENSORS, TOKENIZER, entry, gguf_bytes, string, tensor_row, write_small_gguf
from smidgen.checkpoint.architectures import ARCHITECTURES, tensor_name
from smidgen.checkpoint.gguf import GgufCheckpoint, unpermute
from smidgen.checkpoint.gguf_header import BLOCK_TYPES
from smidgen.checkpoint.open import open_checkpoint
from smidgen.errors import ModelError
from smidgen.model.tokenizer import load_tokenizer


def _refused(folder: Path, raw: bytes, says: str) -> None:
    path = write_small_gguf(folder, raw)
    began = time.perf_counter()
    with pytest.raises(ModelError, match=says) as caught:
        open_checkpoint(path)
    assert str(path) in str(caught.value)
    assert "\n" not in str(caught.value)
    assert time.perf_counter() - began < 2


def _readable(value: Any) -> str:
    return value if isinstance(value, str) else "raw"


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


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"general.architecture": "mamba"}, "unknown GGUF architecture.*expected llama.*found mamba"),
        ({"general.architecture": 3}, "wrong value of general.architecture.*a string.*found 3"),
        ({"general.architecture": None}, "no general.architecture"),
        ({"general.type": "adapter"}, "is no model"),
        ({"split.count": 4}, "part 1 of 4.*expected part 1 of 1"),
        ({"llama.expert_count": 8}, "mixture of experts"),
        ({"llama.block_count": 2}, "no tensor blk.1.attn_norm.weight"),
        ({"llama.block_count": 2_000_000_000}, "wrong llama.block_count.*found 2000000000"),
        ({"llama.block_count": [1, 1]}, "wrong value of llama.block_count"),
        ({"llama.embedding_length": 0}, "wrong value of llama.embedding_length"),
        ({"llama.attention.head_count": 5}, "rows for 5 heads"),
        ({"llama.attention.head_count_kv": 32}, "rows for 32 heads"),
        ({"llama.attention.layer_norm_rms_epsilon": float("nan")}, "positive number.*found nan"),
        ({"llama.rope.dimension_count": 8}, "part of the head"),
        ({"llama.rope.scaling.type": "longrope"}, "unknown rotary scaling"),
        ({"llama.rope.freq_base": float("inf")}, "llama.rope.freq_base"),
        ({"general.alignment": 48}, "power of two"),
        ({"general.alignment": 1 << 21}, "general.alignment"),
    ],
)
def test_wrong_metadata_is_named(changes: dict[str, Any], says: str, tmp_path: Path) -> None:
    _refused(tmp_path, _with(changes), says)


@pytest.mark.parametrize(
    ("raw", "says"),
    [
        (b"", "is empty"),
        (b"GGU", "not a GGUF file"),
        (b"PK\3\4" + bytes(100), "not a GGUF file"),
        (b"GGUF" + struct.pack("<I", 1) + bytes(16), "unknown GGUF version.*found 1"),
        (b"GGUF" + struct.pack(">I", 3) + bytes(16), "big-endian"),
        # 43 bytes that keep a reader busy for ever: one array entry that claims 2^60 values.
        (
            b"GGUF" + struct.pack("<IQQ", 3, 0, 1) + string("abc")[:11] + struct.pack("<I", 9) + b"\x08\0\0\0",
            "ends in the middle of the value of abc",
        ),
        (b"GGUF" + struct.pack("<IQQ", 3, 0, 1 << 60) + bytes(30), "claims 1152921504606846976 metadata entries"),
        (b"GGUF" + struct.pack("<IQQ", 3, 1 << 60, 0) + bytes(30), "claims 1152921504606846976 tensors"),
        (b"GGUF" + struct.pack("<IQQ", 3, 0, 1) + struct.pack("<Q", 1 << 62) + bytes(30), "metadata key is too long"),
    ],
    ids=_readable,
)
def test_wrong_heads_are_refused(raw: bytes, says: str, tmp_path: Path) -> None:
    _refused(tmp_path, raw, says)


@pytest.mark.parametrize(
    ("value", "says"),
    [
        (struct.pack("<I", 13), "unknown type.*found 13"),
        (struct.pack("<IQ", 8, 1 << 40), "too long"),
        (struct.pack("<IQ", 8, 1 << 22), "ends in the middle of the value of bad"),
        (struct.pack("<IQ", 8, 2) + b"\xff\xfe", "not UTF-8"),
        (struct.pack("<IIQ", 9, 9, 1) + bytes(64), "array of an unknown type"),
        (struct.pack("<IIQ", 9, 8, 1 << 50), "too long"),
        (struct.pack("<IIQ", 9, 8, 3_000_000), "ends in the middle"),
        (struct.pack("<IIQ", 9, 6, 3_000_000), "ends in the middle"),
        (struct.pack("<IIQQ", 9, 8, 1, 1 << 63), "ends in the middle"),
        (struct.pack("<IIQQ", 9, 8, 1, 2) + b"\xff\xfe", "not UTF-8"),
    ],
    ids=_readable,
)
def test_wrong_values_are_refused(value: bytes, says: str, tmp_path: Path) -> None:
    _refused(tmp_path, gguf_bytes({**LLAMA, "bad": value}), says)


def test_a_key_that_comes_twice_is_refused(tmp_path: Path) -> None:
    raw = entry("a", 1) * 2
    _refused(tmp_path, b"GGUF" + struct.pack("<IQQ", 3, 0, 2) + raw + bytes(40), "a comes twice")


@pytest.mark.parametrize(
    ("row", "says"),
    [
        (tensor_row("x", (32, 4), 23, 0), "type that is not read.*expected F32.*found IQ4_XS"),
        (tensor_row("x", (32, 4), 999, 0), "found type 999"),
        (tensor_row("x", (31, 4), 8, 0), "wrong shape"),
        (tensor_row("x", (0, 4), 0, 0), "wrong shape"),
        (tensor_row("x", (1 << 62, 1 << 62), 0, 0), "ends beyond the file"),
        (tensor_row("x", (4,) * 5, 0, 0), "5 dimensions"),
        (tensor_row("x", (), 0, 0), "0 dimensions"),
        (tensor_row("x", (4,), 0, 16), "not aligned"),
        (tensor_row("x", (4,), 0, 1 << 40), "ends beyond the file"),
        (tensor_row("x" * 65, (4,), 0, 0), "tensor name is too long"),
        (tensor_row("x", (64,), 0, 0) + tensor_row("y", (4,), 0, 32), "y overlaps x"),
        (tensor_row("x", (4,), 0, 0) + tensor_row("x", (4,), 0, 32), "x comes twice"),
        (tensor_row("token_embd.weight", (4, 4), 0, 0) + tensor_row("evil", (4,), 0, 64), "has no tensor 'evil'"),
    ],
    ids=_readable,
)
def test_wrong_tensor_tables_are_refused(row: bytes, says: str, tmp_path: Path) -> None:
    count = 2 if says in ("y overlaps x", "x comes twice", "has no tensor 'evil'") else 1
    head = b"GGUF" + struct.pack("<IQQ", 3, count, len(LLAMA))
    _refused(tmp_path, gguf_bytes(LLAMA, head=head, rows=[row], data_bytes=2048), says)


def test_llama_3_rotary_scaling_arrives(tmp_path: Path) -> None:
    from transformers import LlamaConfig
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

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


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"tokenizer.ggml.pre": "tekken"}, "unknown tokenizer.ggml.pre.*smollm.*found tekken"),
        ({"tokenizer.ggml.model": "bert"}, "expected gpt2 or llama.*found bert"),
        ({"tokenizer.ggml.model": None}, "no tokenizer.ggml.model"),
        ({"tokenizer.ggml.tokens": ["a", "b", "a"]}, "'a' is twice"),
        ({"tokenizer.ggml.token_type": [1, 1]}, "expected 261 entries, found 2"),
        ({"tokenizer.ggml.eos_token_id": 261}, "eos_token_id.*from 0 to 260, found 261"),
        ({"tokenizer.ggml.merges": ["h"]}, "not two tokens"),
        ({"tokenizer.ggml.merges": ["zz yy"]}, "do not fit together"),
        ({"tokenizer.ggml.model": "llama"}, "no tokenizer.ggml.scores"),
        ({"tokenizer.ggml.model": "llama", "tokenizer.ggml.scores": [1.0]}, "expected 261 entries, found 1"),
        ({"tokenizer.chat_template": 7}, "tokenizer.chat_template"),
    ],
)
def test_wrong_tokenizers_are_refused(changes: dict[str, Any], says: str, tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=says):
        load_tokenizer(write_small_gguf(tmp_path, _with(changes)))


def test_bos_is_added_as_the_file_says(tmp_path: Path) -> None:
    def first(changes: dict[str, Any]) -> str:
        return load_tokenizer(write_small_gguf(tmp_path, _with(changes)))("hel").tokens()[0]

    assert first({}) == "hel"
    assert first({"tokenizer.ggml.add_bos_token": True}) == "<s>"
    assert first({"tokenizer.ggml.pre": "llama-bpe"}) == "<s>"
    assert first({"tokenizer.ggml.pre": "llama-bpe", "tokenizer.ggml.add_bos_token": False}) == "hel"


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
