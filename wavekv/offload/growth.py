"""Pages of generated tokens, built for all layers at once beside the steps of a decode engine.

The oldest local tokens stay in the ring while pages are made of them on a stream of their own,
behind the pages that steps read. Between two steps their spans get a scatter that includes them,
and the counters move on: from there the tokens are in their pages and no longer local. On CUDA the
work is one graph, so that it costs the host a launch.
"""

from __future__ import annotations

from types import ModuleType

import torch
from torch import Tensor

from wavekv.index import page_scatter
from wavekv.index.scatter import add_rounded
from wavekv.kernels.page_codec import encode_pages
from wavekv.kernels.page_index import pages_of_parts
from wavekv.kernels.step import PAGES, START, StepArena, StepShape
from wavekv.offload.builder import form_pages
from wavekv.offload.device_layer import DeviceLayer, GrownPages


class Growth:
    """Makes `num_pages` pages for each KV head of every layer from `segment` tokens."""

    def __init__(
        self,
        layers: list[DeviceLayer],
        ring: Tensor,
        counters: Tensor,
        arena: StepArena,
        shape: StepShape,
        segment: int,
        ops: ModuleType,
    ) -> None:
        """ring: [layers, 2, B, Hkv, A + L, D], the steady zones of all layers."""
        self.layers, self.ring, self.counters, self.arena = layers, ring, counters, arena
        self.shape, self.segment, self.ops = shape, segment, ops
        self.num_pages = segment // shape.page_size
        self.is_running = False
        device = ring.device
        is_cuda = device.type == "cuda"
        size = len(layers), shape.batch, shape.kv_heads, self.num_pages
        # of the new pages: their ids, and where host memory has them
        self._ids = torch.zeros(2, *size, dtype=torch.int64, device=device)
        self._arena_ids, self._host_slots = self._ids[0], self._ids[1]
        self._host_ids = torch.zeros(2, *size, dtype=torch.int64, pin_memory=is_cuda)
        self._counts = torch.zeros(size, dtype=torch.int32, device=device)
        self._token_ids = torch.zeros(*size, shape.page_size, dtype=torch.int32, device=device)
        # a segment may begin in one span and end in the next
        D = shape.head_dim
        self._totals = torch.zeros(2, *size[:3], 2, D, D, dtype=torch.bfloat16, device=device)
        self._spans = torch.zeros(2, 1, dtype=torch.int64, device=device)
        self._moved = torch.zeros(4, dtype=torch.int32, device=device)
        self._moved[PAGES], self._moved[START] = self.num_pages, segment
        self._stream = torch.cuda.Stream(device) if is_cuda else None
        self._done = torch.cuda.Event() if is_cuda else None
        self._graph: torch.cuda.CUDAGraph | None = None
        self._host: tuple[Tensor, Tensor] | None = None

    @property
    def nbytes(self) -> int:
        """Bytes of its buffers on the device."""
        buffers = self._counts, self._token_ids, self._totals, self._spans, self._moved
        return self._ids.nbytes + sum(buffer.nbytes for buffer in buffers)

    @property
    def num_arena_pages(self) -> int:
        """Pages of the host arena that one run takes."""
        return self._arena_ids.numel()

    @property
    def is_done(self) -> bool:
        """Whether the pages are complete, without waiting."""
        return self._done is None or self._done.query()

    def capture(self, arena_ids: Tensor, slots: Tensor) -> None:
        """Make the graph. arena_ids: pages that are free to be written, and `slots` where host
        memory has them. What a rehearsal writes lies behind the pages in use."""
        if self._stream is None:
            return
        self._write_ids(arena_ids, slots)
        self._ids.copy_(self._host_ids)
        self._stream.wait_stream(torch.cuda.current_stream(self.ring.device))
        with torch.cuda.stream(self._stream):
            self._build()
        self._stream.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, stream=self._stream, capture_error_mode="thread_local"):
            self._build()
        self._graph = graph

    def start(self, arena_ids: Tensor, slots: Tensor) -> None:
        """Begin to build pages of the oldest local tokens, to be stored under `arena_ids`, which
        host memory has at `slots`."""
        self._write_ids(arena_ids, slots)
        self.is_running = True
        if self._stream is None or self._done is None:
            self._ids.copy_(self._host_ids)
            self._build()
            self._host = self._counts.clone(), self._token_ids.clone()
            return
        self._stream.wait_stream(torch.cuda.current_stream(self.ring.device))
        with torch.cuda.stream(self._stream):
            self._ids.copy_(self._host_ids, non_blocking=True)
            if self._graph is None:
                self._build()
            else:
                self._graph.replay()
            self._host = _to_host(self._counts), _to_host(self._token_ids)
            self._done.record(self._stream)

    def commit(self, end: int) -> GrownPages:
        """Let steps from here on read the new pages; `end` is the position behind their tokens."""
        if self._done is not None:
            torch.cuda.current_stream(self.ring.device).wait_event(self._done)
            self._done.synchronize()
        for number, layer in enumerate(self.layers):
            # the first last: without a next span both name the same, and the first has the pages
            for k in (1, 0):
                total = self._totals[k, number].unsqueeze(2)
                layer.pages.scatter.index_copy_(2, self._spans[k], total)
        self.counters.add_(self._moved)
        self.is_running = False
        assert self._host is not None
        counts, token_ids = self._host
        return GrownPages(end, self._host_ids[0].clone(), counts.clone(), token_ids.clone())

    def wait(self) -> None:
        """Wait on the host for a run that is not committed."""
        if self.is_running and self._done is not None:
            self._done.synchronize()

    def _write_ids(self, arena_ids: Tensor, slots: Tensor) -> None:
        for mine, ids in zip(self._host_ids, (arena_ids, slots), strict=True):
            mine.copy_(ids.view(mine.shape))

    def _build(self) -> None:
        shape, device = self.shape, self.ring.device
        L, B, H, n = self._arena_ids.shape
        S, D = self.segment, shape.head_dim
        start, first = self.counters[START], self.counters[PAGES]
        slots = shape.sinks + (start + torch.arange(S, device=device)) % shape.ring
        local = self.ring.index_select(4, slots)
        valid = self.layers[0].steady.valid.index_select(1, slots)
        rows = valid[None, :, None].expand(L, B, H, S).reshape(L * B * H, S)
        keys, values = (local[:, half].reshape(L * B * H, S, D) for half in range(2))
        formed = form_pages(keys, values, rows, shape.page_size, shape.block_pages)
        token_ids = formed.token_ids
        self._token_ids.copy_(
            torch.where(token_ids >= 0, token_ids + start, -1).view(self._token_ids.shape)
        )
        self._counts.copy_(formed.counts.view(self._counts.shape))
        stored = formed.pages
        if shape.codec is not None:
            stored = encode_pages(stored, formed.counts.flatten(), shape.codec)
        self.ops.store(stored, self._host_slots.flatten(), self.arena)
        pages = first + torch.arange(n, device=device)
        span = first // shape.span_pages
        in_first = pages // shape.span_pages == span
        for k, part in enumerate((in_first, ~in_first)):
            scatter = page_scatter(formed.keys, formed.values, formed.counts * part.int())
            self._add_to_span(k, span + k, scatter.unflatten(0, (L, B, H)))
        for every, name in zip(
            pages_of_parts(shape.block_pages), formed.summary._fields, strict=True
        ):
            part = getattr(formed.summary, name).unflatten(0, (L, B, H))
            places = first // every + torch.arange(n // every, device=device)
            for number, layer in enumerate(self.layers):
                getattr(layer.pages.summary, name).index_copy_(2, places, part[number])
        for number, layer in enumerate(self.layers):
            layer.pages.arena_ids.index_copy_(2, pages, self._arena_ids[number])

    def _add_to_span(self, k: int, span: Tensor, scatter: Tensor) -> None:
        """The totals `k`: of the span, as steps read it until the pages become visible, and of the
        scatter [layers, B, Hkv, 2, D, D] of pages."""
        last = self.layers[0].pages.scatter.shape[2] - 1
        self._spans[k].copy_(span.clamp(max=last))
        for number, layer in enumerate(self.layers):
            total = self._totals[k, number]
            total.copy_(layer.pages.scatter.index_select(2, self._spans[k]).squeeze(2))
            add_rounded(total, scatter[number])


def _to_host(tensor: Tensor) -> Tensor:
    host = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True)
    host.copy_(tensor, non_blocking=True)
    return host
