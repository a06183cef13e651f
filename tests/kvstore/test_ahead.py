"""Chunks that are made before they are needed: counted at once, taken in order, cancelled whole."""

import gc
import threading
import time
from weakref import ref

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from wavekv.errors import CapacityError
from wavekv.kvstore import HostArena, KVLayout, MemoryBudget, arena
from wavekv.kvstore.ahead import ChunksAhead

LAYOUT = KVLayout(page_size=4, head_dim=3, dtype=torch.float32)
PAGE = LAYOUT.page_bytes


def make_arena(chunk_pages: int = 5, budget_pages: int = 1000) -> HostArena:
    budget = MemoryBudget(budget_pages * PAGE)
    return HostArena(LAYOUT, budget, pin=False, chunk_bytes=chunk_pages * PAGE)


def until(condition, seconds: float = 20.0) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.001)


def threads() -> list[threading.Thread]:
    return [thread for thread in threading.enumerate() if thread.name == "wavekv-chunks"]


def check(one: HostArena) -> None:
    chunks = len(one.chunks) + one._num_ordered
    assert one.budget.used == chunks * one.pages_per_chunk * PAGE
    one.check_integrity()


@given(
    steps=st.lists(
        st.tuples(st.sampled_from(["order", "allocate", "release", "cancel"]), st.integers(0, 30)),
        max_size=20,
    ),
    limit=st.integers(40, 120),
)
def test_whatever_is_ordered_the_budget_counts_what_there_is(steps, limit) -> None:
    one = make_arena(budget_pages=limit)
    held: list[torch.Tensor] = []
    for name, count in steps:
        used, capacity = one.budget.used, one.capacity
        try:
            if name == "order":
                one.order(count)
            elif name == "allocate":
                held.append(one.allocate(count))
            elif name == "cancel":
                one.cancel_orders()
                assert one.budget.used == capacity * PAGE
            elif held:
                one.release(held.pop())
        except CapacityError:
            assert (one.budget.used, one.capacity) == (used, capacity)
        check(one)
    budget = one.budget
    del one
    assert budget.used == 0
    until(lambda: not threads())


def test_what_was_ordered_is_what_is_allocated() -> None:
    one = make_arena()
    one.order(12)
    one.order(7)  # 19 pages in 4 chunks
    assert one.budget.used == 20 * PAGE
    assert one.capacity == 0
    first = one.allocate(12)
    one.allocate(7)
    assert (one.capacity, one.budget.used) == (20, 20 * PAGE)
    one.order(1)  # the page that is free
    assert one.budget.used == 20 * PAGE
    one.order(1)
    assert one.budget.used == 25 * PAGE
    one.release(first)
    one.cancel_orders()
    assert (one.capacity, one.budget.used) == (20, 20 * PAGE)


def test_an_order_that_does_not_fit_is_an_error_and_changes_nothing() -> None:
    one = make_arena(budget_pages=40)
    one.order(20)
    with pytest.raises(CapacityError, match="raise cpu_budget"):
        one.order(21)
    assert one.budget.used == 20 * PAGE
    assert len(one.allocate(40)) == 40
    with pytest.raises(CapacityError):
        one.order(1)


def test_more_than_was_ordered_is_made_at_once(monkeypatch) -> None:
    one = make_arena()
    one.order(5)
    until(lambda: not threads())
    made = []
    new = HostArena._new_chunk
    monkeypatch.setattr(HostArena, "_new_chunk", lambda self: made.append(1) or new(self))
    one.allocate(11)
    assert len(made) == 2
    check(one)


def test_a_chunk_that_the_system_refuses_is_the_error_of_who_needs_it(monkeypatch) -> None:
    def refuse(*_: object) -> torch.Tensor:
        raise MemoryError("no memory to pin")

    monkeypatch.setattr(arena, "_new_chunk", refuse)
    one = make_arena()
    one.order(7)
    until(lambda: not threads())
    with pytest.raises(MemoryError, match="no memory to pin"):
        one.allocate(7)
    assert (one.capacity, one.budget.used) == (0, 0)
    check(one)


def test_a_refusal_midway_keeps_what_was_made() -> None:
    made = []

    def make() -> torch.Tensor:
        if len(made) == 2:
            raise MemoryError
        made.append(1)
        return torch.zeros(1)

    ahead = ChunksAhead(make)
    ahead.order(5)
    assert len(ahead.take(4)) == 2
    assert ahead.num_ordered == 0


def test_orders_are_taken_while_others_are_open() -> None:
    gate = threading.Semaphore(0)

    def make() -> torch.Tensor:
        gate.acquire()
        return torch.zeros(1)

    ahead = ChunksAhead(make)
    ahead.order(3)
    gate.release()
    assert len(ahead.take(1)) == 1
    assert ahead.num_ordered == 2
    # the one that is being made when all is cancelled serves the next order
    ahead.cancel()
    ahead.order(1)
    gate.release()
    assert len(ahead.take(2)) == 1
    until(lambda: not threads())


def test_the_thread_holds_no_arena_and_ends_with_it(monkeypatch) -> None:
    begun, gate = threading.Semaphore(0), threading.Semaphore(0)

    def slow(*_: object) -> torch.Tensor:
        begun.release()
        gate.acquire()
        return torch.zeros(1)

    monkeypatch.setattr(arena, "_new_chunk", slow)
    one = make_arena()
    budget, gone = one.budget, ref(one)
    one.order(100)
    begun.acquire()
    gc.disable()
    try:
        del one
        assert gone() is None
    finally:
        gc.enable()
    assert budget.used == 0
    gate.release()
    until(lambda: not threads())
    assert not begun.acquire(blocking=False)


def test_what_steps_will_need_is_ordered_where_it_takes_time(monkeypatch) -> None:
    one = make_arena(budget_pages=40)
    one.order_ahead(5)
    assert one.budget.used == 0
    monkeypatch.setattr(one, "pin", True)  # its chunks are not, in this test
    one.order_ahead(5)
    assert one.budget.used == 5 * PAGE
    for _ in range(4):
        one.allocate(5)
        one.order_ahead(5)  # always one ahead, however often
    assert one.budget.used == 25 * PAGE
    one.order_ahead(1000)  # does not fit, and is no error
    assert one.budget.used == 25 * PAGE


@pytest.mark.gpu
def test_chunks_made_ahead_are_pinned() -> None:
    one = HostArena(LAYOUT, MemoryBudget(1 << 20), pin=True, chunk_bytes=5 * PAGE)
    one.order(12)
    one.allocate(12)
    assert all(chunk.is_pinned() for chunk in one.chunks)
