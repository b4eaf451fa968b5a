"""Models made by hand after known defects: each is refused in one clear line, within two seconds, in little memory.

Every row names what it comes from: a CVE or advisory, an issue or pull request of a project whose reader fell for it,
or the rule of the format that it breaks. `says` is what the error has to say; None where the damage does no harm and
the model may be used. Random damage is in test_hostile_files.py.
"""

import json
import math
import os
import re
import shutil
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from safetensors.torch import load_file, save_file

from checkpoint.gguf_files import (
    LLAMA,
    SENTENCEPIECE,
    TENSORS,
    TOKENIZER,
    entry,
    gguf_bytes,
    string,
    tensor_row,
    write_small_gguf,
)
from hostile import MOST_GROWN_KB, bitsandbytes_model, dense_model, grouped_model, outcome, sharded_model
from smidgen.checkpoint.gguf_header import read_header

Q = "model.layers.0.self_attn.q_proj"


class Defect(NamedTuple):
    origin: str
    model: str  # of MODELS: what is damaged
    damage: Callable[[Path], Any]
    says: str | None


# ---- sound models


MODELS: dict[str, Callable[[Path], Path]] = {
    "safetensors": dense_model,
    "shards": sharded_model,
    "nf4": lambda path: bitsandbytes_model(path, load_in_4bit=True, bnb_4bit_quant_type="nf4"),
    "nf4-dq": lambda path: bitsandbytes_model(
        path, load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True
    ),
    "int8": lambda path: bitsandbytes_model(path, load_in_8bit=True),
    "gptq": lambda path: grouped_model(path, "gptq"),
    "awq": lambda path: grouped_model(path, "awq", symmetric=False),
    "gguf": write_small_gguf,
}


# ---- ways to damage one


def _file(name: str, content: bytes | str | None) -> Callable[[Path], Any]:
    """None: it is gone."""

    def damage(folder: Path) -> None:
        if content is None:
            (folder / name).unlink()
        else:
            (folder / name).write_bytes(content if isinstance(content, bytes) else content.encode())

    return damage


def _header(entries: Any, data: bytes = b"", length: int | None = None) -> Callable[[Path], Any]:
    """Another model.safetensors. entries: its header, JSON or bytes; length: what it says of the header's length."""
    raw = entries if isinstance(entries, bytes) else json.dumps(entries).encode()
    return _file("model.safetensors", struct.pack("<Q", len(raw) if length is None else length) + raw + data)


def _one(dtype: Any, shape: Any, offsets: Any, data: int = 4) -> Callable[[Path], Any]:
    """A model.safetensors with one tensor."""
    return _header({"x": {"dtype": dtype, "shape": shape, "data_offsets": offsets}}, bytes(data))


def _cut(nbytes: int) -> Callable[[Path], Any]:
    """The weights' file without its end."""

    def damage(path: Path) -> None:
        file = path / "model.safetensors" if path.is_dir() else path
        os.truncate(file, file.stat().st_size - nbytes)

    return damage


def _json(name: str, **changes: Any) -> Callable[[Path], Any]:
    """A value of ... takes the key away."""

    def damage(folder: Path) -> None:
        content = json.loads((folder / name).read_text()) | changes
        kept = {key: value for key, value in content.items() if value is not ...}
        (folder / name).write_text(json.dumps(kept))

    return damage


def _config(**changes: Any) -> Callable[[Path], Any]:
    return _json("config.json", **changes)


def _quantisation(**changes: Any) -> Callable[[Path], Any]:
    def damage(folder: Path) -> None:
        config = json.loads((folder / "config.json").read_text())
        config["quantization_config"] |= changes
        (folder / "config.json").write_text(json.dumps(config))

    return damage


def _index(change: Callable[[dict[str, str]], Any]) -> Callable[[Path], Any]:
    """change: of the weight map, in place."""

    def damage(folder: Path) -> None:
        path = folder / "model.safetensors.index.json"
        index = json.loads(path.read_text())
        change(index["weight_map"])
        path.write_text(json.dumps(index))

    return damage


def _points_to(name: Any) -> Callable[[Path], Any]:
    return _index(lambda weight_map: weight_map.update({"model.norm.weight": name}))


def _tensor(name: str, change: Callable[[torch.Tensor], torch.Tensor | None]) -> Callable[[Path], Any]:
    """One tensor of model.safetensors becomes another; None takes it away. A new one is made of an empty one."""

    def damage(folder: Path) -> None:
        tensors = load_file(folder / "model.safetensors")
        changed = change(tensors.pop(name, torch.empty(0)))
        if changed is not None:
            tensors[name] = changed
        save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})

    return damage


def _state(text: str | None = None, **changes: Any) -> Callable[[Path], Any]:
    """The JSON beside a 4-bit weight: another text, or other values, or (...) none."""
    name = f"{Q}.weight.quant_state.bitsandbytes__nf4"

    def change(stored: torch.Tensor) -> torch.Tensor:
        values = json.loads(bytes(stored.tolist())) | changes
        changed = json.dumps({k: v for k, v in values.items() if v is not ...}) if text is None else text
        return torch.tensor(list(changed.encode()), dtype=torch.uint8)

    return _tensor(name, change)


def _raw(content: bytes) -> Callable[[Path], Any]:
    return lambda path: path.write_bytes(content)


def _keys(**changes: Any) -> Callable[[Path], Any]:
    """Other metadata; two underscores stand for a dot. A value of None takes the key away, bytes go in as they are."""
    named = {key.replace("__", "."): value for key, value in changes.items()}
    metadata = {key: value for key, value in (LLAMA | TOKENIZER | named).items() if value is not None}
    return _raw(gguf_bytes(metadata))


def _pieces(**changes: Any) -> Callable[[Path], Any]:
    """_keys over the SentencePiece tokenizer."""
    return _raw(gguf_bytes(LLAMA | SENTENCEPIECE | {f"tokenizer.ggml.{key}": value for key, value in changes.items()}))


def _counts(tensors: int, entries: int, rest: bytes = bytes(30), version: int = 3) -> bytes:
    return b"GGUF" + struct.pack("<IQQ", version, tensors, entries) + rest


def _value(raw: bytes) -> Callable[[Path], Any]:
    """A metadata entry `bad`, raw from its type on."""
    return _raw(gguf_bytes({**LLAMA, "bad": raw}))


def _table(*rows: bytes) -> Callable[[Path], Any]:
    """Another table of tensors, over 2048 bytes of data."""
    head = _counts(len(rows), len(LLAMA), b"")
    return _raw(gguf_bytes(LLAMA, head=head, rows=list(rows), data_bytes=2048))


