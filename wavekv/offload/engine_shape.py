"""What a decode engine is made for: whether it can take contexts over, and its fixed sizes."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from wavekv.config import OffloadConfig
from wavekv.index.levels import num_finalists
from wavekv.kernels.step import (
    CANDIDATES,
    FINALISTS,
    FIRST,
    LEAST,
    LIKELY,
    MOST,
    NUM_LIMITS,
    SECOND,
    WIDE,
    StepShape,
)
from wavekv.kvstore import KVLayout
from wavekv.offload.budget import page_limits
from wavekv.offload.context import LayerContext
from wavekv.offload.index_sizes import index_sizes
from wavekv.offload.room import room_tokens

POOL_BUDGETS = 4
"""Slots of the page pool, in budgets and rounded up to a power of two (which costs the choice of
victims nothing), unless `device_budget` allows fewer."""
RUNNERS_UP = 1.25
"""Pages that are made resident for the next step, as a multiple of the budget."""
LIKELY_SHARES = 0.75, 0.875
"""Pages that are fetched ahead of the choice, as shares of the budget, after the first and the
second stage of ranking. Of these four in five and 19 in 20 are chosen (docs/log.md)."""


def likely_pages(shape: StepShape, most: int, stage: int) -> int:
    """How many pages of a KV head a stage of ranking has fetched, where a step chooses `most`. All
    that a step may choose finds a slot beside them."""
    spare = (shape.slots - shape.most) // len(LIKELY_SHARES)
    return min(int(LIKELY_SHARES[stage] * most), spare)


def step_limits(config: OffloadConfig, shape: StepShape, least: int, most: int) -> Tensor:
    """The `limits` [NUM_LIMITS] int32 of a step in which a KV head chooses so many pages."""
    values = torch.zeros(NUM_LIMITS, dtype=torch.int32)
    values[LEAST], values[MOST] = least, most
    if config.refine > 1:
        values[CANDIDATES] = most * config.refine
        values[FINALISTS] = most * num_finalists(config.refine)
    values[WIDE] = int(RUNNERS_UP * most) if shape.is_wide else most
    for stage in FIRST, SECOND:
        values[LIKELY + stage] = likely_pages(shape, most, stage)
    return values


def table_ids(num_ids: int, num_layers: int, shape: StepShape) -> int:
    """Pages of an arena in two tiers that an engine keeps track of, where there are `num_ids`: with
    room for those that its layers may get, and for as many that forks may."""
    return num_ids + 2 * num_layers * shape.rows * shape.capacity


def engine_refusal(contexts: Sequence[LayerContext | None]) -> str | None:
    """Why an engine cannot take these contexts over; None if it can."""
    made = [context for context in contexts if context is not None]
    if not made or len(made) < len(contexts):
        return "some layers hold no tokens yet"
    first = made[0]
    queries = [context.counters.last_query for context in made]
    if first.runtime.config.mode != "retrieval":
        return f'mode is "{first.runtime.config.mode}"'
    if any(query is None for query in queries):
        return "no decode step has run yet"
    kinds = {
        (
            *(context.shape, context.paged.arena, context.paged.num_pages),
            *(context.steady.start, context.steady.end, context.steady.num_sink_slots),
            *(query.shape, query.dtype, query.device),
        )
        for context, query in zip(made, queries, strict=True)
        if query is not None
    }
    if len(kinds) > 1:
        return "layers differ in heads, tokens, dtype or device"
    config = first.runtime.config
    if first.paged.arena.layout.page_bytes % 4:
        return f"pages of {first.paged.arena.layout.page_bytes} bytes are not whole words"
    if first.steady.num_local > config.window + 2 * config.append_segment:
        return "too many tokens wait to be paged out"
    return None


def wanted_shape(contexts: Sequence[LayerContext]) -> StepShape:
    """The sizes of an engine for these contexts, such that `engine_refusal` is None, with as many
    slots as pay."""
    first, query = contexts[0], contexts[0].counters.last_query
    assert query is not None
    zone, paged = first.steady, first.paged
    return step_shape(
        first.runtime.config,
        sizes=first.shape,
        group=query.shape[1] // first.shape[1],
        num_tokens=zone.end,
        num_pages=paged.num_pages,
        sinks=zone.num_sink_slots,
        layout=paged.arena.layout,
    )


def step_shape(
    config: OffloadConfig,
    *,
    sizes: tuple[int, int, int],
    group: int,
    num_tokens: int,
    num_pages: int,
    sinks: int,
    layout: KVLayout,
) -> StepShape:
    """The sizes of an engine for contexts of sizes (B, Hkv, D) that hold `num_tokens`, `num_pages`
    pages of each KV head among them, stored as `layout` says, with as many slots as pay (pure)."""
    (B, H, D), P = sizes, config.page_size
    span_pages, K = index_sizes(config, D)
    room = room_tokens(config)
    capacity = num_pages + room // P // K * K
    # the ring takes tokens beyond those that have room in pages
    longest = num_tokens + room + config.window + 2 * config.append_segment
    most = min(capacity, page_limits(config, longest)[1])
    return StepShape(
        batch=B,
        kv_heads=H,
        group=group,
        head_dim=D,
        page_size=P,
        capacity=capacity,
        most=most,
        slots=1 << (POOL_BUDGETS * most - 1).bit_length(),
        misses=min(most, config.max_misses or most),
        sinks=sinks,
        ring=config.window + 2 * config.append_segment,
        span_pages=span_pages,
        block_pages=K,
        scale=1.0,
        top_p=config.top_p,
        tail=config.tail_estimate,
        codec=layout.codec,
        is_wide=config.prefetch == "runners-up",
    )
