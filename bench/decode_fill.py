"""Contexts of all layers filled without a prompt: keys come clustered, so each cluster is a page.

Some layers have host pages of their own and the others share those, so that a long context needs
neither the host memory nor the time to pin it; the index in device memory is every layer's own.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
from decode_walk import clustered_pages
from needles import Needles
from torch import Tensor
from transformers import LlamaForCausalLM

from wavekv.config import OffloadConfig
from wavekv.index.levels import index_of_pages
from wavekv.index.scatter import scatter_by_span
from wavekv.kernels.page_index import PageIndex
from wavekv.offload import LayerContext, OffloadRuntime
from wavekv.offload.engine_shape import ROOM_TOKENS
from wavekv.offload.paged import PagedZone, SegmentPages

Plant = Callable[[int, Tensor], None]
"""Changes some of the keys [B, Hkv, T, D] of the tokens from a position on."""


@dataclass
class FilledContexts:
    """Contexts of all layers at one length."""

    runtime: OffloadRuntime
    layers: list[LayerContext]
    host_layers: int
    """Layers with host pages of their own."""
    last_spans: list[Tensor]
    """The scatter of each layer's last span, to which an engine adds the pages of new tokens."""

    def renew(self, config: OffloadConfig) -> None:
        """As filled, for other settings. An engine that had the contexts was dropped and has not
        given them back: it wrote behind what they hold, and to the last span."""
        self.runtime = self.runtime.fork(config)
        for context, span in zip(self.layers, self.last_spans, strict=True):
            context.runtime = self.runtime
            context.paged.scatter.spans.view[:, :, -1] = span

    @property
    def page_bytes(self) -> int:
        """Bytes of a page of one KV head."""
        return self.layers[0].paged.arena.layout.page_bytes

    @property
    def num_pages(self) -> int:
        """Pages of all layers and KV heads."""
        return sum(context.paged.page_ids.view.numel() for context in self.layers)


def fill_contexts(
    model: LlamaForCausalLM,
    runtime: OffloadRuntime,
    tokens: int,
    batch: int,
    *,
    host_layers: int,
    seed: int,
    needles: Needles | None = None,
) -> FilledContexts:
    """Contexts of `tokens` tokens: sinks, pages, and a window with what waits to be paged out.
    Needles of a layer whose pages are another's are that one's.

    Raises:
        ValueError: too few tokens for pages.
        CapacityError: the pages do not fit the host.
    """
    config, num_layers = runtime.config, model.config.num_hidden_layers
    host_layers = min(host_layers, num_layers)
    segment = config.append_segment
    num_paged = (tokens - config.window) // segment * segment
    if num_paged <= 0:
        raise ValueError(f"{tokens} tokens are all in the window")
    generator = torch.Generator(model.device).manual_seed(seed)
    like = torch.empty(
        (batch, model.config.num_key_value_heads, 0, model.config.head_dim),
        dtype=model.dtype,
        device=model.device,
    )
    layers = [LayerContext(runtime, like, like) for _ in range(num_layers)]
    arena = layers[0].paged.arena
    pages = host_layers * like.shape[0] * like.shape[1] * num_paged // config.page_size
    say(f"reserving {pages * arena.layout.page_bytes / 2**30:.1f} GiB for {host_layers} layers")
    arena.reserve(pages)
    say(f"filling {num_layers} layers with {num_paged} tokens in pages")
    for number, context in enumerate(layers):
        _fit(context.paged, num_paged)
        if number < host_layers:
            planted = None if needles is None else partial(needles.plant, number)
            _fill_pages(context.paged, num_paged, config.segment, generator, planted)
        else:
            _share_pages(context.paged, layers[number % host_layers].paged)
        _fill_steady(context, num_paged, tokens, generator)
    if like.is_cuda:
        torch.cuda.synchronize()
    index = sum(context.paged.statistics_nbytes for context in layers)
    say(f"filled; the index takes {index / 2**30:.1f} GiB")
    last_spans = [context.paged.scatter.spans.view[:, :, -1].clone() for context in layers]
    return FilledContexts(runtime, layers, host_layers, last_spans)


def say(text: str) -> None:
    """A line of progress."""
    print(f"[{time.strftime('%H:%M:%S')}] {text}", flush=True)


def _fit(zone: PagedZone, num_tokens: int) -> None:
    """Buffers of the size that an engine will want: it then leaves them where they are."""
    pages = num_tokens // zone.arena.layout.page_size
    capacity = pages + ROOM_TOKENS // zone.arena.layout.page_size
    for part in (zone.page_ids, zone.counts, zone.token_ids):
        part.fit(pages)
    zone.index.fit(capacity)
    zone.scatter.spans.fit(-(-capacity // zone.scatter.span_pages))


def _fill_pages(
    zone: PagedZone, num_tokens: int, segment: int, generator: torch.Generator, plant: Plant | None
) -> None:
    """Random pages, a segment at a time."""
    for start in range(0, num_tokens, segment):
        length = min(segment, num_tokens - start)
        zone.append(_random_segment(zone, start, length, generator, plant))


def _random_segment(
    zone: PagedZone, start: int, length: int, generator: torch.Generator, plant: Plant | None
) -> SegmentPages:
    layout, held = zone.arena.layout, zone.index.view.counts
    (B, H, _), device, P, D = held.shape, held.device, layout.page_size, layout.head_dim
    n = length // P
    keys, values = clustered_pages(generator, B * H, n, P, D, device, layout.dtype)
    if plant is not None:
        plant(start, keys.view(B, H, length, D))
    counts = torch.full((B * H, n), P, dtype=torch.int32, device=device)
    index = index_of_pages(keys, values, counts, zone.index.block_pages)
    scatter = scatter_by_span(
        keys, values, counts, first_page=zone.num_pages, span_pages=zone.scatter.span_pages
    )
    ids = zone.allocate(B * H * n)
    zone.arena.write(ids, torch.stack([keys, values], 2).flatten(0, 1))
    token_ids = torch.arange(start, start + length, dtype=torch.int32).view(n, P)

    def of_heads(x: Tensor) -> Tensor:
        return x.unflatten(0, (B, H))

    return SegmentPages(
        start=start,
        length=length,
        page_ids=ids.view(B, H, n),
        counts=torch.full((B, H, n), P, dtype=torch.int32),
        token_ids=token_ids.expand(B, H, n, P),
        index=PageIndex._make(of_heads(part) for part in index),
        scatter=of_heads(scatter),
    )


def _share_pages(zone: PagedZone, other: PagedZone) -> None:
    """The pages of another layer, with an index of its own over them."""
    zone.arena.retain(other.page_ids.view)
    pages = SegmentPages(
        start=0,
        length=other.num_tokens,
        page_ids=other.page_ids.view,
        counts=other.counts.view,
        token_ids=other.token_ids.view,
        index=other.index.view,
        scatter=other.scatter.spans.view,
    )
    zone.append(pages)


def _fill_steady(context: LayerContext, start: int, end: int, generator: torch.Generator) -> None:
    """Random sinks, and random local tokens [start, end)."""
    zone, sinks = context.steady, context.runtime.config.num_sink_tokens
    B, H, D = context.shape
    like = zone.keys.view

    def random(count: int) -> Tensor:
        size = B, H, count, D
        return torch.randn(size, generator=generator, dtype=like.dtype, device=like.device)

    if sinks:
        zone.append(random(sinks), random(sinks), None)
        zone.fill_sinks(sinks)
        zone.drop_oldest(sinks)
    zone.start = start
    zone.append(random(end - start), random(end - start), None)
