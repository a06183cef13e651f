"""The host arena: every page of a cache, in chunks of CPU memory (pinned for an accelerator).

Pages are stored as its layout says: in the model's dtype, or as small integers.
Pages are written once and then only read, so sequences and forks share them by counting references.
The arena knows page ids and bytes, and nothing of heads, layers or tokens.
"""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import Future
from contextlib import suppress
from functools import partial
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from wavekv.errors import CapacityError, LayoutError
from wavekv.kvstore.ahead import ChunksAhead
from wavekv.kvstore.aligned import aligned_empty
from wavekv.kvstore.budget import MemoryBudget
from wavekv.kvstore.layout import KVLayout
from wavekv.kvstore.page_ids import PageIds
from wavekv.kvstore.pinned import pinned_empty

CHUNK_BYTES = 64 << 20
"""A power of two: what a pinned allocation rounds up to anyway."""

LEAST_RUN = 32
"""Pages that consecutive ids must have on average to be copied run by run."""

_LEAST_CHUNKS = 8
"""A budget holds at least so many chunks: what does not fill the last one is little."""


class Brought(NamedTuple):
    """Pages that are in memory until the next are brought."""

    slots: Tensor
    """Their ids in the host arena, in the shape in which they were asked for; -1 for none."""
    num_read: int
    """How many had to be read from a disk."""


class TierBytes(NamedTuple):
    """Bytes of each tier."""

    host: int
    disk: int


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
        self.ids = PageIds()
        self._num_mapped = 0
        """Chunks that take nothing of the budget."""

    def __del__(self) -> None:
        self._ahead.cancel()
        own = len(self.chunks) - self._num_mapped
        self.budget.give((own + self._num_ordered) * self.chunk_nbytes)

    @property
    def host(self) -> HostArena:
        """Where pages are in memory; `bring` says at which of its ids."""
        return self

    @property
    def capacity(self) -> int:
        """Pages that the chunks hold."""
        return len(self.chunks) * self.pages_per_chunk

    @property
    def chunk_nbytes(self) -> int:
        """Bytes of a chunk."""
        return self.pages_per_chunk * self.layout.page_bytes

    @property
    def num_ordered_pages(self) -> int:
        """Pages of chunks that were ordered and not taken yet."""
        return self._num_ordered * self.pages_per_chunk

    @property
    def num_orderable(self) -> int:
        """Pages that the budget lets be ordered beside those that were."""
        chunks = self._num_ordered + self.budget.free // self.chunk_nbytes
        return max(0, len(self.ids.free) + chunks * self.pages_per_chunk - self._promised)

    @property
    def max_chunks(self) -> int:
        """Chunks that the budget allows."""
        return self._num_mapped + self.budget.limit // self.chunk_nbytes + 1

    @property
    def num_pages(self) -> int:
        """Pages in use."""
        self.ids.collect()
        return self.ids.num_used

    @property
    def nbytes(self) -> int:
        """Bytes of the pages in use."""
        return self.num_pages * self.layout.page_bytes

    @property
    def num_ready(self) -> int:
        """Chunks that were ordered, and are made."""
        return self._ahead.num_ready

    def reserve(self, num_pages: int) -> None:
        """Make room for `num_pages` more.

        Raises:
            CapacityError: they do not fit the budget; nothing is allocated then.
        """
        self.ids.collect()
        lacking = num_pages - len(self.ids.free)
        if lacking <= 0:
            return
        num_chunks = -(-lacking // self.pages_per_chunk)
        self.budget.check(max(0, num_chunks - self._num_ordered) * self.chunk_nbytes)
        num_chunks -= self._take_ordered(num_chunks)
        self.budget.take(num_chunks * self.chunk_nbytes)
        try:
            new = [self._new_chunk() for _ in range(num_chunks)]
        except BaseException:
            self.budget.give(num_chunks * self.chunk_nbytes)
            raise
        self._adopt(new)

    def order(self, num_pages: int) -> None:
        """Say that `num_pages` more will be allocated, beside those said before: memory for them is
        made on another thread, and counts as used from now on.

        Raises:
            CapacityError: they do not fit the budget; nothing is ordered then.
        """
        self.ids.collect()
        wanted = self._promised + num_pages
        lacking = wanted - len(self.ids.free) - self._num_ordered * self.pages_per_chunk
        num_chunks = max(0, -(-lacking // self.pages_per_chunk))
        self.budget.take(num_chunks * self.chunk_nbytes)
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
        self.budget.give(self._num_ordered * self.chunk_nbytes)
        self._num_ordered = self._promised = 0

    def allocate(self, num_pages: int) -> Tensor:
        """Return the ids [num_pages] of free pages, each with one reference.

        Raises:
            CapacityError: as `reserve`.
        """
        self.reserve(num_pages)
        self._promised = max(0, self._promised - num_pages)
        return torch.from_numpy(self.ids.allocate(num_pages))

    def seal(self, ids: Tensor, after: Future[Any] | None = None) -> None:
        """Say that pages are complete, now or once a future is done: nothing writes to them from
        then on."""

    def bring(self, ids: Tensor) -> Brought:
        """Have the pages `ids` (any shape, -1 for none) in memory: they are."""
        return Brought(ids, 0)

    def slots_of(self, ids: Tensor) -> Tensor:
        """Where pages are in `host`."""
        return ids

    @property
    def moved(self) -> TierBytes:
        """Bytes that were read from files to memory, and written from memory to them."""
        return TierBytes(0, 0)

    def held(self, ids: Tensor) -> TierBytes:
        """How many bytes of the pages `ids` memory holds, and how many files do."""
        return TierBytes(ids.numel() * self.layout.page_bytes, 0)

    def retain(self, ids: Tensor) -> None:
        """Add a reference to each page of `ids` (any shape; an id may recur)."""
        self.ids.retain(ids)

    def release(self, ids: Tensor) -> None:
        """Take a reference from each page of `ids`; pages without one are free again."""
        self.ids.release(ids.flatten().numpy())

    def drop(self, ids: Tensor) -> None:
        """`release` for finalisers, which may run on any thread and inside any other method: it
        takes effect when the arena is next used."""
        self.ids.drop(ids)

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
        self.ids.collect()
        self.ids.check_integrity()

    def _take_ordered(self, count: int) -> int:
        """Adopt at most `count` of the chunks that were ordered; how many came."""
        new = self._ahead.take(min(count, self._num_ordered))
        # void: the system has refused one
        void = self._num_ordered - len(new) - self._ahead.num_ordered
        self._num_ordered -= len(new) + void
        self.budget.give(void * self.chunk_nbytes)
        self._adopt(new)
        return len(new)

    def _adopt(self, new: list[Tensor]) -> None:
        self.chunks += new
        self.ids.grow(len(new) * self.pages_per_chunk)

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
        return pinned_empty(shape, dtype) if pin else aligned_empty(shape, dtype)
