"""Building pages beside the model: cluster a segment, gather it into pages, copy them to the host.

One worker thread, and on CUDA a stream of its own, so that the next layer computes meanwhile.
"""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import AbstractContextManager, nullcontext
from typing import TypeVar

import torch
from torch import Tensor

from wavekv.index import balanced_pages, page_statistics
from wavekv.kvstore import HostArena
from wavekv.offload.paged import SegmentPages

T = TypeVar("T")


class PageBuilder:
    """Runs page building in the background, in order."""

    def __init__(self) -> None:
        self._worker: ThreadPoolExecutor | None = None
        self._streams: dict[torch.device, torch.cuda.Stream] = {}

    def submit(self, device: torch.device, build: Callable[[], T]) -> Future[T]:
        """Run `build` after all that the current stream of `device` was given so far.

        The result is complete on the host and the device when the future is done.
        """
        if self._worker is None:
            self._worker = ThreadPoolExecutor(1, thread_name_prefix="wavekv-pages")
        if device.type != "cuda":
            return self._worker.submit(_without_grad, build, nullcontext)
        stream = self._streams.setdefault(device, torch.cuda.Stream(device))
        ready = torch.cuda.current_stream(device).record_event()

        def on_stream() -> T:
            stream.wait_event(ready)
            result = build()
            stream.synchronize()
            return result

        return self._worker.submit(_without_grad, on_stream, lambda: torch.cuda.stream(stream))


def _without_grad(
    build: Callable[[], T], context: Callable[[], AbstractContextManager[object]]
) -> T:
    # grad and inference modes belong to a thread
    with torch.no_grad(), context():
        return build()


def build_segment(
    keys: Tensor,
    values: Tensor,
    valid: Tensor | None,
    *,
    start: int,
    arena: HostArena,
    page_ids: Tensor,
) -> SegmentPages:
    """Cluster the tokens [start, start + S) into pages and write them to the arena.

    keys, values: [B, Hkv, S, D]; valid: [B, S] bool, or None for all; page_ids: [B * Hkv * S / P]
    allocated in the arena. Cost: O(S log(S / P) D) a head (see `balanced_pages`).
    """
    B, H, S, D = keys.shape
    P = arena.layout.page_size
    N, R = S // P, B * H
    k, v = keys.reshape(R, S, D), values.reshape(R, S, D)
    order = balanced_pages(k, P, None if valid is None else valid.repeat_interleave(H, 0))
    rows = order[..., None].expand(-1, -1, D)
    paged_keys, paged_values = (x.gather(1, rows).reshape(R, N, P, D) for x in (k, v))
    counts = _page_counts(valid, B, N, P, keys.device).repeat_interleave(H, 0)
    statistics = page_statistics(paged_keys, paged_values, counts, dtype=keys.dtype)
    pages = torch.stack([paged_keys, paged_values], dim=2)
    arena.write(page_ids, pages.reshape(R * N, 2, P, D))
    held = torch.arange(P, device=keys.device) < counts[..., None]
    token_ids = torch.where(held, order.reshape(R, N, P) + start, -1)
    return SegmentPages(
        start=start,
        length=S,
        page_ids=page_ids.reshape(B, H, N),
        counts=counts.reshape(B, H, N).cpu(),
        token_ids=token_ids.to(torch.int32).reshape(B, H, N, P).cpu(),
        mean=statistics.mean.reshape(B, H, N, D),
        variance=statistics.variance.reshape(B, H, N, D),
        value_mean=statistics.value_mean.reshape(B, H, N, D),
    )


def _page_counts(
    valid: Tensor | None, batch: int, num_pages: int, page_size: int, device: torch.device
) -> Tensor:
    """[B, N] int32: valid tokens come first, so pages fill up one after another."""
    if valid is None:
        return torch.full((batch, num_pages), page_size, dtype=torch.int32, device=device)
    before = torch.arange(num_pages, device=device) * page_size
    return (valid.sum(1, keepdim=True) - before).clamp(0, page_size).to(torch.int32)
