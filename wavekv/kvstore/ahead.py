"""Chunks of host memory made before they are needed: pinned memory takes a fifth of a second a GiB,
which on a thread of its own hides behind the work of the device."""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable

from torch import Tensor


class ChunksAhead:
    """Makes chunks that were ordered, one after another.

    The thread knows nothing but this object, runs only while orders are open, and ends within one
    chunk of `cancel` or of the end of the program. Methods are for one thread at a time.
    """

    def __init__(self, make: Callable[[], Tensor]) -> None:
        """make: gives a new chunk; must not refer to whoever owns this object."""
        self._make = make
        self._changed = threading.Condition()
        self._ready: deque[Tensor] = deque()
        self._num_open = 0
        self._thread: threading.Thread | None = None

    @property
    def num_ordered(self) -> int:
        """Chunks ordered and not taken yet, made or not."""
        with self._changed:
            return len(self._ready) + self._num_open

    @property
    def num_ready(self) -> int:
        """Chunks that are made and not taken yet."""
        with self._changed:
            return len(self._ready)

    def order(self, count: int) -> None:
        """Have `count` more chunks made."""
        with self._changed:
            if count <= 0:
                return
            self._num_open += count
            if self._thread is None:
                self._thread = threading.Thread(target=self._run, name="wavekv-chunks")
                self._thread.start()

    def take(self, count: int) -> list[Tensor]:
        """At most `count` of the chunks that were ordered; waits for them. Fewer come if the system
        has refused one: the orders that were open then are void."""
        with self._changed:
            # what an interrupt leaves here is taken by the next call
            self._changed.wait_for(lambda: len(self._ready) >= count or not self._num_open)
            return [self._ready.popleft() for _ in range(min(count, len(self._ready)))]

    def cancel(self) -> None:
        """Forget all orders, and what was made for them."""
        with self._changed:
            self._num_open = 0
            self._ready.clear()
            self._changed.notify_all()

    def _run(self) -> None:
        while True:
            with self._changed:
                # a program that ends waits for its threads
                if not self._num_open or not threading.main_thread().is_alive():
                    self._num_open, self._thread = 0, None
                    self._changed.notify_all()
                    return
            try:
                chunk = self._make()
            except Exception:
                # whoever needs the chunk makes it and sees the error
                with self._changed:
                    self._num_open = 0
                continue
            with self._changed:
                if self._num_open:
                    self._num_open -= 1
                    self._ready.append(chunk)
                    self._changed.notify_all()
            del chunk
