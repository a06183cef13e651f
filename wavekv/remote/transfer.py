"""Files worked on in threads, some at a time, until one of them fails."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor, wait
from threading import Event, Lock
from typing import TypeVar

from wavekv.errors import ConfigError

JOBS = 8
"""Files at a time, unless told otherwise."""

Progress = Callable[[int, int], None]
"""Told how many bytes are done since it was told last, and of how many in all."""

_Item = TypeVar("_Item")
_Result = TypeVar("_Result")


class Transfer:
    """Work on `total` bytes in files, `jobs` files at a time.

    Raises:
        ConfigError: `jobs` is not positive.
    """

    def __init__(self, jobs: int, total: int, progress: Progress | None) -> None:
        if jobs < 1:
            raise ConfigError(f"jobs must be 1 or more, got {jobs}; 1 copies file after file")
        self._jobs = jobs
        self._total = total
        self._progress = progress
        self._lock = Lock()
        self._failed = Event()
        self._failure: BaseException | None = None

    def run(self, work: Callable[[_Item], _Result], items: Iterable[_Item]) -> list[_Result]:
        """Call `work` for each item and return what it returned, in order.

        The first failure is raised; no item is begun after it, and those in work stop at their next
        chunk.
        """
        with ThreadPoolExecutor(self._jobs) as pool:
            futures = [pool.submit(self._attempt, work, item) for item in items]
            try:
                wait(futures)
            except BaseException:  # an interrupt: the threads are to stop before it goes on
                self._failed.set()
                raise
        if self._failure is not None:
            raise self._failure
        return [future.result() for future in futures]

    def done(self, nbytes: int) -> None:
        """Count bytes; called by `work` after every chunk."""
        if self._failed.is_set():
            raise _StoppedError
        if self._progress is not None:
            with self._lock:
                self._progress(nbytes, self._total)

    def _attempt(self, work: Callable[[_Item], _Result], item: _Item) -> _Result:
        if self._failed.is_set():
            raise _StoppedError
        try:
            return work(item)
        except _StoppedError:
            raise
        except BaseException as error:
            with self._lock:
                self._failure = self._failure or error
            self._failed.set()
            raise


class _StoppedError(Exception):
    """Raised in the threads of other items when the work on another item failed."""
