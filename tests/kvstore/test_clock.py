"""The order in which slots are given up."""

from __future__ import annotations

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from wavekv.kvstore import clock as clocks
from wavekv.kvstore.clock import Clock


def make_clock(num_slots: int, used: list[int] | None = None) -> Clock:
    clock = Clock()
    clock.grow(num_slots)
    clock.use(np.array(used or [], dtype=np.int64))
    return clock


def test_what_was_used_is_spared_once() -> None:
    clock, every = make_clock(4, [0, 2]), np.ones(4, dtype=bool)
    assert clock.victims(2, every.__getitem__).tolist() == [1, 3]
    assert clock.victims(2, every.__getitem__).tolist() == [0, 1]


def test_the_hand_asks_for_no_more_than_it_passes() -> None:
    clock, asked = make_clock(1 << 20), []

    def is_spare(slots: slice) -> np.ndarray:
        asked.append(slots.stop - slots.start)
        return np.ones(asked[-1], dtype=bool)

    assert clock.victims(5, is_spare).tolist() == [0, 1, 2, 3, 4]
    assert sum(asked) < 1 << 14


@given(st.data())
def test_all_that_may_be_given_up_is_found_once(data: st.DataObject) -> None:
    num_slots = data.draw(st.integers(0, 30), "slots")
    spare = np.array(data.draw(st.lists(st.booleans(), min_size=num_slots, max_size=num_slots)))
    slots = st.lists(st.integers(0, max(0, num_slots - 1)), max_size=num_slots)
    clock = make_clock(num_slots, data.draw(slots, "used"))
    stride, clocks._STRIDE = clocks._STRIDE, data.draw(st.integers(1, 8), "stride")
    try:
        for _ in range(3):
            count = data.draw(st.integers(0, num_slots + 2), "count")
            victims = clock.victims(count, spare.astype(bool).__getitem__)
            assert len(set(victims.tolist())) == len(victims) == min(count, spare.sum())
            assert spare[victims].all() if len(victims) else True
    finally:
        clocks._STRIDE = stride