def _sizes(**changes: tuple[int, ...] | None) -> Callable[[Path], Any]:
    """Tensors of layer 0 with other sizes, or without one."""
    tensors = {name: changes.get(name.split(".")[-2], row[0]) and (changes.get(name.split(".")[-2], row[0]), row[1])
               for name, row in TENSORS.items()}  # fmt: skip
    return _raw(gguf_bytes(LLAMA | TOKENIZER, {name: row for name, row in tensors.items() if row}))  # type: ignore[misc]


def _writes(name: str, value: float, at: int = 0) -> Callable[[Path], Any]:
    """Two bytes of a tensor of a GGUF file become this float16."""

    def damage(path: Path) -> None:
        raw = bytearray(path.read_bytes())
        place = read_header(path, raw).tensors[name].offset + at
        raw[place : place + 2] = struct.pack("<e", value)
        path.write_bytes(raw)

    return damage


def _fifo(folder: Path) -> None:
    (folder / "model.safetensors").unlink()
    os.mkfifo(folder / "model.safetensors")


def _device(folder: Path) -> None:
    (folder / "model.safetensors").unlink()
    (folder / "model.safetensors").symlink_to("/dev/zero")


def _pickle(folder: Path) -> None:
    (folder / "model.safetensors").unlink()
    # what runs `touch fired` in the working folder when it is unpickled
    (folder / "pytorch_model.bin").write_bytes(b"cos\nsystem\n(S'touch fired'\ntR.")


_RUNS = "{{ lipsum.__globals__['os'].popen('touch fired').read() }}"
_CLIMBS = "{% for c in ''.__class__.__mro__[1].__subclasses__() %}{{ c.__init__.__globals__ }}{% endfor %}"
_NO_GLOBALS = "refuses this conversation .access to attribute '__globals__'"
_NO_CLASS = "refuses this conversation .access to attribute '__class__'"
_BYTES = SENTENCEPIECE["tokenizer.ggml.tokens"]
_SPEC = "safetensors specification: "
_GGUF = "GGUF specification: "


# ---- the table

SAFETENSORS = [
    (_SPEC + "the header is a JSON string", _header(b"nonsense"), "header is not JSON .Expecting value"),
    (_SPEC + "the header is an object", _header(b"[1]"), "header is not a JSON object"),
    ("wifi-densepose SAFETENSORS-HEADER-BUG: padded by NUL", _header(b"{}\0\0\0"), "header is not JSON .Extra data"),
    (_SPEC + "the header is UTF-8", _header(b"\xff\xfe{}"), "header is not JSON"),
    (_SPEC + "strings of the header are UTF-8", _header(b'{"\xff\xfe": 1}'), "header is not JSON"),
    ("CPython: RecursionError of deeply nested JSON", _header(b'{"x":' + b"[" * 50_000),
     "header is not JSON .maximum recursion"),
    ("CVE-2020-10735: a number of 6000 digits", _header(b'{"x": ' + b"9" * 6000 + b"}"), "not JSON .*6000 digits"),
    ("safetensors #401: a key twice", _header(b'{"x": 1, "x": 2}'), "'x' comes twice"),
    (_SPEC + "an entry is an object", _header({"x": 3}), "entry is not an object"),
    (_SPEC + "__metadata__ is an object", _header({"__metadata__": 3}), "__metadata__ .* not an object of strings"),
    (_SPEC + "__metadata__ maps text to text", _header({"__metadata__": {"a": 1}}),
     "__metadata__ .* not an object of strings"),
    ("kekzl/imp #1603: an unknown dtype", _one("Q9", [1], [0, 1 << 60]), "unknown dtype.*F32.*found Q9"),
    (_SPEC + "dtype is a string", _one(["F32"], [1], [0, 4]), r"unknown dtype.*found \['F32'\]"),
    (_SPEC + "sizes are not negative", _one("F32", [-1], [0, 4]), r"integers >= 0, found \[-1\]"),
    (_SPEC + "sizes are integers", _one("F32", [1.0], [0, 4]), r"integers >= 0, found \[1.0\]"),
    ("CPython: true is an int", _one("F32", [True], [0, 4]), r"integers >= 0, found \[True\]"),
    ("torch: tensors of many dimensions", _one("F32", [1] * 17, [0, 4]), "wrong shape, expected up to 16 sizes"),
    ("stable-diffusion.cpp #1754: begin behind end", _one("F32", [1], [4, 0]), r"wrong data_offsets.*found \[4, 0\]"),
    (_SPEC + "data_offsets are two", _one("F32", [1], [0]), r"wrong data_offsets.*found \[0\]"),
    ("stable-diffusion.cpp #1754: end behind the file", _one("F32", [1 << 20], [0, 4 << 20]),
     "wrong size, expected 4194385 bytes"),
    ("ComfyUI #15722: the shape does not match", _one("F32", [2], [0, 4]), "expected 8 bytes, found 4"),
    (_SPEC + "a tensor of a petabyte", _one("F32", [1 << 48], [0, 4]), "expected 1125899906842624 bytes, found 4"),
    ("openasr #73: a shape whose size wraps to 0", _one("F32", [1 << 62, 4], [0, 0], 0),
     "expected 73786976294838206464 bytes"),
    (_SPEC + "no holes", _one("U8", [4], [2, 6], 6), "leaves a hole after the header"),
    (_SPEC + "the whole buffer is indexed", _one("U8", [4], [0, 4], 5), "wrong size, expected 72 bytes, found 73"),
    (
        "ohdearquant/lattice #752: two tensors share their bytes",
        _header({name: {"dtype": "U8", "shape": [4], "data_offsets": [0, 4]} for name in "xy"}, bytes(4)),
        "y overlaps x",
    ),
    (
        "h3.c #48: tensors overlap in part",
        _header(
            {
                "x": {"dtype": "U8", "shape": [4], "data_offsets": [0, 4]},
                "y": {"dtype": "U8", "shape": [4], "data_offsets": [2, 6]},
            },
            bytes(6),
        ),
        "y overlaps x",
    ),
    ("openasr #73: a header longer than the file", _header({}, length=5), "a header of at most 2 bytes, found 5"),
    ("openasr #73: a header of a terabyte", _header({}, length=1 << 40), "at most 2 bytes, found 1099511627776"),
    ("openasr #73: a header of 2^64 - 1 bytes", _header({}, length=(1 << 64) - 1),
     "at most 2 bytes, found 18446744073709551615"),
    (_SPEC + "a header has at most 100 MB", _header(b"{}" + b" " * 1000, length=100_000_001), "found 100000001"),
    ("an interrupted download: the last bytes are missing", _cut(100), "has the wrong size.*cut off"),
    ("an interrupted download: an empty file", _file("model.safetensors", b""), "is empty"),
    ("CWE-502: weights as a pickle", _pickle, r"pickle \(pytorch_model.bin\).*save_pretrained"),
    ("POSIX: a FIFO blocks who opens it", _fifo, "not a regular file"),
    ("POSIX: a device never ends", _device, "not a regular file"),
]  # fmt: skip

