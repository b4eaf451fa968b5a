"""bitsandbytes as an AVX2 machine runs it, on a processor that has AVX-512.

Its CPU library asks the processor once and remembers the answers in static variables; there is no switch. So that
`--isa avx2` means the same for all sides, these variables are set to "asked, and no" before anything has asked. Their
places come from the symbol table of the very file (ELF, 64 bits); afterwards the library itself must say no.
"""

import ctypes
import os
import struct
from importlib.util import find_spec
from pathlib import Path

__all__ = ["keep_bitsandbytes_to_avx2", "kept_to_isa"]

_SYMBOLS, _SECTION_HEADER, _SYMBOL = 2, struct.Struct("<IIQQQQIIQQ"), struct.Struct("<IBBHQQ")
_QUESTIONS = ("has_avx512f_cpu", "has_avx512bf16_cpu")


def kept_to_isa() -> bool:
    """Does bitsandbytes keep to what SMIDGEN_ISA says, as all others do? Call before its first import."""
    return os.environ.get("SMIDGEN_ISA") != "avx2" or keep_bitsandbytes_to_avx2()


def keep_bitsandbytes_to_avx2() -> bool:
    """Call before the first import of bitsandbytes. False: its answers could not be changed, it uses what is there."""
    spec = find_spec("bitsandbytes")
    if spec is None:
        return True
    folders = list(spec.submodule_search_locations or ())
    path = Path(folders[0]) / "libbitsandbytes_cpu.so" if folders else None
    if path is None or not path.is_file():
        return False
    library = ctypes.CDLL(str(path))
    base = _address_of(path)
    if base is None:
        return False
    for name, place in _symbols(path.read_bytes()):
        if "supported_avx512" in name:
            # A guard's first byte says that the variable beside it has its value.
            ctypes.c_uint8.from_address(base + place).value = 1 if name.startswith("_ZGV") else 0
    return not any(getattr(library, question)() & 0xFF for question in _QUESTIONS)


def _address_of(path: Path) -> int | None:
    """Where the file's first byte is mapped in this process."""
    with open("/proc/self/maps", encoding="utf-8", errors="replace") as maps:
        for line in maps:
            words = line.split(maxsplit=5)
            if len(words) == 6 and int(words[2], 16) == 0 and Path(words[5].strip()).resolve() == path.resolve():
                return int(words[0].partition("-")[0], 16)
    return None


def _symbols(content: bytes) -> list[tuple[str, int]]:
    """(name, place) of the library's symbols, local ones among them; [] if it is stripped or no 64-bit ELF file."""
    if content[:6] != b"\x7fELF\x02\x01":
        return []
    start = struct.unpack_from("<Q", content, 0x28)[0]
    size, count = struct.unpack_from("<HH", content, 0x3A)
    sections = [_SECTION_HEADER.unpack_from(content, start + number * size) for number in range(count)]
    found = []
    for _, kind, _, _, offset, nbytes, names, _, _, _ in sections:
        if kind != _SYMBOLS:
            continue
        names_at = sections[names][4]
        for at in range(offset, offset + nbytes, _SYMBOL.size):
            name, _, _, _, place, _ = _SYMBOL.unpack_from(content, at)
            found.append((content[names_at + name : content.index(b"\0", names_at + name)].decode(), place))
    return found
