"""What a prefill will need, before it begins: whether it fits, how long its chunks are, and how
many tokens it may keep on the device."""

from __future__ import annotations

from collections import Counter

import torch
from transformers import PreTrainedConfig, PreTrainedModel

from wavekv.kvstore import KVLayout
from wavekv.model_adapters.cache import OffloadedCache
from wavekv.model_adapters.graph import model_refusal
from wavekv.model_adapters.layer import OffloadedLayer
from wavekv.offload.device_memory import (
    LIBRARY_BYTES,
    device_budget,
    free_memory,
    held_memory,
    too_much,
)
from wavekv.offload.pool import check_steps
from wavekv.offload.prefill_sizes import (
    PREFILL_DO,
    chosen_chunk,
    forward_bytes,
    prefill_parts,
    resident_tokens,
)
from wavekv.offload.room import room_tokens
from wavekv.offload.runtime import PrefillPlan
from wavekv.offload.sizes import CacheShape


def plan_prefill(
    model: PreTrainedModel, cache: OffloadedCache, batch: int, total: int
) -> PrefillPlan:
    """The plan for `total` more tokens of `batch` sequences.

    Raises:
        CapacityError: host pages do not fit cpu_budget, or the device_budget does not hold what the
            prefill, or a decode step after it, cannot do without. Nothing is allocated.
    """
    _check_host(model, cache, batch, total)
    config, end = cache.config, cache.get_seq_length() + total
    shapes = _cache_shapes(model, cache, batch, end)
    devices = _cuda_devices(model)
    if not devices:
        chunk = chosen_chunk(config, None, lambda _: 0)
        wanted = resident_tokens(total=total, chunk=chunk, room=1 << 62, token_bytes=1)
        return PrefillPlan(end, chunk, wanted if cache.runtime.keeps_resident else 0)
    contexts = [layer.context for layer in cache.offloaded_layers]
    held = held_memory(context for context in contexts if context is not None)
    budget = device_budget(config, sum(map(free_memory, devices)) + held)

    def parts(chunk: int) -> dict[str, int]:
        found = prefill_parts(
            config,
            shapes,
            new_tokens=total,
            chunk=chunk,
            forward=lambda tokens: _working_bytes(model, cache, batch, tokens),
        )
        # the ids of the whole prompt
        found["forward"] += 8 * batch * total
        return found | {"libraries": LIBRARY_BYTES * len(devices)}

    chunk = chosen_chunk(config, budget, lambda size: sum(parts(size).values()))
    needed = parts(chunk)
    if sum(needed.values()) > budget:
        what = f"a prefill of {total} tokens in chunks of {min(chunk, total)}"
        raise too_much(what, needed, budget, PREFILL_DO)
    check_steps(
        config.override(prefill_chunk=chunk),
        shapes,
        budget=budget,
        is_captured=config.capture and model_refusal(model, cache) is None,
    )
    keeps = cache.runtime.keeps_resident
    room = 0 if keeps is False else budget - sum(needed.values())
    # 2 for keys and values
    token_bytes = 2 * model.dtype.itemsize * batch * sum(h * d for h, d in _shapes(cache))
    resident = resident_tokens(total=total, chunk=chunk, room=room, token_bytes=token_bytes)
    return PrefillPlan(end, chunk, resident, room_tokens(config))


def _check_host(model: PreTrainedModel, cache: OffloadedCache, batch: int, total: int) -> None:
    config = cache.config
    waiting = max(0, total - config.window - config.append_segment)
    layouts = [
        (heads, KVLayout(config.page_size, dim, model.dtype, config.host_dtype))
        for heads, dim in _shapes(cache)
    ]
    page_bytes = sum(heads * layout.page_bytes for heads, layout in layouts)
    size = waiting * batch * page_bytes // config.page_size
    cache.runtime.check_room(size)


def _working_bytes(
    model: PreTrainedModel, cache: OffloadedCache, batch: int, num_tokens: int
) -> int:
    """Bytes of the tensors of a forward over `num_tokens` of each sequence that are there at once
    (estimated)."""
    config, itemsize = cache.model_config, model.dtype.itemsize
    hidden = config.hidden_size
    inner = getattr(config, "intermediate_size", None) or 4 * hidden
    # one layer at a time: the widest
    heads, head_dim = max(map(_guessed_shape, _layer_configs(cache)), key=lambda s: s[0] * s[1])
    size = forward_bytes(
        num_tokens * batch,
        hidden=hidden,
        inner=max(inner) if isinstance(inner, (list, tuple)) else inner,
        num_queries=config.num_attention_heads,
        kv_heads=heads,
        head_dim=head_dim,
        itemsize=itemsize,
    )
    window = getattr(config, "sliding_window", None) or 0
    if window and len(cache.offloaded_layers) < len(cache.layers):
        # the mask of such a layer, as bits and as the bias that they become; and what it keeps
        kept = min(window, cache.get_seq_length()) + num_tokens
        others = len(cache.layers) - len(cache.offloaded_layers)
        size += batch * num_tokens * kept * (1 + itemsize)
        size += 2 * batch * heads * head_dim * itemsize * (others * window + num_tokens)
    return size


def _cache_shapes(
    model: PreTrainedModel, cache: OffloadedCache, batch: int, num_tokens: int
) -> list[CacheShape]:
    """The offloaded layers, those alike together."""
    num_queries = cache.model_config.num_attention_heads
    return [
        CacheShape(
            layers=count,
            batch=batch,
            kv_heads=heads,
            group=max(1, num_queries // heads),
            head_dim=dim,
            dtype=model.dtype,
            num_tokens=num_tokens,
        )
        for (heads, dim), count in Counter(_shapes(cache)).items()
    ]


def _shapes(cache: OffloadedCache) -> list[tuple[int, int]]:
    """(Hkv, D) of each offloaded layer: an estimate before any ran."""
    shapes = []
    for layer, config in zip(cache.layers, _layer_configs(cache), strict=False):
        if not isinstance(layer, OffloadedLayer):
            continue
        if layer.context is not None:
            _, heads, dim = layer.context.shape
        else:
            heads, dim = _guessed_shape(config)
        shapes.append((heads, dim))
    return shapes


def _layer_configs(cache: OffloadedCache) -> list[PreTrainedConfig]:
    """Of each layer: models whose layers differ say so for each of them, and only there."""
    text = cache.model_config
    return list(getattr(text, "per_layer_config", None) or [text] * len(cache.layers))


def _guessed_shape(config: PreTrainedConfig) -> tuple[int, int]:
    """(Hkv, D) as configurations call them; rather too little than too much."""
    num_queries: int = config.num_attention_heads
    heads = getattr(config, "num_key_value_heads", None) or num_queries
    heads = 1 if getattr(config, "multi_query", False) else heads
    return heads, getattr(config, "head_dim", None) or config.hidden_size // num_queries


def _cuda_devices(model: PreTrainedModel) -> list[torch.device]:
    found = {weight.device for weight in model.parameters() if weight.is_cuda}
    return sorted(found, key=lambda device: device.index)
