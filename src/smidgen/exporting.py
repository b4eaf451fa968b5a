"""A run -> a file or folder for other programs: the work behind `smidgen export`, and the rows that prove it."""

from dataclasses import replace
from itertools import islice
from pathlib import Path
from typing import Any

from smidgen.data.records import read_data
from smidgen.data.render import IGNORED, Example
from smidgen.errors import SmidgenError
from smidgen.events import Note, Report
from smidgen.export.compare import plain_example
from smidgen.export.forms import EXPORT_TYPES
from smidgen.export.quantise import plain_dtype
from smidgen.export.verified import export_verified
from smidgen.loading import LoadedModel, load
from smidgen.train.rows import edits_of, renderer_of
from smidgen.train.run import RunFolder

__all__ = ["export_as"]

_COMPARED_ROWS = 16


def export_as(run: Path, out: Path, to: str, type: str, *, trust_remote_code: bool, report: Report) -> dict[str, Any]:
    """See api.export_run. out: free to become what `to` makes."""
    trained = load(run, compute_dtype="float32", trust_remote_code=trust_remote_code, report=report)
    examples = _held_out(run, trained, report)
    automatic = str(plain_dtype(trained.base)).removeprefix("torch.") if to == "hf" else EXPORT_TYPES[to][0]
    kind = automatic if type == "auto" else type
    figures = export_verified(
        trained.base, trained.tokenizer, examples, to, out, kind=kind, system=trained.system,
        trust_remote_code=trust_remote_code, report=report,
    )  # fmt: skip
    return {"out": str(out), "to": to, "type": kind, **figures}


def _held_out(run: Path, trained: LoadedModel, report: Report) -> list[Example]:
    """Rows with labels that the run did not train on, or a plain text where they cannot be had."""
    plain = "the export is compared on a plain text"
    try:
        _, settings, _, data = RunFolder.open(run)
        rows = read_data(data, limit=settings.limit, edits=edits_of(settings))
    except SmidgenError:
        report(Note(f"the run's data is not there: {plain}"))
        return [plain_example(trained.tokenizer)]
    if settings.too_long != "left":  # for what is compared here a row's beginning is as good as all of it
        settings = replace(settings, too_long="right")
    renderer = renderer_of(settings, trained.tokenizer, trained.base.max_positions)
    rows = rows.test or rows.validation or rows.train
    labelled = (row for row in renderer.render_each(rows, len(rows)) if row.labels.count(IGNORED) < len(row.labels))
    if examples := list(islice(labelled, _COMPARED_ROWS)):
        return examples
    report(Note(f"no held-out row has a label within seq_len {renderer.seq_len}: {plain}"))
    return [plain_example(trained.tokenizer)]
