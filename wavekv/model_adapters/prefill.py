"""Chunked prefill: exact, with pages built behind it, and undone as a whole chunk if it fails."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm
from transformers import PreTrainedConfig, PreTrainedModel

from wavekv.errors import CacheError
from wavekv.model_adapters.cache import OffloadedCache
from wavekv.model_adapters.layer import OffloadedLayer


def prefill(
    model: PreTrainedModel,
    input_ids: Tensor,
    cache: OffloadedCache,
    attention_mask: Tensor | None,
    *,
    progress: bool,
    want_logits: bool,
) -> Tensor | None:
    """Take `input_ids` [B, T] into the cache, `prefill_chunk` tokens a forward (see `_chunks`).

    attention_mask: [B, cached + T], 0 where a token is padding. Returns the logits [B, V] after the
    last token, or None if not wanted. If it fails, the cache holds the chunks that were finished.
    Cost: O(T * (cached + T)) attention.
    """
    seen = cache.get_seq_length()
    check_shapes(cache, input_ids, attention_mask, seen)
    batch, total = input_ids.shape
    _reserve_all(model, cache, batch, total)
    input_ids = input_ids.to(model.device)
    mask = None if attention_mask is None else attention_mask.to(model.device)
    logits = None
    with _prefilling(cache), _bar(total, progress) as bar:
        for start, stop in _chunks(cache, seen, total):
            needs_head = want_logits and stop == total
            forward = model if needs_head else model.base_model
            inputs = _forward_inputs(
                forward.forward,
                input_ids[:, start:stop],
                None if mask is None else mask[:, : seen + stop],
                seen + start,
            )
            with cache.restored_on_error(), torch.no_grad():
                out = forward(**inputs, past_key_values=cache, use_cache=True)
            if needs_head:
                logits = out.logits[:, -1]
            bar.update(stop - start)
    for layer in cache.offloaded_layers:
        if layer.context is not None:
            layer.context.page_out()
    return logits


def check_shapes(cache: OffloadedCache, ids: Tensor, mask: Tensor | None, seen: int) -> None:
    """Raise CacheError unless ids [B, T] and mask [B, seen + T] fit the cache and each other."""
    if ids.ndim != 2 or ids.shape[1] == 0:
        raise CacheError(f"expected input_ids [B, T] with T >= 1, got {tuple(ids.shape)}")
    expected = (ids.shape[0], seen + ids.shape[1])
    if mask is not None and tuple(mask.shape) != expected:
        raise CacheError(
            f"expected an attention_mask over cached and new tokens, {expected} = "
            f"[B, {seen} + {ids.shape[1]}], got {tuple(mask.shape)}"
        )
    if cache.batch_size not in (-1, ids.shape[0]):
        raise CacheError(
            f"expected {cache.batch_size} sequences, as this cache holds, got {ids.shape[0]}; use "
            "a new cache (beam search and num_return_sequences leave one sequence for each beam)"
        )


def positions(attention_mask: Tensor, num_new: int) -> Tensor:
    """Positions [B, num_new] of the last tokens, counting valid ones, as `generate()` does.

    attention_mask: [B, cached + new].
    """
    counted = attention_mask.long().cumsum(-1) - 1
    return counted.masked_fill(attention_mask == 0, 0)[:, -num_new:]


def _chunks(cache: OffloadedCache, seen: int, total: int) -> Iterator[tuple[int, int]]:
    """(start, stop) of each forward over `total` tokens after `seen` cached ones.

    Raises:
        CacheError: the cached tokens would have to be rotated anew.
    """
    size = first = cache.config.prefill_chunk
    switch = _rotation_switch(cache.model_config)
    if switch is not None and seen + total > switch:
        if 0 < seen <= switch:
            raise CacheError(
                f"expected all tokens anew: this model rotates keys differently beyond {switch} "
                f"tokens (longrope), the cache holds {seen}; pass the whole text to a new cache"
            )
        # what the first forward sees decides how its keys are rotated
        first = max(size, switch + 1)
    yield 0, min(first, total)
    for start in range(first, total, size):
        yield start, min(start + size, total)


def _rotation_switch(config: PreTrainedConfig) -> int | None:
    """The length beyond which a longrope model rotates all keys of a forward differently."""
    parameters = getattr(config, "rope_parameters", None) or {}
    parts = [part for part in parameters.values() if isinstance(part, dict)] or [parameters]
    for part in parts:
        if part.get("rope_type") == "longrope":
            original = part.get("original_max_position_embeddings")
            return int(original or config.original_max_position_embeddings)
    return None


def _forward_inputs(
    forward: Callable[..., Any], input_ids: Tensor, attention_mask: Tensor | None, seen: int
) -> dict[str, Any]:
    """Arguments of a forward over `input_ids` [B, t] after `seen` cached tokens."""
    accepted = inspect.signature(forward).parameters
    inputs: dict[str, Any] = {"input_ids": input_ids}
    if attention_mask is not None:
        inputs["attention_mask"] = attention_mask
    if "position_ids" in accepted:
        t = input_ids.shape[1]
        if attention_mask is None:
            steps = torch.arange(seen, seen + t, device=input_ids.device)
            inputs["position_ids"] = steps.expand_as(input_ids)
        else:
            inputs["position_ids"] = positions(attention_mask, t)
    if "logits_to_keep" in accepted:
        inputs["logits_to_keep"] = 1
    return inputs


def _reserve_all(model: PreTrainedModel, cache: OffloadedCache, batch: int, total: int) -> None:
    """Raise CapacityError now if the pages of all `total` tokens will not fit."""
    config, itemsize = cache.config, model.dtype.itemsize
    waiting = max(0, total - config.window - config.append_segment)
    size = 2 * itemsize * waiting * batch * _values_per_token(cache)
    arenas = cache.runtime.arenas.values()
    held = sum((a.capacity - a.num_pages) * a.layout.page_bytes for a in arenas)
    cache.runtime.budget.check(max(0, size - held))


def _values_per_token(cache: OffloadedCache) -> int:
    """KV heads times their size, summed over the offloaded layers: an estimate before any ran."""
    text, count = cache.model_config, 0
    configs = getattr(text, "per_layer_config", None) or [text] * len(cache.layers)
    for layer, config in zip(cache.layers, configs, strict=False):
        if not isinstance(layer, OffloadedLayer):
            continue
        if layer.context is not None:
            _, heads, dim = layer.context.shape
        else:
            heads, dim = _guessed_shape(config)
        count += heads * dim
    return count


def _guessed_shape(config: PreTrainedConfig) -> tuple[int, int]:
    """(Hkv, D) as configurations call them; rather too little than too much."""
    num_queries: int = config.num_attention_heads
    heads = getattr(config, "num_key_value_heads", None) or num_queries
    heads = 1 if getattr(config, "multi_query", False) else heads
    return heads, getattr(config, "head_dim", None) or config.hidden_size // num_queries


@contextmanager
def _prefilling(cache: OffloadedCache) -> Iterator[None]:
    cache.runtime.is_prefilling = True
    try:
        yield
    finally:
        cache.runtime.is_prefilling = False


def _bar(total: int, progress: bool) -> Any:
    return tqdm(total=total, unit="tok", unit_scale=True, desc="prefill", disable=not progress)
