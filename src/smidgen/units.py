"""Sizes and durations: the only place where units are parsed or printed."""

import re

__all__ = ["format_bytes", "format_count", "format_duration", "parse_bytes", "parse_duration"]

_DURATION = re.compile(r"(?:(\d+(?:\.\d+)?)h)?(?:(\d+(?:\.\d+)?)m)?(?:(\d+(?:\.\d+)?)s?)?")
_BYTES = re.compile(r"(\d+(?:\.\d+)?)\s*([kKMGT]?)(i?)[Bb]?")


def parse_bytes(text: str) -> int:
    """'6GiB', '1.5 GB', '900M', '4096' -> bytes: GiB and the like count in 1024, GB in 1000. Raises ValueError."""
    match = _BYTES.fullmatch(text.strip())
    if not match:
        raise ValueError(f"not a size: {text!r} (write 6GiB, 1.5GB or 900MB)")
    number, prefix, binary = match.groups()
    return int(float(number) * (1024 if binary else 1000) ** " kMGT".index(prefix.replace("K", "k") or " "))


def format_bytes(nbytes: float) -> str:
    """12_582_912 -> '12.6 MB'. Decimal units, as disks and the tables of the papers have them."""
    for unit in ("B", "kB", "MB", "GB"):
        if abs(nbytes) < 1000:
            return f"{nbytes:.0f} B" if unit == "B" else f"{nbytes:.1f} {unit}"
        nbytes /= 1000
    return f"{nbytes:.2f} TB"


def format_count(number: float) -> str:
    """4_884_480 -> '4.9M'."""
    for unit in ("", "k", "M", "G"):
        if abs(number) < 1000:
            return f"{number:.0f}" if not unit else f"{number:.1f}{unit}"
        number /= 1000
    return f"{number:.1f}T"


def format_duration(seconds: float) -> str:
    """75 -> '1m15s', 3.2 -> '3.2s', 7500 -> '2h05m'."""
    if seconds < 10:
        return f"{seconds:.1f}s"
    total = round(seconds)
    if total < 60:
        return f"{total}s"
    if total < 3600:
        return f"{total // 60}m{total % 60:02d}s"
    return f"{total // 3600}h{total % 3600 // 60:02d}m"


def parse_duration(text: str | float) -> float:
    """'90', '90s', '15m', '1h30m' -> seconds. Raises ValueError for anything else."""
    stripped = str(text).strip()
    match = _DURATION.fullmatch(stripped)
    if not stripped or not match:
        raise ValueError(f"not a duration: {text!r} (write 90s, 15m or 1h30m)")
    hours, minutes, seconds = (float(part) if part else 0.0 for part in match.groups())
    return hours * 3600 + minutes * 60 + seconds
