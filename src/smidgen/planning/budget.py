"""A budget of memory that does not suffice: one sentence, whatever was planned."""

from math import ceil

from smidgen.units import format_bytes

__all__ = ["too_little"]


def too_little(budget: int, where: str, what: str, least_bytes: int, more: str = "") -> str:
    """where: the budget (bytes) comes from. what: 'for llama-7b'. What is asked for is rounded up: it will do."""
    asked = f"at least {ceil(least_bytes / 1e6)} MB is needed{more}"
    return f"memory: {format_bytes(budget)} ({where}) is too little {what}: {asked}"
