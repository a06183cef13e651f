"""Decode steps in a CUDA graph: the same tokens as without one, whatever comes in between."""

from __future__ import annotations

import logging
from typing import Any

import pytest
import torch
from tiny_models import TINY, VOCAB, make_model, prompt
from torch import Tensor
from torch.profiler import ProfilerActivity, profile

from wavekv import OffloadedCache, OffloadedKV

pytestmark = pytest.mark.gpu

DEVICE = torch.device("cuda")
ACTIVITIES = [ProfilerActivity.CPU, ProfilerActivity.CUDA]


def wrap(model_type: str = "llama", **overrides: Any) -> OffloadedKV:
    return OffloadedKV(make_model(model_type).to(DEVICE), TINY, **overrides)


def generated(model: OffloadedKV, ids: Tensor, cache: OffloadedCache, **options: Any) -> Tensor:
    settings = {"max_new_tokens": 60, "do_sample": False, "past_key_values": cache} | options
    return model.generate(ids, **settings)


def is_captured(cache: OffloadedCache) -> bool:
    assert cache.steps is not None
    return cache.steps._graph is not None and cache.steps.refusal is None


@pytest.mark.parametrize("model_type", ["llama", "qwen2", "qwen3", "mistral", "gpt2", "phi3"])
@pytest.mark.parametrize("prefetch", ["none", "runners-up", "early"])
def test_tokens_as_without_a_graph(model_type: str, prefetch: str) -> None:
    ids = prompt(150, batch=2).to(DEVICE)
    eager, graph = wrap(model_type, capture=False), wrap(model_type, prefetch=prefetch)
    expected = generated(eager, ids, eager.new_cache())
    cache = graph.new_cache()
    assert torch.equal(generated(graph, ids, cache), expected)
    assert is_captured(cache)
    statistics = cache.stats()
    assert statistics["tokens"] == ids.shape[1] + 59
    assert statistics["decode_steps"] == 60


def kernels_of_a_step(cache: OffloadedCache) -> set[str]:
    """Names of what the graph of this cache's steps runs."""
    assert cache.steps is not None
    assert cache.steps._graph is not None
    with profile(activities=ACTIVITIES, acc_events=True) as profiled:
        cache.steps._graph._graph.replay()
        torch.cuda.synchronize()
    return {event.key for event in profiled.key_averages()}


@pytest.mark.filterwarnings("ignore::UserWarning", "ignore::DeprecationWarning")  # the compiler's
@pytest.mark.parametrize("model_type", ["llama", "qwen3"])
@pytest.mark.parametrize("prefetch", ["none", "early"])
def test_compiled_parts(model_type: str, prefetch: str) -> None:
    ids = prompt(150).to(DEVICE)
    eager = wrap(model_type, capture=False)
    graph = wrap(model_type, compile=True, prefetch=prefetch)
    expected = generated(eager, ids, eager.new_cache())
    cache = graph.new_cache()
    assert torch.equal(generated(graph, ids, cache), expected)
    assert is_captured(cache)
    assert any("fused" in name for name in kernels_of_a_step(cache))


