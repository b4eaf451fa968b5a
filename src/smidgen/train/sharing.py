"""How the rows of a step are computed: how many at once, packed or padded, and whether sharing a beginning pays."""

from collections.abc import Sequence
from dataclasses import replace
from functools import cache

import numpy as np
import torch
from numpy.typing import NDArray

from smidgen.data.batch import Batching
from smidgen.data.render import Example
from smidgen.data.report import Sharing
from smidgen.data.tokens import Examples
from smidgen.events import Note, Report
from smidgen.model.build import Base
from smidgen.model.fused import is_fused, learns_norms
from smidgen.planning.work import Load, Rows
from smidgen.train.config import Settings
from smidgen.train.loop import Schedule

__all__ = ["choose_batching", "estimate_sharing", "planned_rows", "refuse_packing"]

_STEPS = 100  # of the first epoch are looked at; they are in random order
_LEAST_SAVED = 0.05  # of the tokens
_MOST_ROWS = 1 << 21  # are put in order for a plan, in about a second; more count as if the longest came together
_MOST_SHARED = 1 << 14  # rows of the largest steps have their beginnings compared, in about a second
_MOST_DISTANT = 0.2  # of a token's hidden states in norm; a first token that sees another row is farther off


def estimate_sharing(examples: Sequence[Example], schedule: Schedule) -> Sharing:
    """What computing shared prefixes once saves in the first 100 steps, where the layers pack rows; nothing where the
    settings do not let it, or it would be too little.
    """
    settings = schedule.settings
    batching = Batching(settings.micro_batch, settings.pack, share_prefix=True, tile_tokens=settings.tile_tokens)
    tokens = computed = 0
    for step in range(min(_STEPS, schedule.steps_per_epoch)):
        rows = [examples[row] for row in schedule.rows_of(step)]
        for part in batching.split(rows):
            ids = [rows[index].input_ids for index in part]
            tokens += sum(map(len, ids))
            computed += batching.tokens_of(ids)
    off = _off_by_settings(settings)
    if not off and tokens - computed < _LEAST_SAVED * tokens:
        off = f"rows computed at once begin alike in {1 - computed / tokens:.0%} of their tokens"
    computed = tokens if off else computed
    return Sharing(settings.micro_batch, settings.accumulation, settings.pack, tokens, computed, off)


