"""The host arena: every page of a cache, in chunks of CPU memory (pinned for an accelerator).

Pages are written once and then only read, so sequences and forks share them by counting references.
The arena knows page ids and bytes, and nothing of heads, layers or tokens.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from wavekv.errors import LayoutError
from wavekv.kvstore.budget import MemoryBudget
from wavekv.kvstore.layout import KVLayout

CHUNK_BYTES = 64 << 20
"""A power of two: what a pinned allocation rounds up to anyway."""


class HostArena:
    """Pages [2, P, D] by id, in chunks [C, 2, P, D]: page i is `chunks[i // C][i % C]`."""

    def __init__(
        self, layout: KVLayout, budget: MemoryBudget, *, pin: bool, chunk_bytes: int = CHUNK_BYTES
    ) -> None:
        self.layout, self.budget, self.pin = layout, budget, pin
        fitting = min(chunk_bytes, budget.limit) // layout.page_bytes
        self.pages_per_chunk = max(1, fitting)
        self.chunks: list[Tensor] = []
        self._references = torch.empty(0, dtype=torch.int32)
        self._free = torch.empty(0, dtype=torch.int64)

    def __del__(self) -> None:
        self.budget.give(len(self.chunks) * self._chunk_bytes)

    @property
    def capacity(self) -> int:
        """Pages that the chunks hold."""
        return len(self.chunks) * self.pages_per_chunk

    @property
    def num_pages(self) -> int:
        """Pages in use."""
        return self.capacity - len(self._free)

    @property
    def nbytes(self) -> int:
        """Bytes of the pages in use."""
        return self.num_pages * self.layout.page_bytes

    def reserve(self, num_pages: int) -> None:
        """Make room for `num_pages` more.

        Raises:
            CapacityError: they do not fit the budget; nothing is allocated then.
        """
        lacking = num_pages - len(self._free)
        if lacking <= 0:
            return
        num_chunks = -(-lacking // self.pages_per_chunk)
        self.budget.take(num_chunks * self._chunk_bytes)
        try:
            new = [self._new_chunk() for _ in range(num_chunks)]
        except BaseException:
            self.budget.give(num_chunks * self._chunk_bytes)
            raise
        start = self.capacity
        self.chunks += new
        self._references = torch.cat(
            [self._references, self._references.new_zeros(self.capacity - start)]
        )
        self._free = torch.cat([self._free, torch.arange(start, self.capacity)])

    def allocate(self, num_pages: int) -> Tensor:
        """Return the ids [num_pages] of free pages, each with one reference.

        Raises:
            CapacityError: as `reserve`.
        """
        self.reserve(num_pages)
        ids = self._free[:num_pages].clone()
        self._free = self._free[num_pages:]
        self._references[ids] = 1
        return ids

    def retain(self, ids: Tensor) -> None:
        """Add a reference to each page of `ids` (any shape; an id may recur)."""
        ids = ids.flatten()
        self._references.index_add_(0, ids, torch.ones_like(ids, dtype=torch.int32))

    def release(self, ids: Tensor) -> None:
        """Take a reference from each page of `ids`; pages without one are free again."""
        ids = ids.flatten()
        self._references.index_add_(0, ids, torch.full_like(ids, -1, dtype=torch.int32))
        touched = torch.unique(ids)
        self._free = torch.cat([touched[self._references[touched] == 0], self._free])

    def write(self, ids: Tensor, pages: Tensor) -> None:
        """Store pages [n, 2, P, D] under ids [n]. From a CUDA device the copy may still be running
        on the current stream when this returns.

        Raises:
            LayoutError: pages of another shape or dtype.
        """
        expected = (len(ids), *self.layout.page_shape)
        if tuple(pages.shape) != expected or pages.dtype != self.layout.dtype:
            raise LayoutError(
                f"pages must be {expected} {self.layout.dtype}, "
                f"got {tuple(pages.shape)} {pages.dtype}"
            )
        for chunk, rows, slots in self._by_chunk(ids):
            start, count = int(slots[0]), len(slots)
            if torch.equal(slots, torch.arange(start, start + count)):
                chunk[start : start + count].copy_(pages[rows], non_blocking=True)
            else:
                chunk.index_copy_(0, slots, pages[rows].to("cpu"))

    def read(self, ids: Tensor, out: Tensor | None = None) -> Tensor:
        """Copy the pages of ids [n] into `out` [n, 2, P, D] (new CPU memory by default)."""
        if out is None:
            out = torch.empty(len(ids), *self.layout.page_shape, dtype=self.layout.dtype)
        for chunk, rows, slots in self._by_chunk(ids):
            if len(rows) == len(ids):
                torch.index_select(chunk, 0, slots, out=out)
            else:
                out[rows] = chunk[slots]
        return out

    def check_integrity(self) -> None:
        """Raise RuntimeError unless each page is either free or referenced."""
        free = torch.zeros(self.capacity, dtype=torch.bool)
        free[self._free] = True
        twice = len(self._free) - int(free.sum())
        wrong = int((free != (self._references == 0)).sum())
        if twice or wrong or (self.capacity and int(self._references.min()) < 0):
            raise RuntimeError(
                f"arena integrity: {twice} pages twice in the free list, {wrong} of "
                f"{self.capacity} pages both free and referenced or neither"
            )

    @property
    def _chunk_bytes(self) -> int:
        return self.pages_per_chunk * self.layout.page_bytes

    def _new_chunk(self) -> Tensor:
        shape = (self.pages_per_chunk, *self.layout.page_shape)
        return torch.empty(shape, dtype=self.layout.dtype, pin_memory=self.pin)

    def _by_chunk(self, ids: Tensor) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
        """For each chunk that holds some of ids [n]: (chunk, positions in ids, slots in it)."""
        where = ids // self.pages_per_chunk
        for index in torch.unique(where).tolist():
            rows = (where == index).nonzero().squeeze(1)
            yield self.chunks[index], rows, ids[rows] - index * self.pages_per_chunk