INDEX = [
    ("transformers #47176: ../", _points_to("../x.safetensors"), "outside its folder"),
    ("transformers #46281: ../../", _points_to("../../x.safetensors"), "outside its folder"),
    ("transformers #46272: an absolute path", _points_to("/etc/passwd"), "outside its folder"),
    ("transformers #46097: a path of the root", _points_to("/x.safetensors"), "outside its folder"),
    ("transformers #46913: a folder below", _points_to("sub/x.safetensors"), "outside its folder"),
    ("diffusers #14175: ..", _points_to(".."), "outside its folder"),
    ("index rule: a name", _points_to(""), "outside its folder"),
    ("Windows: a drive", _points_to("C:x.safetensors"), "outside its folder"),
    ("Windows: a backslash", _points_to("a\\b.safetensors"), "outside its folder"),
    ("C strings end at NUL", _points_to("x.safetensors\0"), "outside its folder"),
    ("CWE-502: a pickle among the shards", _points_to("x.bin"), "outside its folder"),
    ("a terminal takes a line break as one", _points_to("x\n.safetensors"), "outside its folder"),
    ("index rule: a name is a string", _points_to(7), "outside its folder"),
    ("index rule: no name is null", _points_to(None), "outside its folder"),
    ("index rule: one file for each tensor", _points_to(["x.safetensors"]), "outside its folder"),
    ("index rule: named files are there", _points_to("x.safetensors"), "lacks the shard x.safetensors"),
    (
        "GPTQModel #3077: a stale index names a tensor that no shard has",
        _index(lambda weights: weights.update(zz=next(iter(weights.values())))),
        "lacks tensor 'zz'",
    ),
    (
        "modelaudit #1667: a key twice in the index",
        _file("model.safetensors.index.json", '{"weight_map": {"a": "b.safetensors", "a": "../c"}}'),
        "'a' comes twice",
    ),
    ("index rule: an object", _file("model.safetensors.index.json", "[]"), "not a JSON object"),
    ("index rule: JSON", _file("model.safetensors.index.json", "{"), "not JSON"),
    ("index rule: it has a map", _file("model.safetensors.index.json", "{}"), "wrong weight_map"),
    ("index rule: the map is an object", _json("model.safetensors.index.json", weight_map=[]), "wrong weight_map"),
    ("index rule: the map is not empty", _json("model.safetensors.index.json", weight_map={}), "wrong weight_map"),
    (
        "safetensors, shards: a tensor in two files",
        lambda folder: shutil.copy(*sorted(folder.glob("model-*.safetensors"))[:2]),
        "is both in",
    ),
    (
        "index rule: shards have one",
        _file("model.safetensors.index.json", None),
        ".safetensors files and no index",
    ),
]  # fmt: skip

CONFIG = [
    ("an interrupted download: an empty config", _file("config.json", ""), "is empty"),
    ("an interrupted download: half a config", _file("config.json", '{"model_type": "lla'), "not JSON"),
    ("config rule: it is there", _file("config.json", None), "has no config.json"),
    ("config rule: an object", _file("config.json", "[]"), "not a JSON object"),
    ("config rule: model_type", _config(model_type=...), "wrong model_type"),
    ("config rule: model_type is a string", _config(model_type=3), "wrong model_type"),
    ("config rule: model_type is known", _config(model_type="../evil"), "unknown to transformers"),
    ("CPython: RecursionError of a nested config", _file("config.json", '{"x":' + "[" * 50_000), "not JSON"),
    ("CVE-2020-10735: a size of 6000 digits", _file("config.json", '{"x":' + "9" * 6000 + "}"), "not JSON"),
    ("tabfm #91: sizes that take all memory", _config(hidden_size=1 << 20, intermediate_size=1 << 30),
     r"embed_tokens.*expected shape \[272, 1048576\] by config.json"),
    ("tabfm #91: no heads", _config(num_attention_heads=0), "config.json cannot be read .integer modulo by zero"),
    ("any-guardrail #239: heads do not divide the width", _config(num_attention_heads=24),
     r"config.json .*\(64\) is not a multiple of .* heads \(24\)"),
    ("config rule: more heads for keys than for queries", _config(num_key_value_heads=7),
     r"k_proj.*shape \[112, 64\] by config.json, found \[32, 64\]"),
    ("llama.cpp #25513: 100,000 layers", _config(num_hidden_layers=100_000), "wrong num_hidden_layers"),
    ("config rule: a negative number of layers", _config(num_hidden_layers=-1), r"model.layers.0.* left over"),
    ("config rule: a layer more than there is", _config(num_hidden_layers=2),
     r"model.layers.1.* missing, expected the 21"),
    ("config rule: a vocabulary of 0", _config(vocab_size=0), "config.json does not describe .*num_embeddings"),
    ("config rule: a vocabulary of 2^40", _config(vocab_size=1 << 40), r"embed_tokens.*shape \[1099511627776, 64\]"),
    ("config rule: a negative width", _config(intermediate_size=-96), "config.json .*negative dimension -96"),
    ("config rule: a head of an odd width", _config(head_dim=15), "config.json .*even rotary dimension.*=15"),
    ("config rule: an activation that is none", _config(hidden_act="os.system"),
     "config.json does not describe .*'os.system'"),
    ("config rule: quantization_config is an object", _config(quantization_config="gptq"), "expected a JSON object"),
    ("config rule: a quantiser that is read", _config(quantization_config={"quant_method": "hqq"}), r"\(hqq\)"),
    ("CVE-2026-4372: a kernel of the hub", _config(_attn_implementation_internal="evil/kernel"), None),
    ("transformers, auto_map: code beside the weights", _config(auto_map={"AutoConfig": "evil.Config"}), None),
]  # fmt: skip

