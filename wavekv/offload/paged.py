"""The paged zone of one layer: which pages hold which tokens, and the statistics of each page.

Page ids, counts and token ids stay on the host; the index lives on the device, where a step ranks
and estimates pages. Pages come in segments, in the order of the tokens.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from wavekv.growing import GrowingTensor
from wavekv.index import page_scatter
from wavekv.index.levels import LevelPages
from wavekv.index.scatter import SpanScatter
from wavekv.kernels.page_index import PageIndex
from wavekv.kvstore import PageArena
from wavekv.offload.growing_index import GrowingIndex
from wavekv.offload.interrupts import uninterrupted
from wavekv.offload.resident import ResidentPages


@dataclass(frozen=True, slots=True)
class SegmentPages:
    """The pages of one segment of tokens [start, start + length), for B sequences and Hkv heads."""

    start: int
    length: int
    page_ids: Tensor
    """[B, Hkv, n] int64 arena ids, host."""
    counts: Tensor
    """[B, Hkv, n] int32 tokens in each page, host."""
    token_ids: Tensor
    """[B, Hkv, n, P] int32 positions, -1 where a slot holds none, host."""
    index: PageIndex
    """Of [B, Hkv] rows and n pages, device."""
    scatter: Tensor
    """[B, Hkv, m, 2, D, D] float32 within-page scatter of each span touched, device
    (`scatter_by_span`)."""
    num_resident: int = 0
    """How many pages, the first of each head, were put into the zone's `ResidentPages`."""


_PARTS = ("page_ids", "counts", "token_ids", "index")
"""What a segment and a zone have for each page."""


