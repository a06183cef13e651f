"""The host arena: every page of a cache, in chunks of CPU memory (pinned for an accelerator).

Pages are stored as its layout says: in the model's dtype, or as small integers.
Pages are written once and then only read, so sequences and forks share them by counting references.
The arena knows page ids and bytes, and nothing of heads, layers or tokens.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator
from contextlib import suppress
from functools import partial

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from wavekv.errors import CapacityError, LayoutError
from wavekv.kvstore.ahead import ChunksAhead
from wavekv.kvstore.budget import MemoryBudget
from wavekv.kvstore.layout import KVLayout
from wavekv.kvstore.pinned import pinned_empty

CHUNK_BYTES = 64 << 20
"""A power of two: what a pinned allocation rounds up to anyway."""

LEAST_RUN = 32
"""Pages that consecutive ids must have on average to be copied run by run."""

_LEAST_CHUNKS = 8
"""A budget holds at least so many chunks: what does not fill the last one is little."""


class HostArena:
    """Pages by id, in chunks [C, *stored_shape]: page i is `chunks[i // C][i % C]`."""

    def __init__(
        self, layout: KVLayout, budget: MemoryBudget, *, pin: bool, chunk_bytes: int = CHUNK_BYTES
    ) -> None:
        self.chunks: list[Tensor] = []
        self.layout, self.budget, self.pin = layout, budget, pin
        fitting = min(chunk_bytes, budget.limit // _LEAST_CHUNKS) // layout.page_bytes
        self.pages_per_chunk = max(1, fitting)
        shape = (self.pages_per_chunk, *layout.stored_shape)
        self._make_chunk = partial(_new_chunk, shape, layout.stored_dtype, pin)
        self._ahead = ChunksAhead(self._make_chunk)
        self._num_ordered = 0
        self._promised = 0
        # numpy: tensors made inside inference mode could not be changed outside it
        self._references = np.empty(0, dtype=np.int32)
        self._free = np.empty(0, dtype=np.int64)
        self._dropped: deque[NDArray[np.int64]] = deque()

    def __del__(self) -> None:
        self._ahead.cancel()
        self.budget.give((len(self.chunks) + self._num_ordered) * self._chunk_bytes)

    @property
    def capacity(self) -> int:
        """Pages that the chunks hold."""
        return len(self.chunks) * self.pages_per_chunk

    @property
    def max_chunks(self) -> int:
        """Chunks that the budget allows."""
        return self.budget.limit // self._chunk_bytes + 1

    @property
    def num_pages(self) -> int:
        """Pages in use."""
        self._collect()
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
        self._collect()
        lacking = num_pages - len(self._free)
        if lacking <= 0:
            return
        num_chunks = -(-lacking // self.pages_per_chunk)
        self.budget.check(max(0, num_chunks - self._num_ordered) * self._chunk_bytes)
        num_chunks -= self._take_ordered(num_chunks)
        self.budget.take(num_chunks * self._chunk_bytes)
        try:
            new = [self._new_chunk() for _ in range(num_chunks)]
        except BaseException:
            self.budget.give(num_chunks * self._chunk_bytes)
            raise
        self._adopt(new)

    def order(self, num_pages: int) -> None:
        """Say that `num_pages` more will be allocated, beside those said before: memory for them is
        made on another thread, and counts as used from now on.

        Raises:
            CapacityError: they do not fit the budget; nothing is ordered then.
        """
        self._collect()
        wanted = self._promised + num_pages
        lacking = wanted - len(self._free) - self._num_ordered * self.pages_per_chunk
        num_chunks = max(0, -(-lacking // self.pages_per_chunk))
        self.budget.take(num_chunks * self._chunk_bytes)
        self._promised = wanted
        self._num_ordered += num_chunks
        self._ahead.order(num_chunks)

    def order_ahead(self, num_pages: int) -> None:
        """Order what a later step will need, if it fits. Only where memory is pinned: elsewhere a
        chunk takes no time."""
        if self.pin:
            with suppress(CapacityError):
                self.order(num_pages)

    def cancel_orders(self) -> None:
        """Take back all that was ordered and not allocated; its memory is free again, but for a
        chunk that is being made."""
        self._ahead.cancel()
        self.budget.give(self._num_ordered * self._chunk_bytes)
        self._num_ordered = self._promised = 0

    def allocate(self, num_pages: int) -> Tensor:
        """Return the ids [num_pages] of free pages, each with one reference.

        Raises:
            CapacityError: as `reserve`.
        """
        self.reserve(num_pages)
        ids, self._free = self._free[:num_pages].copy(), self._free[num_pages:]
        self._references[ids] = 1
        self._promised = max(0, self._promised - num_pages)
        return torch.from_numpy(ids)

    def retain(self, ids: Tensor) -> None:
        """Add a reference to each page of `ids` (any shape; an id may recur)."""
        np.add.at(self._references, ids.flatten().numpy(), 1)

    def release(self, ids: Tensor) -> None:
        """Take a reference from each page of `ids`; pages without one are free again."""
        self._release(ids.flatten().numpy())

    def drop(self, ids: Tensor) -> None:
        """`release` for finalisers, which may run on any thread and inside any other method: it
        takes effect when the arena is next used."""
        # a copy: the tensor may be in the middle of its own collection
        self._dropped.append(ids.flatten().numpy().copy())

    def write(self, ids: Tensor, pages: Tensor, counts: Tensor | None = None) -> None:
        """Store pages [n, 2, P, D] under ids [n]. From a CUDA device the copy may still be running
        on the current stream when this returns. counts: [n] tokens of each page, or None if all
        are full; what is behind them need not come back.

        Raises:
            LayoutError: pages of another shape or dtype.
        """
        expected = (len(ids), *self.layout.page_shape)
        if tuple(pages.shape) != expected or pages.dtype != self.layout.dtype:
            raise LayoutError(
                f"pages must be {expected} {self.layout.dtype}, "
                f"got {tuple(pages.shape)} {pages.dtype}"
            )
        self.put(ids, self.layout.encode(pages, counts))

    def put(self, ids: Tensor, stored: Tensor) -> None:
        """`write` pages that are encoded: [n, *stored_shape], as `KVLayout.encode` returns them."""
        runs = self.runs(ids)
        if len(runs) * LEAST_RUN > len(ids):
            for chunk, rows, slots in self._by_chunk(ids):
                chunk.index_copy_(0, slots, stored[rows].to("cpu"))
            return
        for start, run in runs:
            run.copy_(stored[start : start + len(run)], non_blocking=True)

    def read(self, ids: Tensor) -> Tensor:
        """The pages of ids [n] in the model's dtype, in new CPU memory: [n, 2, P, D]."""
        return self.layout.decode(self.gather(ids))

    def gather(self, ids: Tensor, out: Tensor | None = None) -> Tensor:
        """Copy the pages of ids [n], as they are stored, into `out` [n, *stored_shape] (new CPU
        memory by default)."""
        if out is None:
            out = torch.empty(len(ids), *self.layout.stored_shape, dtype=self.layout.stored_dtype)
        for chunk, rows, slots in self._by_chunk(ids):
            if len(rows) == len(ids):
                torch.index_select(chunk, 0, slots, out=out)
            else:
                out[rows] = chunk[slots]
        return out

    def runs(self, ids: Tensor) -> list[tuple[int, Tensor]]:
        """The pages of ids [n] where they lie: stretches of consecutive ids within a chunk, each as
        its first position in `ids` and a view [m, *stored_shape] of the chunk."""
        pages = ids.numpy()
        if not len(pages):
            return []
        begins = (np.diff(pages) != 1) | (pages[1:] % self.pages_per_chunk == 0)
        starts = np.concatenate([[0], np.flatnonzero(begins) + 1])
        lengths = np.diff(starts, append=len(pages))
        where, slots = np.divmod(pages[starts], self.pages_per_chunk)
        return [
            (start, self.chunks[chunk][slot : slot + length])
            for start, length, chunk, slot in zip(
                *(x.tolist() for x in (starts, lengths, where, slots)), strict=True
            )
        ]

    def check_integrity(self) -> None:
        """Raise RuntimeError unless each page is either free or referenced."""
        self._collect()
        free = np.zeros(self.capacity, dtype=bool)
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

    def _release(self, pages: NDArray[np.int64]) -> None:
        np.subtract.at(self._references, pages, 1)
        touched = np.unique(pages)
        self._free = np.concatenate([touched[self._references[touched] == 0], self._free])

    def _collect(self) -> None:
        while self._dropped:
            self._release(self._dropped.popleft())

    def _take_ordered(self, count: int) -> int:
        """Adopt at most `count` of the chunks that were ordered; how many came."""
        new = self._ahead.take(min(count, self._num_ordered))
        # void: the system has refused one
        void = self._num_ordered - len(new) - self._ahead.num_ordered
        self._num_ordered -= len(new) + void
        self.budget.give(void * self._chunk_bytes)
        self._adopt(new)
        return len(new)

    def _adopt(self, new: list[Tensor]) -> None:
        start = self.capacity
        self.chunks += new
        self._references = np.pad(self._references, (0, self.capacity - start))
        self._free = np.concatenate([self._free, np.arange(start, self.capacity)])

    def _new_chunk(self) -> Tensor:
        return self._make_chunk()

    def _by_chunk(self, ids: Tensor) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
        """For each chunk that holds some of ids [n]: (chunk, positions in ids, slots in it)."""
        where = ids // self.pages_per_chunk
        for index in torch.unique(where).tolist():
            rows = (where == index).nonzero().squeeze(1)
            yield self.chunks[index], rows, ids[rows] - index * self.pages_per_chunk


def _new_chunk(shape: tuple[int, ...], dtype: torch.dtype, pin: bool) -> Tensor:
    with torch.inference_mode(False):
        return pinned_empty(shape, dtype) if pin else torch.empty(shape, dtype=dtype)
