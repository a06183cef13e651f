"""Building pages beside the model: cluster a segment, gather it into pages, copy them to the host.

On CUDA in a worker thread with a stream of its own, so that the next layer computes meanwhile. On a
CPU at once: there a thread would compete with the model for the same cores, and measured slower.
"""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import AbstractContextManager, nullcontext
from typing import TypeVar

import torch
from torch import Tensor

from wavekv.index import balanced_pages, encode_keys, page_statistics
from wavekv.index.scatter import scatter_by_span
from wavekv.kvstore import HostArena
from wavekv.offload.paged import SegmentPages

T = TypeVar("T")


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


def build_segment(
    keys: Tensor,
    values: Tensor,
    valid: Tensor | None,
    *,
    start: int,
    arena: HostArena,
    page_ids: Tensor,
    first_page: int,
    span_pages: int,
) -> SegmentPages:
    """Cluster the tokens [start, start + S) into pages and write them to the arena.

    keys, values: [B, Hkv, S, D]; valid: [B, S] bool, or None for all; page_ids: [B * Hkv * S / P]
    allocated in the arena; first_page: the index that the first page will have in its zone, whose
    spans are of `span_pages`. Cost: O(S log(S / P) D + S D^2) a head (see `balanced_pages`).
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
    quantised = encode_keys(paged_keys, statistics.mean, counts)
    scatter = scatter_by_span(
        paged_keys, paged_values, counts, first_page=first_page, span_pages=span_pages
    )
    pages = torch.stack([paged_keys, paged_values], dim=2)
    arena.write(page_ids, pages.reshape(R * N, 2, P, D))
    held = torch.arange(P, device=keys.device) < counts[..., None]
    token_ids = torch.where(held, order.reshape(R, N, P) + start, -1)
    return SegmentPages(
        start=start,
        length=S,
        page_ids=page_ids.reshape(B, H, N),
        counts=counts.reshape(B, H, N).cpu(),
        device_counts=counts.reshape(B, H, N),
        token_ids=token_ids.to(torch.int32).reshape(B, H, N, P).cpu(),
        mean=statistics.mean.reshape(B, H, N, D),
        variance=statistics.variance.reshape(B, H, N),
        value_mean=statistics.value_mean.reshape(B, H, N, D),
        codes=quantised.codes.reshape(B, H, N, -1, P, 4),
        code_scale=quantised.scale.reshape(B, H, N, P),
        page_scale=quantised.page_scale.reshape(B, H, N),
        scatter=scatter.reshape(B, H, -1, 2, D, D),
    )


def _page_counts(
    valid: Tensor | None, batch: int, num_pages: int, page_size: int, device: torch.device
) -> Tensor:
    """[B, N] int32: valid tokens come first, so pages fill up one after another."""
    if valid is None:
        return torch.full((batch, num_pages), page_size, dtype=torch.int32, device=device)
    before = torch.arange(num_pages, device=device) * page_size
    return (valid.sum(1, keepdim=True) - before).clamp(0, page_size).to(torch.int32)
