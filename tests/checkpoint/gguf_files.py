"""Small GGUF files, byte by byte, so that a test can put any lie into any field."""

import struct
from pathlib import Path
from typing import Any

__all__ = [
    "LLAMA",
    "SENTENCEPIECE",
    "TENSORS",
    "TOKENIZER",
    "entry",
    "gguf_bytes",
    "string",
    "tensor_row",
    "write_small_gguf",
]

_HIDDEN, _HEADS, _FFN, _VOCAB = 32, 2, 64, 261


def string(text: str) -> bytes:
    raw = text.encode()
    return struct.pack("<Q", len(raw)) + raw


def entry(key: str, value: Any) -> bytes:
    """One metadata entry: str, bool, int (u32), float (f32), list of str, of int (i32) or of float; bytes go in raw."""
    if isinstance(value, bytes):
        return string(key) + value
    if isinstance(value, list):
        if isinstance(value[0], str):
            packed = struct.pack("<IQ", 8, len(value)) + b"".join(map(string, value))
        else:
            code, kind = ("f", 6) if isinstance(value[0], float) else ("i", 5)
            packed = struct.pack(f"<IQ{len(value)}{code}", kind, len(value), *value)
        return string(key) + struct.pack("<I", 9) + packed
    if isinstance(value, str):
        return string(key) + struct.pack("<I", 8) + string(value)
    code, kind = {bool: ("?", 7), int: ("I", 4), float: ("f", 6)}[type(value)]
    return string(key) + struct.pack("<I" + code, kind, value)


def tensor_row(name: str, sizes: tuple[int, ...], kind: int, offset: int) -> bytes:
    """sizes fastest first, as the file has them."""
    return string(name) + struct.pack(f"<I{len(sizes)}QIQ", len(sizes), *sizes, kind, offset)


LLAMA: dict[str, Any] = {
    "general.architecture": "llama",
    "llama.block_count": 1,
    "llama.context_length": 128,
    "llama.embedding_length": _HIDDEN,
    "llama.feed_forward_length": _FFN,
    "llama.attention.head_count": _HEADS,
    "llama.attention.layer_norm_rms_epsilon": 1e-5,
}
# The letters that byte-level BPE writes bytes with, then two control tokens, two words and a number.
_LETTERS = [chr(code) for code in (*range(33, 127), *range(161, 173), *range(174, 256), *range(256, 324))]
TOKENIZER: dict[str, Any] = {
    "tokenizer.ggml.model": "gpt2",
    "tokenizer.ggml.pre": "smollm",
    "tokenizer.ggml.tokens": [*_LETTERS, "<s>", "</s>", "he", "hel", "12"],
    "tokenizer.ggml.token_type": [1] * 256 + [3, 3, 1, 1, 1],
    "tokenizer.ggml.merges": ["h e", "he l", "1 2"],
    "tokenizer.ggml.bos_token_id": 256,
    "tokenizer.ggml.eos_token_id": 257,
}
# The other kind: a token for every byte, and two pieces.
SENTENCEPIECE: dict[str, Any] = {
    "tokenizer.ggml.model": "llama",
    "tokenizer.ggml.tokens": ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256)), "\u2581", "a"],
    "tokenizer.ggml.token_type": [2, 3, 3] + [6] * 256 + [1, 1],
    "tokenizer.ggml.scores": [0.0] * 259 + [-1.0, -2.0],
    "tokenizer.ggml.bos_token_id": 1,
    "tokenizer.ggml.eos_token_id": 2,
}
TENSORS: dict[str, tuple[tuple[int, ...], int]] = {  # name -> (sizes fastest first, type: 0 F32, 1 F16, 8 Q8_0)
    "token_embd.weight": ((_HIDDEN, _VOCAB), 8),
    "output_norm.weight": ((_HIDDEN,), 0),
    "blk.0.attn_norm.weight": ((_HIDDEN,), 0),
    "blk.0.attn_q.weight": ((_HIDDEN, _HIDDEN), 8),
    "blk.0.attn_k.weight": ((_HIDDEN, _HIDDEN), 1),
    "blk.0.attn_v.weight": ((_HIDDEN, _HIDDEN), 1),
    "blk.0.attn_output.weight": ((_HIDDEN, _HIDDEN), 0),
    "blk.0.ffn_norm.weight": ((_HIDDEN,), 0),
    "blk.0.ffn_gate.weight": ((_HIDDEN, _FFN), 2),
    "blk.0.ffn_up.weight": ((_HIDDEN, _FFN), 3),
    "blk.0.ffn_down.weight": ((_FFN, _HIDDEN), 30),
}
_BLOCKS = {0: (1, 4), 1: (1, 2), 2: (32, 18), 3: (32, 20), 8: (32, 34), 30: (1, 2)}


def gguf_bytes(
    metadata: dict[str, Any] | None = None,
    tensors: dict[str, tuple[tuple[int, ...], int]] | None = None,
    *,
    head: bytes | None = None,
    rows: list[bytes] | None = None,
    data_bytes: int | None = None,
    alignment: int = 32,
) -> bytes:
    """A whole file; `head` replaces magic, version and counts, `rows` the table of tensors."""
    metadata = LLAMA | TOKENIZER if metadata is None else metadata
    tensors = TENSORS if tensors is None else tensors
    made, end = [], 0
    for name, (sizes, kind) in tensors.items():
        made.append(tensor_row(name, sizes, kind, end))
        block, nbytes = _BLOCKS[kind]
        count = 1
        for size in sizes:
            count *= size
        end += -(-(count // block * nbytes) // alignment) * alignment
    rows = made if rows is None else rows
    raw = head if head is not None else b"GGUF" + struct.pack("<IQQ", 3, len(rows), len(metadata))
    raw += b"".join(entry(key, value) for key, value in metadata.items()) + b"".join(rows)
    raw += bytes(-len(raw) % alignment)
    payload = bytes(index * 7 % 61 for index in range(end if data_bytes is None else data_bytes))
    return raw + payload


def write_small_gguf(folder: Path, raw: bytes | None = None) -> Path:
    path = folder / "small.gguf"
    path.write_bytes(gguf_bytes() if raw is None else raw)
    return path
