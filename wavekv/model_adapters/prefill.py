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
from wavekv.model_adapters.prefill_plan import chunk_tokens, plan_prefill
from wavekv.offload import LayerContext
from wavekv.offload.runtime import PrefillPlan
from wavekv.offload.together import page_out_together


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
    last token, or None if not wanted. If it fails, or is interrupted (Ctrl-C), the cache holds the
    chunks that were finished. Cost: O(T * (cached + T)) attention.

    Raises:
        CapacityError: it cannot fit the host or the device; usually found before the first chunk.
    """
    seen = cache.get_seq_length()
    check_shapes(cache, input_ids, attention_mask, seen)
    batch, total = input_ids.shape
    size = chunk_tokens(model, cache, batch)
    plan = plan_prefill(model, cache, batch, total, size)
    input_ids = input_ids.to(model.device)
    mask = None if attention_mask is None else attention_mask.to(model.device)
    logits = None
    with _bar(total, progress) as bar, _prefilling(cache, plan):
        for start, stop in _chunks(cache, seen, total, size):
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


def _chunks(cache: OffloadedCache, seen: int, total: int, size: int) -> Iterator[tuple[int, int]]:
    """(start, stop) of each forward over `total` tokens after `seen` cached ones.

    Raises:
        CacheError: the cached tokens would have to be rotated anew.
    """
    first = size
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


@contextmanager
def _prefilling(cache: OffloadedCache, plan: PrefillPlan) -> Iterator[None]:
    """Let layers follow the plan in the body; afterwards, or after an error, nothing is left of it
    but the tokens."""
    runtime = cache.runtime
    runtime.is_prefilling, runtime.plan = True, plan
    try:
        yield
        runtime.is_prefilling = False
        for context in _contexts(cache):
            context.end_prefill()
        page_out_together(_contexts(cache))
    finally:
        runtime.is_prefilling, runtime.plan = False, None
        for context in _contexts(cache):
            context.end_prefill()
        runtime.buffers.clear()
        for arena in runtime.arenas.values():
            arena.cancel_orders()


def _contexts(cache: OffloadedCache) -> list[LayerContext]:
    contexts = (layer.context for layer in cache.offloaded_layers)
    return [context for context in contexts if context is not None]


def _bar(total: int, progress: bool) -> Any:
    return tqdm(total=total, unit="tok", unit_scale=True, desc="prefill", disable=not progress)
