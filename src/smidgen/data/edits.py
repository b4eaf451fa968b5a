"""What a run changes in its rows before they are rendered: their system message, and placeholders."""

import re
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from smidgen.data.layouts import Row

__all__ = ["Edits"]

_PLACEHOLDER = re.compile(r"\{\{\s*(\w+)\s*\}\}")


@dataclass(frozen=True)
class Edits:
    """system: the system message of every chat row, in place of its own; "": none. None: rows keep theirs.
    fill: what is written for {{name}} in the rows' texts; other placeholders stay.
    """

    system: str | None = None
    fill: Mapping[str, str] = field(default_factory=dict)

    def apply(self, row: Row) -> Row:
        """The row as the run has it."""
        if self.fill:
            text = None if row.text is None else self._filled(row.text)
            row = replace(row, text=text, messages=tuple(self._filled(message) for message in row.messages))
        if self.system is not None and row.text is None:
            others = tuple(message for message in row.messages if message["role"] != "system")
            own = ({"role": "system", "content": self.system},) if self.system else ()
            row = replace(row, messages=own + others)
        return row

    def unfilled(self, row: Row) -> set[str]:
        """Names of placeholders that are left in the row's messages."""
        contents = [message["content"] for message in row.messages]
        return {name for content in contents if "{{" in content for name in _PLACEHOLDER.findall(content)}

    def _filled(self, value: Any) -> Any:
        """Texts at any depth (tool calls have arguments) with their placeholders filled."""
        if isinstance(value, str):
            return _PLACEHOLDER.sub(lambda found: self.fill.get(found[1], found[0]), value) if "{{" in value else value
        if isinstance(value, dict):
            return {key: self._filled(item) for key, item in value.items()}
        return [self._filled(item) for item in value] if isinstance(value, list) else value
