"""Pages in two tiers: all of them by id, those in use in host memory, the others in files.

Host memory is a cache of the files, with these rules:

- A page is written to memory first, and stays there while it is built (until `seal`).
- Once pages fill three quarters of `cpu_budget`, those that only memory holds are written behind,
  oldest first, so that they are never much more than a quarter of it.
- A slot is given up by second chance (`Clock`): what was brought since the hand came by stays.
- `gather`, for pages that all pass by once, reads around the cache and displaces nothing.

The pages of a saved context, if there is one, are the first ids, and have a reference for good.
"""

from __future__ import annotations

from collections import deque
from concurrent.futures import Future
from contextlib import suppress
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from wavekv.errors import CapacityError
from wavekv.kvstore.aligned import aligned_empty
from wavekv.kvstore.arena import CHUNK_BYTES, Brought, HostArena
from wavekv.kvstore.budget import MemoryBudget
from wavekv.kvstore.clock import Clock
from wavekv.kvstore.disk_tier import DiskTier, SavedPages
from wavekv.kvstore.layout import KVLayout
from wavekv.kvstore.page_file import Rows
from wavekv.kvstore.page_ids import PageIds


class TieredArena:
    """What `HostArena` is, for more pages than host memory holds."""

    def __init__(
        self,
        layout: KVLayout,
        budget: MemoryBudget,
        disk_budget: MemoryBudget,
        folder: str | None,
        *,
        pin: bool,
        base: SavedPages | None = None,
        chunk_bytes: int = CHUNK_BYTES,
    ) -> None:
        """budget: of host memory. disk_budget: of a file in `folder`; None for no such file.

        Raises:
            OSError: a file cannot be made in `folder`.
        """
        self.layout = layout
        self.host = HostArena(layout, budget, pin=pin, chunk_bytes=chunk_bytes)
        """The slots of the cache; its ids are their numbers."""
        self.disk = DiskTier(layout.page_bytes, disk_budget, folder, base)
        self.ids = PageIds()
        self._clock = Clock()
        # the slot of each id, and the id in each slot; -1 for none
        self._slot = np.empty(0, dtype=np.int64)
        self._owner = np.empty(0, dtype=np.int64)
        # slots that may not be given up: pages that are built, or wanted now
        self._is_held = np.empty(0, dtype=bool)
        self._building: deque[tuple[Tensor, Future[Any]]] = deque()
        self._unwritten: deque[Rows] = deque()
        self._num_unwritten = 0
        if self.disk.num_base:
            self._grow_ids(self.disk.num_base)
            self.ids.allocate(self.disk.num_base)

    @property
    def num_pages(self) -> int:
        """Pages in use, those of the saved context included."""
        self._collect()
        return self.ids.num_used

    @property
    def num_own(self) -> int:
        """Pages in use that are not of the saved context."""
        return self.num_pages - self.disk.num_base

    @property
    def num_on_host(self) -> int:
        """Pages in memory."""
        return int((self._owner >= 0).sum())

    def reserve(self, num_pages: int) -> None:
        """See that there is room for `num_pages` more, in one tier or the other.

        Raises:
            CapacityError: they fit neither cpu_budget nor disk_budget, or the disk is full; nothing
                is allocated then.
        """
        self._collect()
        own = self.num_own + num_pages
        on_host = self._host_pages
        if own <= (on_host // 2 if self.disk.num_base else on_host):
            return
        if not self.disk.is_writable:
            self._refuse(num_pages)
        self.disk.reserve(own)

    def order(self, num_pages: int) -> None:
        """Say that `num_pages` more will be allocated: as many of them as fit memory are made on
        another thread, and count as used from now on.

        Raises:
            CapacityError: as `reserve`; nothing is ordered then.
        """
        self.reserve(num_pages)
        self.host.order(min(num_pages, self._host_room))

    def order_ahead(self, num_pages: int) -> None:
        """As `HostArena.order_ahead`."""
        if num_pages <= self._host_room:
            self.host.order_ahead(num_pages)

    def cancel_orders(self) -> None:
        """As `HostArena.cancel_orders`."""
        self.host.cancel_orders()

    def allocate(self, num_pages: int) -> Tensor:
        """Return the ids [num_pages] of free pages, each with one reference; in memory until they
        are sealed.

        Raises:
            CapacityError: as `reserve`, or so many are not in memory at once; nothing changed.
        """
        self.reserve(num_pages)
        self._make_free(num_pages)
        if len(self.ids.free) < num_pages:
            self._grow_ids(num_pages - len(self.ids.free))
        ids = self.ids.allocate(num_pages)
        self._take_slots(ids)
        return torch.from_numpy(ids)

    def seal(self, ids: Tensor, after: Future[Any] | None = None) -> None:
        """Say that pages are complete, now or once a future is done (unless it fails): they may be
        written behind and given up."""
        if after is not None:
            self._building.append((ids, after))
            self._seal_built()
            return
        pages = ids.flatten().numpy().copy()
        self._is_held[self._slot[pages]] = False
        self._unwritten.append(pages)
        self._num_unwritten += len(pages)
        self._write_behind()

    def bring(self, ids: Tensor) -> Brought:
        """Have the pages `ids` (any shape, -1 for none) in memory until others are brought or
        allocated.

        Raises:
            CapacityError: cpu_budget does not hold so many.
            ContextFormatError: a page is not what was written; nothing is brought then.
        """
        self._collect()
        wanted = ids.flatten().numpy()
        pages = np.unique(wanted[wanted >= 0])
        slots = self._slot[pages]
        found, missing = slots[slots >= 0], pages[slots < 0]
        self._clock.use(found)
        if len(missing):
            self._write_behind()
            was_held = self._is_held[found].copy()
            self._is_held[found] = True
            try:
                self._bring_missing(missing)
            finally:
                self._is_held[found] = was_held
        result = np.where(wanted >= 0, self._slot[wanted], -1)
        return Brought(torch.from_numpy(result).view(ids.shape), len(missing))

    def retain(self, ids: Tensor) -> None:
        """Add a reference to each page of `ids` (any shape; an id may recur)."""
        self.ids.retain(ids)

    def release(self, ids: Tensor) -> None:
        """Take a reference from each page of `ids`; pages without one are free again."""
        self._forget(self.ids.release(ids.flatten().numpy()))

    def drop(self, ids: Tensor) -> None:
        """As `HostArena.drop`."""
        self.ids.drop(ids)

    def write(self, ids: Tensor, pages: Tensor, counts: Tensor | None = None) -> None:
        """As `HostArena.write`, of pages that are not sealed."""
        self.host.write(self.slots_of(ids), pages, counts)

    def put(self, ids: Tensor, stored: Tensor) -> None:
        """As `HostArena.put`, of pages that are not sealed. Any thread may."""
        self.host.put(self.slots_of(ids), stored)

    def slots_of(self, ids: Tensor) -> Tensor:
        """Where pages (any shape) are in `host`, -1 for those that are not."""
        return torch.from_numpy(self._slot[ids.numpy()])

    def read(self, ids: Tensor) -> Tensor:
        """As `HostArena.read`."""
        return self.layout.decode(self.gather(ids))

    def gather(self, ids: Tensor, out: Tensor | None = None) -> Tensor:
        """As `HostArena.gather`, from memory or from the files; displaces nothing."""
        self._collect()
        if out is None:
            shape = len(ids), *self.layout.stored_shape
            out = aligned_empty(shape, self.layout.stored_dtype)
        pages = ids.numpy()
        slots = self._slot[pages]
        there, missing = np.flatnonzero(slots >= 0), np.flatnonzero(slots < 0)
        if not len(missing):
            return self.host.gather(torch.from_numpy(slots), out)
        if len(there):
            out[torch.from_numpy(there)] = self.host.gather(torch.from_numpy(slots[there]))
        self.disk.read(pages[missing], [out], missing)
        return out

    def check_integrity(self) -> None:
        """Raise RuntimeError unless ids, slots and places agree."""
        self._collect()
        for part in self.ids, self.host, self.disk:
            part.check_integrity()
        every = np.arange(self.ids.capacity)
        in_use, on_disk = self.ids.references > 0, self.disk.holds(every)
        owned = np.flatnonzero(self._owner >= 0)
        agree = np.array_equal(self._slot[self._owner[owned]], owned)
        lost = int((in_use & (self._slot < 0) & ~on_disk).sum())
        kept = int((~in_use & ((self._slot >= 0) | on_disk)).sum())
        if not agree or lost or kept or len(owned) != self.host.ids.num_used:
            raise RuntimeError(
                f"arena integrity: {lost} pages in neither tier, {kept} free pages in one, "
                f"{len(owned)} slots with a page where {self.host.ids.num_used} are in use"
            )

    @property
    def _host_room(self) -> int:
        """Pages that fit memory beside those that are there."""
        host, budget = self.host, self.host.budget
        return len(host.ids.free) + budget.free // host.chunk_nbytes * host.pages_per_chunk

    @property
    def _host_pages(self) -> int:
        """Pages that fit memory."""
        ordered = self.host.num_ordered * self.host.pages_per_chunk
        return self.host.ids.num_used + ordered + self._host_room

    def _refuse(self, num_pages: int) -> None:
        mib = self.layout.page_bytes / 2**20
        raise CapacityError(
            f"host pages need {num_pages * mib:.1f} MiB more at once, but cpu_budget has room for "
            f"{self._host_pages * mib:.1f} MiB of host RAM and others use "
            f"{self.host.ids.num_used * mib:.1f} MiB of it; raise cpu_budget, shorten the context, "
            "or set disk= to a folder for pages over it"
        )

    def _grow_ids(self, count: int) -> None:
        self.ids.grow(count)
        self._slot = np.pad(self._slot, (0, count), constant_values=-1)
        lacking = self.ids.capacity - len(self.disk)
        self.disk.grow(lacking)

    def _make_free(self, num_pages: int) -> None:
        """Have so many free slots: of new memory while the budget has some, then of pages that are
        given up."""
        host = self.host
        lacking = num_pages - len(host.ids.free)
        if lacking > 0:
            num_chunks = host.budget.free // host.chunk_nbytes + host.num_ordered
            num_chunks = min(-(-lacking // host.pages_per_chunk), num_chunks)
            host.reserve(len(host.ids.free) + num_chunks * host.pages_per_chunk)
            self._grow_slots()
        while (lacking := num_pages - len(host.ids.free)) > 0:
            if not (self._give_up(lacking) or self._wait_for_some(lacking)):
                self._refuse(num_pages)

    def _grow_slots(self) -> None:
        more = self.host.capacity - len(self._owner)
        if not more:
            return
        self._owner = np.pad(self._owner, (0, more), constant_values=-1)
        self._is_held = np.pad(self._is_held, (0, more))
        self._clock.grow(self.host.capacity)

    def _take_slots(self, ids: Rows) -> Rows:
        """Slots for pages, of which there are as many free; held."""
        slots: Rows = self.host.allocate(len(ids)).numpy()
        self._slot[ids], self._owner[slots] = slots, ids
        self._is_held[slots] = True
        return slots

    def _give_up(self, count: int) -> int:
        """Free at most `count` slots of pages that are in a file; how many."""
        victims = self._clock.victims(count, self._is_spare)
        self._clear(victims)
        return len(victims)

    def _is_spare(self, slots: slice) -> NDArray[np.bool_]:
        """Which slots have pages that are in a file and that nobody needs in memory."""
        owners = self._owner[slots]
        is_spare = (owners >= 0) & ~self._is_held[slots]
        is_spare[is_spare] = self.disk.holds(owners[is_spare])
        return is_spare

    def _clear(self, slots: Rows) -> None:
        self._slot[self._owner[slots]], self._owner[slots] = -1, -1
        self._is_held[slots] = False
        self.host.release(torch.from_numpy(slots))

    def _wait_for_some(self, count: int) -> bool:
        """Wait until more pages could be given up; False if no more ever can."""
        if not self.disk.is_writing and not self._start_writing(count):
            if not self._building:
                return False
            # pages that are built on another thread
            self._building[0][1].exception()
            self._seal_built()
            return True
        self._finish_writes(wait=True)
        return True

    def _bring_missing(self, missing: Rows) -> None:
        self._make_free(len(missing))
        slots = self._take_slots(missing)
        try:
            self.disk.read(missing, self.host.chunks, slots)
        except BaseException:
            self._clear(slots)
            raise
        self._is_held[slots] = False
        self._clock.use(slots)

    def _write_behind(self) -> None:
        """Begin to write pages that only memory holds, if they are many and more are to come."""
        on_host = self._host_pages
        is_near = self.ids.num_used - self.disk.num_base > 3 * on_host // 4
        if is_near and self._num_unwritten > on_host // 4:
            # where the disk has no room, memory may have it still
            with suppress(CapacityError):
                self._start_writing(self._num_unwritten - on_host // 8)

    def _start_writing(self, count: int) -> bool:
        """Begin to write at least `count` pages, the oldest; False if there are none.

        Raises:
            CapacityError: the disk has no room for them.
        """
        parts = [np.empty(0, dtype=np.int64)]
        while self.disk.is_writable and self._unwritten and count > 0:
            part = self._unwritten.popleft()
            self._num_unwritten -= len(part)
            # what was freed meanwhile is not there, or is another page by now
            part = part[(self._slot[part] >= 0) & ~self.disk.holds(part)]
            part = part[~self._is_held[self._slot[part]]]
            parts.append(part)
            count -= len(part)
        pages = np.unique(np.concatenate(parts))
        if not len(pages):
            return False
        try:
            self.disk.begin_writing(pages, self.host.chunks, self._slot[pages])
        except CapacityError:
            self._write_later(pages)
            raise
        return True

    def _write_later(self, pages: Rows) -> None:
        """Pages that were to be written: the first to be so again."""
        self._unwritten.appendleft(pages)
        self._num_unwritten += len(pages)

    def _finish_writes(self, *, wait: bool = False) -> None:
        failed = self.disk.finish_writing(wait=wait)
        if len(failed):
            self._write_later(failed)
            raise CapacityError(
                f"{len(failed)} pages could not be written to disk; see that {self.disk.where} can "
                "be written and has room, and go on"
            )

    def _seal_built(self) -> None:
        while self._building and self._building[0][1].done():
            ids, future = self._building.popleft()
            if future.exception() is None:
                self.seal(ids)

    def _forget(self, freed: Rows) -> None:
        """Free the slots and places of pages without references."""
        if not len(freed):
            return
        if self.disk.is_writing:
            self._finish_writes(wait=True)
        slots = self._slot[freed]
        self._clear(slots[slots >= 0])
        self.disk.forget(freed)

    def _collect(self) -> None:
        self._forget(self.ids.collect())
        self._finish_writes()
        self._seal_built()
