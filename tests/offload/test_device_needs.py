"""What a prefill and steps take of the device: sums stay inside the budget, more of it never gives
less, and estimates of working memory are no less than what is measured."""

from __future__ import annotations

from dataclasses import replace
from functools import partial

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from offload_cases import SMALL
from peak_memory import PeakMemory

from wavekv.config import OffloadConfig
from wavekv.errors import CapacityError
from wavekv.kernels import step_reference
from wavekv.kernels.backend import use_backend
from wavekv.kvstore import HostArena, KVLayout, MemoryBudget
from wavekv.offload import LayerContext, Logits, OffloadRuntime
from wavekv.offload.builder import SegmentBatch, build_segments
from wavekv.offload.device_memory import LIBRARY_BYTES, device_budget
from wavekv.offload.engine import DecodeEngine
from wavekv.offload.pool import check_steps, eager_parts, foreseen_shape, pool_parts, with_slots
from wavekv.offload.prefill_sizes import (
    CPU_CHUNK,
    building_bytes,
    chosen_chunk,
    prefill_parts,
    resident_tokens,
)
from wavekv.offload.sizes import CacheShape, engine_bytes, engine_step_shape

SHAPE = CacheShape(
    layers=3, batch=1, kv_heads=2, group=2, head_dim=64, dtype=torch.bfloat16, num_tokens=30000
)
CONFIG = OffloadConfig(segment=1024, append_segment=256, prefill_chunk=2048)
STEP = engine_step_shape(CONFIG, SHAPE)
PARTS = pool_parts(CONFIG, SHAPE, STEP, 0, 0)
OTHERS = sum(PARTS.values()) - PARTS["pages"]
SLOT = PARTS["pages"] // STEP.slots
LOGITS = Logits(0.125)


@given(st.integers(0, OTHERS + 2 * PARTS["pages"]), st.integers(0, 1 << 20))
def test_slots_of_a_budget(budget: int, more: int) -> None:
    try:
        shape = with_slots(STEP, PARTS, budget)
    except CapacityError:
        assert budget < OTHERS + STEP.most * SLOT
        return
    assert STEP.most <= shape.slots <= STEP.slots
    assert OTHERS + shape.slots * SLOT <= budget
    assert shape.slots == STEP.slots or OTHERS + (shape.slots + 1) * SLOT > budget
    assert with_slots(STEP, PARTS, budget + more).slots >= shape.slots


def test_a_slot_is_what_one_more_takes() -> None:
    few, more = (
        engine_bytes(CONFIG, SHAPE, replace(STEP, slots=slots))["pool"] for slots in (100, 101)
    )
    assert more - few == SLOT


@given(
    st.integers(1, 10**6), st.integers(1, 10**5), st.integers(-(10**9), 10**9), st.integers(0, 9**9)
)
def test_resident_tokens_of_a_budget(total: int, chunk: int, room: int, more: int) -> None:
    find = partial(resident_tokens, total=total, chunk=chunk, token_bytes=768)
    kept = find(room=room)
    assert 0 <= kept * 768 <= max(0, room)
    assert kept < total
    assert kept <= find(room=room + more)


@given(st.integers(0, 200_000), st.integers(1, 200_000))
def test_a_chunk_is_halved_until_it_fits(budget: int, floor: int) -> None:
    config = OffloadConfig()
    size = chosen_chunk(config, budget, lambda chunk: floor + 2 * chunk)
    assert size == CPU_CHUNK or floor + 2 * size <= budget
    assert size == 32768 or floor + 4 * size > budget
    assert chosen_chunk(config, None, lambda _: 0) == CPU_CHUNK


@given(st.sampled_from([0.1, 0.9, 1.0, 10**6, "1KiB"]), st.integers(1, 10**9))
def test_a_budget_is_never_more_than_there_is(setting: float | int | str, available: int) -> None:
    size = device_budget(OffloadConfig(device_budget=setting), available)
    assert 0 <= size <= available


def test_longer_contexts_and_chunks_take_more() -> None:
    def total(tokens: int, chunk: int, **settings: object) -> int:
        shape = CacheShape(3, 1, 2, 2, 64, torch.bfloat16, tokens)
        config = CONFIG.override(**settings)
        parts = prefill_parts(
            config, [shape], new_tokens=tokens, chunk=chunk, forward=lambda n: 1000 * n
        )
        return sum(parts.values())

    assert total(10_000, 2048) < total(20_000, 2048) < total(20_000, 4096)
    assert total(20_000, 2048) < total(20_000, 2048, host_dtype="int4")


