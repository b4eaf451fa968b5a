"""A 16-bit model or a GGUF file -> a packed folder: the work behind `smidgen quantize`."""

import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from smidgen.checkpoint.base import Checkpoint
from smidgen.data.files import TEXT_SUFFIXES, read_text
from smidgen.data.records import read_data
from smidgen.data.render import Renderer
from smidgen.errors import ModelError
from smidgen.events import Note, Report, Saved, silent
from smidgen.export.files import check_vacant, folder_bytes, new_folder
from smidgen.export.packed import BNB_STORAGES, save_gptq, save_packed
from smidgen.model.build import Base
from smidgen.model.calibration import Calibration, builtin_text, cut_rows, tokens_of
from smidgen.model.device import budget_on, peak_rss_bytes, resident_bytes
from smidgen.model.gptq import GptqPass, no_place
from smidgen.model.inventory import inventory_of
from smidgen.model.load import Source, load_base
from smidgen.model.stored import stored_weights
from smidgen.model.trained import TokenRows, TrainedModule
from smidgen.planning.conversion import Conversion, fitting, gptq_pieces, hidden_state_bytes, packed_pieces
from smidgen.quant.gptq import GROUP_SIZES, GptqSettings
from smidgen.units import format_bytes

__all__ = ["calibration_of", "check_quantisable", "plain_dtype", "plan_quantising", "quantise_model"]


def calibration_of(
    spec: str | None, source: Source, *, rows: int, length: int, held_out: bool, report: Report = silent
) -> Calibration:
    """Calibration text from a plain text file, from rows of data (data.records.read_data), or the built-in sample.

    Raises DataError for text that cannot be used.
    """
    length = min(length, source.max_positions)
    wanted = (rows + 8) * length
    if spec is None:
        ids, name = tokens_of(builtin_text(), source.tokenizer, wanted), "the built-in sample"
    elif Path(spec).suffix.lower() in TEXT_SUFFIXES:
        ids, name = tokens_of(read_text(Path(spec)), source.tokenizer, wanted), Path(spec).name
    else:
        ids, name = [], Path(spec).name
        renderer = Renderer(source.tokenizer, seq_len=length, report=report)
        for row in read_data(spec, hold_out=False, report=report).train:
            ids += renderer.render(row).input_ids
            if len(ids) >= wanted:
                break
    return cut_rows(ids, rows=rows, length=length, held_out=held_out, source=name, report=report)


def plain_dtype(base: Base) -> torch.dtype:
    """The type that embedding and norms of a folder are written in: the base's own, float16 for a GGUF base."""
    if base.checkpoint.format == "gguf":
        return torch.float16
    embedding: Any = base.model.get_input_embeddings()
    stored: Any = embedding.base if isinstance(embedding, TrainedModule | TokenRows) else embedding
    return stored.weight.dtype


def quantise_model(
    source: Source,
    out: Path,
    to: str,
    *,
    settings: GptqSettings | None = None,
    calibration: Calibration | None = None,
    memory: int | None = None,
    trust_remote_code: bool = False,
    report: Report = silent,
) -> dict[str, Any]:
    """Write `source` as a folder of packed weights, whole or not at all, and say what it has become.

    to: of forms.PACKED_FORMS; 'gptq' needs settings and calibration. Weights stay in their mapped file; in memory are
    those of one decoder layer, a shard of the result (2 GB), and for GPTQ the hidden states of the calibration text.
    memory: bytes that this process may have in all, by default what the machine has free; shards are smaller where that
    helps. Raises RunError if `out` holds something, ModelError for a base that is quantised already, SettingsError
    where memory is too little.
    """
    started = time.perf_counter()
    check_vacant(out)
    check_quantisable(source, to, report)
    in_blocks = stored_weights(source.checkpoint) is not None
    plan = _plan(source, to, settings, calibration, memory, trust_remote_code=trust_remote_code, report=report)
    base = load_base(
        source,
        quantize="keep" if in_blocks else "none",
        compute_dtype="float32",
        device="cpu",
        trust_remote_code=trust_remote_code,
        report=_without_choices(report),
    )
    dtype = plain_dtype(base)
    figures: dict[str, Any] = {}
    if to == "gptq":
        assert settings is not None and calibration is not None
        figures = _gptq(base, source, out, settings, calibration, dtype, plan, report)
    else:
        assert to in BNB_STORAGES
        with new_folder(out) as folder:
            save_packed(base, folder, to, dtype, source.tokenizer, report, plan.shard_bytes)
    for file in sorted(out.iterdir()):
        report(Saved(file, file.stat().st_size))
    return {
        "out": str(out),
        "to": to,
        "bytes": folder_bytes(out),
        **figures,
        "wall_s": round(time.perf_counter() - started, 1),
        "peak_rss_bytes": peak_rss_bytes(),
        "forecast_peak_bytes": plan.peak_bytes,
    }


