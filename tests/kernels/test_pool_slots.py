"""Which slots of the page pool the pages of a step get, case by case."""

from __future__ import annotations

import pytest
import torch
from implementations import IMPLEMENTATIONS, implementation
from pool_model import LAST, PoolPair

from wavekv.kernels.step import AHEAD, CLOCK

pytestmark = pytest.mark.usefixtures("_one_thread")


def advance(pair: PoolPair, steps: int = 1) -> None:
    pair.set_clock(pair.now + steps)


def test_first_step_fills_the_first_slots(kernels) -> None:
    pair = PoolPair(*kernels, kv_heads=2, misses=3)
    pair.step([2, 3, 11, 19], [0])
    assert pair.slots(0) == [0, 1, 2, -1, -1]
    assert pair.slots(1) == [0, -1, -1, -1, -1]
    assert pair.paging(0)[:3] == [0, 3, 1]
    assert pair.paging(1)[:3] == [0, 1, 0]


def test_every_slot_is_chosen(kernels) -> None:
    pair = PoolPair(*kernels, slots=6, most=6, misses=6)
    pair.step([0, 1, 2, 3, 4, 5])
    assert pair.slots() == [0, 1, 2, 3, 4, 5]
    advance(pair)
    pair.step([4, 5, 6, 7, 8, 9])
    assert pair.slots() == [4, 5, 0, 1, 2, 3]
    advance(pair)
    pair.step([10, 11, 12, 13, 14, 15])
    assert pair.slots() == [0, 1, 2, 3, 4, 5]
    assert pair.paging()[:3] == [2, 16, 0]


@pytest.mark.parametrize("name", IMPLEMENTATIONS)
def test_no_slot_is_left(name: str) -> None:
    """In a step nothing of it is given up."""
    pair = PoolPair(*implementation(name), slots=5, misses=4)
    pair.prefetch([10, 11, 12])
    pair.prefetch([13, 14])
    pair.step([1, 2, 13])
    assert pair.slots() == [-1, -1, 3, -1, -1]
    assert pair.paging()[:3] == [1, 0, 2]
    advance(pair)
    pair.step([1, 2, 13])
    assert pair.slots() == [0, 1, 3, -1, -1]


def test_one_slot_and_one_page(kernels) -> None:
    pair = PoolPair(*kernels, slots=1, most=1, misses=1, num_pages=2, capacity=2)
    for page in (0, 1, 1, 0):
        pair.step([page])
        assert pair.slots() == [0]
        advance(pair)
    assert pair.paging()[:3] == [1, 3, 0]


def test_many_misses_at_once(kernels) -> None:
    """More than there are programs to fetch them; of one head only, then of both."""
    pair = PoolPair(
        *kernels, kv_heads=2, num_pages=400, capacity=400, slots=300, most=300, misses=300
    )
    pair.step([], list(range(300)))
    advance(pair)
    pair.step(list(range(100, 400)), list(range(200, 400)))
    assert pair.paging(0)[:3] == [0, 300, 0]
    assert pair.paging(1)[:3] == [100, 400, 0]


def test_one_miss_a_step(kernels) -> None:
    pair = PoolPair(*kernels, misses=1)
    for fetched in range(1, 6):
        pair.step([3, 5, 8, 13, 17])
        assert pair.slots() == list(range(fetched)) + [-1] * (5 - fetched)
        advance(pair)
    # what was just used stays, though it is not chosen
    pair.step([1, 2, 3, 4, 5])
    assert pair.slots() == [5, -1, 0, -1, 1]


def test_the_best_misses_are_within_the_cap(kernels) -> None:
    pair = PoolPair(*kernels, kv_heads=2, misses=2)
    ranks = [0.0] * 20
    ranks[3], ranks[8], ranks[13], ranks[17] = 1e-30, 2.0, 1e-3, 1e-3
    bits = torch.tensor([ranks, [1.0] * 20]).view(torch.int32).tolist()
    pair.rank(bits)
    pair.step([3, 5, 8, 13, 17], [3, 5, 8, 13, 17])
    assert pair.slots(0) == [-1, -1, 0, 1, -1]
    assert pair.slots(1) == [0, 1, -1, -1, -1]
    pair.fetch_left_out()
    assert pair.paging(0)[:3] == pair.paging(1)[:3] == [0, 2, 3]
    assert pair.paging(0)[4] == pair.paging(1)[4] == 3
    advance(pair)
    pair.step([3, 5, 8, 13, 17], [3, 5, 8, 13, 17])
    assert pair.slots(0) == [2, 3, 0, 1, 4]
    assert pair.slots(1) == [0, 1, 2, 3, 4]


