"""Which layers get an adapter: field names (q, k, v, o, gate, up, down, head) or module names -> the layers of a model;
and which of them a rank or alpha of their own.

The field's names mean the same in every architecture. A fused projection is one layer that holds several of them: `q`
on a fused query-key-value layer means the whole fused layer, and the caller is told so.
"""

import re
from collections.abc import Iterable, Mapping
from typing import Any

from smidgen.errors import SettingsError

__all__ = ["FIELDS", "LARGEST_ALPHA", "check_pattern", "fields_of", "match_pattern", "select_modules", "select_targets"]

FIELDS = ("q", "k", "v", "o", "gate", "up", "down", "head")
LARGEST_ALPHA = 3.4e38  # products take the scaling as float32

# Last part of a module's name -> the fields it holds, for names that mean one thing wherever they stand.
_BY_NAME: dict[str, tuple[str, ...]] = {
    "q_proj": ("q",),
    "k_proj": ("k",),
    "v_proj": ("v",),
    "o_proj": ("o",),
    "out_proj": ("o",),
    "qkv_proj": ("q", "k", "v"),
    "query_key_value": ("q", "k", "v"),
    "Wqkv": ("q", "k", "v"),
    "c_attn": ("q", "k", "v"),
    "gate_proj": ("gate",),
    "up_proj": ("up",),
    "down_proj": ("down",),
    "gate_up_proj": ("gate", "up"),
    "dense_h_to_4h": ("up",),
    "dense_4h_to_h": ("down",),
    "c_fc": ("up",),
    "fc1": ("up",),
    "fc2": ("down",),
    "fc_in": ("up",),
    "fc_out": ("down",),
}
# Names that mean one thing in attention and another in the feed-forward part.
_BY_PLACE: dict[str, tuple[str, str]] = {"c_proj": ("o", "down"), "dense": ("o", "down")}


def fields_of(name: str, head: str) -> tuple[str, ...]:
    """The fields that the linear layer `name` holds, () if its name says nothing. head: the head's module name."""
    if name == head:
        return ("head",)
    *parents, last = name.split(".")
    if last in _BY_PLACE:
        in_attention = any("att" in parent for parent in parents[-1:])
        return (_BY_PLACE[last][0 if in_attention else 1],)
    return _BY_NAME.get(last, ())


def select_targets(targets: str, names: Iterable[str], head: str) -> tuple[list[str], list[str]]:
    """(names of the layers to adapt in the model's order, sentences that say what was understood).

    targets: 'all' (every linear layer but the head) or a comma list. names: all linear layers of the model, the head
    among them. Raises SettingsError naming every target that matches nothing.
    """
    names = list(names)
    if targets.strip() in ("all", "all-linear"):
        return [name for name in names if name != head], []
    chosen: set[str] = set()
    missing: list[str] = []
    notes: list[str] = []
    for target in dict.fromkeys(part.strip() for part in targets.split(",") if part.strip()):
        if target in FIELDS:
            hits = [name for name in names if target in fields_of(name, head)]
            fused = {name.split(".")[-1]: fields_of(name, head) for name in hits if len(fields_of(name, head)) > 1}
            notes += [
                f"target {target} is part of the fused layer {last}: the adapter covers {', '.join(fields)} together"
                for last, fields in fused.items()
            ]
        else:
            hits = [name for name in names if name == target or name.endswith("." + target)]
        if not hits:
            missing.append(target)
        chosen.update(hits)
    if missing:
        raise SettingsError([_no_match(missing, names, head)])
    return [name for name in names if name in chosen], notes


def select_modules(modules: Iterable[str], names: Iterable[str]) -> list[str]:
    """The modules of `names` that are meant, in their order: each of `modules` is a name or the end of one from a dot
    on. Raises SettingsError naming all that match nothing.
    """
    names = list(names)
    hits = {given: [name for name in names if name == given or name.endswith("." + given)] for given in modules}
    if missing := [given for given, found in hits.items() if not found]:
        some = ", ".join(dict.fromkeys(name.split(".")[-1] for name in names))
        raise SettingsError([f"modules_to_save: no module matches {', '.join(missing)}, there are {some}"])
    chosen = {name for found in hits.values() for name in found}
    return [name for name in names if name in chosen]


def match_pattern(patterns: Mapping[str, Any], name: str) -> str | None:
    """The first key that means the layer `name`, by PEFT's rule: a regular expression for the end of its name, from a
    dot on. None if there is none.
    """
    return next((key for key in patterns if re.match(rf"(.*\.)?({key})$", name)), None)


def check_pattern(setting: str, patterns: Mapping[str, Any], names: Iterable[str]) -> None:
    """Raises SettingsError naming every key that no adapted layer takes its value from. names: the adapted layers."""
    names = list(names)
    used = {match_pattern(patterns, name) for name in names}
    if idle := [key for key in patterns if key not in used]:
        some = ", ".join(dict.fromkeys(name.split(".")[-1] for name in names))
        raise SettingsError([f"{setting}: no adapted layer is left for {', '.join(idle)}, there are {some}"])


def _no_match(missing: list[str], names: list[str], head: str) -> str:
    fields = [field for field in FIELDS if any(field in fields_of(name, head) for name in names)]
    modules = list(dict.fromkeys(name.split(".")[-1] for name in names))
    return (
        f"targets: no layer matches {', '.join(missing)}, this model has {', '.join(fields)}"
        f" (modules {', '.join(modules)})"
    )
