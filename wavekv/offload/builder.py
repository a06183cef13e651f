"""Building pages beside the model: cluster a segment, gather it into pages, copy them to the host.

On CUDA in a worker thread with a stream of its own, so that the next layer computes meanwhile. On a
CPU at once: there a thread would compete with the model for the same cores, and measured slower.
"""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import NamedTuple, TypeVar

import torch
from torch import Tensor

from wavekv.index import balanced_pages
from wavekv.index.levels import index_of_pages
from wavekv.index.scatter import scatter_by_span
from wavekv.kernels.page_index import PageIndex
from wavekv.kvstore import PageArena
from wavekv.offload.paged import SegmentPages
from wavekv.offload.resident import ResidentPages

T = TypeVar("T")

BATCH_BYTES = 128 << 20
"""Keys, as float32, of the segments that are built at once. Building a segment is many small
launches on CUDA: the same number for several of them."""


class PageBuilder:
    """Runs page building in order, on CUDA in the background."""

    def __init__(self) -> None:
        self._worker: ThreadPoolExecutor | None = None
        self._streams: dict[torch.device, torch.cuda.Stream] = {}

    def submit(self, device: torch.device, build: Callable[[], T]) -> Future[T]:
        """Run `build` after all that the current stream of `device` was given so far.

        The result is complete on the host and the device when the future is done, and what `build`
        read may be changed again. An error is the future's.
        """
        if device.type != "cuda":
            return _run_now(build)
        if self._worker is None:
            self._worker = ThreadPoolExecutor(1, thread_name_prefix="wavekv-pages")
        if device not in self._streams:
            self._streams[device] = torch.cuda.Stream(device)
        stream = self._streams[device]
        ready = torch.cuda.current_stream(device).record_event()

        def on_stream() -> T:
            stream.wait_event(ready)
            try:
                return build()
            finally:
                # after an error too: kernels that started still read the inputs
                stream.synchronize()

        return self._worker.submit(_without_grad, on_stream, lambda: torch.cuda.stream(stream))


def _run_now(build: Callable[[], T]) -> Future[T]:
    try:
        result = _without_grad(build, nullcontext)
    except Exception as error:
        return _failed(error)
    future: Future[T] = Future()
    future.set_result(result)
    return future


def _failed(error: Exception) -> Future[T]:
    # not in `_run_now`: the error's traceback holds that frame, and would hold the future with it
    future: Future[T] = Future()
    future.set_exception(error)
    return future


def _without_grad(
    build: Callable[[], T], context: Callable[[], AbstractContextManager[object]]
) -> T:
    # grad and inference modes belong to a thread
    with torch.no_grad(), context():
        return build()


class FormedPages(NamedTuple):
    """Tokens of R rows gathered into pages, with what is known of each page."""

    order: Tensor
    """[R, n, P] int64: which token of the row is in each slot; tokens that are not valid come
    last."""
    counts: Tensor
    """[R, n] int32 valid tokens of each page."""
    keys: Tensor
    """[R, n, P, D]"""
    values: Tensor
    """[R, n, P, D]"""
    summary: PageIndex
    """Of R rows and n pages."""

    @property
    def pages(self) -> Tensor:
        """[R * n, 2, P, D] as an arena stores them."""
        return torch.stack([self.keys, self.values], dim=2).flatten(0, 1)

    @property
    def token_ids(self) -> Tensor:
        """[R, n, P] int32: the token in each slot, -1 where there is none."""
        slot = torch.arange(self.order.shape[2], device=self.order.device)
        held = slot < self.counts.unsqueeze(-1)
        return torch.where(held, self.order, -1).to(torch.int32)


def form_pages(
    keys: Tensor, values: Tensor, valid: Tensor | None, page_size: int, block_pages: int
) -> FormedPages:
    """Cluster the tokens of each row into pages. Nothing waits for the device.

    keys, values: [R, S, D], S whole blocks of `block_pages` pages; valid: [R, S] bool, or None for
    all. Cost: O(S log(S / P) D) a row (see
    `balanced_pages`).
    """
    R, S, D = keys.shape
    n = S // page_size
    order = balanced_pages(keys, page_size, valid)
    rows = order[..., None].expand(-1, -1, D)
    paged_keys, paged_values = (
        x.gather(1, rows).reshape(R, n, page_size, D) for x in (keys, values)
    )
    counts = _page_counts(valid, R, n, page_size, keys.device)
    summary = index_of_pages(paged_keys, paged_values, counts, block_pages)
    order = order.reshape(R, n, page_size)
    return FormedPages(order, counts, paged_keys, paged_values, summary)


