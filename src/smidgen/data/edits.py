"""What a run changes in its rows before they are rendered: their system message, and placeholders."""

import re
from collections.abc import Mapping, Set
from dataclasses import dataclass, field, replace
from typing import Any

from smidgen.data.layouts import Row
from smidgen.errors import SettingsError

__all__ = ["PLACEHOLDERS_SHOWN", "Edits", "placeholders_in"]

PLACEHOLDERS_SHOWN = 8

_PLACEHOLDER = re.compile(r"\{\{\s*(\w+)\s*\}\}")


@dataclass(frozen=True)
class Edits:
    """system: the system message of every chat row, in place of its own; "": none. None: rows keep theirs.
    fill: what is written for {{name}} in the rows' texts and in `system`; other placeholders stay.
    """

    system: str | None = None
    fill: Mapping[str, str] = field(default_factory=dict)

    def apply(self, row: Row) -> Row:
        """The row as the run has it."""
        row = self.with_system(row)
        if self.fill:
            text = None if row.text is None else self._filled(row.text)
            row = replace(row, text=text, messages=tuple(self._filled(message) for message in row.messages))
        return row

    def with_system(self, row: Row) -> Row:
        """The row with its system message exchanged, and placeholders as they stand."""
        if self.system is None or row.text is not None:
            return row
        others = tuple(message for message in row.messages if message["role"] != "system")
        own = ({"role": "system", "content": self.system},) if self.system else ()
        return replace(row, messages=own + others)

    def key(self) -> str:
        """Changes with whatever `apply` makes of rows."""
        return repr((self._filled(self.system), dict(self.fill)))

    def check_fill(self, placeholders: Set[str]) -> None:
        """Raise SettingsError for names that no row has. placeholders: those of all rows, before they were filled."""
        has = ", ".join(sorted(placeholders)[:PLACEHOLDERS_SHOWN]) or "none"
        unknown = sorted(self.fill.keys() - placeholders)
        if unknown:
            raise SettingsError([f"fill: no row says {{{{{name}}}}}, placeholders are {has}" for name in unknown])

    def _filled(self, value: Any) -> Any:
        """Texts at any depth (tool calls have arguments) with their placeholders filled; see placeholders_in."""
        if isinstance(value, str):
            return _PLACEHOLDER.sub(lambda found: self.fill.get(found[1], found[0]), value) if "{{" in value else value
        if isinstance(value, dict):
            return {key: self._filled(item) for key, item in value.items()}
        return [self._filled(item) for item in value] if isinstance(value, list) else value


def placeholders_in(row: Row) -> set[str]:
    """Names of the placeholders that the row's texts have, at any depth: what `fill` can fill."""
    found: set[str] = set()
    waiting: list[Any] = [row.text, *row.messages]
    while waiting:
        value = waiting.pop()
        if isinstance(value, str):
            if "{{" in value:
                found.update(_PLACEHOLDER.findall(value))
        elif isinstance(value, dict):
            waiting.extend(value.values())
        elif isinstance(value, list):
            waiting.extend(value)
    return found
