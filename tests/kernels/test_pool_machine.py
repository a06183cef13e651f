"""The page pool against a plain model of it, whatever is chosen, prefetched and appended."""

from __future__ import annotations

from collections.abc import Iterator
from types import ModuleType

import pytest
import torch
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
    run_state_machine_as_test,
)
from pool_model import IMPLEMENTATIONS, OLDEST, PoolPair, implementation

from wavekv.kernels.step import CLOCK

LAST = 2**31 - 2
"""The last step whose distance to an empty slot's age is an int32."""


@pytest.fixture(autouse=True, scope="module")
def _one_thread() -> Iterator[None]:
    """Tensors are small here: threads would only wait for each other."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


class PoolMachine(RuleBasedStateMachine):
    """Steps and prefetches of any pages, in a context that grows."""

    ops: ModuleType
    device: str
    pair: PoolPair

    @initialize(
        seed=st.integers(0, 999),
        heads=st.sampled_from([(1, 1), (1, 2), (2, 1)]),
        page_size=st.sampled_from([1, 2, 4]),
        num_pages=st.integers(0, 24),
        spare=st.integers(16, 20),
        slots=st.integers(6, 12),
        most=st.integers(1, 9),
        misses=st.integers(1, 9),
        clock=st.sampled_from([0, 7, OLDEST - 2, 65534, 10**6, LAST - 10**6]),
        dtype=st.sampled_from([torch.float32, torch.float16]),
    )
    def start(
        self,
        seed: int,
        heads: tuple[int, int],
        page_size: int,
        num_pages: int,
        spare: int,
        slots: int,
        most: int,
        misses: int,
        clock: int,
        dtype: torch.dtype,
    ) -> None:
        self.pair = PoolPair(
            self.ops,
            self.device,
            seed=seed,
            batch=heads[0],
            kv_heads=heads[1],
            page_size=page_size,
            num_pages=num_pages,
            capacity=num_pages + spare,
            slots=slots,
            most=min(most, slots),
            misses=min(misses, most, slots),
            clock=clock,
            dtype=dtype,
        )

    def draw_pages(self, data: st.DataObject, most: int) -> list[list[int]]:
        """At most so many pages of each row, ascending: any, or resident ones and a few others."""
        everything = list(range(self.pair.num_pages))
        chosen = []
        for head in self.pair.heads:
            pages: set[int] = set()
            if everything:
                count = st.integers(0, most)
                pages |= set(data.draw(st.lists(st.sampled_from(everything), max_size=most)))
                if head.table and data.draw(st.booleans()):
                    resident = st.lists(st.sampled_from(sorted(head.table)), max_size=most)
                    pages = set(sorted(pages)[: data.draw(count)]) | set(data.draw(resident))
            chosen.append(sorted(sorted(pages)[:most]))
        return chosen

    @rule(data=st.data())
    def step(self, data: st.DataObject) -> None:
        self.pair.step(*self.draw_pages(data, self.pair.most))

    @rule(data=st.data())
    def next_step(self, data: st.DataObject) -> None:
        """As a decode step is: what came before is a step older."""
        self.advance(1)
        self.step(data)

    @precondition(lambda self: self.pair.attended is not None)
    @rule()
    def fetch_left_out(self) -> None:
        self.pair.fetch_left_out()

    @rule(data=st.data(), wide=st.booleans())
    def prefetch(self, data: st.DataObject, wide: bool) -> None:
        scratch = self.pair.runners_up if wide else self.pair.early
        chosen = self.draw_pages(data, scratch.chosen.shape[2])
        self.pair.prefetch(*chosen, wide=wide)

    @rule(data=st.data())
    def rank(self, data: st.DataObject) -> None:
        """Ranks decide which misses are within the cap; many are equal."""
        bits = st.sampled_from([0, 1, 1 << 20, 0x3F800000, 0x3F800001, 0x40E00000])
        count = self.pair.num_pages
        row = st.lists(bits, min_size=count, max_size=count)
        self.pair.rank([data.draw(row) for _ in self.pair.heads])

    @precondition(lambda self: self.pair.num_pages < self.pair.case.shape.capacity)
    @rule(count=st.integers(1, 8))
    def grow(self, count: int) -> None:
        self.pair.grow(min(count, self.pair.case.shape.capacity - self.pair.num_pages))

    @rule(steps=st.sampled_from([1, 1, 2, 3, OLDEST - 1, OLDEST, OLDEST + 1, 65536, 10**6]))
    def advance(self, steps: int) -> None:
        self.pair.set_clock(min(self.pair.now + steps, LAST))

    @invariant()
    def pool_is_as_the_model_says(self) -> None:
        if hasattr(self, "pair"):
            self.pair.check()


def run_machine(name: str, max_examples: int, steps: int) -> None:
    class Machine(PoolMachine):
        pass

    Machine.ops, Machine.device = implementation(name)
    limits = settings(max_examples=max_examples, stateful_step_count=steps)
    run_state_machine_as_test(Machine, settings=limits)


def test_pool_of_the_twins() -> None:
    run_machine("torch", 80, 30)


def test_pool_of_the_kernels() -> None:
    run_machine("triton", 12, 10)


@pytest.fixture(params=IMPLEMENTATIONS)
def kernels(request: pytest.FixtureRequest) -> tuple[ModuleType, str]:
    return implementation(request.param)


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
    before = [part.clone() for part in pair.case.pool]
    paging = pair.paging()
    advance(pair)
    pair.step([])
    pair.prefetch([])
    pair.prefetch([], wide=True)
    assert pair.slots() == [-1] * 5
    assert pair.paging() == paging
    assert not pair.scratch.attended.any()
    for ours, theirs in zip(pair.case.pool, before, strict=True):
        assert torch.equal(ours, theirs)


def test_empty_pages_take_slots_and_no_tokens(kernels) -> None:
    pair = PoolPair(*kernels)
    pair.counts[0, :3] = 0
    pair.case.pages.counts[0, 0, :3] = 0
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


def test_old_ages_are_equal_beyond_the_last_that_is_told_apart(kernels) -> None:
    now = 10**6
    pair = PoolPair(*kernels, slots=8, most=8, misses=8)
    pair.step([0, 1, 2, 3, 4, 5, 6, 7])
    pair.set_clock(now)
    young, edge = now - OLDEST + 1, now - OLDEST
    # never used is no older than used OLDEST steps ago
    pair.set_ages(0, [now - 1, young, 5, edge, 0, now - OLDEST // 2, edge - 1, young])
    pair.step([8, 9])
    assert pair.slots()[:2] == [2, 3]
    pair.step([10, 11, 12])
    assert pair.slots()[:3] == [1, 4, 6]
    pair.step([13, 14])
    assert pair.slots()[:2] == [5, 7]
    pair.step([15, 16])
    assert pair.slots()[:2] == [0, -1]


@pytest.mark.parametrize("gap", [2, OLDEST - 1, OLDEST, OLDEST + 1, 65536, 10**6])
def test_least_recently_used_goes_first_after_a_long_time(kernels, gap: int) -> None:
    pair = PoolPair(*kernels, slots=4, most=4, misses=4)
    # the first page used gets the last slot
    for count in (4, 3, 2, 1):
        pair.step(list(range(count)))
        advance(pair)
    pair.set_clock(pair.now + gap - 2)
    pair.step([10])
    # one step more than can be told apart makes the slots used last but one equally old
    rest = [min(gap + k - 1, OLDEST) for k in range(4)]
    assert pair.slots()[0] == rest.index(max(rest))


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
    """Empty slots would be 2**31 steps old then."""
    pair = PoolPair(*kernels, slots=5, clock=LAST - 1)
    pair.step([0, 1, 2, 3, 4])
    advance(pair)
    pair.step([1, 2])
    advance(pair)
    pair.step([10, 11, 12])
    assert pair.slots()[:3] == [0, 3, 4]
