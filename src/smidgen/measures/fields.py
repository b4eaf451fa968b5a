"""Answers in JSON: whether they parse, and how many of the expected fields they have."""

import json
from collections import Counter
from collections.abc import Iterator
from typing import Any

__all__ = ["field_counts", "is_json"]


def is_json(text: str) -> bool:
    """One JSON object or array and nothing else."""
    return _parsed(text) is not None


def field_counts(expected: str, answer: str) -> tuple[int, int]:
    """(twice the fields that both have, fields of both together): their sums over rows give the F1 of all fields.

    A field is a value that is no object or list, with the keys and list places that lead to it; an empty object or list
    is one too. An answer that does not parse has none.
    """
    wanted, given = (Counter(_fields(_parsed(text))) for text in (expected, answer))
    return 2 * (wanted & given).total(), wanted.total() + given.total()


def _parsed(text: str) -> dict[str, Any] | list[Any] | None:
    try:
        value = json.loads(text)
    except (ValueError, RecursionError):
        return None
    return value if isinstance(value, dict | list) else None


def _fields(value: Any) -> Iterator[tuple[Any, ...]]:
    """(path..., value as JSON) of each field. 1.0 is 1, as JSON has one kind of number; true is not 1."""
    waiting: list[tuple[tuple[Any, ...], Any]] = [] if value is None else [((), value)]
    while waiting:
        path, found = waiting.pop()
        if isinstance(found, dict) and found:
            waiting += [((*path, key), child) for key, child in found.items()]
        elif isinstance(found, list) and found:
            waiting += [((*path, place), child) for place, child in enumerate(found)]
        elif isinstance(found, float) and found.is_integer():
            yield (*path, str(int(found)))
        else:
            yield (*path, json.dumps(found))
