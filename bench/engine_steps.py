"""Steps of a model on a decode engine, one by one and not captured: on a GPU, or on the torch twins
of its kernels."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

from wavekv import OffloadedCache, OffloadedKV
from wavekv.offload.engine import DecodeEngine
from wavekv.offload.engine_shape import engine_refusal


@contextmanager
def engine_of(cache: OffloadedCache) -> Iterator[DecodeEngine]:
    """While entered, an engine has what `cache` holds, which has a decode step behind it."""
    contexts = [layer.context for layer in cache.offloaded_layers]
    refusal = engine_refusal(contexts)
    if refusal is not None:
        raise RuntimeError(refusal)
    if cache.offloaded_layers[0].device.type == "cuda":
        from wavekv.kernels import cuda as ops
    else:
        from wavekv.kernels import step_reference as ops
    engine = DecodeEngine(contexts, ops)
    cache.runtime.engine = engine
    try:
        yield engine
    finally:
        cache.runtime.reclaim()


@torch.no_grad()
def engine_step(
    engine: DecodeEngine, model: OffloadedKV, cache: OffloadedCache, token: Tensor
) -> Tensor:
    """The next token [1, 1] after `token`, the likeliest."""
    inputs = {"past_key_values": cache, "use_cache": True, "logits_to_keep": 1}
    engine.before_step()
    position = torch.full_like(token, engine.num_tokens)
    with engine.stepping():
        out = model.model(input_ids=token, position_ids=position, **inputs)
    engine.advance()
    engine.after_step()
    return out.logits[:, -1].argmax(-1, keepdim=True)