def test_without_a_compiler_steps_are_captured_as_they_are(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def fails(*args: Any, **kwargs: Any) -> Any:
        raise RuntimeError("no compiler")

    monkeypatch.setattr(torch, "compile", lambda function, **options: fails)
    ids = prompt(150).to(DEVICE)
    eager, graph = wrap(capture=False), wrap(compile=True)
    expected = generated(eager, ids, eager.new_cache())
    cache = graph.new_cache()
    assert torch.equal(generated(graph, ids, cache), expected)
    assert is_captured(cache)
    assert "not compiled: RuntimeError('no compiler')" in caplog.text


def test_a_captured_step_copies_nothing_to_the_host() -> None:
    ids = prompt(150).to(DEVICE)
    model = wrap()
    cache = model.new_cache()
    generated(model, ids, cache)
    names = kernels_of_a_step(cache)
    assert {"_score", "_fetch", "_merge"} <= names
    assert not any("DtoH" in name for name in names)
    with profile(activities=ACTIVITIES, acc_events=True) as profiled:
        ids.cpu()
    assert any("DtoH" in event.key for event in profiled.key_averages())


def test_padded_batch() -> None:
    ids = prompt(120, batch=3).to(DEVICE)
    mask = torch.ones_like(ids)
    mask[0, :37] = 0
    mask[1, :2] = 0
    eager, graph = wrap(capture=False), wrap()
    cache = graph.new_cache()
    expected = generated(eager, ids, eager.new_cache(), attention_mask=mask)
    assert torch.equal(generated(graph, ids, cache, attention_mask=mask), expected)
    assert is_captured(cache)


def test_second_turn_fork_and_crop() -> None:
    ids = prompt(100).to(DEVICE)
    caches, answers = [], []
    for model in (wrap(capture=False), wrap()):
        cache = model.new_cache()
        first = generated(model, ids, cache)
        fork = cache.fork()
        more = torch.cat([first, prompt(30, 1).to(DEVICE)], 1)
        second = generated(model, more, cache)
        third = generated(model, more[:, :-3], fork)
        fork.crop(-20)
        fourth = generated(model, third[:, :-15], fork)
        answers.append((first, second, third, fourth))
        caches.append((cache, fork))
    for expected, got in zip(*answers, strict=True):
        assert torch.equal(got, expected)
    for eager, graph in zip(*caches, strict=True):
        assert eager.get_seq_length() == graph.get_seq_length()
        arena = graph.offloaded_layers[0].context.paged.arena
        arena.check_integrity()


def test_calls_of_the_wrapper_take_captured_steps() -> None:
    ids = prompt(100).to(DEVICE)
    outs = []
    for model in (wrap(capture=False), wrap()):
        cache = model.new_cache()
        logits = [model.prefill(ids, cache)]
        for _ in range(40):
            token = logits[-1].argmax(-1, keepdim=True)
            with torch.no_grad():
                logits.append(model(input_ids=token, past_key_values=cache).logits[:, -1])
        outs.append(torch.stack(logits))
    torch.testing.assert_close(outs[1], outs[0], rtol=1e-3, atol=1e-3)
    assert is_captured(cache)


def test_under_inference_mode() -> None:
    ids = prompt(100).to(DEVICE)
    eager, graph = wrap(capture=False), wrap()
    expected = generated(eager, ids, eager.new_cache(), max_new_tokens=90)
    cache = graph.new_cache()
    with torch.inference_mode():
        first = generated(graph, ids, cache, max_new_tokens=60)
        assert is_captured(cache)
    # out of that mode the contexts still grow
    second = generated(graph, first, cache, max_new_tokens=30)
    assert torch.equal(second, expected)


def test_a_cap_on_misses_keeps_all_pages_in_reach() -> None:
    ids = prompt(150).to(DEVICE)
    graph = wrap(budget=0.3, max_misses=1)
    cache = graph.new_cache()
    out = generated(graph, ids, cache)
    assert out.shape[1] == ids.shape[1] + 60
    assert is_captured(cache)
    assert cache.runtime.engine is not None
    paging = cache.runtime.engine.layers[0].totals.paging
    assert int(paging[..., 2].sum()) > 0
    assert int(paging[..., 4].sum()) == int(paging[..., 2].sum())
    cache.runtime.engine.check_integrity()


def test_statistics_between_steps_give_the_contexts_back() -> None:
    ids = prompt(100).to(DEVICE)
    outs = []
    for model in (wrap(capture=False), wrap()):
        cache = model.new_cache()
        logits = [model.prefill(ids, cache)]
        for step in range(30):
            token = logits[-1].argmax(-1, keepdim=True)
            with torch.no_grad():
                logits.append(model(input_ids=token, past_key_values=cache).logits[:, -1])
            if step % 10 == 9:
                assert cache.stats()["tokens"] == ids.shape[1] + step + 1
        outs.append(torch.stack(logits))
    torch.testing.assert_close(outs[1], outs[0], rtol=1e-3, atol=1e-3)


def test_two_caches_of_one_model() -> None:
    model, eager = wrap(), wrap(capture=False)
    prompts = [prompt(100, seed).to(DEVICE) for seed in (0, 1)]
    caches = [model.new_cache() for _ in prompts]
    outs = [generated(model, ids, cache) for ids, cache in zip(prompts, caches, strict=True)]
    outs = [generated(model, out, cache) for out, cache in zip(outs, caches, strict=True)]
    for ids, out in zip(prompts, outs, strict=True):
        expected = generated(eager, ids, eager.new_cache(), max_new_tokens=120)
        assert torch.equal(out, expected)


def test_beams_are_never_captured() -> None:
    ids = prompt(80).to(DEVICE)
    eager, graph = wrap(capture=False), wrap()
    cache = graph.new_cache()
    expected = generated(eager, ids, eager.new_cache(), num_beams=2, max_new_tokens=10)
    assert torch.equal(generated(graph, ids, cache, num_beams=2, max_new_tokens=10), expected)
    assert not is_captured(cache)


@pytest.mark.parametrize("model_type", ["gemma3_text", "qwen3_moe", "qwen3_next"])
def test_what_cannot_be_captured_says_why(
    model_type: str, caplog: pytest.LogCaptureFixture
) -> None:
    ids = prompt(80).to(DEVICE)
    eager, graph = wrap(model_type, capture=False), wrap(model_type)
    cache = graph.new_cache()
    with caplog.at_level(logging.INFO, logger="wavekv"):
        expected = generated(eager, ids, eager.new_cache())
        assert torch.equal(generated(graph, ids, cache), expected)
    if not is_captured(cache):
        assert "without a CUDA graph" in caplog.text
        assert cache.steps is not None
        assert cache.steps.refusal


def test_room_runs_out(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("wavekv.offload.room.ROOM_TOKENS", 32)
    ids = prompt(100).to(DEVICE)
    eager, graph = wrap(capture=False), wrap()
    expected = generated(eager, ids, eager.new_cache(), max_new_tokens=150)
    cache = graph.new_cache()
    assert torch.equal(generated(graph, ids, cache, max_new_tokens=150), expected)
    assert int(expected.max()) < VOCAB


def test_a_short_prompt_grows_into_pages() -> None:
    ids = prompt(10).to(DEVICE)
    eager, graph = wrap(capture=False), wrap()
    expected = generated(eager, ids, eager.new_cache(), max_new_tokens=120)
    cache = graph.new_cache()
    assert torch.equal(generated(graph, ids, cache, max_new_tokens=120), expected)
    assert cache.stats()["pages"] > 0
