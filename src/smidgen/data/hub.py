"""Data sets of the hub, and the short names of those that many runs begin with."""

import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass
from itertools import cycle
from typing import Any

from smidgen.data.files import Record
from smidgen.errors import DataError, first_line
from smidgen.events import Note, Report, silent

__all__ = ["HUB_DATA", "open_hub"]


@dataclass(frozen=True)
class _Known:
    """A data set with a short name. record: a row's columns as a known layout has them. splits: those with answers."""

    hub_id: str
    record: Callable[[Mapping[str, Any]], dict[str, Any]]
    splits: tuple[str, ...] = ("train",)


def _keep(*columns: str) -> Callable[[Mapping[str, Any]], dict[str, Any]]:
    return lambda row: {column: row[column] for column in columns}


def _alternating(row: Mapping[str, Any]) -> dict[str, Any]:
    """LIMA: texts of user and assistant in turn."""
    turns = zip(cycle(("user", "assistant")), row["conversations"], strict=False)
    return {"messages": [{"role": role, "content": text} for role, text in turns]}


def _marked(row: Mapping[str, Any]) -> dict[str, Any]:
    """Guanaco: one text, '### Human: ...### Assistant: ...'."""
    _, *parts = _TURN.split(row["text"])
    turns = zip(parts[::2], parts[1::2], strict=True)
    return {"messages": [{"role": _SPEAKERS[who], "content": text.strip()} for who, text in turns]}


_TURN = re.compile(r"### (Human|Assistant):")
_SPEAKERS = {"Human": "user", "Assistant": "assistant"}
# Their licences stand in docs/data.md.
_KNOWN = {
    "alpaca": _Known("tatsu-lab/alpaca", _keep("instruction", "input", "output")),
    "alpaca-cleaned": _Known("yahma/alpaca-cleaned", _keep("instruction", "input", "output")),
    "dolly": _Known("databricks/databricks-dolly-15k", _keep("instruction", "context", "response")),
    "lima": _Known("GAIR/lima", _alternating),  # its test split has no answers
    "oasst1": _Known("timdettmers/openassistant-guanaco", _marked, ("train", "test")),
}
HUB_DATA = tuple(_KNOWN)
_PROBE_S = 10.0


def open_hub(
    spec: str, splits: Mapping[str, tuple[str, ...]], report: Report = silent
) -> dict[str, Callable[[], Iterator[Record]]]:
    """A reader for each split of a name in HUB_DATA, "owner/name", "owner/name:subset", "owner/name:subset:split" or
    "owner/name::split"; a split that is named is trained on.

    splits: our name of each, and how the data set's names of it begin. What is taken under another name or left out is
    reported. Raises DataError where several splits may be meant for training, and at once where the hub cannot be
    reached.
    """
    known = _KNOWN.get(spec)
    name, _, rest = (known.hub_id if known else spec).partition(":")
    subset, _, split = rest.partition(":")
    loaded = _load(name, {key: value for key, value in (("name", subset), ("split", split)) if value})
    if split:
        loaded = {"train": loaded}
    sources: dict[str, Callable[[], Iterator[Record]]] = {}
    names = [str(theirs) for theirs in loaded if known is None or theirs in known.splits]
    for ours, prefixes in splits.items():
        fitting = [theirs for theirs in names if theirs.startswith(prefixes)]
        chosen = [theirs for theirs in fitting if theirs in (ours, *prefixes)] or fitting
        if ours == "train" and len(chosen) != 1:
            what = "no split named train" if not chosen else "several splits to train on"
            cure = f"name one: {name}:{subset}:{(chosen or ['SPLIT'])[0]}"
            raise DataError(f"the data set {name} has {what}", found=", ".join(map(str, loaded)), cure=cure)
        if len(chosen) == 1:
            sources[ours] = _reader(loaded[chosen[0]], f"{name} {split or chosen[0]}", known.record if known else dict)
            names.remove(chosen[0])
            if chosen[0] != ours and known is None:
                report(Note(f"{name}: split {chosen[0]} is taken for {ours}"))
    if names and known is None:
        report(Note(f"{name}: splits left out: {', '.join(names)}"))
    return sources


def _load(name: str, chosen: Mapping[str, Any]) -> Any:
    try:
        import datasets
    except ImportError:
        raise DataError(
            f"the hub data set {name} needs the package datasets", cure="pip install 'smidgen[data]'"
        ) from None
    try:
        _check_reachable(name)
        return datasets.load_dataset(name, **chosen)
    except Exception as error:  # the hub, the network and the data set's files each fail with their own kinds
        raise DataError(
            f"the data set {name} could not be had from the hub",
            found=first_line(error)[:200],
            cure="check the name and the network, or give a file; one that has been fetched before is read with"
            " HF_HUB_OFFLINE=1, and a gated one needs its terms accepted and HF_TOKEN",
        ) from None


def _check_reachable(name: str) -> None:
    """One question to the hub, which is not repeated: load_dataset would ask for half a minute before it gives up."""
    from huggingface_hub import HfApi
    from huggingface_hub.errors import OfflineModeIsEnabled

    with suppress(OfflineModeIsEnabled):  # what has been fetched is read without it
        HfApi().dataset_info(name, timeout=_PROBE_S)


def _reader(
    rows: Iterable[Any], place: str, record: Callable[[Mapping[str, Any]], dict[str, Any]]
) -> Callable[[], Iterator[Record]]:
    def read() -> Iterator[Record]:
        for number, row in enumerate(rows, 1):
            yield f"{place}:{number}", record(row)

    return read
