"""Prefill of a whole model: the same with pages resident, streamed or in between; interrupted and
continued; refused before anything is done."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from tiny_models import make_model, prompt
from torch import Tensor

from wavekv import OffloadConfig, OffloadedKV
from wavekv.errors import CapacityError
from wavekv.model_adapters import prefill_plan
from wavekv.model_adapters.prefill_plan import chunk_tokens, plan_prefill
from wavekv.offload import LayerContext, Logits, OffloadRuntime, streaming
from wavekv.offload.device_memory import index_bytes
from wavekv.offload.index_sizes import index_sizes

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
            len(a.chunks) * a._chunk_bytes for a in runtime.arenas.values()
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
        return type(made[-1])(made[-1].end, min(resident, made[-1].resident_tokens))

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


def test_a_device_that_is_too_small_is_an_error_before_anything(wrapped: Wrap, monkeypatch) -> None:
    model = wrapped("llama", prefill_chunk=100)
    monkeypatch.setattr(prefill_plan, "_cuda_devices", lambda _: [torch.device("cpu")])
    monkeypatch.setattr(streaming, "BLOCK_BYTES", 0)
    free = [0]
    monkeypatch.setattr(prefill_plan, "free_memory", lambda _: free[0])
    cache = model.new_cache()
    pattern = (
        r"a prefill of 300 tokens needs .* GiB of device memory: .* GiB for the index of its "
        r"pages, .* GiB for a chunk of 100 tokens and 0\.0 GiB to stream pages; 0\.0 GiB are free; "
        "shorten the context, lower prefill_chunk, or free device memory"
    )
    with pytest.raises(CapacityError, match=pattern):
        model.prefill(prompt(TOKENS), cache)
    assert cache.get_seq_length() == 0
    assert not any(layer.context for layer in cache.offloaded_layers)
    assert not cache.runtime.arenas
    # what may be kept is what the budget or the free memory leaves
    kept = []
    for free[0] in (2 * 10**6, 10**7, 10**8):
        kept.append(plan_prefill(model.model, cache, 1, TOKENS, 100).resident_tokens)
        assert kept[-1] * KV_BYTES <= 0.5 * free[0]
    assert kept == sorted(kept)
    model.prefill(prompt(TOKENS), cache)
    assert cache.get_seq_length() == TOKENS


def test_the_length_of_a_chunk(wrapped: Wrap, monkeypatch) -> None:
    def size(free: int | None, batch: int = 1, **settings: Any) -> int:
        devices = [] if free is None else [torch.device("cpu")]
        monkeypatch.setattr(prefill_plan, "_cuda_devices", lambda _: devices)
        monkeypatch.setattr(prefill_plan, "free_memory", lambda _: free)
        model = wrapped("llama", **settings)
        return chunk_tokens(model.model, model.new_cache(), batch)

    assert size(None) == 8192
    assert size(10**12) == 32768
    assert size(10**12, prefill_chunk=100) == 100
    bytes_of_a_token = 4 * 2 * (48 + 64) + 4 * 16 * 20
    assert size(4 * 32768 * bytes_of_a_token) == 32768
    assert size(4 * 32768 * bytes_of_a_token - 4) == 16384
    assert size(4 * 32768 * bytes_of_a_token, batch=2) == 16384
    assert size(1) == 8192


@pytest.mark.parametrize("page_size", [4, 8, 16])
@pytest.mark.parametrize("width", [16, 20, 128])
def test_the_estimate_of_the_index_is_its_size(page_size: int, width: int) -> None:
    segment = page_size << 5
    config = OffloadConfig(
        page_size=page_size, segment=segment, append_segment=segment, num_sink_tokens=0, window=1
    )
    runtime = OffloadRuntime(config)
    # whole spans
    span = index_sizes(config, width)[0] * page_size
    count = (2 if width > 100 else 16) * math.lcm(segment, span)
    keys = torch.randn(1, 2, count + 1, width, dtype=torch.bfloat16)
    context = LayerContext(runtime, keys[:, :, :0], keys[:, :, :0])
    context.attend(keys, keys, keys, None, Logits(1.0))
    context.settle()
    tokens = context.paged.num_tokens
    actual = context.paged.statistics_nbytes / (2 * tokens)
    assert index_bytes(config, width) == pytest.approx(actual, rel=0.01)


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
@pytest.mark.parametrize("budget", ["1MiB", "24MiB", 0.5])
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
def test_device_memory_is_that_of_the_settings() -> None:
    """Twice the tokens need more index and nothing else."""
    model = make_model("llama", attention="sdpa", head_dim=64).to("cuda", torch.bfloat16)
    settings = {"segment": 1024, "append_segment": 256, "page_size": 8}
    config = OffloadConfig(**settings, device_budget="8MiB", prefill_chunk=2048)
    one = OffloadedKV(model, config)
    peaks = []
    for tokens in (16384, 16384, 32768):
        torch.cuda.synchronize()
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        cache = one.new_cache()
        one.prefill(prompt(tokens).cuda(), cache)
        torch.cuda.synchronize()
        peaks.append(torch.cuda.max_memory_allocated() - before)
        del cache
    index = 3 * 2 * 16384 * index_bytes(config, 64)
    assert peaks[2] - peaks[1] < 1.5 * index + (4 << 20)
    one.unwrap()