@dataclass(frozen=True, slots=True)
class SegmentBatch:
    """Tokens of c segments in a row, of one length S, that are built at once."""

    keys: Tensor
    """[B, Hkv, c * S, D]"""
    values: Tensor
    """[B, Hkv, c * S, D]"""
    valid: Tensor | None
    """[B, c * S] bool, or None for all."""
    start: int
    """The position of the first token."""
    length: int
    """S"""
    page_ids: list[Tensor]
    """Of each segment [B * Hkv * S / P], allocated in the arena."""
    first_page: int
    """The index that the first page will have in its zone."""


def build_segments(
    batch: SegmentBatch,
    arena: PageArena,
    span_pages: int,
    block_pages: int,
    *,
    resident: ResidentPages | None = None,
) -> list[SegmentPages]:
    """Cluster the tokens of a batch into pages and write them to the arena.

    span_pages, block_pages: of the zone that they are for. resident: takes the pages that are full
    in every sequence, as far as there is room. Cost: O(S log(S / P) D + S D^2) a head and segment
    (see `balanced_pages`).
    """
    keys, values, valid = batch.keys, batch.values, batch.valid
    start, length, page_ids = batch.start, batch.length, batch.page_ids
    B, H = keys.shape[:2]
    count, num_pages = len(page_ids), length // arena.layout.page_size
    valid_rows = None if valid is None else _rows(valid[:, None].expand(-1, H, -1), count)
    formed = form_pages(
        _rows(keys, count), _rows(values, count), valid_rows, arena.layout.page_size, block_pages
    )
    stored = arena.layout.encode(formed.pages, formed.counts.flatten())
    arena.put(torch.cat(page_ids), stored)

    def of_segments(x: Tensor) -> Tensor:
        """[c, B, Hkv, ...]"""
        parts: Tensor = x.unflatten(0, (count, B, H))
        return parts

    offsets = start + length * torch.arange(count, device=keys.device)
    token_ids = of_segments(formed.token_ids)
    moved = token_ids + offsets.to(torch.int32).view(-1, 1, 1, 1, 1)
    token_ids = torch.where(token_ids >= 0, moved, -1).cpu()
    device_counts = of_segments(formed.counts)
    counts = device_counts.cpu()
    paged_keys, paged_values = of_segments(formed.keys), of_segments(formed.values)
    kept_keys, kept_values = paged_keys, paged_values
    if resident is not None and arena.layout.codec is not None:
        # later chunks attend to what the pages say, wherever they find it
        kept = of_segments(arena.layout.decode(stored).unflatten(0, formed.counts.shape))
        kept_keys, kept_values = kept.unbind(4)
    parts = [of_segments(part) for part in formed.summary]
    segments = []
    for k in range(count):
        num_resident = 0
        if resident is not None:
            full = num_full(counts[k], arena.layout.page_size)
            num_resident = resident.put(kept_keys[k, :, :, :full], kept_values[k, :, :, :full])
        scatter = scatter_by_span(
            paged_keys[k].flatten(0, 1),
            paged_values[k].flatten(0, 1),
            device_counts[k].flatten(0, 1),
            first_page=batch.first_page + k * num_pages,
            span_pages=span_pages,
        )
        segment = SegmentPages(
            start=start + k * length,
            length=length,
            page_ids=page_ids[k].reshape(B, H, -1),
            counts=counts[k],
            token_ids=token_ids[k],
            index=PageIndex._make(part[k] for part in parts),
            scatter=scatter.unflatten(0, (B, H)),
            num_resident=num_resident,
        )
        segments.append(segment)
    return segments


def num_full(counts: Tensor, page_size: int) -> int:
    """How many of the first pages of a segment are full in every row. counts: [B, Hkv, n], host."""
    is_full = (counts == page_size).flatten(0, 1).all(0)
    return int(is_full.cumprod(0).sum())


def _rows(x: Tensor, count: int) -> Tensor:
    """[B, Hkv, c * S, ...] -> [c * B * Hkv, S, ...]: segment by segment, as their pages lie."""
    rows: Tensor = x.unflatten(2, (count, -1)).movedim(2, 0).flatten(0, 2)
    return rows


def _page_counts(
    valid: Tensor | None, rows: int, num_pages: int, page_size: int, device: torch.device
) -> Tensor:
    """[R, n] int32: valid tokens come first, so pages fill up one after another."""
    if valid is None:
        return torch.full((rows, num_pages), page_size, dtype=torch.int32, device=device)
    before = torch.arange(num_pages, device=device) * page_size
    return (valid.sum(1, keepdim=True) - before).clamp(0, page_size).to(torch.int32)
