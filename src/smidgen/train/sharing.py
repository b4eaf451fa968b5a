"""How the rows of a step are computed: at how many rows at once, and whether what they begin with alike pays."""

from collections.abc import Sequence

from smidgen.data.batch import Batching
from smidgen.data.mixture import Mixture
from smidgen.data.render import Example
from smidgen.data.report import Sharing
from smidgen.data.tokens import Examples
from smidgen.events import Note, Report
from smidgen.model.build import Base
from smidgen.model.fused import is_fused
from smidgen.train.config import Settings
from smidgen.train.loop import Schedule

__all__ = ["choose_batching", "estimate_sharing"]

_STEPS = 100  # of the first epoch are looked at; they are in random order
_LEAST_SAVED = 0.05  # of the tokens


def estimate_sharing(examples: Sequence[Example], schedule: Schedule) -> Sharing:
    """What computing shared prefixes once would save in the first 100 steps."""
    settings = schedule.settings
    batching = Batching(settings.micro_batch, settings.pack, share_prefix=True)
    tokens = computed = 0
    for step in range(min(_STEPS, schedule.steps_per_epoch)):
        rows = [examples[row] for row in schedule.rows_of(step)]
        for part in batching.split(rows):
            ids = [rows[index].input_ids for index in part]
            tokens += sum(map(len, ids))
            computed += batching.tokens_of(ids)
    return Sharing(settings.micro_batch, settings.accumulation, settings.pack, tokens, computed)


def choose_batching(
    base: Base, examples: Examples, mixture: Mixture | None, settings: Settings, report: Report
) -> Batching:
    """What the settings ask for; 'auto' shares prefixes where the layers can and it saves enough, and says why."""
    own = is_fused(base.backbone) and not settings.dropout
    share = False
    if settings.share_prefix == "auto" and settings.neftune_alpha:
        report(Note("share_prefix off: each row has noise of its own"))
    elif settings.share_prefix == "auto":
        saved = estimate_sharing(examples, Schedule(examples.lengths, settings, mixture)).saved
        if saved < _LEAST_SAVED:
            report(Note(f"share_prefix off: rows computed at once begin alike in {saved:.0%} of their tokens"))
        elif not own:
            report(Note(f"share_prefix off: transformers' layers cannot, it would save {saved:.0%} of the tokens"))
        else:
            share = True
            report(Note(f"share_prefix: rows computed at once begin alike, that saves {saved:.0%} of the tokens"))
    return Batching(settings.micro_batch, settings.pack, share_prefix=share, pads=not own)
