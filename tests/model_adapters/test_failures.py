"""Failures midway: the cache is as it was."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from cache_answers import check_answers
from tiny_models import left_padded, prompt
from torch import Tensor, nn

from wavekv import OffloadedKV
from wavekv.errors import (
    CapacityError,
)
from wavekv.kvstore import MemoryBudget
from wavekv.offload import LayerContext

Wrap = Callable[..., OffloadedKV]
HYBRIDS = ["gemma3_text", "llama4_text", "qwen3_next"]


def _fail_in(module: nn.Module, error: BaseException, *, after: int) -> Any:
    """Let the forward of `module` raise once it ran `after` times. Returns the hook's handle."""
    calls = [0]

    def count(*_: Any) -> None:
        calls[0] += 1
        if calls[0] > after:
            raise error

    return module.register_forward_pre_hook(count)


FAILURES = [RuntimeError("from a layer"), KeyboardInterrupt()]
KINDS = ["llama", *HYBRIDS]


def _last_layer(model: OffloadedKV) -> nn.Module:
    """What runs after the last attention."""
    return model.model.model.layers[-1].post_attention_layernorm


@pytest.mark.parametrize("error", FAILURES, ids=["error", "interrupt"])
@pytest.mark.parametrize("finished", [0, 3])
@pytest.mark.parametrize("model_type", KINDS)
def test_a_prefill_that_fails_midway(
    model_type: str, finished: int, error: BaseException, wrapped: Wrap
) -> None:
    model, ids = wrapped(model_type, prefill_chunk=23), prompt(120)
    cache = model.new_cache()
    handle = _fail_in(_last_layer(model), error, after=finished)
    with pytest.raises(type(error)):
        model.prefill(ids, cache)
    handle.remove()
    assert not cache.runtime.is_prefilling
    if finished:
        check_answers(model, model_type, cache, ids[:, : 23 * finished])
    else:
        assert cache.get_seq_length() == 0
        # any batch may come next
        model.prefill(prompt(50, batch=2), cache)
        check_answers(model, model_type, cache, prompt(50, batch=2))


@pytest.mark.parametrize("error", FAILURES, ids=["error", "interrupt"])
@pytest.mark.parametrize("num_new", [1, 30])
@pytest.mark.parametrize("model_type", KINDS)
@torch.no_grad()
def test_a_forward_that_fails_midway(
    model_type: str, num_new: int, error: BaseException, wrapped: Wrap
) -> None:
    model, ids = wrapped(model_type), prompt(90)
    cache = model.new_cache()
    model.prefill(ids, cache)
    handle = _fail_in(_last_layer(model), error, after=0)
    with pytest.raises(type(error)):
        model(prompt(num_new, seed=4), past_key_values=cache)
    handle.remove()
    check_answers(model, model_type, cache, ids)


@pytest.mark.parametrize("error", FAILURES, ids=["error", "interrupt"])
@pytest.mark.parametrize("beams", [1, 2])
@pytest.mark.parametrize("model_type", KINDS)
def test_a_generation_that_fails_midway(
    model_type: str, beams: int, error: BaseException, wrapped: Wrap
) -> None:
    model, ids = wrapped(model_type, prefill_chunk=50), prompt(90, batch=2)
    cache = model.new_cache()
    # two chunks of prefill, then some steps
    handle = _fail_in(_last_layer(model), error, after=2 + 25)
    with pytest.raises(type(error)):
        model.generate(ids, past_key_values=cache, num_beams=beams, max_new_tokens=40)
    handle.remove()
    check_answers(model, model_type, cache, ids[:, :-1])