@pytest.mark.parametrize("is_captured", [False, True])
def test_steps_are_checked_as_they_will_run(is_captured: bool) -> None:
    step = foreseen_shape(CONFIG, SHAPE, 1 << 40)
    if is_captured:
        with pytest.raises(CapacityError) as refused:
            foreseen_shape(CONFIG, SHAPE, 0)
        assert f"{step.most * SLOT / 2**20:.1f} MiB for pages" in str(refused.value)
    eager = sum(eager_parts(CONFIG, SHAPE).values()) + LIBRARY_BYTES
    captured = OTHERS + step.most * SLOT + LIBRARY_BYTES
    least = max(eager, captured) if is_captured else eager
    # what the zones keep is in both
    check_steps(CONFIG, [SHAPE], budget=least + (4 << 20), is_captured=is_captured)
    with pytest.raises(CapacityError, match="decode step"):
        check_steps(CONFIG, [SHAPE], budget=least - 1, is_captured=is_captured)
    exact = CONFIG.override(mode="exact")
    check_steps(exact, [SHAPE], budget=0, is_captured=is_captured)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("host_dtype", ["model", "int8", "int4-int2"])
def test_builders_take_no_more_than_foreseen(dtype: torch.dtype, host_dtype: str) -> None:
    B, H, S, count, D = 1, 2, 1024, 2, 64
    config = CONFIG.override(host_dtype=host_dtype)
    layout = KVLayout(config.page_size, D, dtype, host_dtype)  # type: ignore[arg-type]
    arena = HostArena(layout, MemoryBudget(1 << 30), pin=False)
    ids = [arena.allocate(B * H * S // config.page_size) for _ in range(count)]
    keys, values = torch.randn(2, B, H, count * S, D).to(dtype)
    with use_backend("torch"), torch.no_grad(), PeakMemory() as memory:
        batch = SegmentBatch(keys, values, None, 0, S, ids, 0)
        segments = build_segments(batch, arena, 128, 16)
    assert len(segments) == count
    shape = CacheShape(1, B, H, 1, D, dtype, count * S)
    foreseen = building_bytes(config, shape, count * S)
    assert 0.7 * foreseen < memory.peak <= foreseen
    for each in ids:
        arena.release(each)


def contexts_of(config: OffloadConfig, tokens: int, dtype: torch.dtype) -> list[LayerContext]:
    runtime = OffloadRuntime(config)
    contexts = []
    for _ in range(SHAPE.layers):
        keys, values = torch.randn(2, 1, 2, tokens, 64).to(dtype)
        context = LayerContext(runtime, keys, values)
        runtime.is_prefilling = True
        context.attend(torch.randn(1, 4, tokens, 64).to(dtype), keys, values, None, LOGITS)
        runtime.is_prefilling = False
        context.page_out()
        context.settle()
        contexts.append(context)
    return contexts


def step(context: LayerContext, dtype: torch.dtype) -> None:
    keys, values = torch.randn(2, 1, 2, 1, 64).to(dtype)
    context.attend(torch.randn(1, 4, 1, 64).to(dtype), keys, values, None, LOGITS)
    context.settle()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("host_dtype", ["model", "int8"])
def test_growth_takes_no_more_than_foreseen(dtype: torch.dtype, host_dtype: str) -> None:
    config = CONFIG.override(host_dtype=host_dtype)
    contexts = contexts_of(config, 1500, dtype)
    for context in contexts:
        step(context, dtype)
    engine = DecodeEngine(contexts, step_reference)
    growth = engine.growth
    ids = contexts[0].paged.arena.allocate(growth.num_arena_pages)
    growth._arena_ids.copy_(ids.view(growth._arena_ids.shape))
    with use_backend("torch"), PeakMemory() as memory:
        growth._build()
    shape = CacheShape(3, 1, 2, 2, 64, dtype, 1501)
    foreseen = pool_parts(config, shape, engine.shape, 0, 0)["growth"] - growth.nbytes
    assert 0.5 * foreseen < memory.peak <= foreseen + growth.nbytes


def test_an_index_that_grows_on_a_device_is_not_doubled(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("wavekv.offload.room.ROOM_TOKENS", 64)
    config = OffloadConfig(**(SMALL | {"cpu_budget": 1 << 24}))
    context = contexts_of(config, 400, torch.float32)[0]
    rooms = set()
    for _ in range(120):
        step(context, torch.float32)
        capacity = context.paged.index.buffer.counts.shape[2]
        rooms.add(capacity - context.paged.num_pages)
    assert max(rooms) <= 64 // config.page_size
    assert len(rooms) > 2