class PagedZone:
    """Pages [B, Hkv, N] of one layer; holds one reference to each in the arena."""

    def __init__(
        self, arena: PageArena, like: Tensor, *, span_pages: int, block_pages: int
    ) -> None:
        """like: [B, Hkv, 0, D] gives shape and device. span_pages: pages whose within-page scatter
        is kept as one sum, whole blocks; block_pages: pages of a block, of which every segment has
        whole ones."""
        self.arena = arena
        self._building: list[Tensor] = []
        self.segments: list[tuple[int, int]] = []
        """(end position, end page) of each segment."""
        self.resident: ResidentPages | None = None
        """A copy of some pages on the device while a prompt is prefilled."""
        shape, P = like.shape[:3], arena.layout.page_size
        self.page_ids = GrowingTensor(torch.empty(shape, dtype=torch.int64), dim=2)
        self.counts = GrowingTensor(torch.empty(shape, dtype=torch.int32), dim=2)
        self.token_ids = GrowingTensor(torch.empty(*shape, P, dtype=torch.int32), dim=2)
        self.index = GrowingIndex(like, P, block_pages)
        self.scatter = SpanScatter(like, span_pages)

    def __del__(self) -> None:
        for ids in (self.page_ids.view, *self._building):
            self.arena.drop(ids)

    @property
    def num_pages(self) -> int:
        """Pages N of each KV head, empty ones included."""
        return len(self.page_ids)

    @property
    def num_tokens(self) -> int:
        """The position behind the last paged token."""
        return self.segments[-1][0] if self.segments else 0

    @property
    def summary(self) -> LevelPages:
        """What ranks and estimates the pages: views."""
        return LevelPages(self.index.view, self.scatter.spans.view, self.scatter.span_pages)

    @property
    def statistics_nbytes(self) -> int:
        """Bytes of the index: what the device keeps of every page to rank and estimate it."""
        return self.index.nbytes + self.scatter.spans.nbytes

    def reserve(self, num_pages: int) -> None:
        """Make room in the index for `num_pages` more of each head: buffers that double hold up to
        twice of what is needed, and both sizes while they are copied."""
        total = self.num_pages + num_pages
        self.index.reserve(total)
        for part in self.page_ids, self.counts, self.token_ids:
            part.fit(max(total, part.buffer.shape[2]))
        spans = self.scatter.spans
        spans.fit(max(-(-total // self.scatter.span_pages), spans.buffer.shape[2]))

    def allocate(self, num_pages: int) -> Tensor:
        """Ids [num_pages] for the pages of a later segment, held until `append` or `give_up`.

        Raises:
            CapacityError: as `HostArena.reserve`.
        """
        self.arena.reserve(num_pages)
        with uninterrupted():
            ids = self.arena.allocate(num_pages)
            self._building.append(ids)
        return ids

    def give_up(self) -> None:
        """Release the pages that were allocated and not appended: none is under construction."""
        if self.resident is not None:
            self.resident.withdraw()
        while self._building:
            self.arena.release(self._building.pop())

    def append(self, segment: SegmentPages) -> None:
        """Add the pages of the segment whose ids were allocated first. All or nothing."""
        before = self.num_pages
        try:
            for name, part in zip(_PARTS, self._parts(), strict=True):
                part.append(getattr(segment, name))
            self.scatter.add(before, segment.scatter)
        except BaseException:
            for part in self._parts():
                part.truncate(before)
            raise
        _keep_until_read(segment)
        if self.resident is not None and segment.num_resident:
            page_size = self.arena.layout.page_size
            self.resident.claim(before, segment.num_resident, page_size)
        del self._building[:1]
        self.segments.append((segment.start + segment.length, self.num_pages))

    def segment_start(self, end: int) -> int:
        """The start of the segment that is cut at `end`; `end` itself if none is."""
        start = 0
        for stop, _ in self.segments:
            if stop > end:
                return start
            start = stop
        return end

    def recover(self, start: int, end: int) -> tuple[Tensor, Tensor, Tensor]:
        """Copy the tokens [start, end) out of their pages, in order.

        Returns host tensors: keys and values [B, Hkv, end - start, D], valid [B, end - start]
        (False for tokens that no page holds).
        """
        first = self._pages_until(start)
        last = min(pages for stop, pages in self.segments if stop >= end)
        pages = self._read(first, last)
        B, H, n, _, P, D = pages.shape
        positions = self.token_ids.view[:, :, first:last].reshape(B, H, n * P).long()
        inside = (positions >= start) & (positions < end)
        # a spare slot at the end takes what is outside
        slots = torch.where(inside, positions - start, end - start)
        rows = slots[..., None].expand(-1, -1, -1, D)
        recovered = []
        for half in range(2):
            tokens = pages[:, :, :, half].reshape(B, H, n * P, D)
            target = tokens.new_zeros(B, H, end - start + 1, D)
            recovered.append(target.scatter_(2, rows, tokens)[:, :, :-1])
        valid = torch.zeros(B, end - start + 1, dtype=torch.bool)
        valid.scatter_(1, slots[:, 0], True)
        return recovered[0], recovered[1], valid[:, :-1]

    def scatter_before(self, start: int) -> Tensor | None:
        """The scatter [B, Hkv, 2, D, D] float32 that the last span has after `truncate(start)`,
        from its pages; None if it stays as it is."""
        keep = self._pages_until(start)
        first = keep - keep % self.scatter.span_pages
        if keep in (first, self.num_pages):
            return None
        pages = self._read(first, keep).flatten(0, 1).to(self.scatter.spans.buffer.device)
        counts = self.counts.view[:, :, first:keep].flatten(0, 1).to(pages.device)
        scatter = page_scatter(pages[:, :, 0], pages[:, :, 1], counts)
        return scatter.reshape(*self.page_ids.view.shape[:2], *scatter.shape[1:])

    def truncate(self, start: int, last_span: Tensor | None) -> None:
        """Forget all segments from position `start` (where one begins) on. Cannot fail.

        last_span: from `scatter_before(start)`, which can.
        """
        self.resident = None
        keep = self._pages_until(start)
        self.arena.release(self.page_ids.view[:, :, keep:])
        for part in self._parts():
            part.truncate(keep)
        self.scatter.truncate(keep, last_span)
        self.segments = [segment for segment in self.segments if segment[0] <= start]

    def select(self, index: Tensor) -> None:
        """Keep the sequences `index` [B'], in that order; pages are shared, not copied."""
        self.resident = None
        before = self.page_ids.view
        self.arena.retain(before[index.cpu()])
        self.arena.release(before)
        for part in self._parts():
            part.select(index)
        self.scatter.select(index)

    def clone(self) -> PagedZone:
        """An independent zone that shares the pages."""
        copy = object.__new__(PagedZone)
        copy.arena, copy.segments, copy._building = self.arena, list(self.segments), []
        copy.resident = None
        copy.page_ids = self.page_ids.clone()
        # before anything can fail: the copy releases them when it goes
        self.arena.retain(copy.page_ids.view)
        for name in _PARTS[1:]:
            setattr(copy, name, getattr(self, name).clone())
        copy.scatter = self.scatter.clone()
        return copy

    def _read(self, first: int, last: int) -> Tensor:
        """A copy of the pages [first, last): [B, Hkv, n, 2, P, D], host."""
        ids = self.page_ids.view[:, :, first:last]
        P, D = self.arena.layout.page_size, self.arena.layout.head_dim
        return self.arena.read(ids.reshape(-1)).reshape(*ids.shape, 2, P, D)

    def _pages_until(self, position: int) -> int:
        return max((pages for stop, pages in self.segments if stop <= position), default=0)

    def _parts(self) -> tuple[GrowingTensor | GrowingIndex, ...]:
        return tuple(getattr(self, name) for name in _PARTS)


def _keep_until_read(segment: SegmentPages) -> None:
    """The device tensors belong to the builder's stream: its next build must not get their memory
    before the current stream has copied them."""
    device = segment.scatter.device
    if device.type != "cuda":
        return
    stream = torch.cuda.current_stream(device)
    for part in (*segment.index, segment.scatter):
        part.record_stream(stream)
