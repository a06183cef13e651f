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

    def victims(
        self, count: int, may_go: NDArray[np.bool_], is_held: NDArray[np.bool_]
    ) -> NDArray[np.int64]:
        """At most `count` slots to give up, of those that may go [slots] and are not held. Fewer
        come only if there are fewer. Cost: the slots that the hand passes, at most two rounds."""
        found: list[NDArray[np.int64]] = [np.empty(0, dtype=np.int64)]
        num_slots, passed = len(self._was_used), 0
        taken = np.zeros(num_slots, dtype=bool)
        while count and passed < 2 * num_slots:
            stop = min(self._hand + _STRIDE, num_slots)
            part = slice(self._hand, stop)
            # those that are taken already are met again by a hand that goes round
            is_spare = may_go[part] & ~is_held[part] & ~self._was_used[part] & ~taken[part]
            spare = self._hand + np.flatnonzero(is_spare)[:count]
            if len(spare) == count:
                stop = int(spare[-1]) + 1
            taken[spare] = True
            self._was_used[self._hand : stop] = False
            found.append(spare)
            count -= len(spare)
            passed += stop - self._hand
            self._hand = stop % num_slots
        return np.concatenate(found)
