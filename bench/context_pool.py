"""The yardstick of reading pages: a pool of threads, each of which reads some of the pages."""

from __future__ import annotations

import mmap
import os
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor

THREADS = 16


class PlainPool:
    """Reads rows of files into memory, a `preadv` each. Checks nothing and keeps no account."""

    def __init__(
        self, descriptors: Sequence[int], page_bytes: int, rows_per_file: int, most: int
    ) -> None:
        """most: rows of one read."""
        self._descriptors, self._rows_per_file = list(descriptors), rows_per_file
        self._page_bytes = page_bytes
        self._memory = memoryview(mmap.mmap(-1, most * page_bytes))
        self._pool = ThreadPoolExecutor(THREADS)

    def read(self, rows: list[int]) -> None:
        """Read rows, the first to the beginning of the memory."""

        def share(first: int) -> None:
            for i in range(first, len(rows), THREADS):
                file, row = divmod(rows[i], self._rows_per_file)
                place = self._memory[i * self._page_bytes : (i + 1) * self._page_bytes]
                os.preadv(self._descriptors[file], [place], row * self._page_bytes)

        list(self._pool.map(share, range(THREADS)))