BITSANDBYTES = [
    ("nf4", "bitsandbytes rule: a scale for each block", _tensor(f"{Q}.weight.absmax", lambda t: t[:3]),
     "absmax.*64 scales"),
    ("nf4", "bitsandbytes rule: the table of the type", _tensor(f"{Q}.weight.quant_map", torch.zeros_like),
     "nf4 table"),
    ("nf4", "bitsandbytes rule: a table", _tensor(f"{Q}.weight.quant_map", lambda t: None), "no tensor .*quant_map"),
    ("nf4", "IEEE 754: an infinite scale", _tensor(f"{Q}.weight.absmax", lambda t: t * math.inf),
     "absmax.*finite scales"),
    ("nf4", "bitsandbytes rule: half a byte for a weight", _tensor(f"{Q}.weight", lambda t: t[:-1]), "2048 bytes"),
    ("nf4", "bitsandbytes rule: packed bytes", _tensor(f"{Q}.weight", lambda t: t.long()),
     "bytes, or bytes as a float type"),
    ("nf4", "bitsandbytes rule: the state is JSON", _state("{]"), r"nf4 cannot be read \(Expecting property name"),
    ("nf4", "bitsandbytes rule: the state is an object", _state("[1]"), r"nf4 cannot be read \(list indices"),
    ("nf4", "CPython: OverflowError of an infinite blocksize", _state('{"quant_type": "nf4", "blocksize": 1e999}'),
     r"nf4 cannot be read \(cannot convert float infinity"),
    ("nf4", "CPython: RecursionError of a nested state", _state("[" * 60_000), "nf4 cannot be read .maximum recursion"),
    ("nf4", "bitsandbytes rule: a short state", _state(" " * 70_000), "a short JSON text"),
    ("nf4", "CWE-369: a blocksize of 0", _state(blocksize=0), "a known blocksize"),
    ("nf4", "bitsandbytes rule: a blocksize of 63", _state(blocksize=63), "a known blocksize"),
    ("nf4", "CWE-125: larger blocks than there are scales for", _state(blocksize=32), "absmax.*expected 128 scales"),
    ("nf4", "bitsandbytes rule: nf4 or fp4", _state(quant_type="nf5"), "nf4 or fp4"),
    ("nf4", "CWE-125: a larger shape than there are bytes", _state(shape=[1 << 20, 64]), "shape .* by config.json"),
    ("nf4", "bitsandbytes rule: a shape of two", _state(shape=7), "nf4 cannot be read .'int' object is not iterable"),
    ("nf4-dq", "bitsandbytes rule: nested scales are bytes",
     _tensor(f"{Q}.weight.absmax", lambda t: torch.ones(64)), "absmax.*uint8 if nested"),
    ("nf4-dq", "bitsandbytes rule: bytes need outer scales", _tensor(f"{Q}.weight.nested_absmax", lambda t: None),
     "absmax.*uint8 if nested"),
    ("nf4-dq", "CWE-125: too few outer scales", _tensor(f"{Q}.weight.nested_absmax", lambda t: t[:0]),
     "1 float scales"),
    ("nf4-dq", "IEEE 754: an outer scale that is no number",
     _tensor(f"{Q}.weight.nested_absmax", lambda t: t * math.nan), "nested_absmax.*finite scales"),
    ("nf4-dq", "bitsandbytes rule: the dynamic map", _tensor(f"{Q}.weight.nested_quant_map", torch.zeros_like),
     "the dynamic map"),
    ("nf4-dq", "IEEE 754: an offset that is no number", _state(nested_offset=math.nan),
     "expected a finite nested_offset"),
    ("nf4-dq", "bitsandbytes rule: an offset, which was taken for 0", _state(nested_offset=...),
     "nf4 does not say nested_offset"),
    ("nf4-dq", "bitsandbytes rule: nested blocks have a size", _state(nested_blocksize=...),
     "nf4 does not say nested_blocksize"),
    ("nf4-dq", "bitsandbytes rule: nested blocks of 256", _state(nested_blocksize=128),
     "expected nested_blocksize 256"),
    ("int8", "bitsandbytes rule: a scale for each row", _tensor(f"{Q}.SCB", lambda t: t[:3]), "one float scale"),
    ("int8", "bitsandbytes rule: codes need scales", _tensor(f"{Q}.SCB", lambda t: None),
     "q_proj.weight is no weight.*found int8"),
    ("int8", "bitsandbytes rule: scales are floats", _tensor(f"{Q}.SCB", lambda t: t.to(torch.float8_e4m3fn)),
     "one float scale"),
    ("int8", "IEEE 754: a scale that is no number", _tensor(f"{Q}.SCB", lambda t: t * math.nan), "SCB.*finite scales"),
    ("int8", "CWE-125: fewer rows than config.json says", _tensor(f"{Q}.weight", lambda t: t[:-1]), r"int8 \[64, 64\]"),
    ("int8", "bitsandbytes rule: weight_format is 0 (rows)",
     _tensor(f"{Q}.weight_format", lambda t: torch.tensor(2, dtype=torch.uint8)), "weight_format.*expected 0"),
    ("int8", "bitsandbytes rule: weight_format is one number",
     _tensor(f"{Q}.weight_format", lambda t: torch.empty(0, dtype=torch.uint8)), "weight_format.*expected 0"),
    ("int8", "bitsandbytes rule: scales belong to a weight", _tensor("foo.SCB", lambda t: torch.ones(3)),
     "foo.SCB left over"),
    ("int8", "bitsandbytes rule: parts belong to a weight", _tensor("foo.weight.absmax", lambda t: torch.ones(3)),
     "foo.weight.absmax left over"),
    ("int8", "safetensors: integers where numbers belong",
     _tensor("model.norm.weight", lambda t: torch.ones(64, dtype=torch.int32)), "norm.weight is no weight"),
]  # fmt: skip

