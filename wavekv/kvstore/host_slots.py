"""Which page is in which slot of host memory, and which slots may be given to others."""

from __future__ import annotations

from collections import deque
from weakref import ref

import numpy as np
import torch
from numpy.typing import NDArray

from wavekv.kvstore.arena import HostArena
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

    def __init__(self, host: HostArena) -> None:
        """host: the memory; its ids are the slots."""
        self.host = host
        # the slot of each id, and the id in each slot; -1 for none
        self.of = np.empty(0, dtype=np.int64)
        """[ids] the slot of each page, -1 for none."""
        self.owner = np.empty(0, dtype=np.int64)
        """[slots] the page in each slot, -1 for none."""
        self.is_held = np.empty(0, dtype=bool)
        """[slots]"""
        self.is_open = np.empty(0, dtype=bool)
        """[slots] whose page is being built; they are held too."""
        self._is_copy = np.empty(0, dtype=bool)
        self._clock = Clock()
        self._watchers: list[ref[SlotChanges]] = []

    def grow(self, num_ids: int) -> None:
        """Have so many ids, and the slots that the memory has; new ones without each other."""
        self.of = np.pad(self.of, (0, num_ids - len(self.of)), constant_values=-1)
        more = self.host.capacity - len(self.owner)
        if not more:
            return
        self.owner = np.pad(self.owner, (0, more), constant_values=-1)
        for name in ("is_held", "is_open", "_is_copy"):
            setattr(self, name, np.pad(getattr(self, name), (0, more)))
        self._clock.grow(self.host.capacity)

    @property
    def num_room(self) -> int:
        """Pages that fit memory beside those that are there."""
        host = self.host
        return len(host.ids.free) + host.budget.free // host.chunk_nbytes * host.pages_per_chunk

    @property
    def most_pages(self) -> int:
        """Pages that fit memory."""
        return self.host.ids.num_used + self.host.num_ordered_pages + self.num_room

    def grow_memory(self, num_pages: int) -> None:
        """Have so many more free slots, of new memory, or as many as the budget has."""
        host = self.host
        num_chunks = host.budget.free // host.chunk_nbytes
        most = num_chunks * host.pages_per_chunk + host.num_ordered_pages
        wanted = -(-num_pages // host.pages_per_chunk) * host.pages_per_chunk
        host.reserve(len(host.ids.free) + min(wanted, most))
        self.grow(len(self.of))

    def watch(self) -> SlotChanges:
        """What changes from now on, as long as the result is kept."""
        changes = SlotChanges()
        self._watchers = [watcher for watcher in self._watchers if watcher() is not None]
        self._watchers.append(ref(changes))
        return changes

    def use(self, slots: Rows) -> None:
        """Slots are in use now: they are not the next to be given up."""
        self._clock.use(slots)

    def take(self, count: int) -> Rows:
        """So many free slots, held."""
        slots: Rows = self.host.allocate(count).numpy()
        self.is_held[slots] = True
        return slots

    def open(self, pages: Rows) -> None:
        """Give new pages [n] slots to be built in."""
        slots = self.take(len(pages))
        self.is_open[slots] = True
        self._join(pages, slots)

    def seal(self, pages: Rows) -> None:
        """Pages [n] are complete."""
        slots = self.of[pages]
        self.is_held[slots] = self.is_open[slots] = False

    def fill(self, pages: Rows, slots: Rows) -> None:
        """Copies of pages [n] that are in a file are in slots [n] that were taken. A page that has
        another slot by now keeps that."""
        is_new = self.of[pages] < 0
        if not is_new.all():
            self.clear(slots[~is_new])
            pages, slots = pages[is_new], slots[is_new]
        self._join(pages, slots)
        self.is_held[slots] = False
        self._is_copy[slots] = True
        self._clock.use(slots)

    def clear(self, slots: Rows) -> None:
        """Free slots, whatever they hold."""
        owned = slots[self.owner[slots] >= 0]
        pages = self.owner[owned]
        self.of[pages], self.owner[owned] = -1, -1
        for part in self.is_held, self.is_open, self._is_copy:
            part[slots] = False
        self._tell(pages)
        self.host.release(torch.from_numpy(slots))

    def copied(self, pages: Rows) -> None:
        """Pages are in a file too from now on."""
        slots = self.of[pages]
        self._is_copy[slots[slots >= 0]] = True

    def give_up(self, count: int) -> int:
        """Free at most `count` slots of pages that are in a file too; how many."""
        victims = self._clock.victims(count, self._is_spare)
        self.clear(victims)
        return len(victims)

    def _is_spare(self, slots: slice) -> NDArray[np.bool_]:
        is_spare: NDArray[np.bool_] = self._is_copy[slots] & ~self.is_held[slots]
        return is_spare

    def check_integrity(self) -> None:
        """Raise RuntimeError unless the two tables and the memory agree. None is taken only."""
        owned = np.flatnonzero(self.owner >= 0)
        agree = np.array_equal(self.of[self.owner[owned]], owned)
        num_placed, num_used = int((self.of >= 0).sum()), self.host.ids.num_used
        if not agree or not len(owned) == num_placed == num_used:
            raise RuntimeError(
                f"slot integrity: {len(owned)} slots have a page, {num_placed} pages have a slot, "
                f"{num_used} slots are in use"
            )

    def _join(self, pages: Rows, slots: Rows) -> None:
        self.of[pages], self.owner[slots] = slots, pages
        self._tell(pages)

    def _tell(self, pages: Rows) -> None:
        if not len(pages):
            return
        for watcher in self._watchers:
            changes = watcher()
            if changes is not None:
                changes.append(pages.copy())
