"""The paged zone of one layer: which arena pages hold which tokens, and the statistics of each page.

Page ids, counts and token ids stay on the host; counts and statistics also live on the device,
where a step ranks and estimates pages. Pages come in segments, in the order of the tokens.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from wavekv.kvstore import GrowingTensor, HostArena


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
    mean: Tensor
    """[B, Hkv, n, D] mean key, device."""
    variance: Tensor
    """[B, Hkv, n, D] variance of the keys, device."""
    value_mean: Tensor
    """[B, Hkv, n, D] mean value, device."""


class PagedZone:
    """Pages [B, Hkv, N] of one layer; holds one reference to each in the arena."""

    def __init__(self, arena: HostArena, batch: int, num_kv_heads: int, like: Tensor) -> None:
        """`like` gives the device and dtype of the statistics."""
        self.arena = arena
        self.segments: list[tuple[int, int]] = []
        """(end position, end page) of each segment."""
        shape, P, D = (batch, num_kv_heads, 0), arena.layout.page_size, arena.layout.head_dim
        self.page_ids = GrowingTensor(torch.empty(shape, dtype=torch.int64), dim=2)
        self.counts = GrowingTensor(torch.empty(shape, dtype=torch.int32), dim=2)
        self.token_ids = GrowingTensor(torch.empty(*shape, P, dtype=torch.int32), dim=2)
        self.device_counts = GrowingTensor(like.new_empty(shape, dtype=torch.int32), dim=2)
        self.mean, self.variance, self.value_mean = (
            GrowingTensor(like.new_empty(*shape, D), dim=2) for _ in range(3)
        )

    def __del__(self) -> None:
        self.arena.release(self.page_ids.view)

    @property
    def num_pages(self) -> int:
        """Pages N of each KV head, empty ones included."""
        return len(self.page_ids)

    @property
    def num_tokens(self) -> int:
        """The position behind the last paged token."""
        return self.segments[-1][0] if self.segments else 0

    @property
    def statistics_nbytes(self) -> int:
        """Bytes of what a step reads of every page."""
        return self.mean.nbytes + self.variance.nbytes + self.value_mean.nbytes

    def append(self, segment: SegmentPages) -> None:
        """Add the pages of the next segment; their references pass to this zone."""
        for part in ("page_ids", "counts", "token_ids", "mean", "variance", "value_mean"):
            getattr(self, part).append(getattr(segment, part))
        self.device_counts.append(segment.counts)
        self.segments.append((segment.start + segment.length, self.num_pages))

    def segment_start(self, end: int) -> int:
        """The start of the segment that holds position `end - 1`; `end` if it ends there or none."""
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
        ids = self.page_ids.view[:, :, first:last]
        B, H, n = ids.shape
        P, D = self.arena.layout.page_size, self.arena.layout.head_dim
        pages = self.arena.read(ids.reshape(-1)).reshape(B, H, n, 2, P, D)
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

    def truncate(self, start: int) -> None:
        """Forget all segments from position `start` (where one begins) on."""
        keep = self._pages_until(start)
        self.arena.release(self.page_ids.view[:, :, keep:])
        for part in self._parts():
            part.truncate(keep)
        self.segments = [segment for segment in self.segments if segment[0] <= start]

    def select(self, index: Tensor) -> None:
        """Keep the sequences `index` [B'], in that order; pages are shared, not copied."""
        before = self.page_ids.view
        self.arena.retain(before[index.cpu()])
        self.arena.release(before)
        for part in self._parts():
            part.select(index)

    def clone(self) -> PagedZone:
        """An independent zone that shares the pages."""
        copy = object.__new__(PagedZone)
        copy.arena, copy.segments = self.arena, list(self.segments)
        copy.page_ids, copy.counts = self.page_ids.clone(), self.counts.clone()
        copy.token_ids, copy.device_counts = self.token_ids.clone(), self.device_counts.clone()
        copy.mean, copy.variance = self.mean.clone(), self.variance.clone()
        copy.value_mean = self.value_mean.clone()
        self.arena.retain(copy.page_ids.view)
        return copy

    def _pages_until(self, position: int) -> int:
        return max((pages for stop, pages in self.segments if stop <= position), default=0)

    def _parts(self) -> tuple[GrowingTensor, ...]:
        return (
            self.page_ids,
            self.counts,
            self.token_ids,
            self.device_counts,
            self.mean,
            self.variance,
            self.value_mean,
        )