GROUPS = [
    ("gptq", "GPTQModel #2949: g_idx beyond the groups", _tensor(f"{Q}.g_idx", lambda t: t + 1),
     "g_idx.*groups from 0 to 1.*found 1 to 2"),
    ("gptq", "vLLM #47255: a negative g_idx", _tensor(f"{Q}.g_idx", lambda t: t - 9),
     "g_idx.*groups from 0 to 1.*found -9"),
    ("gptq", "exllamav2 #817: a g_idx of 2^31 - 1", _tensor(f"{Q}.g_idx", lambda t: t | 0x7FFFFFFF),
     "g_idx.*found 2147"),
    ("gptq", "GPTQ rule: a group for each input", _tensor(f"{Q}.g_idx", lambda t: t[:5]), r"g_idx.*int32 \[64\]"),
    ("gptq", "GPTQ rule: groups are int32", _tensor(f"{Q}.g_idx", lambda t: t.long()), "g_idx.*found int64"),
    ("gptq", "GPTQModel #3077: a missing qweight", _tensor(f"{Q}.qweight", lambda t: None), "q_proj.weight missing"),
    ("gptq", "GPTQ rule: words of all inputs", _tensor(f"{Q}.qweight", lambda t: t[:-1]),
     r"q_proj.qweight.*expected int32 \[8, 64\]"),
    ("gptq", "GPTQ rule: words are int32", _tensor(f"{Q}.qweight", lambda t: t.float()),
     "q_proj.qweight.*expected int32.*found float32"),
    ("gptq", "GPTQ rule: zero points", _tensor(f"{Q}.qzeros", lambda t: None), "no tensor .*q_proj.qzeros"),
    ("gptq", "CWE-125: zero points of one group of two", _tensor(f"{Q}.qzeros", lambda t: t[:1]),
     r"q_proj.qzeros, expected int32 \[2, 8\], found int32 \[1, 8\]"),
    ("gptq", "IEEE 754: a scale that is no number", _tensor(f"{Q}.scales", lambda t: t * math.nan),
     "q_proj.scales holds a scale that is not finite"),
    ("gptq", "CWE-125: scales of three outputs", _tensor(f"{Q}.scales", lambda t: t[:, :3].contiguous()),
     r"q_proj.scales.*expected float \[2, 64\]"),
    ("gptq", "vLLM #48470: no groups", _tensor(f"{Q}.scales", lambda t: t[:0]), r"q_proj.scales.*float16 \[0, 64\]"),
    ("gptq", "vLLM #48470: 5 bits", _quantisation(bits=5), "bits that is not read here.*2, 3, 4 or 8.*found 5"),
    ("gptq", "GPTQ rule: bits are a number", _quantisation(bits="4; rm"), "bits that is not read here.*found 4; rm"),
    ("gptq", "CWE-369: groups of 0", _quantisation(group_size=0), "group_size that is not read here.*found 0"),
    ("gptq", "GPTQ rule: groups of 2^40", _quantisation(group_size=1 << 40),
     "group_size that is not.*found 1099511627776"),
    ("gptq", "GPTQModel: a format of another tool", _quantisation(checkpoint_format="gptq_p"),
     "checkpoint_format.*gptq or gptq_v2.*found gptq_p"),
    ("gptq", "GPTQModel: settings of their own for some layers", _quantisation(dynamic={"+:.*": {"bits": 8}}),
     "dynamic that is not read here, expected one setting"),
    ("awq", "AutoAWQ #217: the layout gemv", _quantisation(version="gemv"), "version.*gemm.*found gemv"),
    ("awq", "AWQ rule: 4 bits", _quantisation(bits=3), "bits.*found 3"),
    ("awq", "CWE-369: groups of 0", _quantisation(group_size=0), "group_size that is not read here.*found 0"),
    ("awq", "GPTQModel #3077: a missing qweight", _tensor(f"{Q}.qweight", lambda t: None), "q_proj.weight missing"),
    ("awq", "AWQ rule: a row for each input", _tensor(f"{Q}.qweight", lambda t: t[:-1]), r"q_proj.qweight.*\[64, 8\]"),
    ("awq", "CWE-125: zero points of one group of two", _tensor(f"{Q}.qzeros", lambda t: t[:1]),
     r"q_proj.qzeros, expected int32 \[2, 8\], found int32 \[1, 8\]"),
    ("awq", "IEEE 754: an infinite scale", _tensor(f"{Q}.scales", lambda t: t / 0),
     "q_proj.scales holds a scale that is not finite"),
]  # fmt: skip

