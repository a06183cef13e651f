"""One layer's context: its tokens in three zones, how it grows, shrinks and is attended to.

Every valid token is in exactly one place: a sink slot, a page, or the local window.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from concurrent.futures import Future, wait
from contextlib import suppress
from functools import wraps
from itertools import chain, groupby
from typing import Concatenate, ParamSpec, TypeVar

import torch
from torch import Tensor

from wavekv.errors import LayoutError
from wavekv.index.levels import Logits
from wavekv.index.segments import cut_segments
from wavekv.offload.attention import State, add_attention_sink, attend_chunk, attend_step
from wavekv.offload.builder import BATCH_BYTES, SegmentBatch, build_segments
from wavekv.offload.counters import Counters
from wavekv.offload.index_sizes import index_sizes
from wavekv.offload.interrupts import uninterrupted
from wavekv.offload.paged import PagedZone, SegmentPages
from wavekv.offload.resident import ResidentPages
from wavekv.offload.room import room_tokens
from wavekv.offload.runtime import OffloadRuntime, PrefillPlan
from wavekv.offload.steady import SteadyZone

P = ParamSpec("P")
R = TypeVar("R")


def _on_plain_tensors(
    method: Callable[Concatenate[LayerContext, P], R],
) -> Callable[Concatenate[LayerContext, P], R]:
    """Leave the caller's modes. State made inside inference mode could not be changed outside it;
    autocast would round statistics and logits to half precision."""

    @wraps(method)
    def wrapped(self: LayerContext, /, *args: P.args, **kwargs: P.kwargs) -> R:
        device = self.steady.keys.view.device.type
        with torch.inference_mode(False), torch.no_grad(), torch.autocast(device, enabled=False):
            return method(self, *args, **kwargs)

    return wrapped


class LayerContext:
    """The context of one layer for B sequences. Made for the tokens of its first `attend`."""

    def __init__(self, runtime: OffloadRuntime, keys: Tensor, values: Tensor) -> None:
        """keys, values: [B, Hkv, T, D] give shapes, dtype and device; nothing is stored yet.

        Raises:
            LayoutError: values of another shape than keys, or an odd head dimension.
        """
        if keys.shape[-1] % 2:
            raise LayoutError(
                f"keys must have an even head dimension, got {keys.shape[-1]}; mean values "
                "are stored two dimensions to a byte"
            )
        if keys.shape != values.shape:
            raise LayoutError(
                f"keys and values must have one shape, got {tuple(keys.shape)} and "
                f"{tuple(values.shape)}; models whose value heads differ in size are not supported"
            )
        self.runtime = runtime
        self.counters = Counters()
        with torch.inference_mode(False), torch.no_grad():
            B, H, _, D = keys.shape
            empty = torch.empty(B, H, 0, D, dtype=keys.dtype, device=keys.device)
            self.steady = SteadyZone(empty, empty.clone())
            arena = runtime.arena(D, keys.dtype, keys.device)
            span_pages, K = index_sizes(runtime.config, D)
            self.paged = PagedZone(arena, empty, span_pages=span_pages, block_pages=K)
        self._pending: Future[list[SegmentPages]] | None = None
        self._num_pending = 0
        self._plan: PrefillPlan | None = None

    @property
    def num_tokens(self) -> int:
        """Tokens held, padding included."""
        return self.steady.end

    @property
    def shape(self) -> tuple[int, int, int]:
        """(B, Hkv, D)."""
        B, H, _, D = self.steady.keys.view.shape
        return B, H, D

    @_on_plain_tensors
    def attend(
        self,
        query: Tensor,
        keys: Tensor,
        values: Tensor,
        valid: Tensor | None,
        logits: Logits,
        sink_logits: Tensor | None = None,
    ) -> Tensor:
        """Take in T new tokens and attend with their queries: [B, Hq, T, D] float32.

        One token is a decode step in the configured mode; several, or one of a prompt that is being
        prefilled, are attended to exactly.
        query: [B, Hq, T, D]; keys, values: [B, Hkv, T, D]; valid: [B, T] bool or None for all.

        Raises:
            CapacityError: the pages that would be due do not fit cpu_budget; nothing changed.
            LayoutError: keys, values or valid do not fit this context; nothing changed.
        """
        self._check(keys, values, valid)
        self.settle()
        self._follow_plan()
        self._reserve(self.segments_after(keys.shape[2]))
        if query.shape[2] == 1 and not self.runtime.is_prefilling:
            self.steady.append(keys, values, valid)
            config = self.runtime.config
            out, lse = attend_step(
                query[:, :, 0],
                self.steady,
                self.paged,
                logits,
                config,
                self.counters,
                self.runtime.buffers,
            )
            state: State = out[:, :, None], lse[:, :, None]
        else:
            state = attend_chunk(
                query,
                keys,
                values,
                valid,
                self.steady,
                self.paged,
                logits,
                self.counters,
                self.runtime.buffers,
            )
            self.steady.append(keys, values, valid)
        if sink_logits is not None:
            state = add_attention_sink(state, sink_logits)
        self._page_out()
        return state[0]

    def segments_after(self, num_new: int) -> list[int]:
        """Lengths of the segments that will be paged out once `num_new` more tokens came."""
        config = self.runtime.config
        smallest = config.segment if self.runtime.is_prefilling else config.append_segment
        waiting = self.steady.num_local - self._num_pending + num_new - config.window
        return cut_segments(waiting, segment=config.segment, smallest=smallest)

    def _page_out(self) -> None:
        """Start building pages of the oldest local tokens, if there are enough."""
        batches = self.due()
        if not batches:
            return
        arena, resident = self.paged.arena, self.paged.resident
        sizes = self.paged.scatter.span_pages, self.paged.index.block_pages

        def build() -> list[SegmentPages]:
            parts = (build_segments(batch, arena, *sizes, resident=resident) for batch in batches)
            return list(chain.from_iterable(parts))

        try:
            pending = self.runtime.builder.submit(self.steady.keys.view.device, build)
        except BaseException:
            self.paged.give_up()
            raise
        self.await_pages(batches, pending)

    @_on_plain_tensors
    def due(self) -> list[SegmentBatch]:
        """The oldest local tokens, if there are enough, in segments to be built, with arena pages
        for them. Nothing else is done to them yet: `await_pages` or `PagedZone.give_up` follows.

        Raises:
            CapacityError: the pages do not fit cpu_budget; nothing changed.
        """
        lengths = self.segments_after(0)
        if not lengths:
            return []
        self._reserve(lengths)
        self.steady.fill_sinks(self.runtime.config.num_sink_tokens)
        batches, first, num_pages = [], 0, self.paged.num_pages
        try:
            for length, count in self._batches(lengths):
                ids = [self.paged.allocate(self._num_pages(length)) for _ in range(count)]
                keys, values, valid = self.steady.local(first, count * length)
                mask = valid if self.steady.is_ragged else None
                start = self.steady.start + first
                batches.append(SegmentBatch(keys, values, mask, start, length, ids, num_pages))
                first += count * length
                num_pages += count * (length // self.runtime.config.page_size)
        except BaseException:
            self.paged.give_up()
            raise
        return batches

    def await_pages(self, batches: list[SegmentBatch], pending: Future[list[SegmentPages]]) -> None:
        """Pages of what was `due` are being built; `settle` takes them in."""
        self._pending = pending
        for batch in batches:
            self.paged.arena.seal(torch.cat(batch.page_ids), after=pending)
        self._num_pending = sum(len(batch.page_ids) * batch.length for batch in batches)
        if not self.runtime.is_prefilling:
            self.paged.arena.order_ahead(self._num_pages(self.runtime.config.append_segment))

    def _batches(self, lengths: list[int]) -> Iterator[tuple[int, int]]:
        """(length, how many) of segments in a row that are built at once."""
        B, H, D = self.shape
        for length, group in groupby(lengths):
            left, most = len(list(group)), max(1, BATCH_BYTES // (4 * B * H * length * D))
            while left:
                yield length, min(left, most)
                left -= min(left, most)

    @_on_plain_tensors
    def settle(self) -> None:
        """Wait for pages under construction and take them in. On failure the tokens stay local; an
        interrupt while it waits changes nothing."""
        if self._pending is None:
            return
        wait([self._pending])
        with uninterrupted():
            self._take_in(self._pending)

    def _take_in(self, pending: Future[list[SegmentPages]]) -> None:
        self._pending, self._num_pending = None, 0
        try:
            segments = pending.result()
            self._make_room(sum(segment.page_ids.shape[2] for segment in segments))
            for segment in segments:
                self.paged.append(segment)
                self.steady.drop_oldest(segment.length)
                num_bytes = segment.page_ids.numel() * self.paged.arena.layout.page_bytes
                self.counters.bytes_to_host += num_bytes
        finally:
            self.paged.give_up()

    def _make_room(self, num_pages: int) -> None:
        """The index grows by a fixed length, so that `device_budget` can count on it."""
        config, paged = self.runtime.config, self.paged
        if paged.num_pages + num_pages > paged.index.buffer.counts.shape[2]:
            paged.reserve(num_pages + room_tokens(config) // config.page_size)

    @_on_plain_tensors
    def page_out(self) -> None:
        """Page out what waits for a whole segment: the end of a prefill."""
        self.settle()
        self._page_out()

    def _follow_plan(self) -> None:
        """Once in a prefill: order the host memory that it will fill, make room in the index and
        for pages that stay on the device.

        Raises:
            CapacityError: as `HostArena.order`; nothing changed.
        """
        plan = self.runtime.plan
        if plan is self._plan:
            return
        if plan is not None:
            config = self.runtime.config
            to_come = self.steady.num_local + plan.end - self.num_tokens - config.window
            to_come = max(0, to_come) // config.append_segment * config.append_segment
            self.paged.arena.order(self._num_pages(to_come))
            self.paged.reserve((to_come + plan.room_tokens) // config.page_size)
            num_resident = min(plan.resident_tokens, to_come)
            self.paged.resident = None
            if num_resident >= config.page_size:
                like = self.steady.keys.view[:, :, :0]
                # where memory is in pieces that are too small, pages are streamed instead
                with suppress(torch.OutOfMemoryError):
                    self.paged.resident = ResidentPages(like, num_resident)
        self._plan = plan

    def end_prefill(self) -> None:
        """Free what was on the device for the prefill only."""
        self.paged.resident, self._plan = None, None

    @_on_plain_tensors
    def truncate(self, length: int) -> None:
        """Keep the tokens at positions below `length`.

        A segment that is cut goes back to the local window, to be paged out again.
        """
        self.settle()
        if length >= self.steady.start:
            self.steady.truncate(length)
            return
        start = self.paged.segment_start(length)
        device = self.steady.keys.view.device
        keys, values, valid = (x.to(device) for x in self.paged.recover(start, length))
        last_span = self.paged.scatter_before(start)
        self.steady.restart(start, length, keys, values, valid)
        self.paged.truncate(start, last_span)

    @_on_plain_tensors
    def select(self, index: Tensor) -> None:
        """Keep the sequences `index` [B'] (repeats allowed), in that order."""
        self.settle()
        if index.tolist() == list(range(self.shape[0])):
            return
        self.steady.select(index)
        self.paged.select(index)

    @_on_plain_tensors
    def fork(self, runtime: OffloadRuntime) -> LayerContext:
        """An independent context with the same tokens; pages are shared."""
        self.settle()
        copy = object.__new__(LayerContext)
        copy.runtime, copy.counters = runtime, self.counters.copy()
        copy.steady, copy.paged = self.steady.clone(), self.paged.clone()
        copy._pending, copy._num_pending, copy._plan = None, 0, None
        return copy

    def _num_pages(self, num_tokens: int) -> int:
        """Arena pages that `num_tokens` positions take, over all sequences and heads."""
        B, H, _ = self.shape
        return B * H * num_tokens // self.runtime.config.page_size

    def _reserve(self, lengths: list[int]) -> None:
        if lengths:
            self.paged.arena.reserve(self._num_pages(sum(lengths)))

    def _check(self, keys: Tensor, values: Tensor, valid: Tensor | None) -> None:
        B, H, D = self.shape
        T = keys.shape[2]
        fits = tuple(keys.shape) == tuple(values.shape) == (B, H, T, D)
        if not fits or (valid is not None and tuple(valid.shape) != (B, T)):
            raise LayoutError(
                f"keys and values must be [B={B}, Hkv={H}, T, D={D}] and valid [B, T], got "
                f"{tuple(keys.shape)}, {tuple(values.shape)} and "
                f"{None if valid is None else tuple(valid.shape)}"
            )
