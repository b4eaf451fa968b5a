"""Errors that a user can mend.

    SmidgenError
    ├── SettingsError    settings that do not make sense (all of them at once)
    ├── DataError        training or evaluation data
    ├── ModelError       a base model: folder, GGUF file, hub id, tokenizer
    └── RunError         a run folder: adapter, checkpoint, output folder, disk

Each says in one line what is wrong, what was expected, what was found and what to do about it.
The command line prints that line and exits with code 2. Anything else that is raised is our own bug.
"""

import re

__all__ = ["DataError", "ModelError", "RunError", "SettingsError", "SmidgenError", "first_line"]


# Names in a stranger's file may hold line ends, a terminal's commands, or marks that turn the direction of text round.
_CONTROL = re.compile("[\x00-\x1f\x7f-\x9f\u2028-\u202e\u2066-\u2069]")


def first_line(error: BaseException) -> str:
    """What another library's error says, as a part of a line; its kind where it says nothing."""
    return (str(error).splitlines() or [type(error).__name__])[0]


class SmidgenError(Exception):
    """A mistake that the user can mend.

    what: the thing and what is wrong with it, with its file, line or setting.
    expected, found, cure: short phrases without a final full stop; each may be left out.
    """

    def __init__(self, what: str, *, expected: str = "", found: str = "", cure: str = "") -> None:
        parts = [what.rstrip(".")]
        if expected:
            parts.append(f"expected {expected}")
        if found:
            parts.append(f"found {found}")
        line = ", ".join(parts)
        if cure:
            line += f". {cure[0].upper()}{cure[1:]}"
        super().__init__(_CONTROL.sub("\N{REPLACEMENT CHARACTER}", line.rstrip(".") + "."))
        self.what, self.expected, self.found, self.cure = what, expected, found, cure


class SettingsError(SmidgenError):
    """Settings that do not make sense; `problems` holds one line for each."""

    def __init__(self, problems: list[str]) -> None:
        self.problems = problems
        super().__init__("; ".join(problem.rstrip(".") for problem in problems))


class DataError(SmidgenError):
    """Training or evaluation data that cannot be used as it is."""


class ModelError(SmidgenError):
    """A base model that cannot be used as it is."""


class RunError(SmidgenError):
    """A run folder, adapter or output place that cannot be used as it is."""
