"""Flags: one table each, from which come the command line's options, their --help and the keys of --config FILE.yaml.

A fine-tuning run's flags are made from the fields of `Settings`; the other verbs list theirs with `Flag`. Click only
splits the command line into words: every value is read by `values.collect`, which reports all that is wrong at once,
the same way for the command line and for a file.
"""

from collections.abc import Callable, Mapping
from dataclasses import MISSING, dataclass, field, fields
from pathlib import Path
from typing import Any, get_args, get_origin, get_type_hints

import click

from smidgen.cli.console import Console
from smidgen.cli.values import Given, collect, metavar
from smidgen.train.config import Settings

__all__ = ["BASE_FLAGS", "CONTEXT", "Flag", "Verb", "base_flags", "settings_flags", "verb"]

CONTEXT = {"help_option_names": ["-h", "--help"], "max_content_width": 100}  # of every command
_METAVARS = {int: "N", float: "X", str: "TEXT"}


@dataclass(frozen=True)
class Flag:
    """One flag. kind: int, float, str, bool, or dict[str, int or float], which is repeatable.

    default None: nothing is passed on.
    no: how the twin of a bool is spelt that switches it off, if not --no-NAME.
    """

    name: str
    kind: type
    default: Any
    help: str
    group: str = "Options"
    choices: tuple[str, ...] = ()
    aliases: Mapping[str, str] = field(default_factory=dict)
    metavar: str = ""
    check: Callable[[Any], bool] | None = None
    expected: str = ""  # what `check` wants, in words
    no: str = ""

    @property
    def spelling(self) -> str:
        return "--" + self.name.replace("_", "-")

    def option(self) -> "GroupedOption":
        """The click option that carries this flag's words, unread, to `values.collect`."""
        if self.kind is bool:
            no = self.no or self.spelling.replace("--", "--no-", 1)
            return GroupedOption([f"{self.spelling}/{no}"], default=None, help=self._help(), group=self.group)
        metavar = self.metavar or ("[" + "|".join(self.choices) + "]" if self.choices else _METAVARS[self.kind])
        repeatable = get_origin(self.kind) is dict
        return GroupedOption([self.spelling], metavar=metavar, help=self._help(), group=self.group, multiple=repeatable)

    def _help(self) -> str:
        if self.default is None or self.default is False or self.default == "":
            return self.help
        default = "on" if self.default is True else f"{self.default:g}" if self.kind is float else self.default
        return f"{self.help}  [default: {default}]"


def settings_flags() -> tuple[Flag, ...]:
    """The fields of Settings as flags, in their order."""
    hints = get_type_hints(Settings)
    return tuple(
        Flag(
            name=f.name,
            kind=next(kind for kind in (get_args(hints[f.name]) or (hints[f.name],)) if kind is not type(None)),
            default=None if f.default is MISSING else f.default,
            help=f.metadata["help"],
            group=f.metadata["group"],
            choices=tuple(f.metadata.get("choices", ())),
            aliases=f.metadata.get("aliases", {}),
            metavar=f.metadata.get("metavar", ""),
        )
        for f in fields(Settings)
    )


def base_flags(*names: str) -> tuple[Flag, ...]:
    """Some of the flags of Settings, for the verbs that open a model too."""
    return tuple(flag for flag in settings_flags() if flag.name in names)


BASE_FLAGS = base_flags("quantize", "compute_dtype", "device", "trust_remote_code")


class GroupedOption(click.Option):
    """A click option that knows under which title --help lists it."""

    def __init__(self, *args: Any, group: str, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.group = group


class Verb(click.Command):
    """A command whose --help lists options under the titles of their groups."""

    flags: tuple[Flag, ...] = ()

    def help_page(self, width: int = 100) -> str:
        """The text of --help."""
        ctx = self.make_context(f"smidgen {self.name}", [], resilient_parsing=True, terminal_width=width)
        return self.get_help(ctx)

    def format_options(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        groups: dict[str, list[tuple[str, str]]] = {}
        for param in self.get_params(ctx):
            if isinstance(param, click.Argument):
                continue  # the text above says what they are
            record = param.get_help_record(ctx)
            if record is not None:
                groups.setdefault(getattr(param, "group", "General"), []).append(record)
        general = groups.pop("General", [])
        for title, records in [*groups.items(), ("General", general)]:
            with formatter.section(title):
                formatter.write_dl(records, col_max=26)


def verb(
    name: str,
    *,
    arguments: tuple[str, ...] = (),
    optional: tuple[str, ...] = (),
    several: tuple[str, ...] = (),
    flags: tuple[Flag, ...] = (),
    in_file: tuple[Flag, ...] = (),
    check: Callable[[Given], list[str]] | None = None,
) -> Callable[[Callable[[Console, Given], Mapping[str, Any]]], Verb]:
    """Makes a command of `function(console, given)`: its result is what --json prints, its docstring is the help.
    A result that names something as `failed` ends with exit code 1.

    arguments: positional words in their order, also keys of the --config file; those in `optional` may be left out,
    those in `several` are lists.
    in_file: flags of another verb that the --config file may have too, so that one file serves both.
    check: more rules over all values; returns one line for each that is broken.
    """

    def make(function: Callable[[Console, Given], Mapping[str, Any]]) -> Verb:
        def run(**typed: Any) -> int:
            as_json, config = typed.pop("json"), typed.pop("config")
            console = Console(as_json=bool(as_json))
            required = tuple(a for a in arguments if a not in optional)
            path = Path(config) if config else None
            given = collect((*flags, *in_file), arguments, required, typed, path, check, several)
            for note in given.notes:
                console.note(note)
            result = function(console, given)
            console.close()
            if as_json:
                console.json(result)
            return 1 if result.get("failed") else 0

        params: list[click.Parameter] = [
            *(
                click.Argument(
                    [a],
                    required=False,
                    nargs=-1 if a in several else 1,
                    metavar=metavar(a) + ("..." if a in several else ""),
                )
                for a in arguments
            ),
            *(flag.option() for flag in flags),
            GroupedOption(
                ["--json"], is_flag=True, group="General", help="Print one JSON object as the last line of stdout."
            ),
            GroupedOption(
                ["--config"],
                metavar="FILE.yaml",
                group="General",
                help="Read flags from a YAML file; its keys are the flags' names. The command line wins.",
            ),
        ]
        command = Verb(name, callback=run, params=params, help=function.__doc__, context_settings=CONTEXT)
        command.flags = flags
        return command

    return make
