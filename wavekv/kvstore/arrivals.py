"""Pages on their way from files to memory, read on a thread of their own."""

from __future__ import annotations

import time
from collections import deque
from concurrent.futures import Future, ThreadPoolExecutor, wait
from functools import partial

import numpy as np

from wavekv.kvstore.disk_tier import DiskTier
from wavekv.kvstore.host_slots import HostSlots
from wavekv.kvstore.page_file import Rows

_PART = 256
"""Pages that are read together."""


class Arrivals:
    """Reads of pages, part by part and in order. For one thread at a time."""

    def __init__(self, disk: DiskTier, slots: HostSlots) -> None:
        self._disk, self._slots = disk, slots
        self._reader = ThreadPoolExecutor(1, thread_name_prefix="wavekv-read")
        self._parts: deque[tuple[Rows, Rows, Future[None]]] = deque()

    def __len__(self) -> int:
        """Parts on their way."""
        return len(self._parts)

    def without(self, pages: Rows) -> Rows:
        """Those of pages [n] that are not on their way."""
        if not self._parts:
            return pages
        return pages[~np.isin(pages, np.concatenate([part for part, _, _ in self._parts]))]

    def read(self, pages: Rows) -> None:
        """Read pages [n] into free slots, of which there are as many, on the caller's thread: for a
        small batch, another one takes longer to wake than the disk takes to answer.

        Raises:
            ContextFormatError, OSError: a page could not be read, and none of them is there.
        """
        slots = self._slots.take(len(pages))
        try:
            self._disk.read(pages, self._slots.host.chunks, slots)
        except BaseException:
            self._slots.clear(slots)
            raise
        self._slots.fill(pages, slots)

    def begin(self, pages: Rows) -> None:
        """Read pages [n] into free slots, of which there are as many, a part after another."""
        for start in range(0, len(pages), _PART):
            part = pages[start : start + _PART]
            slots = self._slots.take(len(part))
            chunks = list(self._slots.host.chunks)
            read = self._reader.submit(partial(self._disk.read, part, chunks, slots))
            self._parts.append((part, slots, read))

    def finish(self, end: float | None = None) -> None:
        """Take in what is there; waits for it until the time `end` (of `time.monotonic`), None for
        as long as it takes.

        Raises:
            ContextFormatError, OSError: a page could not be read, and its part is not there.
        """
        while self._parts:
            pages, slots, read = self._parts[0]
            wait((read,), None if end is None else max(0.0, end - time.monotonic()))
            if not read.done():
                return
            self._parts.popleft()
            error = read.exception()
            if error is not None:
                self._slots.clear(slots)
                raise error
            self._slots.fill(pages, slots)

    def close(self) -> None:
        """Wait for what is being read; the rest does not come."""
        self._reader.shutdown(wait=True, cancel_futures=True)
