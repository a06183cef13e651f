"""The pages of a saved context that nobody has asked for yet, read beside everything else."""

from __future__ import annotations

import numpy as np

from wavekv.kvstore.arrivals import Arrivals
from wavekv.kvstore.disk_tier import DiskTier
from wavekv.kvstore.host_slots import HostSlots

_PAGES = 4096
"""That are begun at a time."""
_MOST_PARTS = 32
"""On their way at once."""


class ReadAhead:
    """Reads them in the order of the files, a little more at each `go_on`. Nothing waits for it: it
    stops where pinned memory is not made yet."""

    def __init__(self, disk: DiskTier, slots: HostSlots) -> None:
        self._disk, self._slots = disk, slots
        self._arrivals = Arrivals(disk, slots)
        self._next = 0

    def __len__(self) -> int:
        """Parts on their way."""
        return len(self._arrivals)

    def go_on(self) -> None:
        """Take in what came, and begin to read more. Memory must have room for all pages.

        Raises:
            ContextFormatError, OSError: a page could not be read.
        """
        self._arrivals.finish(end=0.0)
        while self._next < self._disk.num_base and len(self._arrivals) < _MOST_PARTS:
            pages = np.arange(self._next, min(self._next + _PAGES, self._disk.num_base))
            pages = pages[self._slots.of[pages] < 0]
            if not self._has_slots(len(pages)):
                return
            self._next += _PAGES
            self._arrivals.begin(pages)

    def finish(self) -> None:
        """Wait for what is on its way, and take it in.

        Raises:
            ContextFormatError, OSError: a page could not be read.
        """
        self._arrivals.finish()

    def close(self) -> None:
        """Wait for what is being read; the rest does not come."""
        self._arrivals.close()

    def _has_slots(self, count: int) -> bool:
        host = self._slots.host
        if len(host.ids.free) >= count:
            return True
        if host.pin and not host.num_ready:
            if not host.num_ordered_pages:
                host.order_ahead(host.pages_per_chunk)
            return False
        self._slots.grow_memory(count - len(host.ids.free))
        return len(host.ids.free) >= count
