"""A cache on the CPU that holds what another holds, in the same pages: one on a device, or one that
stores them in another form."""

from __future__ import annotations

import torch

from wavekv import OffloadedCache, OffloadedKV
from wavekv.kernels.page_index import PageIndex
from wavekv.offload import LayerContext, OffloadRuntime

CPU = torch.device("cpu")


@torch.no_grad()
def cache_on_cpu(cache: OffloadedCache, model: OffloadedKV) -> OffloadedCache:
    """What `cache` holds, as a cache of `model`, which is on the CPU and has the same config, but
    perhaps for `host_dtype`."""
    assert model.offload_config == cache.config.override(host_dtype=model.offload_config.host_dtype)
    cache.settle()
    copy = model.new_cache()
    for source, layer in zip(cache.offloaded_layers, copy.offloaded_layers, strict=True):
        layer._context = _context_on_cpu(source.context, copy.runtime)
        layer.dtype, layer.device, layer.is_initialized = source.dtype, CPU, True
    assert copy.get_seq_length() == cache.get_seq_length()
    return copy


def _context_on_cpu(source: LayerContext, runtime: OffloadRuntime) -> LayerContext:
    """A settled context as one of `runtime`, with copies of its pages in that one's arena."""
    B, H, D = source.shape
    empty = torch.empty(B, H, 0, D, dtype=source.steady.keys.view.dtype)
    context = LayerContext(runtime, empty, empty)
    for name in ("keys", "values", "valid"):
        getattr(context.steady, name).append(getattr(source.steady, name).view.cpu())
    context.steady.sink_positions = source.steady.sink_positions.to(CPU, copy=True)
    for name in ("start", "has_gaps", "is_ragged"):
        setattr(context.steady, name, getattr(source.steady, name))
    theirs, mine = source.paged, context.paged
    old_ids = theirs.page_ids.view
    ids = mine.arena.allocate(old_ids.numel())
    mine.page_ids.append(ids.view(old_ids.shape))
    mine.arena.write(ids, theirs.arena.read(old_ids.flatten()), theirs.counts.view.flatten())
    for name in ("counts", "token_ids"):
        getattr(mine, name).append(getattr(theirs, name).view.cpu())
    mine.index.append(PageIndex._make(part.cpu() for part in theirs.index.view))
    mine.scatter.spans.append(theirs.scatter.spans.view.cpu())
    mine.segments = list(theirs.segments)
    return context
