"""How many bytes a cache takes, from the shapes of a model alone.

The tensors are made as a cache and its engine make them, but on torch's meta device, where a tensor
has a shape and a size and no memory. So the sizes are those of the real code, not a second copy of
it. Cost: milliseconds, for any number of tokens.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch

from wavekv.config import OffloadConfig
from wavekv.growing import GrowingTensor
from wavekv.index.segments import cut_segments
from wavekv.kernels import step_reference
from wavekv.kernels.step import StepArena, StepPages, StepShape, StepSteady, empty_scratch
from wavekv.kvstore import KVLayout
from wavekv.offload.context import LayerContext
from wavekv.offload.device_layer import DeviceLayer
from wavekv.offload.engine_shape import step_shape
from wavekv.offload.fetches import PageFetches
from wavekv.offload.growth import Growth
from wavekv.offload.runtime import OffloadRuntime

_META = torch.device("meta")


_INDEX_PARTS = {
    "mean keys": ("mean", "mean_step"),
    "mean values": ("value", "value_step"),
    "blocks": ("block_mean", "block_mean_scale", "block_value", "block_value_scale"),
    "variances": ("variance",),
    "counts": ("counts",),
    "high codes": ("high", "key_step"),
    "low codes": ("low",),
}
"""What a `PageIndex` holds, by names."""


@dataclass(frozen=True, slots=True)
class CacheShape:
    """The offloaded layers of a model, and how much they hold."""

    layers: int
    batch: int
    kv_heads: int
    group: int
    """Query heads that share a KV head."""
    head_dim: int
    dtype: torch.dtype
    num_tokens: int
    """T, of each sequence."""


@dataclass(frozen=True, slots=True)
class CacheBytes:
    """What a cache holds after a prefill, in bytes of all layers."""

    index: dict[str, int]
    """By part: mean keys and mean values of pages, blocks, variances, counts, high and low planes
    of the codes, scatter."""
    steady: int
    """Keys and values of the sinks and the local window."""
    host_pages: int
    host_tables: int
    """Where pages are and which tokens they hold."""
    layout: KVLayout
    """Of one page."""
    num_pages: int
    """N, of a KV head."""
    local_tokens: int
    """The most that the steady zone of a layer has room for during a prefill, in chunks of
    `prefill_chunk`, which is a number here."""


def cache_bytes(config: OffloadConfig, shape: CacheShape) -> CacheBytes:
    """Sizes after a prefill."""
    layer = _layer(config, shape)
    paged, layers, pages = layer.paged, shape.layers, num_pages(config, shape.num_tokens)
    index = {name: paged.index.nbytes_of(*parts) for name, parts in _INDEX_PARTS.items()}
    index["scatter"] = paged.scatter.spans.nbytes
    tables = (paged.page_ids, paged.counts, paged.token_ids)
    layout = paged.arena.layout
    return CacheBytes(
        index={name: layers * size for name, size in index.items()},
        steady=layers * layer.steady.nbytes,
        host_pages=layers * shape.batch * shape.kv_heads * pages * layout.page_bytes,
        host_tables=layers * pages * sum(part.row_nbytes for part in tables),
        layout=layout,
        num_pages=pages,
        local_tokens=room_for_local(config, shape.num_tokens),
    )


def engine_step_shape(config: OffloadConfig, shape: CacheShape) -> StepShape:
    """The `StepShape` of an engine for this cache, with as many slots as pay."""
    layer = _layer(config, shape)
    return step_shape(
        config,
        sizes=(shape.batch, shape.kv_heads, shape.head_dim),
        group=shape.group,
        num_tokens=shape.num_tokens,
        num_pages=num_pages(config, shape.num_tokens),
        sinks=layer.steady.num_sink_slots,
        layout=layer.paged.arena.layout,
    )


def engine_bytes(config: OffloadConfig, shape: CacheShape, step: StepShape) -> dict[str, int]:
    """Bytes of the buffers of an engine on the device, by what they are: the index at its full
    capacity, the page pool and its tables, the ring with the steady zone, the working memory of
    steps, and that of growth. Of `shape` the tokens do not matter."""
    context = _layer(config, replace(shape, num_tokens=0))
    first = torch.empty(step.batch, step.kv_heads, step.sinks + 1, step.head_dim, device=_META)
    first = first.to(shape.dtype)
    context.steady.append(first, first, None)
    context.steady.fill_sinks(step.sinks)
    size = step.batch, step.kv_heads, step.sinks + step.ring, step.head_dim
    ring = torch.empty(shape.layers, 2, *size, dtype=shape.dtype, device=_META)
    valid = torch.empty(step.batch, size[2], dtype=torch.bool, device=_META)
    layer = DeviceLayer(context, StepSteady(ring[0, 0], ring[0, 1], valid), step)
    layers = [layer] * shape.layers
    counters = torch.empty(4, dtype=torch.int32, device=_META)
    # the host's side is not looked at
    arena = StepArena(counters, 1, [])
    growth = Growth(layers, ring, counters, arena, step, config.append_segment, step_reference)
    scratch = empty_scratch(step, shape.dtype, _META)
    fetches = PageFetches(
        layers=layers,
        arena=arena,
        counters=counters,
        limits=counters,
        scratch=scratch,
        shape=step,
        config=config,
        ops=step_reference,
    )
    working = (scratch, *fetches.scratches)
    # fetches ahead share most of the scratch
    buffers = {id(part): part.nbytes for tensors in working for part in tensors}
    table = layer.pool.table.nbytes
    return {
        "index": shape.layers * _nbytes(layer.pages),
        "pool": shape.layers * (sum(part.nbytes for part in layer.pool) - table),
        "tables": shape.layers * table,
        "ring": ring.nbytes + valid.nbytes,
        "scratch": sum(buffers.values()) + shape.layers * sum(part.nbytes for part in layer.totals),
        "growth": growth.nbytes,
    }


def _nbytes(pages: StepPages) -> int:
    return sum(part.nbytes for part in (*pages.summary, pages.scatter, pages.arena_ids))


def num_pages(config: OffloadConfig, num_tokens: int) -> int:
    """Pages N of a KV head after a prefill of `num_tokens`."""
    return sum(_segments(config, num_tokens)) // config.page_size


def _segments(config: OffloadConfig, num_tokens: int) -> list[int]:
    waiting = num_tokens - config.window
    return cut_segments(waiting, segment=config.segment, smallest=config.append_segment)


def _layer(config: OffloadConfig, shape: CacheShape) -> LayerContext:
    """A layer of that many tokens without memory; its page ids, on the host, are left out."""
    runtime = OffloadRuntime(config.override(cpu_budget=1 << 62))
    size = shape.batch, shape.kv_heads, 0, shape.head_dim
    empty = torch.empty(size, dtype=shape.dtype, device=_META)
    layer = LayerContext(runtime, empty, empty)
    tokens = torch.empty(*size[:2], shape.num_tokens, size[3], dtype=shape.dtype, device=_META)
    layer.steady.append(tokens, tokens, None)
    segments = _segments(config, shape.num_tokens)
    if segments:
        layer.steady.fill_sinks(config.num_sink_tokens)
        layer.steady.drop_oldest(sum(segments))
    pages, paged = sum(segments) // config.page_size, layer.paged
    paged.index.fit(pages)
    paged.index.claim(pages)
    spans = -(-pages // paged.scatter.span_pages)
    paged.scatter.spans.fit(spans)
    paged.scatter.spans.claim(spans)
    return layer


def room_for_local(config: OffloadConfig, num_tokens: int, num_local: int = 0) -> int:
    """The most tokens that the steady zone of a layer has room for while `num_tokens` are prefilled
    by chunks, after `num_local` that it has."""
    chunk = config.prefill_chunk
    assert chunk is not None
    zone = GrowingTensor(torch.empty(0, dtype=torch.uint8, device=_META), dim=0)
    zone.append(torch.empty(num_local, dtype=torch.uint8, device=_META))
    most = waiting = sinks = 0
    # what a chunk leaves is soon the same for all
    seen = min(num_tokens, 4 * (chunk + config.segment))
    for start in range(0, seen, chunk):
        zone.drop(sinks, waiting)
        count = min(chunk, num_tokens - start)
        zone.append(torch.empty(count, dtype=torch.uint8, device=_META))
        local = len(zone) - sinks - config.window
        waiting = sum(cut_segments(local, segment=config.segment, smallest=config.segment))
        if waiting and not sinks and config.num_sink_tokens:
            sinks = config.num_sink_tokens
            zone.insert_front(sinks)
        most = max(most, len(zone.buffer))
    return most
