"""Pages that only memory holds, on their way to a file: oldest first, beside everything else."""

from __future__ import annotations

from collections import deque
from concurrent.futures import Future
from contextlib import suppress
from typing import Any

import numpy as np
from numpy.typing import NDArray

from wavekv.errors import CapacityError
from wavekv.kvstore.disk_tier import DiskTier
from wavekv.kvstore.host_slots import HostSlots
from wavekv.kvstore.page_file import Rows


class WriteBehind:
    """A queue of complete pages, and pages that are being built before it. Those that were freed
    meanwhile are still in it."""

    def __init__(self, disk: DiskTier, slots: HostSlots) -> None:
        self._disk, self._slots = disk, slots
        self._parts: deque[Rows] = deque()
        self._num_pages = 0
        self._building: deque[tuple[Rows, Future[Any]]] = deque()

    def add(self, pages: Rows) -> None:
        """Pages are complete."""
        self._slots.seal(pages)
        self._parts.append(pages)
        self._num_pages += len(pages)

    def add_after(self, pages: Rows, built: Future[Any]) -> None:
        """Pages are complete once a future is done, unless it fails."""
        self._building.append((pages, built))

    def note_built(self, *, wait: bool = False) -> bool:
        """Take in pages whose building is over. wait: for the oldest at least. Returns whether some
        are, or were, being built."""
        was_building = bool(self._building)
        while self._building and (wait or self._building[0][1].done()):
            pages, built = self._building.popleft()
            if built.exception() is None:
                self.add(pages)
            wait = False
        return was_building

    def keep_up(self, num_own: int, host_pages: int) -> None:
        """Begin to write, if pages that only memory holds are many and more are to come. num_own:
        pages that are not of a saved context; host_pages: that memory holds at most."""
        is_near = num_own > 3 * host_pages // 4
        if is_near and self._num_pages > host_pages // 4:
            # where the disk has no room, memory may have it still
            with suppress(CapacityError):
                self.begin(self._num_pages - host_pages // 8)

    def begin(self, count: int) -> bool:
        """Begin to write at least `count` pages; False if there are none.

        Raises:
            CapacityError: the disk has no room for them.
        """
        if not self._disk.is_writable:
            return False
        pages = self._take(count)
        if not len(pages):
            return False
        try:
            self._disk.begin_writing(pages, self._slots.host.chunks, self._slots.of[pages])
        except CapacityError:
            self._add_first(pages)
            raise
        return True

    def finish(self, *, wait: bool = False) -> None:
        """Note what is written. wait: for all that was begun.

        Raises:
            CapacityError: some pages could not be written; they are in memory still.
        """
        written, failed = self._disk.finish_writing(wait=wait)
        self._slots.copied(written)
        if len(failed):
            self._add_first(failed)
            raise CapacityError(
                f"{len(failed)} pages could not be written to disk; see that {self._disk.where} "
                "can be written and has room, and go on"
            )

    def _take(self, count: int) -> Rows:
        """The oldest pages, ascending and each once."""
        parts = [np.empty(0, dtype=np.int64)]
        while self._parts and count > 0:
            part = self._parts.popleft()
            self._num_pages -= len(part)
            parts.append(part[self._is_due(part)])
            count -= len(parts[-1])
        return np.unique(np.concatenate(parts))

    def _is_due(self, pages: Rows) -> NDArray[np.bool_]:
        """Which of pages [n] only memory holds. What was freed is not there, or is another page by
        now, which is being built or comes again."""
        slots = self._slots.of[pages]
        is_due: NDArray[np.bool_] = (slots >= 0) & ~self._disk.holds(pages)
        is_due[is_due] = ~self._slots.is_open[slots[is_due]]
        return is_due

    def _add_first(self, pages: Rows) -> None:
        self._parts.appendleft(pages)
        self._num_pages += len(pages)