@pytest.mark.parametrize("model_type", ["llama", "gemma3_text"])
def test_memory_is_refused_before_anything_is_done(model_type: str, wrapped: Wrap) -> None:
    model = wrapped(model_type, cpu_budget="20kB")
    cache = model.new_cache()
    with pytest.raises(CapacityError, match=r"cpu_budget is .* of host RAM.*raise cpu_budget"):
        model.prefill(prompt(400), cache)
    assert cache.get_seq_length() == 0
    assert not any(arena.capacity for arena in cache.runtime.arenas.values())
    # what does fit is still welcome
    model.prefill(prompt(30), cache)
    assert cache.get_seq_length() == 30


@pytest.mark.parametrize("allowed", [1, 2, 3])
@pytest.mark.parametrize("model_type", KINDS)
def test_memory_that_runs_out_midway(
    model_type: str, allowed: int, wrapped: Wrap, monkeypatch: pytest.MonkeyPatch
) -> None:
    from wavekv.kvstore import HostArena

    model, ids = wrapped(model_type, prefill_chunk=23), prompt(150)
    cache = model.new_cache()
    allocate, calls = HostArena.allocate, [0]

    def scarce(self: HostArena, num_pages: int) -> Tensor:
        calls[0] += 1
        if calls[0] > allowed:
            raise CapacityError("no more")
        return allocate(self, num_pages)

    monkeypatch.setattr(HostArena, "allocate", scarce)
    with pytest.raises(CapacityError, match="no more"):
        model.prefill(ids, cache)
    monkeypatch.undo()
    held = cache.get_seq_length()
    assert held < 150
    assert held % 23 == 0
    check_answers(model, model_type, cache, ids[:, :held])


def test_a_budget_that_fills_while_decoding(wrapped: Wrap) -> None:
    model, ids = wrapped("llama"), prompt(100)
    cache = model.new_cache()
    model.prefill(ids, cache)
    for arena in cache.runtime.arenas.values():
        arena.allocate(arena.capacity - arena.num_pages)
    cache.runtime.budget.limit = cache.runtime.budget.used
    token = prompt(1, seed=3)

    def decode() -> None:
        nonlocal ids
        for _ in range(50):
            model(token, past_key_values=cache)
            ids = torch.cat([ids, token], 1)

    with torch.no_grad(), pytest.raises(CapacityError, match="raise cpu_budget"):
        decode()
    cache.runtime.budget.limit = MemoryBudget.of_host(0.5).limit
    check_answers(model, "llama", cache, ids)


def test_pages_that_cannot_be_built(wrapped: Wrap, monkeypatch: pytest.MonkeyPatch) -> None:
    from wavekv.offload import context

    model, ids = wrapped("llama", prefill_chunk=23), prompt(100)
    cache = model.new_cache()

    def broken(*_: Any, **__: Any) -> None:
        raise RuntimeError("cannot build")

    monkeypatch.setattr(context, "build_segments", broken)
    with pytest.raises(RuntimeError, match="cannot build"):
        model.prefill(ids, cache)
    monkeypatch.undo()
    held = cache.get_seq_length()
    assert held % 23 == 0 or held == 100
    check_answers(model, "llama", cache, ids[:, :held])


def test_padding_of_a_failed_chunk_is_forgotten(
    wrapped: Wrap, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Padding that reaches into a chunk that fails must not be remembered as cached."""
    model = wrapped("llama", prefill_chunk=23)
    ids, mask = left_padded(60, 20)
    fresh = model.new_cache()
    expected = model.prefill(ids, fresh, mask)
    cache = model.new_cache()
    attend, calls = LayerContext.attend, []

    def fail_late(self: LayerContext, *args: Any, **kwargs: Any) -> Any:
        calls.append(1)
        if len(calls) > len(cache.offloaded_layers):
            raise RuntimeError("out of memory")
        return attend(self, *args, **kwargs)

    monkeypatch.setattr(LayerContext, "attend", fail_late)
    with pytest.raises(RuntimeError, match="out of memory"):
        model.prefill(ids, cache, mask)
    monkeypatch.undo()
    assert cache.get_seq_length() == 23
    torch.testing.assert_close(model.prefill(ids[:, 23:], cache, mask), expected)