def test_all_are_there(kernels) -> None:
    pair = PoolPair(*kernels, kv_heads=2)
    pair.step([1, 4, 7, 9, 12], [0, 2, 5, 6, 19])
    advance(pair)
    before, slots = pair.paging(), pair.slots()
    tables = pair.case.pool.table.clone()
    pair.step([1, 4, 7, 9, 12], [0, 2, 5, 6, 19])
    assert pair.slots() == slots
    assert torch.equal(pair.case.pool.table, tables)
    assert pair.scratch.num_misses.tolist() == [[0, 0]]
    assert [b - a for a, b in zip(before, pair.paging(), strict=True)] == [5, 0, 0, before[3], 0]


def test_none_are_chosen(kernels) -> None:
    pair = PoolPair(*kernels)
    pair.step([])
    assert pair.paging() == [0] * 5
    advance(pair)
    pair.step([1, 2, 3])
    advance(pair)
    before = [part.clone() for part in pair.case.pool]
    paging = pair.paging()
    pair.step([])
    pair.prefetch([])
    pair.prefetch([], wide=True)
    assert pair.slots() == [-1] * 5
    assert pair.paging() == paging
    assert not pair.scratch.status.any()
    for ours, theirs in zip(pair.case.pool, before, strict=True):
        assert torch.equal(ours, theirs)


def test_empty_pages_take_slots_and_no_tokens(kernels) -> None:
    pair = PoolPair(*kernels)
    pair.counts[0, :3] = 0
    pair.case.pages.summary.counts[0, 0, :3] = 0
    pair.step([0, 1, 2])
    assert pair.slots() == [0, 1, 2, -1, -1]
    assert pair.paging() == [0, 3, 0, 0, 0]


def test_prefetched_pages_are_not_given_up_in_their_step(kernels) -> None:
    """They may take all the slots that the step would need."""
    pair = PoolPair(*kernels, slots=5)
    pair.prefetch([10, 11, 12])
    pair.step([1, 2, 3, 4, 12])
    assert pair.slots() == [3, 4, -1, -1, 2]
    assert pair.paging()[:3] == [1, 2, 2]
    assert pair.paging()[4] == 3
    advance(pair)
    pair.prefetch([1, 13, 14], wide=True)
    # of slots that are equally old the lower ones go first
    assert [pair.heads[0].table.get(page) for page in (1, 13, 14)] == [3, 0, 1]


def test_what_came_ahead_of_the_choice_was_fetched_not_found(kernels) -> None:
    pair = PoolPair(*kernels)
    pair.prefetch([1, 2, 3], purpose=AHEAD)
    assert pair.paging() == [0, 0, 0, 0, 3]
    pair.step([2, 3, 4])
    assert pair.paging()[:3] == [0, 3, 0]
    # one was fetched in vain
    assert pair.paging()[4] == 1
    advance(pair)
    pair.step([1, 2, 3])
    assert pair.paging()[:3] == [3, 3, 0]
    assert pair.paging()[4] == 1


@pytest.mark.parametrize("gap", [2, 255, 65536, 10**6])
def test_least_recently_used_goes_first_after_a_long_time(kernels, gap: int) -> None:
    pair = PoolPair(*kernels, slots=4, most=4, misses=4)
    # the first page used gets the last slot
    for count in (4, 3, 2, 1):
        pair.step(list(range(count)))
        advance(pair)
    pair.set_clock(pair.now + gap - 2)
    pair.step([10])
    assert pair.slots()[0] == 3
    pair.step([10, 11, 12])
    assert pair.slots()[:3] == [3, 2, 1]


def test_slots_of_one_step_go_in_their_order(kernels) -> None:
    pair = PoolPair(*kernels, slots=6, most=6, misses=6)
    pair.step([0, 1, 2, 3, 4, 5])
    advance(pair)
    pair.step([1, 4])
    advance(pair)
    pair.step([4, 10, 11])
    assert pair.slots()[:3] == [4, 0, 2]
    advance(pair)
    # used last: 3 and 5 in the first step, 1 in the second, 0, 2 and 4 in the third
    pair.step([20, 21, 22, 23, 24, 25])
    assert pair.slots() == [3, 5, 1, 0, 2, 4]


@pytest.mark.parametrize("clock", [LAST - 2, LAST - 1, LAST])
def test_clock_near_its_end(kernels, clock: int) -> None:
    pair = PoolPair(*kernels, clock=clock)
    pair.step([1, 2, 3])
    assert pair.slots() == [0, 1, 2, -1, -1]
    if clock < LAST:
        advance(pair)
    pair.step([2, 4, 5, 6, 7])
    assert pair.slots() == [1, 3, 4, 5, 6]
    pair.set_clock(LAST)
    pair.step([2, 7])
    assert pair.slots() == [1, 6, -1, -1, -1]
    assert int(pair.case.counters[CLOCK]) == LAST


def test_the_last_step_of_a_clock_in_a_full_pool(kernels) -> None:
    pair = PoolPair(*kernels, slots=5, clock=LAST - 1)
    pair.step([0, 1, 2, 3, 4])
    advance(pair)
    pair.step([1, 2])
    advance(pair)
    pair.step([10, 11, 12])
    assert pair.slots()[:3] == [0, 3, 4]
