"""Writes docs/cli.md from the commands' own --help: `make docs`. A test compares the file with what this makes."""

from pathlib import Path

import click

from smidgen.cli.main import VERBS, smidgen
from smidgen.cli.options import Verb

PAGE = Path(__file__).parents[1] / "docs" / "cli.md"
_HEAD = """\
# Command line

Made from the code by `make docs`; do not edit by hand.

All verbs take `--json` (one JSON object as the last line of standard output, everything else on standard error) and
`--config FILE.yaml` (keys are the flags' names; the command line wins). Exit codes: 0 done, 2 a mistake that you can
mend (said in one line each), 130 stopped with Ctrl-C, 143 by SIGTERM.
"""


def make() -> str:
    """The whole page."""
    group = click.Context(smidgen)
    parts = [_HEAD]
    for name in VERBS:
        command = smidgen.get_command(group, name)
        assert isinstance(command, Verb)
        parts.append(f"## smidgen {name}\n\n```text\n{command.help_page().rstrip()}\n```\n")
    return "\n".join(parts)


if __name__ == "__main__":
    PAGE.write_text(make(), encoding="utf-8")
