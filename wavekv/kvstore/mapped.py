"""A host arena that begins with the pages of a saved context, mapped from its files: nothing is
read before it is wanted, and processes that map the same files share what the operating system
keeps of them."""

from __future__ import annotations

import ctypes
import mmap
from collections.abc import Callable
from functools import cache

import numpy as np
import torch
from torch import Tensor

from wavekv.errors import ContextFormatError
from wavekv.kernels.crc32 import crc32_pages
from wavekv.kvstore.arena import CHUNK_BYTES, Brought, HostArena, TierBytes
from wavekv.kvstore.budget import MemoryBudget
from wavekv.kvstore.disk_tier import SavedPages
from wavekv.kvstore.layout import KVLayout
from wavekv.kvstore.page_file import Rows


class MappedArena(HostArena):
    """Pages of files, which are the first ids and have a reference for good, then pages in memory.

    A page of a file is checked against its checksum when it is brought or read first.
    """

    def __init__(
        self,
        layout: KVLayout,
        budget: MemoryBudget,
        saved: SavedPages,
        *,
        chunk_bytes: int = CHUNK_BYTES,
    ) -> None:
        size, files, rows = layout.page_bytes, saved.files, saved.rows_per_file
        fitting = max(1, min(chunk_bytes, budget.limit // 8) // size)
        per_chunk = min(rows, 1 << fitting.bit_length() - 1)
        super().__init__(layout, budget, pin=False, chunk_bytes=per_chunk * size)
        self._names, self._rows, self._crc32 = saved.names, rows, saved.crc32
        self._is_checked = np.zeros(len(saved.crc32), dtype=bool)
        chunks = [chunk for file in files for chunk in file.split(per_chunk)]
        self._adopt(chunks)
        self._num_mapped = len(chunks)
        self.ids.allocate(self.capacity)
        self._num_checked_bytes = 0

    def bring(self, ids: Tensor) -> Brought:
        """Have the pages `ids` (any shape, -1 for none) checked.

        Raises:
            ContextFormatError: a page is not what was saved.
        """
        wanted = ids.flatten().numpy()
        of_file = wanted[(wanted >= 0) & (wanted < len(self._crc32))]
        new = np.unique(of_file[~self._is_checked[of_file]])
        if len(new):
            self._check(new)
        return Brought(ids, len(new))

    @property
    def moved(self) -> TierBytes:
        """As `HostArena.moved`: pages that were read and found sound."""
        return TierBytes(self._num_checked_bytes, 0)

    def held(self, ids: Tensor) -> TierBytes:
        """As `HostArena.held`; what is mapped counts as held by files."""
        num_mapped = int((ids < len(self._crc32)).sum())
        size = self.layout.page_bytes
        return TierBytes((ids.numel() - num_mapped) * size, num_mapped * size)

    def gather(self, ids: Tensor, out: Tensor | None = None) -> Tensor:
        """As `HostArena.gather`, of pages that are checked."""
        self.bring(ids)
        return super().gather(ids, out)

    def _check(self, pages: Rows) -> None:
        self._expect_soon(pages)
        size = self.layout.page_bytes
        crc32 = crc32_pages(self.chunks, torch.from_numpy(pages), size).numpy()
        wrong = np.flatnonzero(crc32 != self._crc32[pages])
        if len(wrong):
            page = int(pages[wrong[0]])
            raise ContextFormatError(
                f"expected page {page % self._rows} of {self._names[page // self._rows]} with "
                f"crc32={self._crc32[page]:08x}, got {crc32[wrong[0]]:08x}; the file is damaged, "
                "take another copy or prefill again"
            )
        self._is_checked[pages] = True
        self._num_checked_bytes += len(pages) * size

    def _expect_soon(self, pages: Rows) -> None:
        """Have the system begin to read all of them: one after another they take a disk's latency
        each."""
        if not hasattr(mmap, "MADV_WILLNEED"):
            return
        madvise = _libc_madvise()
        size, block = self.layout.page_bytes, mmap.PAGESIZE
        starts = np.array([chunk.data_ptr() for chunk in self.chunks[: self._num_mapped]])
        where, slot = np.divmod(pages, self.pages_per_chunk)
        first = (starts[where] + slot * size) // block
        last = (starts[where] + (slot + 1) * size - 1) // block
        joins = first[1:] <= last[:-1] + 1
        begins = np.concatenate([[True], ~joins])
        ends = np.concatenate([~joins, [True]])
        for begin, end in zip(first[begins].tolist(), last[ends].tolist(), strict=True):
            madvise(begin * block, (end - begin + 1) * block, mmap.MADV_WILLNEED)


@cache
def _libc_madvise() -> Callable[[int, int, int], int]:
    """Of the C library: Python's belongs to one mapping, and knows no addresses."""
    madvise = ctypes.CDLL(None).madvise
    madvise.argtypes = ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int
    call: Callable[[int, int, int], int] = madvise
    return call
