"""The lower tier: which pages are in files, where, and how they get there.

Two kinds of file: those of a saved context (`base`), whose pages are the first ids and are only
read, and one of pages over `cpu_budget`, in which a page has a place for good. What is read is
checked against the checksum that it was written with.
"""

from __future__ import annotations

import os
from collections import deque
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from wavekv.errors import CapacityError, ContextFormatError
from wavekv.kernels.crc32 import crc32_pages
from wavekv.kvstore.budget import MemoryBudget
from wavekv.kvstore.page_file import PageFile, Rows
from wavekv.kvstore.page_ids import PageIds

_STEP_BYTES = 64 << 20
"""By which the file of pages over `cpu_budget` grows."""


class SavedPages:
    """The pages of a saved context, in its files, which are open until this goes."""

    def __init__(
        self,
        names: Sequence[str],
        descriptors: Sequence[int],
        files: Sequence[Tensor],
        crc32: Rows,
        *,
        rows_per_file: int,
    ) -> None:
        """names: for errors; descriptors: for reading, which are this object's from now on; files:
        mapped [rows_per_file, *stored_shape]; crc32: [n] of each page."""
        self.names, self.descriptors, self.files = list(names), list(descriptors), list(files)
        self.crc32, self.rows_per_file = crc32, rows_per_file

    def __del__(self) -> None:
        while self.descriptors:
            os.close(self.descriptors.pop())

    def page_file(self, page_bytes: int) -> PageFile:
        """To read pages with."""
        rows = self.rows_per_file
        return PageFile(self.descriptors, self.names, rows_per_file=rows, page_bytes=page_bytes)


