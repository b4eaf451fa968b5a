"""Data sets mixed by weight: how many rows of each an epoch takes, and which.

An epoch has as many rows as all data sets together, and of each the share that its weight is of all weights. The rows
of a data set come in laps, each in an order of its own: none comes again before all have come, over epochs too. So one
whose share is smaller than itself is seen whole after some epochs, and one whose share is larger repeats evenly.
"""

from array import array
from collections.abc import MutableSequence, Sequence
from dataclasses import dataclass
from itertools import accumulate

from smidgen.data.batch import epoch_order

__all__ = ["Mixture", "mix"]


@dataclass(frozen=True)
class Mixture:
    """sizes: rows of each data set, which follow one another. quotas: how many rows of each an epoch takes."""

    sizes: tuple[int, ...]
    quotas: tuple[int, ...]

    def rows(self, seed: int, epoch: int) -> MutableSequence[int]:
        """The rows of an epoch, as indices, data set by data set: a function of the arguments alone."""
        chosen = array("i")
        firsts = list(accumulate((0, *self.sizes)))[:-1]
        for part, (first, size, quota) in enumerate(zip(firsts, self.sizes, self.quotas, strict=True)):
            start, stop = epoch * quota, (epoch + 1) * quota
            for lap in range(start // size, -(-stop // size)):
                order = epoch_order(size, f"{seed} data set {part}", lap)
                taken = order[max(0, start - lap * size) : stop - lap * size]
                chosen.extend(first + row for row in taken)
        return chosen

    def describe(self, names: Sequence[str]) -> str:
        """'a.jsonl 67 % (200 rows an epoch, each 2.00 times), b.jsonl 33 % (...)'"""
        total = sum(self.quotas)
        return ", ".join(
            f"{name} {quota / total:.0%} ({quota:,} rows an epoch, each {quota / size:.2f} times)"
            for name, size, quota in zip(names, self.sizes, self.quotas, strict=True)
        )


def mix(sizes: Sequence[int], weights: Sequence[float]) -> Mixture:
    """The mixture of data sets of these sizes, none of them empty, by weights above 0. Each gives one row or more."""
    total, of_all = sum(sizes), sum(weights)
    ends = [round(total * end / of_all) for end in accumulate(weights)]
    quotas = [max(1, end - start) for start, end in zip([0, *ends], ends, strict=False)]
    return Mixture(tuple(sizes), tuple(quotas))
