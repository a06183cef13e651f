"""Which of many slots to reuse: the clock, or second chance (Corbato 1968).

An approximation of least recently used whose cost does not grow with the number of slots: a hand
goes round; a slot that was used since it came by last is spared once.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray

_STRIDE = 4096
"""Slots that the hand passes at once."""


class Clock:
    """The order in which slots are given up."""

    def __init__(self) -> None:
        self._was_used = np.zeros(0, dtype=bool)
        self._hand = 0

    def grow(self, num_slots: int) -> None:
        """Have so many slots; new ones were not used."""
        self._was_used = np.pad(self._was_used, (0, num_slots - len(self._was_used)))

    def use(self, slots: NDArray[np.int64]) -> None:
        """Slots [n] are in use now."""
        self._was_used[slots] = True

    def victims(
        self, count: int, is_spare: Callable[[slice], NDArray[np.bool_]]
    ) -> NDArray[np.int64]:
        """At most `count` slots to give up, of those that `is_spare`, asked of some neighbours at a
        time, allows. Fewer come only if fewer are allowed. Cost: the slots that the hand passes."""
        found = [np.empty(0, dtype=np.int64)]
        num_slots, missing = len(self._was_used), count
        # twice round: nobody is spared twice
        ahead = 2 * num_slots
        while missing and ahead:
            to_go = (ahead - 1) % num_slots + 1
            stop = min(self._hand + _STRIDE, num_slots, self._hand + to_go)
            passed = slice(self._hand, stop)
            spare = np.flatnonzero(is_spare(passed) & ~self._was_used[passed]) + self._hand
            if ahead <= num_slots:
                # taken slots are not met again by a hand that goes round
                spare = np.setdiff1d(spare, np.concatenate(found))
            spare = spare[:missing]
            if len(spare) == missing:
                stop = int(spare[-1]) + 1
            self._was_used[self._hand : stop] = False
            found.append(spare)
            missing -= len(spare)
            ahead -= stop - self._hand
            self._hand = stop % num_slots
        return np.concatenate(found)
