"""Foreseen sizes are the real ones: of contexts after a prefill, and of a decode engine."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from offload_cases import SMALL

from wavekv.config import OffloadConfig
from wavekv.kernels import step_reference
from wavekv.offload import LayerContext, Logits, OffloadRuntime
from wavekv.offload.engine import DecodeEngine
from wavekv.offload.sizes import CacheShape, cache_bytes, engine_bytes, engine_step_shape

SHAPE = CacheShape(
    layers=2, batch=2, kv_heads=2, group=2, head_dim=16, dtype=torch.float32, num_tokens=300
)


def config_of(**chosen: object) -> OffloadConfig:
    return OffloadConfig(**(SMALL | {"prefill_chunk": 96, "cpu_budget": 1 << 24} | chosen))  # type: ignore[arg-type]


def prefilled(config: OffloadConfig, shape: CacheShape) -> tuple[list[LayerContext], int]:
    """Contexts that took in the tokens of `shape` by chunks, and the largest room for local
    tokens on the way."""
    runtime = OffloadRuntime(config)
    contexts, room = [], 0
    logits = Logits(shape.head_dim**-0.5)
    for _ in range(shape.layers):
        size = shape.batch, shape.kv_heads, shape.num_tokens, shape.head_dim
        keys, values = torch.randn(2, *size, dtype=shape.dtype)
        query = torch.randn(size[0], size[1] * shape.group, *size[2:], dtype=shape.dtype)
        context = LayerContext(runtime, keys, values)
        runtime.is_prefilling = True
        for start in range(0, shape.num_tokens, config.prefill_chunk):
            part = (slice(None), slice(None), slice(start, start + config.prefill_chunk))
            context.attend(query[part], keys[part], values[part], None, logits)
            room = max(room, context.steady.keys.buffer.shape[2])
        runtime.is_prefilling = False
        context.page_out()
        context.settle()
        contexts.append(context)
    return contexts, room


def check_cache(config: OffloadConfig, shape: CacheShape) -> None:
    contexts, room = prefilled(config, shape)
    foreseen = cache_bytes(config, shape)
    paged = [context.paged for context in contexts]
    assert foreseen.num_pages == paged[0].num_pages
    statistics = sum(zone.statistics_nbytes for zone in paged)
    assert sum(foreseen.index.values()) == statistics
    assert foreseen.index["counts"] == sum(zone.index.view.counts.nbytes for zone in paged)
    assert foreseen.index["scatter"] == sum(zone.scatter.spans.nbytes for zone in paged)
    assert foreseen.steady == sum(context.steady.nbytes for context in contexts)
    assert foreseen.host_pages == paged[0].arena.nbytes
    tables = [(zone.page_ids, zone.counts, zone.token_ids) for zone in paged]
    assert foreseen.host_tables == sum(part.nbytes for parts in tables for part in parts)
    assert foreseen.local_tokens == room


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_cache_takes_what_was_foreseen(dtype: torch.dtype) -> None:
    check_cache(config_of(), replace(SHAPE, dtype=dtype))


@pytest.mark.parametrize("host_dtype", ["int8", "int4", "int4-int2"])
def test_pages_of_integers(host_dtype: str) -> None:
    config, dense = config_of(host_dtype=host_dtype), config_of()
    check_cache(config, SHAPE)
    pages = [cache_bytes(c, SHAPE).host_pages for c in (config, dense)]
    assert pages[0] < pages[1]


@settings(max_examples=15)
@given(
    tokens=st.integers(1, 700),
    batch=st.integers(1, 3),
    kv_heads=st.integers(1, 3),
    head_dim=st.sampled_from([2, 8, 10]),
    page_size=st.sampled_from([1, 2, 8]),
    chunk=st.integers(40, 400),
    sinks=st.integers(0, 3),
)
def test_caches_of_any_shape(
    tokens: int,
    batch: int,
    kv_heads: int,
    head_dim: int,
    page_size: int,
    chunk: int,
    sinks: int,
) -> None:
    sizes = {"page_size": page_size, "prefill_chunk": chunk, "num_sink_tokens": sinks}
    shape = CacheShape(1, batch, kv_heads, 1, head_dim, torch.float32, tokens)
    check_cache(config_of(**sizes), shape)


@pytest.mark.parametrize(
    "chosen",
    [
        {},
        {"budget": 0.5},
        {"budget": 8, "max_misses": 1},
        {"budget": 8, "prefetch": "early"},
        {"budget": 8, "prefetch": "runners-up"},
        {"tail_estimate": "none", "refine": 1},
        {"host_dtype": "int8"},
    ],
    ids=str,
)
def test_an_engine_takes_what_was_foreseen(chosen: dict[str, object]) -> None:
    config = config_of(**({"budget": 0.1} | chosen))
    contexts, _ = prefilled(config, SHAPE)
    query = torch.randn(2, 4, 1, 16)
    new = torch.randn(2, 2, 1, 16)
    for context in contexts:
        context.attend(query, new, new, None, Logits(0.25))
        context.settle()
    engine = DecodeEngine(contexts, step_reference)
    shape = replace(SHAPE, num_tokens=SHAPE.num_tokens + 1)
    step = engine_step_shape(config, shape)
    assert step == engine.shape

    def nbytes(tensors: object) -> int:
        return sum(x.nbytes for x in tensors if isinstance(x, torch.Tensor))  # type: ignore[attr-defined]

    layers = engine.layers
    steady = {id(x.steady.valid): x.steady.valid.nbytes for x in layers}
    scratches = (engine.scratch, *engine._fetches.scratches)
    scratch = {part.data_ptr(): part.nbytes for parts in scratches for part in parts}
    working = sum(scratch.values()) + sum(nbytes(layer.totals) for layer in layers)
    tables = sum(layer.pool.table.nbytes for layer in layers)
    # the two halves of its ids are views
    on_host = engine.growth._host_ids.nbytes + engine.growth._ids.nbytes
    held_already = engine.ring.nbytes + engine.counters.nbytes
    assert engine_bytes(config, shape, step) == {
        "index": sum(nbytes((*layer.pages.summary, *layer.pages[1:])) for layer in layers),
        "pool": sum(nbytes(layer.pool) for layer in layers) - tables,
        "tables": tables,
        "ring": engine.ring.nbytes + sum(steady.values()),
        "scratch": working,
        "growth": nbytes(vars(engine.growth).values()) - on_host - held_already,
    }


def test_a_million_tokens_take_no_memory_to_foresee() -> None:
    shape = CacheShape(80, 64, 8, 8, 128, torch.bfloat16, 16 << 20)
    config = OffloadConfig(prefill_chunk=8192)
    cache = cache_bytes(config, shape)
    assert cache.host_pages > 200 << 40
    step = engine_step_shape(config, shape)
    assert engine_bytes(config, shape, step)["index"] > sum(cache.index.values())
