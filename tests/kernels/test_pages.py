"""Tensors in memory whose pages stay: no two share a byte, and no more stays than was in use at once."""

import random
import re
import threading
from itertools import pairwise, permutations
from pathlib import Path

import pytest
import torch

from smidgen.kernels.pages import ReusedPages, converted, empty
from smidgen.kernels.sizes import MAPPED_BYTES

CPU = torch.device("cpu")
SMALLEST = MAPPED_BYTES // 4  # float32 numbers

pytestmark = pytest.mark.skipif(ReusedPages().take(1) is None, reason="no range of addresses here")


def resident_bytes() -> int:
    status = Path("/proc/self/status").read_text(encoding="ascii", errors="replace")
    return 1024 * int(re.findall(r"RssAnon:\s+(\d+)", status)[0])


@pytest.mark.parametrize("seed", range(5))
def test_tensors_never_overlap_and_no_more_stays_than_was_in_use(seed: int) -> None:
    chosen, pages = random.Random(seed), ReusedPages()
    live: dict[int, torch.Tensor] = {}
    most = 0
    with pages:
        for turn in range(600):
            if live and chosen.random() < 0.5:
                del live[chosen.choice(list(live))]
            else:
                numbers = chosen.randint(SMALLEST, 8 * SMALLEST)
                live[turn] = empty((numbers,), torch.float32, CPU).fill_(turn)
            if turn % 150 == 149:
                pages.give_back()
                assert pages.kept_bytes <= sum(4096 * -(-4 * part.numel() // 4096) for part in live.values())
            most = max(most, sum(4096 * -(-4 * part.numel() // 4096) for part in live.values()))
            assert pages.kept_bytes <= most
            places = sorted((part.data_ptr(), part.data_ptr() + 4 * part.numel()) for part in live.values())
            assert all(stop <= start for (_, stop), (start, _) in pairwise(places))
    assert all(bool((part == turn).all()) for turn, part in live.items())


def test_memory_is_used_again_and_given_back() -> None:
    pages, before = ReusedPages(), resident_bytes()
    with pages:
        first = empty((1 << 24,), torch.float32, CPU).fill_(1)
        place = first.data_ptr()
        del first
        assert resident_bytes() - before > 60 << 20  # it stays
        second = empty((1 << 23, 2), torch.float32, CPU)
        assert second.data_ptr() == place
        view = second[5:].fill_(2)
        del second
        assert empty((1 << 22,), torch.float32, CPU).data_ptr() != place  # the view has it
        del view
    pages.give_back()
    assert pages.kept_bytes == 0
    assert resident_bytes() - before < 16 << 20


@pytest.mark.parametrize("order", permutations(range(3)))
def test_free_neighbours_are_one_place(order: tuple[int, ...]) -> None:
    with ReusedPages():
        parts: list[torch.Tensor | None] = [empty((SMALLEST,), torch.float32, CPU) for _ in range(3)]
        behind, place = empty((SMALLEST,), torch.float32, CPU), parts[0].data_ptr()  # type: ignore[union-attr]
        for number in order:
            parts[number] = None
        assert empty((3 * SMALLEST,), torch.float32, CPU).data_ptr() == place
        assert behind.data_ptr() > place


def test_small_tensors_and_those_outside_are_pytorchs() -> None:
    pages = ReusedPages()
    with pages:
        empty((SMALLEST - 1,), torch.float32, CPU)
    outside = empty((SMALLEST,), torch.float32, CPU)
    assert pages.kept_bytes == 0
    assert outside.shape == (SMALLEST,)


def test_tensors_outlive_their_range() -> None:
    pages = ReusedPages()
    with pages:
        kept = converted(torch.arange(SMALLEST, dtype=torch.float32).view(2, -1), torch.float64)
    del pages
    assert torch.equal(kept.view(-1), torch.arange(SMALLEST, dtype=torch.float64))


def test_threads_share_a_range() -> None:
    wrong: list[int] = []

    def work(number: int) -> None:
        for _ in range(200):
            mine = empty((SMALLEST + number,), torch.float32, CPU).fill_(number)
            if not bool((mine == number).all()):
                wrong.append(number)

    with ReusedPages():
        threads = [threading.Thread(target=work, args=(number,)) for number in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert not wrong
