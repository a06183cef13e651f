"""Which page is in which slot of host memory, and which slots may be given to others."""

from __future__ import annotations

from collections import deque
from weakref import ref

import numpy as np

from wavekv.kvstore.clock import Clock
from wavekv.kvstore.page_file import Rows


class SlotChanges(deque[Rows]):
    """Ids of pages that got or lost a slot since somebody looked; may name one twice."""

    def take(self) -> Rows:
        """The ids, each once; from here on they are forgotten."""
        parts = [np.empty(0, dtype=np.int64)]
        while self:
            parts.append(self.popleft())
        return np.unique(np.concatenate(parts))


class HostSlots:
    """The two tables between ids and slots. A slot is given up if its page is in a file too, and if
    it is not *held*: its page is being built, read, or wanted now."""

    def __init__(self) -> None:
        # the slot of each id, and the id in each slot; -1 for none
        self.of = np.empty(0, dtype=np.int64)
        """[ids] the slot of each page, -1 for none."""
        self.owner = np.empty(0, dtype=np.int64)
        """[slots] the page in each slot, -1 for none."""
        self.is_held = np.empty(0, dtype=bool)
        """[slots]"""
        self._is_copy = np.empty(0, dtype=bool)
        self._clock = Clock()
        self._watchers: list[ref[SlotChanges]] = []

    def grow(self, num_ids: int, num_slots: int) -> None:
        """Have so many ids and slots, new ones without each other."""
        self.of = np.pad(self.of, (0, num_ids - len(self.of)), constant_values=-1)
        more = num_slots - len(self.owner)
        self.owner = np.pad(self.owner, (0, more), constant_values=-1)
        self.is_held = np.pad(self.is_held, (0, more))
        self._is_copy = np.pad(self._is_copy, (0, more))
        self._clock.grow(num_slots)

    def watch(self) -> SlotChanges:
        """What changes from now on, as long as the result is kept."""
        changes = SlotChanges()
        self._watchers = [watcher for watcher in self._watchers if watcher() is not None]
        self._watchers.append(ref(changes))
        return changes

    def use(self, slots: Rows) -> None:
        """Slots are in use now: they are not the next to be given up."""
        self._clock.use(slots)

    def hold(self, slots: Rows) -> None:
        """Keep free slots for pages that are on their way."""
        self.is_held[slots] = True

    def fill(self, pages: Rows, slots: Rows, *, are_copies: bool) -> None:
        """Pages [n] are in slots [n] from now on; are_copies: of what is in a file."""
        self.of[pages], self.owner[slots] = slots, pages
        self._is_copy[slots] = are_copies
        self._tell(pages)

    def clear(self, slots: Rows) -> None:
        """Slots hold nothing from now on."""
        owned = slots[self.owner[slots] >= 0]
        pages = self.owner[owned]
        self.of[pages], self.owner[owned] = -1, -1
        self.is_held[slots] = self._is_copy[slots] = False
        self._tell(pages)

    def copied(self, pages: Rows) -> None:
        """Pages are in a file too from now on."""
        slots = self.of[pages]
        self._is_copy[slots[slots >= 0]] = True

    def victims(self, count: int) -> Rows:
        """At most `count` slots to give up."""
        return self._clock.victims(count, self._is_copy, self.is_held)

    def _tell(self, pages: Rows) -> None:
        if not len(pages):
            return
        for watcher in self._watchers:
            changes = watcher()
            if changes is not None:
                changes.append(pages.copy())
