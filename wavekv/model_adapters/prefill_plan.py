"""What a prefill will need, before it begins: whether it fits, how long its chunks are, and how
many tokens it may keep on the device."""

from __future__ import annotations

import torch
from transformers import PreTrainedConfig, PreTrainedModel

from wavekv.errors import CapacityError
from wavekv.kvstore import KVLayout
from wavekv.model_adapters.cache import OffloadedCache
from wavekv.model_adapters.layer import OffloadedLayer
from wavekv.offload.device_memory import free_memory, index_bytes
from wavekv.offload.prefill_sizes import (
    building_bytes,
    chosen_chunk,
    forward_bytes,
    resident_tokens,
    stream_bytes,
)
from wavekv.offload.runtime import PrefillPlan

_GIB = 2**30


def chunk_tokens(model: PreTrainedModel, cache: OffloadedCache, batch: int) -> int:
    """Tokens that one forward of a prefill takes."""
    devices = _cuda_devices(model)
    free = min(map(free_memory, devices)) if devices else None
    return chosen_chunk(cache.config, free, lambda size: _working_bytes(model, cache, size * batch))


def plan_prefill(
    model: PreTrainedModel, cache: OffloadedCache, batch: int, total: int, chunk: int
) -> PrefillPlan:
    """The plan for `total` more tokens of `batch` sequences in chunks of `chunk`.

    Raises:
        CapacityError: host pages do not fit cpu_budget, or what a prefill cannot do without does
            not fit the device. Nothing is allocated.
    """
    _check_host(model, cache, batch, total)
    seen = cache.get_seq_length()
    devices = _cuda_devices(model)
    keeps = cache.runtime.keeps_resident
    if not (bool(devices) if keeps is None else keeps):
        return PrefillPlan(seen + total, 0)
    free = sum(map(free_memory, devices or [torch.device("cpu")]))
    shapes = _shapes(cache)
    # 2 for keys and values
    token_bytes = 2 * model.dtype.itemsize * batch * sum(h * d for h, d in shapes)
    layer_bytes = (seen + total) * token_bytes // len(shapes)
    stream = stream_bytes(layer_bytes, is_coded=cache.config.host_dtype != "model")
    needed = stream
    if devices:
        needed += _check_device(model, cache, batch, total, chunk, free, token_bytes, stream)
    resident = resident_tokens(
        cache.config,
        total=total,
        chunk=chunk,
        free=free,
        needed=needed,
        stream=stream,
        token_bytes=token_bytes,
    )
    return PrefillPlan(seen + total, resident)


def _check_host(model: PreTrainedModel, cache: OffloadedCache, batch: int, total: int) -> None:
    config = cache.config
    waiting = max(0, total - config.window - config.append_segment)
    layouts = [
        (heads, KVLayout(config.page_size, dim, model.dtype, config.host_dtype))
        for heads, dim in _shapes(cache)
    ]
    page_bytes = sum(heads * layout.page_bytes for heads, layout in layouts)
    size = waiting * batch * page_bytes // config.page_size
    arenas = cache.runtime.arenas.values()
    held = sum((a.capacity - a.num_pages) * a.layout.page_bytes for a in arenas)
    cache.runtime.budget.check(max(0, size - held))


def _check_device(
    model: PreTrainedModel,
    cache: OffloadedCache,
    batch: int,
    total: int,
    chunk: int,
    free: int,
    token_bytes: int,
    stream: int,
) -> int:
    """Bytes of device memory that the index, a chunk and its tensors take, beside the stream."""
    shapes = _shapes(cache)
    index = int(total * batch * sum(h * index_bytes(cache.config, d) for h, d in shapes))
    length = min(chunk, total)
    chunk_bytes = length * token_bytes + _working_bytes(model, cache, length * batch)
    chunk_bytes += building_bytes(length * token_bytes // len(shapes))
    if index + chunk_bytes + stream > free:
        raise CapacityError(
            f"a prefill of {total} tokens needs {(index + chunk_bytes + stream) / _GIB:.1f} GiB of "
            f"device memory: {index / _GIB:.1f} GiB for the index of its pages, "
            f"{chunk_bytes / _GIB:.1f} GiB for a chunk of {length} tokens and "
            f"{stream / _GIB:.1f} GiB to stream pages; {free / _GIB:.1f} GiB are free; shorten the "
            "context, lower prefill_chunk, or free device memory"
        )
    return index + chunk_bytes


def _working_bytes(model: PreTrainedModel, cache: OffloadedCache, num_tokens: int) -> int:
    """Bytes of the tensors of a forward that are there at once: rather too little."""
    config = cache.model_config
    hidden, num_queries = config.hidden_size, config.num_attention_heads
    inner = getattr(config, "intermediate_size", None) or 4 * hidden
    return forward_bytes(
        num_tokens,
        hidden=hidden,
        inner=max(inner) if isinstance(inner, (list, tuple)) else inner,
        num_queries=num_queries,
        head_dim=getattr(config, "head_dim", None) or hidden // num_queries,
        itemsize=model.dtype.itemsize,
    )


def _shapes(cache: OffloadedCache) -> list[tuple[int, int]]:
    """(Hkv, D) of each offloaded layer: an estimate before any ran."""
    text, shapes = cache.model_config, []
    configs = getattr(text, "per_layer_config", None) or [text] * len(cache.layers)
    for layer, config in zip(cache.layers, configs, strict=False):
        if not isinstance(layer, OffloadedLayer):
            continue
        if layer.context is not None:
            _, heads, dim = layer.context.shape
        else:
            heads, dim = _guessed_shape(config)
        shapes.append((heads, dim))
    return shapes


def _guessed_shape(config: PreTrainedConfig) -> tuple[int, int]:
    """(Hkv, D) as configurations call them; rather too little than too much."""
    num_queries: int = config.num_attention_heads
    heads = getattr(config, "num_key_value_heads", None) or num_queries
    heads = 1 if getattr(config, "multi_query", False) else heads
    return heads, getattr(config, "head_dim", None) or config.hidden_size // num_queries


def _cuda_devices(model: PreTrainedModel) -> list[torch.device]:
    found = {weight.device for weight in model.parameters() if weight.is_cuda}
    return sorted(found, key=lambda device: device.index)
