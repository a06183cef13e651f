"""Pages on their way from the host to the pools of an engine, beside what does not wait for them.

Three streams: one for pages that the step waits for, one that finds which of them are likely to be
chosen while ranking goes on (before the kernels of ranking that fill the device: the bus waits for
it), one for pages of a later layer or step. What a layer fetches for the next step begins when what
it waits for is there, so that the two do not share the bus.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from types import ModuleType

import torch
from torch import Tensor

from wavekv.config import OffloadConfig
from wavekv.kernels.step import (
    AHEAD,
    COUNT_BLOCK,
    FIRST,
    LATER,
    SECOND,
    StepArena,
    StepScratch,
    StepShape,
    empty_scratch,
)
from wavekv.offload.device_layer import DeviceLayer
from wavekv.offload.engine_shape import RUNNERS_UP, likely_pages
from wavekv.offload.streams import FOREMOST, ORDINARY, SideStreams

_NOW, _LIKELY, _LATER = range(3)


class PageFetches:
    """The fetches of all layers of an engine."""

    def __init__(
        self,
        *,
        layers: Sequence[DeviceLayer],
        arena: StepArena,
        counters: Tensor,
        limits: Tensor,
        scratch: StepScratch,
        shape: StepShape,
        config: OffloadConfig,
        ops: ModuleType,
    ) -> None:
        self.layers, self.arena, self.scratch, self.ops = layers, arena, scratch, ops
        self.counters, self.limits, self.config = counters, limits, config
        self._device = counters.device
        self._streams = SideStreams((FOREMOST, FOREMOST, ORDINARY), self._device)
        self._listed: torch.cuda.Event | None = None
        self._needed: torch.cuda.Event | None = None
        self._resolved: torch.cuda.Event | None = None
        self._guessed: dict[int, tuple[torch.cuda.Event | None, Tensor]] = {}
        self._guess: StepScratch | None = None
        if config.prefetch == "early":
            self._guess = empty_scratch(shape, scratch.out.dtype, self._device)
        # one for each layer: the next layers go on while what a layer fetches for later does
        self._ahead: list[StepScratch] = []
        if config.prefetch == "runners-up":
            wide = int(RUNNERS_UP * shape.most)
            self._ahead = [self._scratch_for(wide, shape) for _ in layers]
        elif config.max_misses is not None:
            self._ahead = [self._scratch_of(shape.most, shape) for _ in layers]
        # one for each stage: the second begins while pages of the first are on their way
        self._likely = {
            stage: self._scratch_for(likely_pages(shape, shape.most, stage), shape)
            for stage in (FIRST, SECOND)
            # where misses are few, they are the best ones
            if likely_pages(shape, shape.most, stage) and config.max_misses is None
        }

    @property
    def scratches(self) -> list[StepScratch]:
        """Working memory beside that of the step, of which they share parts."""
        guess = [self._guess] if self._guess is not None else []
        return [*self._ahead, *self._likely.values(), *guess]

    def begin_layer(self, number: int) -> None:
        """Let the current stream wait for what uses the pool or the scratch of layer `number`."""
        self._streams.await_mark(self._guessed.pop(number, (None, None))[0])
        self.wait_resolved()

    def start_likely(self, number: int, shape: StepShape, *, stage: int) -> None:
        """Fetch what layer `number` will likely choose, by the ranks of this stage, beside the
        ranking that goes on; these ranks have to stay until `wait_listed`."""
        scratch = self._likely.get(stage)
        if scratch is None:
            return
        with self._streams.beside(_LIKELY):
            self.ops.list_likely(self.counters, scratch, shape, stage=stage)
            self._listed = self._streams.mark()
            self._resolve(number, scratch, shape, AHEAD)
            self._resolved = self._streams.mark()
        with self._streams.beside(_NOW):
            self._streams.await_mark(self._resolved)
            self.ops.fetch(self.arena, self.layers[number].pool, scratch, shape)

    def wait_listed(self) -> None:
        """Let the current stream wait until the ranks of the last `start_likely` are read."""
        self._streams.await_mark(self._listed)
        self._listed = None

    def wait_resolved(self) -> None:
        """Let the current stream wait until the pool's tables say what is on its way."""
        self._streams.await_mark(self._resolved)
        self._resolved = None

    def start(self, number: int, shape: StepShape) -> None:
        """Fetch what layer `number` was found to miss, then what is to be there in the next
        step."""
        pool = self.layers[number].pool
        with self._streams.beside(_NOW):
            self.ops.fetch(self.arena, pool, self.scratch, shape)
            self._needed = self._streams.mark()
        if self.config.prefetch == "runners-up":
            # what is left out ranks above them
            self._fetch_runners_up(number, shape)
        elif self.config.max_misses is not None:
            self._fetch_left_out(number, shape)
        with self._streams.beside(_LATER):
            self._streams.await_mark(self._resolved)
            self.ops.settle(pool, self.counters, shape)

    def wait(self) -> None:
        """Let the current stream wait for the pages that the step needs."""
        self._streams.await_mark(self._needed)

    @contextmanager
    def guessing(self, number: int, query: Tensor) -> Iterator[StepScratch]:
        """Beside the current stream and in a scratch of its own: the choice of pages of layer
        `number`, by a guessed query."""
        assert self._guess is not None
        with self._streams.beside(_LATER):
            yield self._guess
            # the query's memory must not be given away before the other stream has read it
            self._guessed[number] = self._streams.mark(), query

    def join(self) -> None:
        """Let the current stream wait for everything."""
        self._streams.join()
        # a mark from outside a capture must not be waited for in it
        self._needed = self._resolved = self._listed = None
        self._guessed.clear()

    def _fetch_runners_up(self, number: int, shape: StepShape) -> None:
        ahead = self._ahead[number]
        self.ops.pick(self.counters, self.limits, self.scratch, ahead.chosen, shape, wide=True)
        self._resolve(number, ahead, shape, LATER)
        with self._streams.beside(_LATER):
            self._streams.await_mark(self._needed)
            self.ops.fetch(self.arena, self.layers[number].pool, ahead, shape)

    def _fetch_left_out(self, number: int, shape: StepShape) -> None:
        left = self._ahead[number]
        with self._streams.beside(_NOW):
            self._resolve(number, left, shape, LATER)
            # the next layer overwrites what this reads
            self._resolved = self._streams.mark()
        with self._streams.beside(_LATER):
            self._streams.await_mark(self._resolved)
            self.ops.fetch(self.arena, self.layers[number].pool, left, shape)

    def _resolve(self, number: int, scratch: StepScratch, shape: StepShape, purpose: int) -> None:
        layer = self.layers[number]
        places = layer.pages, layer.pool, self.counters, scratch, layer.totals, shape
        self.ops.resolve(*places, purpose=purpose)

    def _scratch_for(self, most: int, shape: StepShape) -> StepScratch:
        """For a choice of its own, of so many pages."""
        size = shape.batch, shape.kv_heads

        def ints(*more: int) -> Tensor:
            return torch.zeros(*size, *more, dtype=torch.int32, device=self._device)

        block_count = ints(-(-shape.capacity // COUNT_BLOCK))
        own = self._scratch_of(most, shape)
        return own._replace(chosen=ints(most), block_count=block_count)

    def _scratch_of(self, misses: int, shape: StepShape) -> StepScratch:
        size = shape.batch, shape.kv_heads, misses
        return self.scratch._replace(
            victims=torch.zeros(size, dtype=torch.int32, device=self._device),
            wanted=torch.zeros(size, dtype=torch.int64, device=self._device),
            num_misses=torch.zeros(size[:2], dtype=torch.int32, device=self._device),
        )
