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

import time
from concurrent.futures import Future
from typing import Any

import numpy as np
import torch
from torch import Tensor

from wavekv.errors import CapacityError
from wavekv.kvstore.aligned import aligned_empty
from wavekv.kvstore.arena import CHUNK_BYTES, Brought, HostArena, TierBytes
from wavekv.kvstore.arrivals import Arrivals
from wavekv.kvstore.budget import MemoryBudget
from wavekv.kvstore.disk_tier import DiskTier, SavedPages
from wavekv.kvstore.host_slots import HostSlots, SlotChanges
from wavekv.kvstore.layout import KVLayout
from wavekv.kvstore.page_file import Rows
from wavekv.kvstore.page_ids import PageIds
from wavekv.kvstore.read_ahead import ReadAhead
from wavekv.kvstore.write_behind import WriteBehind

_MOST_PARTS = 8
"""Parts of reads that are on their way at once where nobody waits for them: more would only keep
memory from others."""


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
        self._slots = HostSlots(self.host)
        self._arrivals = Arrivals(self.disk, self._slots)
        self._ahead = ReadAhead(self.disk, self._slots)
        self._writes = WriteBehind(self.disk, self._slots)
        if self.disk.num_base:
            self._grow_ids(self.disk.num_base)
            self.ids.allocate(self.disk.num_base)

    def __del__(self) -> None:
        if hasattr(self, "_arrivals"):
            # the memory that is read into goes with this
            self._arrivals.close()
            self._ahead.close()

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
        return int((self._slots.owner >= 0).sum())

    def reserve(self, num_pages: int) -> None:
        """See that there is room for `num_pages` more, in one tier or the other.

        Raises:
            CapacityError: they fit neither cpu_budget nor disk_budget, or the disk is full; nothing
                is allocated then.
        """
        self._collect()
        own = self.num_own + num_pages
        on_host = self._slots.most_pages
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
        self.host.order(min(num_pages, self.host.num_orderable))

    def order_ahead(self, num_pages: int) -> None:
        """As `HostArena.order_ahead`."""
        if num_pages <= self.host.num_orderable:
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
        self._slots.open(ids)
        return torch.from_numpy(ids)

    def seal(self, ids: Tensor, after: Future[Any] | None = None) -> None:
        """Say that pages are complete, now or once a future is done (unless it fails): they may be
        written behind and given up."""
        pages = ids.flatten().numpy().copy()
        if after is None:
            self._writes.add(pages)
        else:
            self._writes.add_after(pages, after)
        self._writes.note_built()
        self._keep_up()

    def bring(self, ids: Tensor, deadline: float | None = None) -> Brought:
        """Have the pages `ids` (any shape, -1 for none) in memory until others are brought or
        allocated.

        deadline: seconds to wait for those that must be read, None for as long as it takes. Others
        have no slot (-1) in the result; they come later. The first ids are read first.

        Raises:
            CapacityError: cpu_budget does not hold so many.
            ContextFormatError: a page is not what was written.
        """
        self._collect()
        wanted = ids.flatten().numpy()
        is_page, num_read, is_tried = wanted >= 0, 0, False
        while True:
            slots = np.where(is_page, self._slots.of[wanted], -1)
            missing = wanted[is_page & (slots < 0)]
            if not len(missing) or (is_tried and deadline is not None):
                break
            # again where what arrived on the way gave way to what is read here
            _, first = np.unique(missing, return_index=True)
            num_read, is_tried = max(num_read, len(first)), True
            self._bring_missing(missing[np.sort(first)], slots[slots >= 0], deadline)
        self._slots.use(slots[slots >= 0])
        return Brought(torch.from_numpy(slots).view(ids.shape), num_read)

    def read_ahead(self) -> None:
        """Bring some more of the pages of the saved context that nobody asked for, beside what
        follows: called again and again it brings all of them, if memory has room for all pages.

        Raises:
            ContextFormatError: a page is not what was written.
        """
        if self.ids.num_used <= self._slots.most_pages:
            self._ahead.go_on()

    def watch(self) -> SlotChanges:
        """Ids of pages whose place in memory changes from now on, while the result is kept."""
        return self._slots.watch()

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
        return torch.from_numpy(self._slots.of[ids.numpy()])

    @property
    def moved(self) -> TierBytes:
        """As `HostArena.moved`."""
        return TierBytes(self.disk.bytes_read, self.disk.bytes_written)

    def held(self, ids: Tensor) -> TierBytes:
        """As `HostArena.held`; pages in both tiers count in both."""
        pages, size = ids.flatten().numpy(), self.layout.page_bytes
        on_host, on_disk = (self._slots.of[pages] >= 0).sum(), self.disk.holds(pages).sum()
        return TierBytes(int(on_host) * size, int(on_disk) * size)

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
        slots = self._slots.of[pages]
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
        self._arrivals.finish()
        self._ahead.finish()
        for part in self.ids, self.host, self.disk, self._slots:
            part.check_integrity()
        in_use, on_host = self.ids.references > 0, self._slots.of >= 0
        on_disk = self.disk.holds(np.arange(self.ids.capacity))
        lost = int((in_use & ~on_host & ~on_disk).sum())
        kept = int((~in_use & (on_host | on_disk)).sum())
        if lost or kept:
            raise RuntimeError(
                f"arena integrity: {lost} pages in neither tier, {kept} free pages in one"
            )

    def _refuse(self, num_pages: int) -> None:
        mib = self.layout.page_bytes / 2**20
        raise CapacityError(
            f"host pages need {num_pages * mib:.1f} MiB more at once, but cpu_budget has room for "
            f"{self._slots.most_pages * mib:.1f} MiB of host RAM and others use "
            f"{self.host.ids.num_used * mib:.1f} MiB of it; raise cpu_budget, shorten the context, "
            "or set disk= to a folder for pages over it"
        )

    def _grow_ids(self, count: int) -> None:
        self.ids.grow(count)
        self._slots.grow(self.ids.capacity)
        self.disk.grow(self.ids.capacity - len(self.disk))

    def _make_free(self, num_pages: int) -> None:
        """Have so many free slots: of new memory while the budget has some, then of pages that are
        given up."""
        free = self.host.ids.free
        if num_pages > len(free):
            self._slots.grow_memory(num_pages - len(free))
        while (lacking := num_pages - len(self.host.ids.free)) > 0:
            if not (self._slots.give_up(lacking) or self._wait_for_some(lacking)):
                self._refuse(num_pages)

    def _wait_for_some(self, count: int) -> bool:
        """Wait until more pages could be given up; False if no more ever can."""
        if self._arrivals or self._ahead:
            self._arrivals.finish()
            self._ahead.finish()
        elif self.disk.is_writing or self._writes.begin(count):
            self._writes.finish(wait=True)
        else:
            # pages that are built on another thread
            return self._writes.note_built(wait=True)
        return True

    def _bring_missing(self, missing: Rows, found: Rows, deadline: float | None) -> None:
        """Read pages that are not in memory, without giving up the slots `found`."""
        self._keep_up()
        self._slots.is_held[found] = True
        try:
            new = self._arrivals.without(missing)
            if deadline is not None:
                end = time.monotonic() + deadline
                self._arrivals.begin(new[: self._free_now(len(new))])
                self._arrivals.finish(end)
                return
            self._make_free(len(new))
            if self._arrivals:
                self._arrivals.begin(new)
                self._arrivals.finish()
            elif len(new):
                self._arrivals.read(new)
        finally:
            self._slots.is_held[found] = self._slots.is_open[found]

    def _free_now(self, count: int) -> int:
        """How many of so many slots are free without waiting, or can be: none while enough pages
        are on their way."""
        if len(self._arrivals) >= _MOST_PARTS:
            return 0
        free = self.host.ids.free
        if count > len(free):
            self._slots.grow_memory(count - len(free))
            self._slots.give_up(count - len(self.host.ids.free))
        return min(count, len(self.host.ids.free))

    def _keep_up(self) -> None:
        self._writes.keep_up(self.ids.num_used - self.disk.num_base, self._slots.most_pages)

    def _forget(self, freed: Rows) -> None:
        """Free the slots and places of pages without references."""
        if not len(freed):
            return
        if self.disk.is_writing:
            self._writes.finish(wait=True)
        self._arrivals.finish()
        slots = self._slots.of[freed]
        self._slots.clear(slots[slots >= 0])
        self.disk.forget(freed)

    def _collect(self) -> None:
        """Take note of what others did meanwhile."""
        self._forget(self.ids.collect())
        self._arrivals.finish(end=0.0)
        self._writes.finish()
        self._writes.note_built()
