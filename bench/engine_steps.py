"""Steps of a model on a decode engine, one by one and not captured: on a GPU, or on the torch twins
of its kernels."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from wavekv import OffloadedCache, OffloadedKV
from wavekv.offload import LayerContext
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


@contextmanager
def watched(
    engine: DecodeEngine,
    copies: Sequence[LayerContext],
    look: Callable[[int, Tensor, Tensor], None],
) -> Iterator[None]:
    """While entered, what a layer attends to in the engine is attended to by its copy on the CPU
    too. look: is given the layer, and the outputs [B, Hq, 1, D] of both on the CPU."""
    attend = engine.attend

    def attend_twice(number: int, *states: Any) -> Tensor:
        """states: query, keys, values, logits, sink logits (None), as `engine.attend`."""
        got = attend(number, *states)
        expected = copies[number].attend(*(x.cpu() for x in states[:3]), None, states[3])
        look(number, got.cpu(), expected)
        return got

    engine.attend = attend_twice
    try:
        yield
    finally:
        del engine.attend


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