def planned_rows(examples: Examples, held_out: Examples, schedule: Schedule) -> Rows:
    """What a plan has to know of a run's rows: those of its steps, in their order, and those that are evaluated."""
    settings, counts = schedule.settings, (examples.lengths, examples.trained_tokens)
    sharing = estimate_sharing(examples, schedule)
    held = [np.sort(count)[::-1] for count in (held_out.lengths, held_out.trained_tokens)] if held_out else (None, None)
    found = Rows(
        np.sort(counts[0])[::-1],
        np.sort(counts[1])[::-1],
        held_out=held[0],
        held_out_labels=held[1],
        computed=sharing.computed_tokens / max(1, sharing.tokens),
        labelled=int(counts[1].sum()) / max(1, int(counts[0].sum())),
    )
    if schedule.total_steps * schedule.step_rows > _MOST_ROWS:
        return found
    order = np.concatenate(list(schedule.orders()))

    @cache
    def shared(micro_batch: int) -> Load | None:
        smaller = replace(settings, micro_batch=micro_batch, accumulation=max(1, schedule.step_rows // micro_batch))
        if estimate_sharing(examples, Schedule(schedule.lengths, smaller, schedule.mixture)).off:
            return None
        batching = Batching(micro_batch, share_prefix=True, tile_tokens=settings.tile_tokens)
        return _largest_shared(examples, order.reshape(-1, schedule.step_rows), batching)

    lengths, labels = (np.append(count, np.int32(0))[order] for count in counts)
    return replace(found, lengths=lengths, labels=labels, shared=shared)


def _largest_shared(examples: Examples, steps: NDArray[np.int32], batching: Batching) -> Load:
    """Of micro-batches where what rows begin with alike is computed once. steps [S, R]: their rows, see orders().

    The steps that may be largest are looked at first; what is not looked at counts as if its longest rows came
    together and shared nothing.
    """

    micro_batch = batching.micro_batch

    def most(count: NDArray[np.int32]) -> NDArray[np.int64]:
        """int64 [S]: of any micro-batch of a step."""
        return np.sort(np.append(count, np.int32(0))[steps], axis=1)[:, -micro_batch:].sum(axis=1, dtype=np.int64)

    bounds, tokens = most(examples.lengths), 0
    for looked, step in enumerate(np.argsort(-bounds, kind="stable")):
        if bounds[step] <= tokens or looked * steps.shape[1] >= _MOST_SHARED:
            tokens = max(tokens, int(bounds[step]))
            break
        rows = [examples[row] for row in steps[step] if row >= 0]
        computed = (batching.tokens_of([rows[index].input_ids for index in part]) for part in batching.split(rows))
        tokens = max(tokens, *computed)
    # a label behind a prefix that rows share is each row's own
    labels = min(int(most(examples.trained_tokens).max()), tokens + micro_batch)
    return Load(tokens, labels, int(examples.lengths.min()))


def _off_by_settings(settings: Settings) -> str:
    if settings.share_prefix == "off":
        return "share_prefix is off"
    if settings.neftune_alpha or settings.dropout:
        return f"each row has {'noise' if settings.neftune_alpha else 'dropout'} of its own"
    return ""


def choose_batching(
    base: Base, examples: Sequence[Example], schedule: Schedule, most_tokens: int, report: Report
) -> Batching:
    """What the settings ask for; 'auto' shares prefixes where the layers can and it saves enough, and says why.

    most_tokens: of the largest micro-batch without padding, which memory was planned for. Rows that have to be padded
    come in batches of at most so many tokens, padding included.
    """
    settings = schedule.settings
    packs = is_fused(base.backbone) and not learns_norms(base.backbone)
    if not packs and (settings.micro_batch > 1 or settings.pack):
        refused = refuse_packing(base, int(max(schedule.lengths)))
        packs = not refused
        if refused:
            report(Note(f"rows are padded to the longest of their batch: {refused}"))
        else:
            report(Note("rows are packed, without padding: a trial on this model gave what it gives for rows apart"))
    base.packs = packs
    share = False
    if settings.share_prefix == "auto":
        sharing = estimate_sharing(examples, schedule)
        if sharing.off:
            report(Note(f"share_prefix off: {sharing.off}"))
        elif not packs:
            report(Note(f"share_prefix off: rows are padded, it would save {sharing.saved:.0%} of the tokens"))
        else:
            share = True
            saved = f"{sharing.saved:.0%} of the tokens"
            report(Note(f"share_prefix: rows computed at once begin alike, that saves {saved}"))
    pack = settings.pack if packs or settings.micro_batch == 1 else settings.pack or most_tokens
    return Batching(settings.micro_batch, pack, share, not packs, settings.tile_tokens)


@torch.no_grad()
def refuse_packing(base: Base, longest: int) -> str:
    """Why transformers' layers cannot compute packed rows; "" where a trial gave the hidden states of rows apart.

    longest: tokens of the longest row to come. Some layers mix positions elsewhere than in an attention that can be
    exchanged (convolutions, recurrences), or add to it what is not known here; no list of names would stay complete.
    Random rows tell: one alone, two that share a prefix. Where the configuration names a window or chunk that such a
    row fits into, but a row to come does not, the trial's last row is longer.
    """
    config = base.model.config.get_text_config()
    sizes = [size for name, size in config.to_dict().items() if "window" in name or "chunk" in name]
    windows = [size for size in sizes if isinstance(size, int) and 0 < size < longest]
    lengths = [11, 13, max([17, *(min(size + 9, longest) for size in windows)])]
    ids = torch.randint(base.head.out_features, (3, max(lengths)), generator=torch.Generator().manual_seed(0))
    ids[2, :8] = ids[1, :8]
    base.model.eval()
    pairs = zip(ids, lengths, strict=True)
    apart = torch.cat([base.hidden_of(row[None, :length].to(base.device))[0] for row, length in pairs])
    try:
        base.packs = False
        padded, of_padded = base.hidden_of_rows(ids, torch.tensor(lengths))
        base.packs = True
        hidden, places = base.hidden_of_rows(ids, torch.tensor(lengths), [((0,), 0), ((1, 2), 8)])
    except Exception as error:  # whatever a model's code makes of arguments that it does not expect
        return f"{type(base.model).__name__} cannot pack them ({type(error).__name__})"
    finally:
        base.packs = False
    # Rounding is what padding changes, and where that is nothing, some steps of the type: no other computation.
    distance, rounding = (
        float(((found - apart).norm(dim=1) / apart.norm(dim=1)).max()) for found in (hidden[places], padded[of_padded])
    )
    steps = 8 * torch.finfo(base.compute_dtype).eps
    if distance <= min(_MOST_DISTANT, max(steps, 1e-4) + 4 * rounding):
        return ""
    return f"{type(base.model).__name__} does not compute packed rows as rows apart ({distance:.1%} off)"