_ARRAY, _TEXT, _UINT8, _FLOAT32 = 9, 8, 0, 6
GGUF = [
    (_GGUF + "a file has bytes", _raw(b""), "is empty"),
    (_GGUF + "a magic number of four bytes", _raw(b"GGU"), "not a GGUF file"),
    (_GGUF + "magic", _raw(b"PK\3\4" + bytes(100)), "not a GGUF file"),
    (_GGUF + "version 1 is no more", _raw(_counts(0, 0, version=1)), "unknown GGUF version.*found 1"),
    (_GGUF + "byte order", _raw(b"GGUF" + struct.pack(">I", 3) + bytes(16)), "big-endian"),
    (
        "llama.cpp #27188: 43 bytes, an array of 2^60 values",
        _raw(_counts(0, 1, string("abc")[:11] + struct.pack("<I", _ARRAY) + b"\x08\0\0\0")),
        "ends in the middle of the value of abc",
    ),
    ("llama.cpp #27188: 2^63 metadata entries", _raw(_counts(0, 1 << 63)), "claims 9223372036854775808 metadata"),
    ("llama.cpp #27188: 2^63 tensors", _raw(_counts(1 << 63, 0)), "claims 9223372036854775808 tensors"),
    ("llama.cpp #15711: tensors whose table overflows", _raw(_counts((1 << 63) // 56, 0)), "claims .* tensors"),
    ("llama.cpp #4100: 2^32 + 1 entries", _raw(_counts(0, (1 << 32) + 1)), "claims 4294967297 metadata entries"),
    ("llama.cpp #27188: a key of 2^62 bytes", _raw(_counts(0, 1, struct.pack("<Q", 1 << 62) + bytes(30))),
     "metadata key is too long"),
    (_GGUF + "a key has at most 65535 bytes", _raw(gguf_bytes({"k" * 65536: 1})), "metadata key is too long"),
    (_GGUF + "keys are UTF-8", _raw(_counts(0, 1, struct.pack("<Q", 2) + b"\xff\xfe" + bytes(30))),
     "metadata key is not UTF-8"),
    ("llama.cpp #19856: a key twice", _raw(_counts(0, 2, entry("a", 1) * 2 + bytes(40))), "a comes twice"),
    ("llama.cpp #24263: an empty key", _raw(gguf_bytes({"": 1} | LLAMA | TOKENIZER)), None),
    (_GGUF + "types are 0 to 12", _value(struct.pack("<I", 13)), "unknown type.*found 13"),
    ("llama.cpp #19856: a string of a terabyte", _value(struct.pack("<IQ", _TEXT, 1 << 40)),
     "value of bad is too long.*16777216 bytes, found 1099511627776"),
    ("llama.cpp #27188: a string beyond the file", _value(struct.pack("<IQ", _TEXT, 1 << 22)),
     "ends in the middle of the value of bad"),
    (_GGUF + "strings are UTF-8", _value(struct.pack("<IQ", _TEXT, 2) + b"\xff\xfe"), "value of bad is not UTF-8"),
    ("llama.cpp #28880: arrays in arrays", _value(struct.pack("<IIQ", _ARRAY, _ARRAY, 1) * 1000),
     "array of an unknown type"),
    ("llama.cpp #19856: an array of 2^50 strings", _value(struct.pack("<IIQ", _ARRAY, _TEXT, 1 << 50)),
     "value of bad is too long.*4000000 strings"),
    ("llama.cpp #19856: an array of 2^50 numbers", _value(struct.pack("<IIQ", _ARRAY, _UINT8, 1 << 50)),
     "value of bad is too long.*4000000 numbers"),
    ("llama.cpp #27188: strings beyond the file", _value(struct.pack("<IIQ", _ARRAY, _TEXT, 3_000_000)),
     "ends in the middle of the value of bad.*24000000 more bytes"),
    ("llama.cpp #27188: numbers beyond the file", _value(struct.pack("<IIQ", _ARRAY, _FLOAT32, 3_000_000)),
     "ends in the middle of the value of bad.*12000000 more bytes"),
    ("llama.cpp #27188: a string of 2^63 bytes in an array", _value(struct.pack("<IIQQ", _ARRAY, _TEXT, 1, 1 << 63)),
     "ends in the middle of the value of bad.*9223372036854775816 more bytes"),
    (_GGUF + "strings of arrays are UTF-8", _value(struct.pack("<IIQQ", _ARRAY, _TEXT, 1, 2) + b"\xff\xfe"),
     "value of bad holds a string that is not UTF-8"),
    (_GGUF + "alignment is a power of two here", _keys(general__alignment=48),
     "wrong general.alignment, expected a power of two"),
    ("ggml, alignment: 0 divides", _keys(general__alignment=0), "general.alignment.*from 1 to .*found 0"),
    ("llama.cpp #24997: an alignment of 2^31", _keys(general__alignment=1 << 31),
     "general.alignment.*found 2147483648"),
    ("llama.cpp #26318: a negative alignment", _keys(general__alignment=struct.pack("<Ii", 5, -32)),
     "general.alignment.*from 1 to .*found -32"),
    (_GGUF + "architecture is known", _keys(general__architecture="mamba"), "unknown GGUF architecture.*found mamba"),
    ("llama.cpp #26690: architecture as a number", _keys(general__architecture=3),
     "wrong value of general.architecture"),
    (_GGUF + "architecture is required", _keys(general__architecture=None), "no general.architecture"),
    (_GGUF + "an adapter is no model", _keys(general__type="adapter"), "is no model"),
    ("llama.cpp, gguf-split: a part under another name", _keys(split__count=4), "part 1 of 4.*expected part 1 of 1"),
    ("llama.cpp, gguf-split: another number of tensors", _keys(split__tensors__count=9), "have 11 tensors, expected 9"),
    (_GGUF + "experts are not read", _keys(llama__expert_count=8), "mixture of experts"),
    ("llama.cpp #25513: 100,000 blocks", _keys(llama__block_count=100_000), "wrong llama.block_count.*found 100000"),
    ("llama.cpp #9893: fewer tensors than blocks", _keys(llama__block_count=2), "no tensor blk.1.attn_norm.weight"),
    ("llama.cpp #26690: an array of block counts", _keys(llama__block_count=[1, 1]),
     "wrong value of llama.block_count"),
    ("llama.cpp #2247: no heads", _keys(llama__attention__head_count=0), "wrong value of llama.attention.head_count"),
    (_GGUF + "a width of 0", _keys(llama__embedding_length=0), "wrong value of llama.embedding_length"),
    (_GGUF + "heads divide the width", _keys(llama__attention__head_count=5), "rows for 5 heads"),
    (_GGUF + "key heads divide the rows", _keys(llama__attention__head_count_kv=32), "rows for 32 heads"),
    (_GGUF + "a head wider than its rows", _keys(llama__attention__key_length=1 << 30), "q_proj.*expected shape"),
    (_GGUF + "a head as wide as its rotary frequencies may be", _keys(llama__attention__key_length=1 << 25),
     "q_proj.*expected shape"),
    ("IEEE 754: epsilon is no number", _keys(llama__attention__layer_norm_rms_epsilon=math.nan),
     "layer_norm_rms_epsilon.*positive.*found nan"),
    ("IEEE 754: an infinite base", _keys(llama__rope__freq_base=math.inf), "llama.rope.freq_base.*positive.*found inf"),
    (_GGUF + "rotary dimensions are the head's", _keys(llama__rope__dimension_count=8), "part of the head"),
    (_GGUF + "rotary scaling is known", _keys(llama__rope__scaling__type="longrope"), "unknown rotary scaling"),
    ("llama.cpp #9235: a weight of another shape", _sizes(ffn_gate=(32, 32)), "gate_proj.*expected shape"),
    ("CWE-125: a norm shorter than the width", _sizes(attn_norm=(8,)), "input_layernorm.*expected shape"),
    (_GGUF + "the embedding is required", _sizes(token_embd=None), "no tensor token_embd.weight"),
    (_GGUF + "every weight of a block is required", _sizes(ffn_up=None), "no tensor blk.0.ffn_up.weight"),
    ("llama.cpp #8816: a type of removed blocks", _table(tensor_row("x", (32, 4), 4, 0)), "not read.*found Q4_2"),
    ("llama.cpp #19856: a negative type", _table(tensor_row("x", (32, 4), (1 << 32) - 1, 0)), "found type 4294967295"),
    (_GGUF + "a type that is not read here", _table(tensor_row("x", (32, 4), 23, 0)), "expected F32.*found IQ4_XS"),
    (_GGUF + "rows are whole blocks", _table(tensor_row("x", (31, 4), 8, 0)), r"wrong shape \[4, 31\].*blocks of 32"),
    ("ggml #1517: a size of 0", _table(tensor_row("x", (32, 0), 0, 0)), r"wrong shape \[0, 32\]"),
    ("llama.cpp #18674: rows of 2^42 + 1", _table(tensor_row("x", (1152, (1 << 42) + 1), 8, 0)),
     "ends beyond the file"),
    ("CVE-2026-33298: a size that wraps", _table(tensor_row("x", (1 << 62, 1 << 62), 0, 0)), "ends beyond the file"),
    ("llama.cpp #24759: a padded size that wraps", _table(tensor_row("x", ((1 << 62) - 1,), 0, 0)), "ends beyond"),
    ("llama.cpp #25378: sizes whose product wraps to 4",
     _table(tensor_row("x", (4194305, 4194305, 211106198978564), 0, 0)), "ends beyond the file"),
    ("CVE-2026-27940: a total size that wraps",
     _table(tensor_row("x", (8,), 0, 0), tensor_row("y", ((1 << 62) - 8,), 0, 32)), "y ends beyond the file"),
    ("llama.cpp #25378: a million dimensions", _table(string("x") + struct.pack("<I", 1_000_000) + bytes(64)),
     "1000000 dimensions"),
    ("ggml #709: five dimensions", _table(tensor_row("x", (4,) * 5, 0, 0)), "x has 5 dimensions"),
    (_GGUF + "a tensor has a dimension", _table(tensor_row("x", (), 0, 0)), "x has 0 dimensions"),
    (_GGUF + "offsets are aligned", _table(tensor_row("x", (4,), 0, 16)), "x is not aligned, expected 32, found 16"),
    ("CVE-2026-7482: an offset beyond the file", _table(tensor_row("x", (4,), 0, 1 << 40)), "ends beyond the file"),
    ("CVE-2026-7482: a size beyond the file", _table(tensor_row("x", (4, 1024), 0, 0)), "ends beyond the file"),
    ("CWE-190: an offset that wraps", _table(tensor_row("x", (4,), 0, (1 << 64) - 32)), "ends beyond the file"),
    ("CWE-150: a name that clears the terminal and goes on in a line of its own",
     _table(tensor_row("x\n\x1b[2Jy", (32, 4), 23, 0)), "x\N{REPLACEMENT CHARACTER}{2}.2Jy.*found IQ4_XS"),
    ("llama.cpp #10100: a name of 65 bytes", _table(tensor_row("x" * 65, (4,), 0, 0)), "tensor name is too long"),
    ("CWE-119: tensors that overlap", _table(tensor_row("x", (64,), 0, 0), tensor_row("y", (4,), 0, 32)),
     "y overlaps x"),
    (_GGUF + "names are unique", _table(*(tensor_row("x", (4,), 0, at) for at in (0, 32))), "x comes twice"),
    (
        _GGUF + "names of the architecture",
        _table(tensor_row("token_embd.weight", (4, 4), 0, 0), tensor_row("evil", (4,), 0, 64)),
        "has no tensor 'evil'",
    ),
    ("IEEE 754: an infinite scale in a row of the embedding", _writes("token_embd.weight", math.inf, 200 * 34),
     "tensor model.embed_tokens.weight holds numbers that are not finite"),
    ("IEEE 754: an infinite scale of Q8_0", _writes("blk.0.attn_q.weight", -math.inf),
     "q_proj.weight holds numbers that"),
    ("IEEE 754: a scale of Q4_0 that is no number", _writes("blk.0.ffn_gate.weight", math.nan),
     "gate_proj.weight holds numbers that"),
    ("IEEE 754: a least value of Q4_1 that is no number", _writes("blk.0.ffn_up.weight", math.nan, 2),
     "up_proj.weight holds numbers that"),
    ("IEEE 754: a number in 16 bits that is none", _writes("blk.0.attn_k.weight", math.nan),
     "k_proj.weight holds numbers that"),
    ("an interrupted download: half of the last tensor", _cut(1500), "ends beyond the file.*cut off"),
]  # fmt: skip

GGUF_TOKENIZER = [
    (_GGUF + "a rule that is known", _keys(tokenizer__ggml__pre="viking"), "unknown tokenizer.ggml.pre.*found viking"),
    (_GGUF + "a tokenizer that is known", _keys(tokenizer__ggml__model="bert"), "expected gpt2 or llama.*found bert"),
    (_GGUF + "a tokenizer", _keys(tokenizer__ggml__model=None), "no tokenizer.ggml.model"),
    (_GGUF + "tokens", _keys(tokenizer__ggml__tokens=None), "no tokenizer.ggml.tokens"),
    ("llama.cpp #26690: tokens that are numbers", _keys(tokenizer__ggml__tokens=[1, 2]),
     "ggml.tokens, expected an array of strings"),
    (_GGUF + "a token once", _keys(tokenizer__ggml__tokens=["a", "b", "a"]), "'a' is twice"),
    ("llama.cpp #14145: a vocabulary too small", _keys(tokenizer__ggml__tokens=["a"], tokenizer__ggml__token_type=[1]),
     "bos_token_id.*from 0 to 0, found 256"),
    ("llama.cpp #20735: too few types", _keys(tokenizer__ggml__token_type=[1, 1]),
     "token_type, expected 261 entries, found 2"),
    ("llama.cpp #20735: too few scores", _pieces(scores=[1.0]), "scores, expected 261 entries, found 1"),
    ("llama.cpp #26690: types that are strings", _keys(tokenizer__ggml__token_type=["1"] * 261),
     "token_type, expected an array of numbers"),
    (_GGUF + "SentencePiece has scores", _keys(tokenizer__ggml__model="llama"), "no tokenizer.ggml.scores"),
    (_GGUF + "ids are of tokens", _keys(tokenizer__ggml__eos_token_id=261), "eos_token_id.*from 0 to 260, found 261"),
    (_GGUF + "a merge is of two", _keys(tokenizer__ggml__merges=["h"]),
     "entry of tokenizer.ggml.merges is not two tokens"),
    (_GGUF + "a merge is of tokens", _keys(tokenizer__ggml__merges=["zz yy"]),
     "do not fit together .*`zz` out of vocabulary"),
    ("llama.cpp #25969: a byte token <0x-1>", _pieces(tokens=[*_BYTES[:3], "<0x-1>", *_BYTES[4:]]), None),
    ("llama.cpp #25969: a byte token <0xZZ>", _pieces(tokens=[*_BYTES[:3], "<0xZZ>", *_BYTES[4:]]), None),
    ("CWE-407: a piece of a megabyte, which may be cut at every place", _pieces(tokens=[*_BYTES[:-1], "a" * 1_000_000]),
     "a token of 1000000 characters, expected at most 512"),
    ("CWE-129: more tokens than the embedding has rows",
     _keys(tokenizer__ggml__tokens=[*TOKENIZER["tokenizer.ggml.tokens"], "hej", "1 "],
           tokenizer__ggml__token_type=[1] * 256 + [3, 3] + [1] * 5, tokenizer__ggml__bos_token_id=262,
           tokenizer__ggml__add_bos_token=True),
     "token ids below 261"),
    (_GGUF + "a chat template is text", _keys(tokenizer__chat_template=7), "chat_template, expected a string, found 7"),
    ("CVE-2026-5760: a chat template runs a program", _keys(tokenizer__chat_template=_RUNS), _NO_GLOBALS),
    ("CVE-2024-34359: a chat template climbs to the classes", _keys(tokenizer__chat_template=_CLIMBS), _NO_CLASS),
]  # fmt: skip


def _template(source: str) -> Callable[[Path], Any]:
    return _file("chat_template.jinja", source)


def _splits(expression: str) -> Callable[[Path], Any]:
    """A tokenizer that cuts text by a regular expression."""
    split = {"type": "Split", "pattern": {"Regex": expression}, "behavior": "Isolated", "invert": False}
    return _json("tokenizer.json", pre_tokenizer=split)


FOLDER_TOKENIZER = [
    ("tokenizers rule: JSON", _file("tokenizer.json", "{"), r"tokenizer cannot be read \(Expecting property name"),
    ("tokenizers rule: it has a model", _file("tokenizer.json", "{}"), r"tokenizer cannot be read \('added_tokens'"),
    ("CPython: RecursionError of nested JSON", _file("tokenizer.json", "[" * 100_000),
     "cannot be read .maximum recursion"),
    (
        "tokenizers rule: a merge is of tokens",
        _json("tokenizer.json", model={"type": "BPE", "vocab": {"a": 0}, "merges": ["q q"]}),
        "cannot be read .*`q` out of vocabulary",
    ),
    ("tokenizers rule: a model that is known", _json("tokenizer.json", model={"type": "X"}),
     "cannot be read .*ModelUntagged"),
    (
        "tokenizers rule: an expression that is one",
        _json("tokenizer.json", pre_tokenizer={"type": "Split", "pattern": {"Regex": "(a+"}, "behavior": "Isolated",
                                               "invert": False}),
        "cannot be read .*unmatched parenthesis",
    ),
    (
        "CWE-129: a token id beyond the embedding",
        _json("tokenizer.json", model={"type": "BPE", "vocab": {"+": 1_000_000}, "merges": []}),
        "expected token ids below 272, found 1000000",
    ),
    (
        "tokenizers rule: an added token has a text",
        _json("tokenizer.json", added_tokens=[{"id": 0, "content": "", "single_word": False, "lstrip": False,
                                               "rstrip": False, "normalized": False, "special": True}]),
        None,
    ),
    (
        "tokenizers rule: a template of tokens that are there",
        _json("tokenizer.json", post_processor={"type": "TemplateProcessing", "special_tokens": {},
                                                "single": [{"SpecialToken": {"id": "nope", "type_id": 0}}],
                                                "pair": []}),
        "cannot be read .no entry found for key",
    ),
    ("tokenizers rule: the end token is a string", _json("tokenizer_config.json", eos_token=[1]),
     "cannot be read .*eos_token has to be either str"),
    ("tokenizers rule: an end token", _json("tokenizer_config.json", eos_token=None), "names no end-of-text token"),
    ("transformers: a class that does not exist", _json("tokenizer_config.json", tokenizer_class="os.system"), None),
    ("transformers, auto_map: a tokenizer of its own code",
     _json("tokenizer_config.json", auto_map={"AutoTokenizer": ["evil.Tokenizer", None]}), None),
    ("tokenizers rule: it is there", lambda folder: [file.unlink() for file in folder.glob("tokenizer*")],
     "has no tokenizer, expected tokenizer.json"),
    ("Jinja: a template that is none", _template("{% for %}"), "refuses this conversation .Expected an expression"),
    ("Jinja: a division by zero", _template("{{ 1 / 0 }}"), "refuses this conversation .division by zero"),
    ("Jinja: a range of 10^12", _template("{% for i in range(10 ** 12) %}x{% endfor %}"), "refuses .*Range too big"),
    ("Jinja: a macro without end", _template("{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}"),
     "refuses this conversation .maximum recursion"),
    ("Jinja #2149: a text of a petabyte", _template("{{ 'x' * 10 ** 15 }}"), "takes more than 256 MiB of memory"),
    ("CWE-400: a chat template whose text is twice as long with every message that is not there",
     _template("{% set n = namespace(t='x') %}{% for i in range(99) %}{% set n.t = n.t ~ n.t %}{% endfor %}"),
     "takes more than 256 MiB of memory"),
    ("CWE-674: a chat template of loops in loops",
     _template("{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}"),
     "chat template computes for more than 2 s"),
    ("CWE-400: a chat template with a power that takes native code for ever", _template("{{ 9 ** (9 ** 9) }}"),
     "chat template computes for more than 2 s"),
    ("CWE-400: a chat template that writes 10 MB", _template("{{ 'x' * 10 ** 7 }}"),
     "refuses this conversation .it writes 10,000,000 characters"),
    ("CWE-1333: a regular expression of exponential time", _splits("(a|a|aa)+$"),
     "tokenizer (computes|cannot be read)"),
    ("CWE-1333: one of the normaliser",
     _json("tokenizer.json", normalizer={"type": "Replace", "pattern": {"Regex": "(x+x+)+y"}, "content": ""}), None),
    ("CWE-400: a normaliser that makes a text a million times as long",
     _json("tokenizer.json", normalizer={"type": "Sequence", "normalizers": [
         {"type": "Replace", "pattern": {"String": a}, "content": b * 1000} for a, b in ("ab", "bc", "cd")]}),
     "tokenizer (takes more than 256 MiB|ended its process)"),
    ("CVE-2026-5760: a chat template runs a program", _template(_RUNS), _NO_GLOBALS),
    ("CVE-2024-34359: a chat template climbs to the classes", _template(_CLIMBS), _NO_CLASS),
]  # fmt: skip

DEFECTS = [
    *(Defect(origin, "safetensors", damage, says) for origin, damage, says in SAFETENSORS),
    *(Defect(origin, "shards", damage, says) for origin, damage, says in INDEX),
    *(Defect(origin, "safetensors", damage, says) for origin, damage, says in CONFIG),
    *(Defect(origin, model, damage, says) for model, origin, damage, says in (*BITSANDBYTES, *GROUPS)),
    *(Defect(origin, "gguf", damage, says) for origin, damage, says in (*GGUF, *GGUF_TOKENIZER)),
    *(Defect(origin, "safetensors", damage, says) for origin, damage, says in FOLDER_TOKENIZER),
]


@pytest.fixture(scope="module")
def sound(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """A sound model by its name in MODELS, made and gone through once: what libraries load then is loaded."""
    made: dict[str, Path] = {}

    def get(name: str) -> Path:
        if name not in made:
            made[name] = MODELS[name](tmp_path_factory.mktemp(name))
        return made[name]

    return get


def _copied(model: Path, folder: Path) -> Path:
    copy = folder / model.name
    shutil.copytree(model, copy) if model.is_dir() else shutil.copy(model, copy)
    return copy


@pytest.mark.parametrize("name", MODELS)
def test_sound_models_are_used(name: str, sound: Callable[[str], Path]) -> None:
    """Or every refusal below would prove nothing."""
    refused = outcome(sound(name)).refused
    assert refused is None, refused


@pytest.mark.parametrize("defect", [pytest.param(defect, id=f"{defect.model}-{defect.origin}") for defect in DEFECTS])
def test_known_defects(
    defect: Defect, sound: Callable[[str], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = _copied(sound(defect.model), tmp_path)
    (tmp_path / "cwd").mkdir()
    monkeypatch.chdir(tmp_path / "cwd")
    for code in (tmp_path / "cwd" / "evil.py", tmp_path / "evil.py", model / "evil.py"):
        if code.parent.is_dir():
            code.write_text("open('fired', 'w')")
    defect.damage(model)
    refused, _, grown_kb = outcome(model)
    assert grown_kb < MOST_GROWN_KB
    assert not list(tmp_path.rglob("fired")), "code of the model was run"
    if defect.says is not None:
        assert refused is not None, "it was used"
        assert re.search(defect.says, str(refused)), refused


def test_every_defect_has_an_origin_of_its_own() -> None:
    names = [(defect.model, defect.origin) for defect in DEFECTS]
    assert len(set(names)) == len(names) >= 60