class DiskTier:
    """Pages by id in files. For one thread at a time; it has one of its own that writes."""

    def __init__(
        self,
        page_bytes: int,
        budget: MemoryBudget,
        folder: str | None,
        base: SavedPages | None = None,
    ) -> None:
        """budget: of the file in `folder`; None for no such file.

        Raises:
            OSError: a file cannot be made in `folder`.
        """
        self.page_bytes, self.budget = page_bytes, budget
        self.num_base = 0 if base is None else len(base.crc32)
        """Pages of the saved context: the first ids."""
        self.bytes_read = self.bytes_written = 0
        self._saved = base
        self._base = None if base is None else base.page_file(page_bytes)
        self._scratch = None if folder is None else PageFile.scratch(folder, page_bytes)
        self._rows = PageIds()
        # of each id: a row of the base, then of the scratch file; -1 for none
        self._place = np.empty(0, dtype=np.int64)
        self._crc32 = np.empty(0, dtype=np.int64)
        self._writer = ThreadPoolExecutor(1, thread_name_prefix="wavekv-write")
        self._writing: deque[tuple[Rows, Rows, Future[Rows]]] = deque()
        if base is not None:
            self.grow(self.num_base)
            self._place[:] = np.arange(self.num_base)
            self._crc32[:] = base.crc32

    def __del__(self) -> None:
        if hasattr(self, "_writing"):
            self._writer.shutdown(wait=True, cancel_futures=True)
            self.budget.give(self._rows.capacity * self.page_bytes)
        scratch = getattr(self, "_scratch", None)
        if scratch is not None:
            scratch.close()

    def __len__(self) -> int:
        """Ids there are."""
        return len(self._place)

    @property
    def where(self) -> str:
        """The file of pages over `cpu_budget`, for errors."""
        return "" if self._scratch is None else self._scratch.name_of(0)

    @property
    def is_writable(self) -> bool:
        """Whether pages can be written."""
        return self._scratch is not None

    @property
    def nbytes(self) -> int:
        """Bytes of the file of pages over `cpu_budget`."""
        return self._rows.capacity * self.page_bytes

    def grow(self, count: int) -> None:
        """Have `count` more ids, without places."""
        self._place = np.pad(self._place, (0, count), constant_values=-1)
        self._crc32 = np.pad(self._crc32, (0, count))

    def holds(self, pages: Rows) -> NDArray[np.bool_]:
        """Which of pages [n] are in a file."""
        held: NDArray[np.bool_] = self._place[pages] >= 0
        return held

    def reserve(self, num_pages: int) -> None:
        """Have room for so many pages that are not of the saved context.

        Raises:
            CapacityError: disk_budget or the disk has none; nothing changed.
        """
        lacking = num_pages - self._rows.capacity
        if lacking <= 0:
            return
        assert self._scratch is not None
        step = max(lacking, min(_STEP_BYTES, self.budget.free) // self.page_bytes)
        self.budget.take(step * self.page_bytes)
        try:
            self._scratch.allocate(self._rows.capacity + step)
        except OSError as error:
            self.budget.give(step * self.page_bytes)
            raise CapacityError(
                f"pages over cpu_budget need {step * self.page_bytes / 2**20:.1f} MiB more in "
                f"{self._scratch.name_of(0)}, got: {error.strerror}; make room there, set disk= to "
                "another folder, or raise cpu_budget"
            ) from error
        self._rows.grow(step)

    def read(self, pages: Rows, chunks: list[Tensor], rows: Rows) -> None:
        """Read pages [n] to rows [n] of chunks of equal length, and check them.

        Raises:
            ContextFormatError: a page is not what was written.
        """
        places = self._place[pages]
        addresses = _addresses(chunks, rows, self.page_bytes)
        is_base = places < self.num_base
        crc32 = np.empty(len(pages), dtype=np.int64)
        for source, part, first in (
            (self._base, is_base, 0),
            (self._scratch, ~is_base, self.num_base),
        ):
            if source is not None and part.any():
                crc32[part] = source.read(places[part] - first, addresses[part])
        self.bytes_read += len(pages) * self.page_bytes
        wrong = np.flatnonzero(crc32 != self._crc32[pages])
        if len(wrong):
            self._refuse(int(pages[wrong[0]]), int(crc32[wrong[0]]))

    def begin_writing(self, pages: Rows, chunks: list[Tensor], rows: Rows) -> None:
        """Write pages [n] without a place from rows [n] of chunks, which must stay until
        `finish_writing` has noted them, on a thread.

        Raises:
            CapacityError: as `reserve`.
        """
        self.reserve(self._rows.num_used + len(pages))
        places, scratch, page_bytes = (
            self._rows.allocate(len(pages)),
            self._scratch,
            self.page_bytes,
        )
        assert scratch is not None
        chunks = list(chunks)
        addresses = _addresses(chunks, rows, page_bytes)

        def write() -> Rows:
            scratch.write(places, addresses)
            crc32: Rows = crc32_pages(chunks, torch.from_numpy(rows), page_bytes).numpy()
            return crc32

        self._writing.append((pages, places, self._writer.submit(write)))

    @property
    def is_writing(self) -> bool:
        """Whether something is to be noted by `finish_writing`."""
        return bool(self._writing)

    def finish_writing(self, *, wait: bool = False) -> tuple[Rows, Rows]:
        """Note what is written. wait: for all of it. Returns pages that were, and that could not
        be."""
        done = [np.empty(0, dtype=np.int64)]
        failed = list(done)
        while self._writing and (wait or self._writing[0][2].done()):
            pages, places, future = self._writing[0]
            error = future.exception()
            self._writing.popleft()
            if error is not None:
                self._rows.release(places)
                failed.append(pages)
                continue
            self._crc32[pages] = future.result()
            self._place[pages] = places + self.num_base
            self.bytes_written += len(pages) * self.page_bytes
            done.append(pages)
        return np.concatenate(done), np.concatenate(failed)

    def forget(self, pages: Rows) -> None:
        """Free the places of pages, none of which is being written."""
        places = self._place[pages]
        self._place[pages] = -1
        self._rows.release(places[places >= 0] - self.num_base)

    def check_integrity(self) -> None:
        """Raise RuntimeError unless places are in use exactly once."""
        self._rows.check_integrity()
        own = self._place[self._place >= self.num_base] - self.num_base
        writing = [places for _, places, _ in self._writing]
        if len(np.unique(own)) != len(own) or self._rows.num_used != len(own) + sum(
            map(len, writing)
        ):
            raise RuntimeError(
                f"disk integrity: {len(own)} pages have {len(np.unique(own))} places of "
                f"{self._rows.num_used} in use"
            )

    def _refuse(self, page: int, crc32: int) -> None:
        place = int(self._place[page])
        if place < self.num_base:
            assert self._base is not None
            name, row = self._base.name_of(place), place
        else:
            assert self._scratch is not None
            row = place - self.num_base
            name = self._scratch.name_of(row)
        raise ContextFormatError(
            f"expected page {row} of {name} with crc32={self._crc32[page]:08x}, got {crc32:08x}; "
            "the file is damaged, take another copy or prefill again"
        )


def _addresses(chunks: list[Tensor], rows: Rows, page_bytes: int) -> Rows:
    """Of rows [n] of chunks of equal length."""
    starts = np.array([chunk.data_ptr() for chunk in chunks], dtype=np.int64)
    where, slot = np.divmod(rows, len(chunks[0]))
    addresses: Rows = starts[where] + slot * page_bytes
    return addresses
