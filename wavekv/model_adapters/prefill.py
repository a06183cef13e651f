"""Chunked prefill: exact, with pages built behind it, and undone as a whole chunk if it fails."""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm
from transformers import PreTrainedModel

from wavekv.errors import CacheError
from wavekv.model_adapters.cache import OffloadedCache


def prefill(
    model: PreTrainedModel,
    input_ids: Tensor,
    cache: OffloadedCache,
    attention_mask: Tensor | None,
    *,
    progress: bool,
    want_logits: bool,
) -> Tensor | None:
    """Take `input_ids` [B, T] into the cache, `prefill_chunk` tokens a forward.

    attention_mask: [B, cached + T], 0 where a token is padding. Returns the logits [B, V] after the
    last token, or None if not wanted. If it fails, the cache holds the chunks that were finished.
    Cost: O(T * (cached + T)) attention.
    """
    batch, total = input_ids.shape
    seen = cache.get_seq_length()
    _check(cache, input_ids, attention_mask, seen)
    _reserve_all(model, cache, batch, total)
    logits = None
    with _prefilling(cache), _bar(total, progress) as bar:
        for start in range(0, total, cache.config.prefill_chunk):
            stop = min(start + cache.config.prefill_chunk, total)
            mask = None if attention_mask is None else attention_mask[:, : seen + stop]
            inputs = forward_inputs(model, input_ids[:, start:stop], mask, seen + start)
            with cache.restored_on_error(), torch.no_grad():
                if want_logits and stop == total:
                    out = model(**inputs, past_key_values=cache, use_cache=True, logits_to_keep=1)
                    logits = out.logits[:, -1]
                else:
                    model.base_model(**inputs, past_key_values=cache, use_cache=True)
            bar.update(stop - start)
    for layer in cache.offloaded_layers:
        if layer.context is not None:
            layer.context.page_out()
    return logits


def forward_inputs(
    model: PreTrainedModel, input_ids: Tensor, attention_mask: Tensor | None, seen: int
) -> dict[str, Any]:
    """Arguments of a forward over `input_ids` [B, t] after `seen` cached tokens.

    Positions count valid tokens, as `generate()` counts them.
    """
    inputs: dict[str, Any] = {"input_ids": input_ids}
    if attention_mask is not None:
        inputs["attention_mask"] = attention_mask
    if "position_ids" in inspect.signature(model.base_model.forward).parameters:
        t = input_ids.shape[1]
        if attention_mask is None:
            positions = torch.arange(seen, seen + t, device=input_ids.device).expand_as(input_ids)
        else:
            positions = (attention_mask.long().cumsum(-1) - 1).clamp_min(0)[:, -t:]
        inputs["position_ids"] = positions
    return inputs


def _check(cache: OffloadedCache, ids: Tensor, mask: Tensor | None, seen: int) -> None:
    if mask is not None and tuple(mask.shape) != (ids.shape[0], seen + ids.shape[1]):
        raise CacheError(
            f"attention_mask must cover cached and new tokens, "
            f"[{ids.shape[0]}, {seen} + {ids.shape[1]}], got {tuple(mask.shape)}"
        )


def _reserve_all(model: PreTrainedModel, cache: OffloadedCache, batch: int, total: int) -> None:
    """Raise CapacityError now if the pages of all `total` tokens will not fit."""
    text = cache.model_config
    heads = getattr(text, "num_key_value_heads", None) or text.num_attention_heads
    dim = getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads
    config = cache.config
    waiting = max(0, total - config.window - config.append_segment)
    size = 2 * dim * model.dtype.itemsize * waiting * batch * heads * len(cache.offloaded_layers)
    held = sum(arena.capacity - arena.num_pages for arena in cache.runtime.arenas.values())
    page_bytes = 2 * dim * model.dtype.itemsize * config.page_size
    cache.runtime.budget.check(max(0, size - held * page_bytes))


@contextmanager
def _prefilling(cache: OffloadedCache) -> Iterator[None]:
    cache.runtime.is_prefilling = True
    try:
        yield
    finally:
        cache.runtime.is_prefilling = False


def _bar(total: int, progress: bool) -> Any:
    return tqdm(total=total, unit="tok", unit_scale=True, desc="prefill", disable=not progress)
