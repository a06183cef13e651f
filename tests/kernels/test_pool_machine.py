"""The page pool against a plain model of it, whatever is chosen, prefetched and appended."""

from __future__ import annotations

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
from implementations import implementation
from pool_model import LAST, PoolPair

from wavekv.kernels.step import AHEAD, LATER

pytestmark = pytest.mark.usefixtures("_one_thread")


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
        clock=st.sampled_from([0, 7, 65534, 10**6, LAST - 10**6]),
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

    @rule(data=st.data(), wide=st.booleans(), purpose=st.sampled_from([AHEAD, LATER]))
    def prefetch(self, data: st.DataObject, wide: bool, purpose: int) -> None:
        scratch = self.pair.runners_up if wide else self.pair.early
        chosen = self.draw_pages(data, scratch.chosen.shape[2])
        self.pair.prefetch(*chosen, wide=wide, purpose=purpose)

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

    @rule(steps=st.sampled_from([1, 1, 2, 3, 65536, 10**6]))
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
