"""Prefill of a whole model: the same with pages resident, streamed or in between; interrupted and
continued; refused before anything is done."""

from __future__ import annotations

import gc
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from tiny_models import FAMILIES, Family, make_model, prompt
from torch import Tensor

from wavekv import OffloadConfig, OffloadedKV
from wavekv.config import parse_size
from wavekv.errors import CapacityError
from wavekv.model_adapters import prefill_plan
from wavekv.model_adapters.prefill_plan import plan_prefill
from wavekv.offload import LayerContext, streaming

Wrap = Callable[..., OffloadedKV]
TOKENS = 300
KV_BYTES = 3 * 2 * 2 * 16 * 4
"""Of a token in the tiny models: 3 layers, keys and values, 2 heads of 16 in float32."""


def taken_in(
    model: OffloadedKV, ids: Tensor, keeps_resident: bool | None = True
) -> tuple[Any, Tensor]:
    """A cache with `ids`, and the logits after them."""
    cache = model.new_cache()
    cache.runtime.keeps_resident = keeps_resident
    return cache, model.prefill(ids, cache)


def next_logits(model: OffloadedKV, cache: Any) -> Tensor:
    """After two more tokens, which see all others."""
    with torch.no_grad():
        return model(prompt(2, seed=9).to(model.device), past_key_values=cache).logits


def difference(a: Tensor, b: Tensor) -> float:
    return float((a.float() - b).norm() / b.norm())


def check_left_over(cache: Any) -> None:
    """Nothing of a prefill is left but the tokens."""
    runtime = cache.runtime
    assert not runtime.is_prefilling
    assert runtime.plan is None
    assert not runtime.buffers._held
    for layer in cache.offloaded_layers:
        assert layer.context is None or layer.context.paged.resident is None
    for arena in runtime.arenas.values():
        assert arena._num_ordered == arena._promised == 0
        assert runtime.budget.used == sum(
            len(a.chunks) * a.chunk_nbytes for a in runtime.arenas.values()
        )
        arena.check_integrity()


@pytest.mark.parametrize("model_type", ["llama", "gpt_oss"])
@pytest.mark.parametrize("chunk", [60, 130, 1000])
@pytest.mark.parametrize("resident", [0, 90, 10**6])
def test_logits_do_not_depend_on_what_is_resident(
    model_type: str, chunk: int, resident: int, wrapped: Wrap, device: torch.device, monkeypatch
) -> None:
    model, ids = wrapped(model_type, device), prompt(TOKENS).to(device)
    _, expected = taken_in(model, ids, False)
    monkeypatch.setattr(prefill_plan, "free_memory", lambda _: 10**12)
    monkeypatch.setattr(streaming, "BLOCK_BYTES", 5000)
    plan = prefill_plan.plan_prefill
    made = []

    def limited(*args: Any) -> Any:
        made.append(plan(*args))
        return replace(made[-1], resident_tokens=min(resident, made[-1].resident_tokens))

    monkeypatch.setattr("wavekv.model_adapters.prefill.plan_prefill", limited)
    chunked = wrapped(model_type, device, prefill_chunk=chunk)
    cache, logits = taken_in(chunked, ids)
    # without a later chunk nothing is worth keeping
    assert made[0].resident_tokens == TOKENS - 1 - (TOKENS - 1) % chunk
    torch.testing.assert_close(logits, expected, rtol=1e-3, atol=1e-3)
    check_left_over(cache)


def test_resident_pages_spare_the_way_from_the_host(wrapped: Wrap, device: torch.device) -> None:
    model, ids = wrapped("llama", device, prefill_chunk=50), prompt(TOKENS).to(device)
    streamed, resident = (taken_in(model, ids, keeps)[0].stats() for keeps in (False, True))
    assert resident["bytes_to_device"] < 0.1 * streamed["bytes_to_device"]
    assert resident["bytes_host"] == streamed["bytes_host"]


@pytest.mark.parametrize("finished", [0, 2])
@pytest.mark.parametrize("place", ["layer", "attention"])
def test_an_interrupted_prefill_goes_on_where_it_was(
    finished: int, place: str, wrapped: Wrap, device: torch.device, monkeypatch
) -> None:
    """Ctrl-C inside a forward: what is done stays, the rest is prefilled as if nothing had been."""
    model, ids = wrapped("llama", device, prefill_chunk=64), prompt(TOKENS).to(device)
    whole, expected = taken_in(model, ids)
    cache = model.new_cache()
    cache.runtime.keeps_resident = True
    calls, attend = [], LayerContext.attend

    def interrupted(self: LayerContext, *args: Any, **kwargs: Any) -> Tensor:
        calls.append(1)
        is_last = len(calls) == 3 * finished + 2
        if is_last and place == "layer":
            raise KeyboardInterrupt
        out = attend(self, *args, **kwargs)
        if is_last:
            raise KeyboardInterrupt
        return out

    with monkeypatch.context() as patch:
        patch.setattr(LayerContext, "attend", interrupted)
        with pytest.raises(KeyboardInterrupt):
            model.prefill(ids, cache)
    assert cache.get_seq_length() == 64 * finished
    check_left_over(cache)
    logits = model.prefill(ids[:, 64 * finished :], cache)
    torch.testing.assert_close(logits, expected, rtol=1e-4, atol=1e-4)
    check_left_over(cache)
    torch.testing.assert_close(
        next_logits(model, cache), next_logits(model, whole), rtol=1e-3, atol=1e-3
    )


