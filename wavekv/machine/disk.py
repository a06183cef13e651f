"""How fast a disk is read, around the cache of the operating system where it lets us."""

from __future__ import annotations

import mmap
import os
import random
import tempfile
import time
from contextlib import suppress
from pathlib import Path

_FILE_BYTES = 128 << 20
_BLOCK_BYTES = 4 << 20
_ROW_BYTES = 8 << 10
_ROWS = 512
_MOST_SECONDS = 1.0
"""Of each of the two: a slow disk is seen before all is read."""


def disk_rates(folder: Path | None = None) -> tuple[float, float]:
    """Bytes a second of reading a temporary file in `folder` (that of the system by default):
    in order, and 8 KiB at random places one at a time.

    Raises:
        OSError: there is no room for it, or the folder cannot be written.
    """
    with tempfile.NamedTemporaryFile(dir=folder) as file:
        block = os.urandom(_BLOCK_BYTES)
        for _ in range(_FILE_BYTES // _BLOCK_BYTES):
            file.write(block)
        file.flush()
        os.fsync(file.fileno())
        descriptor = _open_uncached(file.name)
        try:
            ordered = range(0, _FILE_BYTES, _BLOCK_BYTES)
            places = [
                _ROW_BYTES * random.randrange(_FILE_BYTES // _ROW_BYTES) for _ in range(_ROWS)
            ]
            return _rate(descriptor, ordered, _BLOCK_BYTES), _rate(descriptor, places, _ROW_BYTES)
        finally:
            os.close(descriptor)


def _open_uncached(name: str) -> int:
    """A descriptor that reads from the disk itself, or after the cached blocks were given up."""
    direct = getattr(os, "O_DIRECT", 0)
    with suppress(OSError):
        descriptor = os.open(name, os.O_RDONLY | direct)
        try:
            # some file systems refuse only here
            _rate(descriptor, [0], _ROW_BYTES)
        except OSError:
            os.close(descriptor)
            raise
        return descriptor
    descriptor = os.open(name, os.O_RDONLY)
    os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
    return descriptor


def _rate(descriptor: int, places: range | list[int], size: int) -> float:
    # whole memory pages, as reads around the cache need them
    with mmap.mmap(-1, size) as buffer:
        began, seen, seconds = time.perf_counter(), 0, 0.0
        for place in places:
            seen += os.preadv(descriptor, [buffer], place)
            seconds = time.perf_counter() - began
            if seconds > _MOST_SECONDS:
                break
        return seen / seconds
