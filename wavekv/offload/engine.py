"""Decode steps decided on the device: no shape depends on data and nothing waits for the host, so a
CUDA graph can hold the steps of all layers.

An engine takes the contexts of a cache over into buffers of fixed capacity, runs steps on them, and
gives them back as if the steps had run one by one. Per layer a step is score, rank, refine, rank,
refine, rank, select, resolve, fetch, attend, estimate, merge (`wavekv.kernels.cuda`). Pages missing
from the pool are fetched on a second stream: those that are likely to be chosen while ranking goes
on, the rest while the pages that are not chosen are estimated.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import replace
from functools import partial
from types import ModuleType

import torch
from torch import Tensor

from wavekv.errors import CapacityError
from wavekv.index.levels import Logits
from wavekv.kernels.step import (
    CLOCK,
    END,
    FINAL,
    FIRST,
    LATER,
    NUM_LIMITS,
    PAGES,
    SECOND,
    START,
    StepScratch,
    StepShape,
    StepSteady,
    empty_scratch,
)
from wavekv.offload.budget import page_limits
from wavekv.offload.context import LayerContext
from wavekv.offload.device_layer import DeviceLayer, GrownPages
from wavekv.offload.disk_requests import DiskRequests, disk_requests
from wavekv.offload.engine_shape import step_limits
from wavekv.offload.fetches import PageFetches
from wavekv.offload.growth import Growth
from wavekv.offload.host_chunks import HostChunks
from wavekv.offload.pool import fitted_shape
from wavekv.offload.step_graph import StepGraph
from wavekv.offload.streams import ORDINARY, SideStreams

_HOST_ROOM_TOKENS = 2048
"""Tokens whose pages have room in the host arena from the start: pinning takes 0.7 s for a GiB."""


class DecodeEngine:
    """Steps of all layers of a cache. Made by `DecodeEngine(contexts, ops)`; ended by
    `give_back`."""

    def __init__(self, contexts: Sequence[LayerContext], ops: ModuleType) -> None:
        """contexts: settled, and such that `engine_refusal` is None. ops: `wavekv.kernels.cuda`, or
        its twin `wavekv.kernels.step_reference`.

        Raises:
            CapacityError: device_budget does not hold the pages of one step. The contexts are as
                they were.
        """
        self.ops, self.config = ops, contexts[0].runtime.config
        zone, paged = contexts[0].steady, contexts[0].paged
        query = contexts[0].counters.last_query
        assert query is not None
        self.device = query.device
        # what forwards of several tokens left
        contexts[0].runtime.buffers.clear()
        self.start, self.num_tokens, self.num_pages = zone.start, zone.end, paged.num_pages
        self.first_token = self.num_tokens
        self.shape = fitted_shape(contexts)
        self._host_arena = paged.arena
        self.grown: list[GrownPages] = []
        self._next_ids: Tensor | None = None
        segment = self.config.append_segment
        pages_per_growth = len(contexts) * self.shape.rows * (segment // self.shape.page_size)
        with suppress(CapacityError):
            # ahead of time only: pages that are due and do not fit are an error then
            self._host_arena.reserve(pages_per_growth * max(1, _HOST_ROOM_TOKENS // segment))
        self._chunks = HostChunks(self._host_arena, self.device)
        A, C, D = self.shape.sinks, self.shape.ring, self.shape.head_dim
        B, H = self.shape.batch, self.shape.kv_heads
        size = len(contexts), 2, B, H, A + C, D
        self.ring = torch.zeros(size, dtype=query.dtype, device=self.device)
        valid = torch.zeros(B, A + C, dtype=torch.bool, device=self.device)
        self.new_valid = torch.ones(B, dtype=torch.bool, device=self.device)
        self._disk = disk_requests(
            self._host_arena, self._chunks, len(contexts), self.shape, self.config.disk_deadline
        )
        slots = None if self._disk is None else self._disk.table.slots
        self.layers = [
            DeviceLayer(context, StepSteady(ring[0], ring[1], valid), self.shape, slots)
            for context, ring in zip(contexts, self.ring, strict=True)
        ]
        self.scratch = empty_scratch(self.shape, query.dtype, self.device)
        self.counters = torch.zeros(4, dtype=torch.int32, device=self.device)
        self.limits = torch.zeros(NUM_LIMITS, dtype=torch.int32, device=self.device)
        self._limits: tuple[int, int] | None = None
        self.reset_counters()
        self._num_growing = 0
        self.growth = Growth(
            self.layers, self.ring, self.counters, self._chunks.arena, self.shape, segment, ops
        )
        # the first tokens that leave the window make the sinks: not here
        has_sinks = self.config.num_sink_tokens == A
        self._can_grow = has_sinks and bool(zone.valid.view[:, :A].all())
        self._fetches = PageFetches(
            layers=self.layers,
            arena=self._chunks.arena,
            counters=self.counters,
            limits=self.limits,
            scratch=self.scratch,
            shape=self.shape,
            config=self.config,
            ops=ops,
        )
        self._aside = SideStreams((ORDINARY,), self.device)
        self.graph = StepGraph() if self.device.type == "cuda" else None
        """Of the step, where it is captured."""
        self.is_stepping = False
        """Whether attention is to come here: while a step is rehearsed, captured or run."""
        self.last_queries: dict[int, Tensor] = {}
        """Of the last step that was not replayed."""

    def __del__(self) -> None:
        # a cache that goes while its engine has it
        if hasattr(self, "growth"):
            self.growth.wait()
        if hasattr(self, "_next_ids"):
            for pages in (*(grown.page_ids for grown in self.grown), self._next_ids):
                if pages is not None:
                    self._host_arena.drop(pages)

    @property
    def is_full(self) -> bool:
        """Whether the buffers have no room for another step: time to give back."""
        if self._disk is not None and self._disk.table.is_too_small:
            return not self.growth.is_running
        if self._num_waiting < self.config.append_segment or self.growth.is_running:
            return False
        has_room = self.num_pages + self.growth.num_pages <= self.shape.capacity
        return not (has_room and self._can_grow)

    def capture_growth(self) -> None:
        """Prepare appending pages, so that it costs a step nothing."""
        if not self._can_grow:
            return
        # pages that are due and do not fit are an error then
        with suppress(CapacityError):
            self._next_ids = self._host_arena.allocate(self.growth.num_arena_pages)
            self._chunks.refresh()
            self.growth.capture(self._next_ids, self._host_arena.slots_of(self._next_ids))

    @contextmanager
    def stepping(self) -> Iterator[None]:
        """Send the attention of the body here."""
        self.is_stepping = True
        try:
            yield
        finally:
            self.is_stepping = False

    def reset(self) -> None:
        """Forget rehearsals: they wrote where the next step will write, and were counted."""
        self.reset_counters()
        self.last_queries.clear()
        for layer in self.layers:
            # their steps come again: no slot may be of the future
            layer.pool.age.fill_(-1)
            layer.pool.ahead.fill_(-1)
            layer.totals.paging.zero_()
            layer.totals.tail_mass.zero_()

    def reset_counters(self) -> None:
        """Say to the device where the steps are."""
        values = torch.zeros(4, dtype=torch.int32)
        values[END], values[CLOCK] = self.num_tokens, self.num_tokens
        values[PAGES], values[START] = self.num_pages, self.start
        self.counters.copy_(values)

    def before_step(self) -> None:
        """Host work for the next step: the limits of its length, and pages of older tokens.

        Raises:
            CapacityError: pages that are due do not fit cpu_budget; nothing changed.
        """
        limits = page_limits(self.config, self.num_tokens + 1)
        if limits != self._limits:
            least, most = (min(limit, self.shape.most) for limit in limits)
            values = step_limits(self.config, self.shape, least, most)
            if self.device.type == "cuda":
                values = values.pin_memory()
            self.limits.copy_(values, non_blocking=True)
            self._limits = limits
        self._grow()
        if self._disk is not None:
            self._disk.table.refresh()

    def after_step(self) -> None:
        """Count the step that was launched."""
        self.num_tokens += 1

    def attend(
        self,
        number: int,
        query: Tensor,
        keys: Tensor,
        values: Tensor,
        logits: Logits,
        sink_logits: Tensor | None,
    ) -> Tensor:
        """Layer `number` of a step: take the new token in, attend. query: [B, Hq, 1, D]; keys,
        values: [B, Hkv, 1, D]. Returns [B, Hq, 1, D] in their dtype; the next layer overwrites it.
        """
        layer, scratch, ops = self.layers[number], self.scratch, self.ops
        shape = replace(self.shape, scale=logits.scale, softcap=logits.softcap)
        self.last_queries[number] = query[:, :, 0]
        q, k, v = (x[:, :, 0].contiguous() for x in (query, keys, values))
        counters, pages, pool = self.counters, layer.pages, layer.pool
        self._fetches.begin_layer(number)
        ops.score(q, k, v, self.new_valid, layer.steady, pages, counters, scratch, shape)
        with self._aside.beside(0):
            # what waits for no choice
            ops.attend(q, layer.steady, pool, counters, scratch, shape, pages=False)
        self._refine(number, scratch, shape, fetches=True)
        if shape.tail == "second":
            with self._aside.beside(0):
                # nor does this; beside a refinement, which fills the device, it would delay it
                ops.value_slope(q, pages, counters, scratch, shape)
        self._select(layer, scratch, shape)
        if self._disk is not None:
            self._ask(self._disk, layer)
        self._fetches.wait_resolved()
        ops.resolve(pages, pool, counters, scratch, layer.totals, shape)
        self._fetches.start(number, shape)
        self._aside.join()
        ops.estimate(pages, counters, scratch, shape)
        self._fetches.wait()
        ops.attend(q, layer.steady, pool, counters, scratch, shape, pages=True)
        ops.merge(counters, scratch, layer.totals, sink_logits, shape)
        return scratch.out.unsqueeze(2)

    def _ask(self, disk: DiskRequests, layer: DeviceLayer) -> None:
        """Have the pages that a layer chose in host memory. A captured step is cut here."""
        disk.ask(layer, self.scratch.chosen)
        # a graph ends with one stream
        self._fetches.join()
        self._aside.join()
        serve = partial(disk.serve, layer)
        if self.graph is None:
            serve()
        else:
            self.graph.cut(serve)

    def prefetch(self, number: int, query: Tensor, logits: Logits) -> None:
        """Fetch what layer `number` would choose for `query` [B, Hq, 1, D], beside other work."""
        layer, ops = self.layers[number], self.ops
        shape = replace(self.shape, scale=logits.scale, softcap=logits.softcap)
        counters, pages, pool = self.counters, layer.pages, layer.pool
        q = query[:, :, 0].contiguous()
        with self._fetches.guessing(number, q) as scratch:
            ops.score(q, None, None, None, layer.steady, pages, counters, scratch, shape)
            self._refine(number, scratch, shape, fetches=False)
            self._select(layer, scratch, shape)
            ops.resolve(pages, pool, counters, scratch, layer.totals, shape, purpose=LATER)
            ops.fetch(self._chunks.arena, pool, scratch, shape)

    def _refine(
        self, number: int, scratch: StepScratch, shape: StepShape, *, fetches: bool
    ) -> None:
        """From scores to refined ranks; `fetches`: what is likely to be chosen, meanwhile."""
        counters, ops, pages = self.counters, self.ops, self.layers[number].pages
        for stage in FIRST, SECOND:
            ops.rank_pages(pages, counters, self.limits, scratch, shape, stage=stage)
            if fetches:
                self._fetches.start_likely(number, shape, stage=stage)
            ops.refine(pages, counters, scratch, shape, stage=stage)
            if fetches:
                self._fetches.wait_listed()

    def _select(self, layer: DeviceLayer, scratch: StepScratch, shape: StepShape) -> None:
        """From refined ranks to the pages in `scratch.chosen`."""
        counters, limits = self.counters, self.limits
        self.ops.rank_pages(layer.pages, counters, limits, scratch, shape, stage=FINAL)
        self.ops.select(counters, limits, scratch, shape)

    def advance(self) -> None:
        """The end of a step, on the device."""
        self._fetches.join()
        self.counters[: CLOCK + 1] += 1

    def check_integrity(self) -> None:
        """Raise RuntimeError unless page tables and pools agree. Waits for the device."""
        for number, layer in enumerate(self.layers):
            layer.check_integrity(number)

    def give_back(self) -> None:
        """Bring the contexts to where the steps left them. The engine is of no use afterwards. If
        it fails, for want of memory, it may be called again."""
        if self.growth.is_running:
            self._commit()
        if self._next_ids is not None:
            self._host_arena.release(self._next_ids)
            self._next_ids = None
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        steps = self.num_tokens - self.first_token
        middle = (self.first_token + self.num_tokens + 1) / 2
        for number, layer in enumerate(self.layers):
            if not layer.is_given_back:
                layer.give_back(number, self.grown, self.start, self.num_tokens, self.shape)
                layer.count(steps, middle, self.grown)
        self.grown = []

    @property
    def _num_waiting(self) -> int:
        return self.num_tokens - self.start - self._num_growing - self.config.window

    def _grow(self) -> None:
        growth, segment = self.growth, self.config.append_segment
        ring_is_full = self.num_tokens - self.start >= self.shape.ring
        if growth.is_running and (growth.is_done or ring_is_full):
            self._commit()
        if growth.is_running or self._num_waiting < segment:
            return
        if self.num_pages + growth.num_pages > self.shape.capacity or not self._can_grow:
            return
        ids = self._next_ids
        if ids is None:
            ids = self._host_arena.allocate(growth.num_arena_pages)
        self._next_ids = ids
        self._chunks.refresh()
        self._host_arena.order_ahead(growth.num_arena_pages)
        growth.start(ids, self._host_arena.slots_of(ids))
        self._num_growing = segment
        if growth.is_done:
            self._commit()

    def _commit(self) -> None:
        segment = self.config.append_segment
        self.start += segment
        self.num_pages += self.growth.num_pages
        grown = self.growth.commit(self.start)
        self._host_arena.seal(grown.page_ids)
        self.grown.append(grown)
        self._num_growing, self._next_ids = 0, None