@pytest.fixture
def free(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """What is free of a device that is none: `free[0]` bytes."""
    amount = [10**12]
    monkeypatch.setattr(prefill_plan, "_cuda_devices", lambda _: [torch.device("cpu")])
    monkeypatch.setattr(prefill_plan, "free_memory", lambda _: amount[0])
    return amount


def test_a_device_that_is_too_small_is_an_error_before_anything(
    wrapped: Wrap, free: list[int]
) -> None:
    model = wrapped("llama", prefill_chunk=100)
    free[0] = 10**6
    cache = model.new_cache()
    pattern = (
        r"a prefill of 300 tokens in chunks of 100 needs .* MiB of device memory \(.* MiB for "
        r"index, .* MiB for chunk, .* MiB for forward, .* MiB for stream, .* MiB for building, "
        r".* MiB for libraries\), device_budget comes to 0\.9 MiB; "
        r"raise device_budget, .*lower prefill_chunk"
    )
    with pytest.raises(CapacityError, match=pattern):
        model.prefill(prompt(TOKENS), cache)
    assert cache.get_seq_length() == 0
    assert not any(layer.context for layer in cache.offloaded_layers)
    assert not cache.runtime.arenas
    # the same cache on a larger device
    free[0] = 10**9
    model.prefill(prompt(TOKENS), cache)
    assert cache.get_seq_length() == TOKENS


def test_steps_that_would_not_fit_are_an_error_before_the_prefill(
    wrapped: Wrap, free: list[int]
) -> None:
    """Half of a long context in one step is more than the chunks that it came in."""
    settings = {"prefill_chunk": 100, "budget": 0.5, "device_budget": 1.0}
    model = wrapped("llama", **settings)
    free[0] = prefill_needs(model, free, 60000)
    cache = model.new_cache()
    with pytest.raises(CapacityError, match=r"a decode step needs .* MiB for index"):
        model.prefill(prompt(60000), cache)
    assert not any(layer.context for layer in cache.offloaded_layers)
    for other in ({"mode": "exact"}, {"budget": 8}):
        changed = wrapped("llama", **(settings | other))
        assert plan_prefill(changed.model, changed.new_cache(), 1, 60000).end == 60000


def prefill_needs(model: OffloadedKV, free: list[int], tokens: int) -> int:
    """The least that a prefill is not refused for."""
    exact = OffloadedKV(model.model, model.offload_config, mode="exact", device_budget=1.0)
    least, most = 0, 10**10
    while most - least > 1:
        free[0] = (least + most) // 2
        try:
            plan_prefill(exact.model, exact.new_cache(), 1, tokens)
        except CapacityError:
            least = free[0]
        else:
            most = free[0]
    return most


def test_what_stays_on_the_device_is_what_the_budget_leaves(wrapped: Wrap, free: list[int]) -> None:
    model = wrapped("llama", prefill_chunk=100, mode="exact", device_budget=1.0)
    least = prefill_needs(model, free, 20000)
    kept = []
    for free[0] in (least, least + 99 * KV_BYTES, least + 10**6, 10**9):
        kept.append(plan_prefill(model.model, model.new_cache(), 1, 20000).resident_tokens)
    assert kept == [0, 99, 10**6 // KV_BYTES, 19900]


def test_a_longer_context_counts_what_the_cache_holds_as_its_own(
    wrapped: Wrap, free: list[int]
) -> None:
    model = wrapped("llama", prefill_chunk=100, device_budget=1.0, mode="exact")
    cache = model.new_cache()
    model.prefill(prompt(2000), cache)
    held = cache.stats()["bytes_device"]
    fresh = prefill_needs(model, free, 2100)
    free[0] = fresh - held
    # of a larger index it holds a part already
    assert plan_prefill(model.model, cache, 1, 100).end == 2100


def test_the_length_of_a_chunk(wrapped: Wrap, free: list[int]) -> None:
    def size(batch: int = 1, **settings: Any) -> int:
        model = wrapped("llama", device_budget=1.0, mode="exact", **settings)
        return plan_prefill(model.model, model.new_cache(), batch, 10**5).chunk

    assert size() == 32768
    assert size(prefill_chunk=100) == 100
    sizes = []
    for free[0] in range(10**9, 255 * 2**20, -(10**7)):
        sizes.append(size())
    assert sizes == sorted(sizes, reverse=True)
    assert {8192, 16384, 32768} == set(sizes)
    free[0] = 5 * 10**8
    assert size(batch=2) < size()


@pytest.mark.parametrize("family", FAMILIES, ids=lambda family: family.model_type)
def test_every_family_can_be_planned(family: Family, wrapped: Wrap, free: list[int]) -> None:
    model = wrapped(family.model_type)
    plan = plan_prefill(model.model, model.new_cache(), 2, 10_000)
    assert plan.chunk > 0
    free[0] = 1 << 20
    with pytest.raises(CapacityError, match="device_budget"):
        plan_prefill(model.model, model.new_cache(), 2, 10_000)


def test_chunks_of_a_cpu(wrapped: Wrap) -> None:
    model = wrapped("llama", device_budget=1)
    assert plan_prefill(model.model, model.new_cache(), 1, 10**5).chunk == 8192


@pytest.mark.gpu
@pytest.mark.parametrize("model_type", ["llama", "gemma3_text"])
def test_a_prefill_on_cuda_is_that_of_a_cpu(model_type: str, wrapped: Wrap) -> None:
    ids = prompt(1500)
    expected = taken_in(wrapped(model_type), ids)[1]
    for chunk in (200, 1000, 1500):
        for keeps in (False, True):
            model = wrapped(model_type, "cuda", prefill_chunk=chunk)
            cache, logits = taken_in(model, ids.cuda(), keeps)
            torch.testing.assert_close(logits.cpu(), expected, rtol=1e-2, atol=1e-2)
            check_left_over(cache)


@pytest.mark.gpu
@pytest.mark.parametrize("budget", ["256MiB", "280MiB", 0.5])
def test_half_precision_prefills_agree_with_the_model(budget: object) -> None:
    """Blocks large enough for cuDNN: as close to float32 as the model's own attention over
    everything at once is."""
    model = make_model("llama", attention="sdpa", head_dim=64).to("cuda")
    ids = prompt(9000).cuda()
    with torch.no_grad():
        exact = model(ids, logits_to_keep=1).logits[:, 0]
        model = model.to(torch.bfloat16)
        own = difference(model(ids, logits_to_keep=1).logits[:, 0], exact)
    settings = {"segment": 1024, "append_segment": 256, "page_size": 8}
    wrapped = OffloadedKV(model, OffloadConfig(**settings, device_budget=budget))
    for chunk in (2048, 4096, 9000):
        one = OffloadedKV(model, wrapped.offload_config, prefill_chunk=chunk)
        logits = one.prefill(ids, one.new_cache())
        assert difference(logits, exact) < 1.5 * own + 0.01
    wrapped.unwrap()


@pytest.mark.gpu
@pytest.mark.parametrize("budget", ["288MiB", "448MiB"])
@pytest.mark.parametrize("tokens", [2000, 16384, 50000])
def test_device_memory_stays_below_the_budget(budget: str, tokens: int) -> None:
    """Prefill and steps, single ones and captured, beside the weights and the prompt."""
    model = make_model("llama", attention="sdpa", head_dim=64, max_position_embeddings=1 << 17)
    model = model.to("cuda", torch.bfloat16)
    settings = {"segment": 1024, "append_segment": 256, "page_size": 8, "prefill_chunk": 2048}
    one = OffloadedKV(model, OffloadConfig(**settings, device_budget=budget))
    ids = prompt(tokens).cuda()
    torch.cuda.synchronize()
    gc.collect()
    torch.cuda.empty_cache()
    before = torch.cuda.memory_allocated()
    cache = one.new_cache()
    peaks = {}
    for name in ("prefill", "steps", "second prefill"):
        torch.cuda.reset_peak_memory_stats()
        if name == "steps":
            token = ids[:, -1:]
            for _ in range(600):
                with torch.no_grad():
                    token = one(input_ids=token, past_key_values=cache).logits[:, -1:].argmax(-1)
            assert cache.steps is not None
            assert cache.steps._graph is not None
        else:
            one.prefill(ids[:, :1000] if name == "second prefill" else ids, cache)
        torch.cuda.synchronize()
        peaks[name] = torch.cuda.max_memory_allocated() - before
    limit = 1.05 * parse_size("device_budget", budget)
    assert all(peak <= limit for peak in peaks.values()), peaks
    one.unwrap()


@pytest.mark.gpu
def test_nothing_is_allocated_by_a_prefill_that_is_refused() -> None:
    model = make_model("llama", attention="sdpa", head_dim=64).to("cuda", torch.bfloat16)
    ids = prompt(4000).cuda()
    one = OffloadedKV(model, OffloadConfig(device_budget="16MiB", prefill_chunk=2048))
    cache = one.new_cache()
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    with pytest.raises(CapacityError, match="raise device_budget"):
        one.prefill(ids, cache)
    assert torch.cuda.max_memory_allocated() == before
    assert cache.get_seq_length() == 0
    cache.runtime.config = cache.config.override(device_budget="1GiB")
    one.prefill(ids, cache)
    assert cache.get_seq_length() == 4000
    one.unwrap()
