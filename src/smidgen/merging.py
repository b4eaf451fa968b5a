"""A run -> a full model: the work behind `smidgen merge`, with the memory that it takes."""

from pathlib import Path
from typing import Any

import torch

from smidgen.events import Note, Report, silent
from smidgen.export.adapter import StoredAdapter, load_adapter, read_adapter
from smidgen.export.compare import COMPARED_TOKENS, compare_models
from smidgen.export.files import folder_bytes, new_folder
from smidgen.export.merge import write_merged
from smidgen.export.quantise import plain_dtype
from smidgen.export.verified import reopened
from smidgen.loading import Found, find_model, load_found
from smidgen.model.device import budget_on, peak_rss_bytes, resident_bytes
from smidgen.model.inventory import inventory_of
from smidgen.model.load import Source, choose_storage, load_base, open_source
from smidgen.model.stream import layer_of
from smidgen.planning import estimate
from smidgen.planning.conversion import Conversion, comparison_bytes, fitting, merged_pieces
from smidgen.planning.inventory import Inventory

__all__ = ["merge_run"]

_TYPES = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}


def merge_run(
    run: str | Path,
    out: Path,
    *,
    base: str | None = None,
    dtype: str = "auto",
    memory: int | None = None,
    trust_remote_code: bool = False,
    report: Report = silent,
) -> dict[str, Any]:
    """See api.merge. run: a folder with an adapter; out: free to become a folder. memory: bytes, for this process;
    by default what the machine has free.

    Layers of the base are read from disk for each use, and files are smaller, where that helps. Raises SettingsError
    where it does not suffice.
    """
    found = find_model(run, compute_dtype="float32")
    assert found.folder is not None
    source = None if base is None else open_source(base, report, tokenizer_from=found.folder)
    plan, streamed = _plan(found, source, dtype, memory, trust_remote_code, report)
    device = "auto" if memory is None and not streamed else "cpu"
    how: Any = {"device": device, "trust_remote_code": trust_remote_code}
    trained = load_found(found, streamed=streamed, **how)
    target = trained.base
    if source is not None:
        target = load_base(source, quantize="none", compute_dtype="float32", **how)
        load_adapter(target, found.folder)
    chosen = plain_dtype(target) if dtype == "auto" else getattr(torch, dtype)
    kind = str(chosen).removeprefix("torch.")
    with new_folder(out) as staging:
        write_merged(target, staging, chosen, trained.tokenizer, report, plan.shard_bytes)
        merged = reopened(staging, kind, "take a wider --dtype", **how)
        distance = compare_models(trained.base, merged, trained.tokenizer)
    if trained.base.stream is not None:
        trained.base.stream.close()
    return {
        "out": str(out),
        "dtype": kind,
        "bytes": folder_bytes(out),
        **distance,
        "peak_rss_bytes": peak_rss_bytes(),
        "forecast_peak_bytes": plan.peak_bytes,
    }


def _plan(
    found: Found, target: Source | None, dtype: str, memory: int | None, trust_remote_code: bool, report: Report
) -> tuple[Conversion, tuple[int, ...]]:
    """(what it will need, the layers of the run's base to be streamed), before weights are read.

    target: the 16-bit base that is merged into instead. Raises SettingsError where `memory` bytes, by default what the
    machine has free, do not suffice.
    """
    assert found.folder is not None
    adapter = read_adapter(found.folder)
    storage, _ = choose_storage(found.quantize, found.source.checkpoint)
    source, model = found.source, _inventory(found.source, storage, trust_remote_code)
    written = model
    if target is not None:
        source, written = target, _inventory(target, "none", trust_remote_code)
    itemsize, copies = _written_as(source, written, dtype)
    changed = {*adapter.modules, *adapter.layers}
    copies = copies or written.embedding_name in changed
    learnt = adapter.nbytes
    in_layers = [info.nbytes for name, info in source.checkpoint.tensors.items() if layer_of(name) is not None]
    pieces = merged_pieces(
        written, itemsize, copies=copies, has_own_head=_parts_head(adapter, written), grows=bool(adapter.token_ids),
        file_bytes=sum(in_layers), adapters=learnt,
    )  # fmt: skip
    compared = max(comparison_bytes(each, itemsize, COMPARED_TOKENS) for each in (model, written))
    always = {
        "framework": sum(resident_bytes()),
        "norms and biases": (2 if target is None else 3) * model.norm_bytes,
        "adapters": (1 if target is None else 2) * learnt,
    }
    budget, where = budget_on(torch.device("cpu"), memory)
    every = () if model.mapped else tuple(range(model.num_layers))
    for streamed in dict.fromkeys(((), every)):
        resident = 0 if model.mapped or streamed else model.packed_bytes
        base = {"packed weights": resident, "stream buffers": estimate.stream_bytes(model, streamed)}
        plan = fitting(pieces, {**always, **base}, budget, at_least=compared)
        if plan.peak_bytes <= budget:
            break
    moved = f", {len(streamed)} layers of the base are read from disk for each use" if streamed else ""
    report(Note(plan.within(budget, where, f"to merge {found.folder}") + moved))
    return plan, streamed


def _inventory(source: Source, storage: str, trust_remote_code: bool) -> Inventory:
    checkpoint = source.checkpoint
    return inventory_of(
        checkpoint, checkpoint.config, storage, name=checkpoint.path.name, trust_remote_code=trust_remote_code
    )


def _written_as(source: Source, model: Inventory, dtype: str) -> tuple[int, bool]:
    """(bytes of a number in the files, whether the embedding is written in another type than the base's file has)."""
    info = source.checkpoint.tensors.get(f"{model.embedding_name}.weight")
    stored = _TYPES.get(info.dtype) if info else None
    if dtype == "auto" and source.checkpoint.format != "gguf":
        return (stored.itemsize if stored else 4), stored is None
    chosen = torch.float16 if dtype == "auto" else getattr(torch, dtype)
    return chosen.itemsize, chosen != stored


def _parts_head(adapter: StoredAdapter, model: Inventory) -> bool:
    """Whether a head that is one with the embedding becomes a matrix of its own."""
    ends = {model.head_name, model.embedding_name}
    whole = bool(ends & set(adapter.whole_modules)) and not adapter.keeps_tied
    return not model.head_bytes and (whole or bool(ends & adapter.layers.keys()))