def _plan(
    source: Source,
    to: str,
    settings: GptqSettings | None,
    calibration: Calibration | None,
    memory: int | None,
    *,
    trust_remote_code: bool,
    report: Report,
) -> Conversion:
    """What it will need, before weights are read. Raises SettingsError where `memory` bytes, by default what the
    machine has free, do not suffice.
    """
    tokens = 0
    if calibration is not None:
        held_out = 0 if calibration.held_out is None else calibration.held_out.numel()
        tokens = calibration.rows.numel() + 4 * held_out
    budget, where = budget_on(torch.device("cpu"), memory)
    plan = plan_quantising(source.checkpoint, to, settings, tokens, budget, trust_remote_code=trust_remote_code)
    cure = "; fewer --calibration-rows or a shorter --calibration-len need less" if tokens else ""
    report(Note(plan.within(budget, where, f"to make {to} of {source.checkpoint.path.name}", cure)))
    return plan


def plan_quantising(
    checkpoint: Checkpoint,
    to: str,
    settings: GptqSettings | None,
    tokens: int,
    memory: int,
    *,
    trust_remote_code: bool = False,
) -> Conversion:
    """What making `to` of a checkpoint needs beside this process as it is now, within `memory` bytes if that can be.

    settings: of GPTQ; tokens: of calibration text, held-out ones four times.
    """
    stored = stored_weights(checkpoint)
    model = inventory_of(
        checkpoint, checkpoint.config, "none" if stored is None else stored.storage, name=checkpoint.path.name,
        trust_remote_code=trust_remote_code,
    )  # fmt: skip
    copies = checkpoint.format == "gguf"
    if settings is not None:
        pieces = gptq_pieces(
            model, act_order=settings.act_order, copies=copies, bits=settings.bits, group_size=settings.group_size
        )
    else:
        pieces = packed_pieces(model, to, copies=copies)
    always = {
        "framework": sum(resident_bytes()),
        "norms and biases": 2 * model.norm_bytes,
        "hidden states": hidden_state_bytes(model, tokens),
    }
    return fitting(pieces, always, memory)


def check_quantisable(source: Source, to: str, report: Report = silent) -> None:
    """Raise ModelError for a mixture of experts and for a base that bitsandbytes, GPTQ or AWQ have quantised; note that
    GGUF blocks are decoded.
    """
    stored = stored_weights(source.checkpoint)
    config = source.checkpoint.config
    if any(config.get(key) for key in ("num_experts", "num_local_experts", "n_routed_experts")):
        raise no_place(f"{source.checkpoint.path}: experts of a mixture", to)
    if stored is None or stored.storage == "none":
        return
    if stored.storage != "gguf":
        raise ModelError(
            f"{source.checkpoint.path} is stored as {stored.storage} already", expected="a 16-bit model or a GGUF file",
            cure="take the 16-bit model it was made from",
        )  # fmt: skip
    report(Note(f"{source.checkpoint.path.name}: its blocks are decoded and quantised again, so their errors add up"))


def _gptq(
    base: Base,
    source: Source,
    out: Path,
    settings: GptqSettings,
    calibration: Calibration,
    dtype: torch.dtype,
    plan: Conversion,
    report: Report,
) -> dict[str, Any]:
    rows = calibration.rows
    report(Note(f"hidden states of the calibration text take {format_bytes(plan.terms['hidden states'])} of memory"))
    walk = GptqPass(base, rows, settings, calibration.held_out, report)
    _note_shorter_groups({base.linears[name].in_features for name in walk.names}, settings.group_size, report)
    with new_folder(out) as folder:
        errors = save_gptq(
            base, folder, walk.layers(keep=False), walk.names, settings, dtype, source.tokenizer, plan.shard_bytes
        )
    figures: dict[str, Any] = {
        "bits": settings.bits,
        "group_size": settings.group_size,
        "symmetric": settings.symmetric,
        "act_order": settings.act_order,
        "calibration": {"source": calibration.source, "rows": len(rows), "tokens": rows.numel()},
        "mean_error": {"gptq": _mean(errors, "gptq"), "rtn": _mean(errors, "rtn")},
        "errors": errors,
    }
    if calibration.held_out is not None and walk.perplexity:
        figures["perplexity"] = {"tokens": calibration.held_out.numel(), **walk.perplexity}
    return figures


def _note_shorter_groups(inputs: set[int], group_size: int, report: Report) -> None:
    """Where the last group of a layer is shorter; inputs: of all layers."""
    uneven = [str(count) for count in sorted(inputs) if group_size != -1 and count % group_size]
    if uneven:
        fitting = [str(size) for size in GROUP_SIZES if size == -1 or not any(count % size for count in inputs)]
        what = f"groups of {group_size} do not divide {' and '.join(uneven)} inputs: a layer's last group is shorter"
        report(Note(f"{what}, which vLLM refuses; --group-size {', '.join(fitting)} would do"))


def _mean(errors: Sequence[dict[str, Any]], key: str) -> float:
    return sum(error[key] for error in errors) / len(errors)


def _without_choices(report: Report) -> Report:
    """load_base's notes speak of training; what is packed here is said by the caller."""
    return lambda event: None if isinstance(event, Note) else report(event)
