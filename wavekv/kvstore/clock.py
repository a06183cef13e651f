"""Which of many slots to reuse: the clock, or second chance (Corbato 1968).

An approximation of least recently used whose cost does not grow with the number of slots: a hand
goes round; a slot that was used since it came by last is spared once.
"""

from __future__ import annotations

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

    def victims(self, count: int, is_spare: NDArray[np.bool_]) -> NDArray[np.int64]:
        """At most `count` slots to give up, of those that `is_spare` [num slots] allows. Fewer come
        only if fewer are allowed. Cost: the slots that the hand passes."""
        found: list[NDArray[np.int64]] = []
        num_slots, missing = len(self._was_used), min(count, int(is_spare.sum()))
        while missing:
            stop = min(self._hand + _STRIDE, num_slots)
            passed = slice(self._hand, stop)
            spare = np.flatnonzero(is_spare[passed] & ~self._was_used[passed])[:missing]
            spare += self._hand
            # taken slots are not met again by a hand that goes round
            is_spare[spare] = False
            if len(spare) == missing:
                stop = int(spare[-1]) + 1
            self._was_used[self._hand : stop] = False
            found.append(spare)
            missing -= len(spare)
            self._hand = stop % num_slots
        return np.concatenate([np.empty(0, dtype=np.int64), *found])
