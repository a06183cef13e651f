"""A decode step as CUDA graphs with work of the host between them, or as one without any."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch


class StepGraph:
    """Captured once on a stream, then replayed in order."""

    def __init__(self) -> None:
        # all of them share memory: they run one after another
        self._pool = torch.cuda.graph_pool_handle()
        self._graphs: list[torch.cuda.CUDAGraph] = []
        self._between: list[Callable[[], None]] = []
        self._is_capturing = False

    @contextmanager
    def capturing(self, stream: torch.cuda.Stream) -> Iterator[None]:
        """Capture what the body launches, which must join all streams it uses before `cut`."""
        torch.cuda.synchronize()
        torch.cuda.empty_cache()
        with torch.cuda.stream(stream):
            self._begin()
            try:
                yield
            finally:
                self._end()

    def cut(self, between: Callable[[], None]) -> None:
        """While capturing: let the host do something here at every replay. Otherwise do it now."""
        if not self._is_capturing:
            between()
            return
        self._end()
        self._between.append(between)
        self._begin()

    def replay(self) -> None:
        """Run the step; returns when its last graph is launched, or, where the host has work
        between graphs, when the device is done."""
        for graph, between in zip(self._graphs, self._between, strict=False):
            graph.replay()
            between()
        self._graphs[-1].replay()
        if self._between:
            # host memory that it reads may be given to other pages afterwards
            torch.cuda.current_stream().synchronize()

    def _begin(self) -> None:
        graph = torch.cuda.CUDAGraph()
        graph.capture_begin(pool=self._pool, capture_error_mode="thread_local")
        self._graphs.append(graph)
        self._is_capturing = True

    def _end(self) -> None:
        self._is_capturing = False
        self._graphs[-1].capture_end()
