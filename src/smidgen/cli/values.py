"""From words to values: the command line and --config FILE.yaml, read alike, all that is wrong reported at once."""

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, get_args, get_origin

from smidgen.errors import SettingsError

if TYPE_CHECKING:
    from smidgen.cli.options import Flag

__all__ = ["Given", "collect", "metavar"]


@dataclass(frozen=True)
class Given:
    """All values of one call, by name. named: those that the user gave, on the command line or in the file."""

    values: dict[str, Any]
    named: frozenset[str]
    notes: list[str] = field(default_factory=list)

    def __getitem__(self, name: str) -> Any:
        return self.values[name]

    def missing(self, *names: str) -> list[str]:
        """Problems with flags that have to be given: those that were not, or are empty."""
        return [f"--{name}: missing" for name in names if name not in self.named or self[name] == ""]

    def misplaced(self, names: Iterable[str], where: str) -> list[str]:
        """Problems with flags that were given but belong to `where`: none is ignored silently."""
        return [f"{name}: belongs to {where}, leave it out" for name in names if name in self.named]

    def pick(self, flags: "Sequence[Flag]") -> dict[str, Any]:
        """The values of some flags, as keyword arguments."""
        return {flag.name: self.values[flag.name] for flag in flags}

    @property
    def own_code(self) -> list[str]:
        """--trust-remote-code if it was given: the next command on the same model needs it too."""
        return ["--trust-remote-code"] if self.values.get("trust_remote_code") else []


def collect(
    flags: "Sequence[Flag]",
    arguments: Sequence[str],
    required: Sequence[str],
    typed: Mapping[str, Any],
    config: Path | None,
    check: Callable[[Given], list[str]] | None = None,
    several: Sequence[str] = (),
) -> Given:
    """typed: name -> word of the command line, None where it was not given; a tuple of words for the arguments in
    `several`, which a file may give as a list. Raises SettingsError with every problem.
    """
    from_file, problems = _read_config(config, {*arguments, *(flag.name for flag in flags)}) if config else ({}, [])
    values: dict[str, Any] = {}
    named: set[str] = set()
    notes: list[str] = []
    label: dict[str, str] = {}  # how problems call a value: the flag, or the file and its key

    def take(name: str, spelling: str) -> Any:
        word = typed.get(name)
        word = None if word == () else word  # a repeatable flag that was not given
        if word is None and from_file.get(name) is not None:
            label[name] = f"{config}: {name.replace('_', '-')}"
            word = from_file[name]
        else:
            label[name] = spelling
        if word is not None and word != ():
            named.add(name)
        return word

    for name in arguments:
        word = take(name, metavar(name))
        if name in several:
            words = word if isinstance(word, (list, tuple)) else [] if word is None else [word]
            values[name] = [str(each) for each in words]
        else:
            values[name] = None if word is None else str(word)
        if name not in named and name in required:
            problems.append(f"{label[name]}: missing")
    for flag in flags:
        word = take(flag.name, flag.spelling)
        values[flag.name] = flag.default
        if word is None:
            continue
        try:
            value = _read(flag, word)
        except ValueError as error:
            problems.append(f"{label[flag.name]}: expected {error}, found {_shown(word)}")
            continue
        if value != word and value in flag.aliases.values() and word in flag.aliases:
            notes.append(f"{flag.spelling} {word}: understood as {value}.")
        values[flag.name] = value
    given = Given(values, frozenset(named), notes)
    if check is not None:
        problems += [_renamed(problem, label) for problem in check(given)]
    if problems:
        raise SettingsError(problems)
    return given


def metavar(argument: str) -> str:
    """How help and problems call a positional argument."""
    return "MODEL|RUN" if argument == "model_run" else argument.upper()


def _read(flag: "Flag", word: Any) -> Any:
    """A word of the command line, or a value of the file, as the flag's kind. Raises ValueError(what was expected)."""
    value = _convert(flag.kind, word)
    if isinstance(value, str):
        value = flag.aliases.get(value, value)
    if flag.choices and value not in flag.choices:
        raise ValueError("one of " + ", ".join(flag.choices))
    if flag.check is not None and not flag.check(value):
        raise ValueError(flag.expected)
    return value


def _convert(kind: type, word: Any) -> Any:
    if get_origin(kind) is dict:
        return _convert_pairs(get_args(kind)[1], word)
    if kind is bool:
        if isinstance(word, bool):
            return word
        raise ValueError("true or false")
    if kind is str:
        if isinstance(word, list) and all(type(item) in (str, int, float) for item in word):
            return ",".join(map(str, word))
        if isinstance(word, (str, int, float)) and not isinstance(word, bool):
            return str(word)
        raise ValueError("text")
    # YAML 1.1 reads 5e-4 as text, so numbers may come as text from a file too.
    number = "a whole number" if kind is int else "a number"
    if isinstance(word, bool) or not isinstance(word, (str, int, float)) or (kind is int and isinstance(word, float)):
        raise ValueError(number)
    try:
        value = kind(word)
    except ValueError:
        raise ValueError(number) from None
    if isinstance(value, float) and not math.isfinite(value):
        raise ValueError("a finite number")
    return value


def _convert_pairs(kind: type, word: Any) -> dict[str, Any]:
    """The words 'key=value' of a repeatable flag, or a mapping of the file.

    A value that is text may have a '=' in it; beside a number it is the key, a pattern, that may.
    """
    if isinstance(word, tuple):
        split = str.partition if kind is str else str.rpartition
        pairs = [(key if sign else "", value) for key, sign, value in (split(each, "=") for each in word)]
    elif isinstance(word, dict):
        pairs = [(str(key), value) for key, value in word.items()]
    else:
        raise ValueError("'key: value' lines")
    if not all(key for key, _ in pairs):
        raise ValueError("KEY=VALUE")
    if len(dict(pairs)) < len(pairs):
        raise ValueError("each key once")
    return {key: _convert(kind, value) for key, value in pairs}


def _read_config(path: Path, known: set[str]) -> tuple[dict[str, Any], list[str]]:
    """The file's keys with underscores, and a line for each thing that is wrong with it."""
    import yaml

    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
    except OSError as error:
        return {}, [f"--config {path}: cannot be read ({error.strerror})"]
    except UnicodeDecodeError:
        return {}, [f"--config {path}: expected UTF-8 text"]
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        line = f":{mark.line + 1}" if mark else ""
        return {}, [f"{path}{line}: not YAML ({getattr(error, 'problem', None) or 'it cannot be parsed'})"]
    if content is None:
        return {}, []
    if not isinstance(content, dict):
        return {}, [f"{path}: expected one 'flag: value' a line, found {_shown(content)}"]
    found: dict[str, Any] = {}
    problems = []
    for key, value in content.items():
        name = str(key).lstrip("-").replace("-", "_")
        if name not in known:
            problems.append(f"{path}: unknown key {_shown(key)}{_nearest(name, known)}")
        elif name in found:
            problems.append(f"{path}: {_shown(key)} is there twice")
        else:
            found[name] = value
    return found, problems


def _nearest(name: str, known: set[str]) -> str:
    import difflib

    close = difflib.get_close_matches(name, sorted(known), n=1)
    return f" (did you mean {close[0].replace('_', '-')}?)" if close else ""


def _renamed(problem: str, label: Mapping[str, str]) -> str:
    """'learning_rate: expected ...' -> '--learning-rate: expected ...', or with the file's name in front."""
    name, colon, rest = problem.partition(":")
    return f"{label[name]}{colon}{rest}" if name in label else problem


def _shown(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else text[:57] + "..."
