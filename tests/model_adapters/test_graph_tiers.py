"""Captured steps whose pages are on a disk in part: the tokens of a cache in memory."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from test_graph import DEVICE, generated, is_captured, wrap
from tiny_models import prompt

from wavekv import OffloadedCache, OffloadedKV
from wavekv.kvstore import TieredArena

pytestmark = pytest.mark.gpu


def tiered(model_type: str, folder: Path, share: float, **overrides: Any) -> OffloadedKV:
    """A model whose pages of some hundred tokens fit host memory in part."""
    model = wrap(model_type, **overrides)
    ids = prompt(400, batch=2).to(DEVICE)
    cache = model.new_cache()
    model.prefill(ids, cache)
    size = int(cache.stats()["bytes_pages"] * share)
    return OffloadedKV(
        model.model, model.offload_config, cpu_budget=size, disk=str(folder), disk_budget="64MiB"
    )


@pytest.mark.parametrize("model_type", ["llama", "qwen3", "gpt2"])
@pytest.mark.parametrize("prefetch", ["none", "runners-up", "early"])
def test_tokens_as_from_memory(model_type: str, prefetch: str, tmp_path: Path) -> None:
    ids = prompt(400, batch=2).to(DEVICE)
    whole = wrap(model_type, prefetch=prefetch)
    expected = generated(whole, ids, whole.new_cache(), max_new_tokens=80)
    model = tiered(model_type, tmp_path, 0.6, prefetch=prefetch)
    cache = model.new_cache()
    assert torch.equal(generated(model, ids, cache, max_new_tokens=80), expected)
    assert is_captured(cache)
    context = cache.offloaded_layers[0].context
    assert isinstance(context.paged.arena, TieredArena)
    statistics = cache.stats()
    assert statistics["bytes_from_disk"] > 0
    assert 0 < statistics["host_hit_rate"] < 1
    assert statistics["late_pages"] == 0
    assert statistics["bytes_host"] < statistics["bytes_pages"]
    context.paged.arena.check_integrity()


@pytest.mark.parametrize("host_dtype", ["model", "int8"])
def test_a_loaded_cache_steps_as_the_saved_one(host_dtype: str, tmp_path: Path) -> None:
    ids = prompt(400, batch=2).to(DEVICE)
    model = wrap(host_dtype=host_dtype)
    cache = model.new_cache()
    model.prefill(ids, cache)
    cache.save(tmp_path / "context", token_ids=ids)
    more = torch.cat([ids, ids[:, :1]], 1)
    expected = generated(model, more, cache, max_new_tokens=80)
    for settings in ({}, {"cpu_budget": "256KiB", "disk": str(tmp_path), "disk_budget": "64MiB"}):
        other = OffloadedKV(model.model, model.offload_config, **settings)
        loaded = OffloadedCache.load(tmp_path / "context", other)
        assert torch.equal(generated(other, more, loaded, max_new_tokens=80), expected)
        assert is_captured(loaded)
        assert loaded.stats()["bytes_from_disk"] > 0


def test_pages_that_come_too_late_are_counted(tmp_path: Path) -> None:
    ids = prompt(400, batch=2).to(DEVICE)
    model = tiered("llama", tmp_path, 0.6, disk_deadline=0.0)
    cache = model.new_cache()
    tokens = generated(model, ids, cache, max_new_tokens=60)
    assert tokens.shape == (2, 460)
    assert is_captured(cache)
    assert cache.stats()["late_pages"] > 0


def test_two_forks_take_turns(tmp_path: Path) -> None:
    """Each has an engine, and takes from the host memory of both."""
    ids = prompt(400, batch=2).to(DEVICE)
    outs = []
    for model in (wrap(), tiered("llama", tmp_path, 0.6)):
        cache = model.new_cache()
        model.prefill(ids, cache)
        forks = [cache.fork(), cache.fork()]
        tokens = [ids[:, :1], ids[:, 1:2]]
        out = []
        with torch.inference_mode():
            for _ in range(30):
                for number, fork in enumerate(forks):
                    logits = model(input_ids=tokens[number], past_key_values=fork).logits
                    tokens[number] = logits[:, -1:].argmax(-1)
                    out.append(tokens[number])
        assert all(map(is_captured, forks))
        outs.append(torch.cat(out))
    assert torch.equal(*outs)
