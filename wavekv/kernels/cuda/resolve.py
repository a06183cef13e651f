"""From pages to slots of the pool: hits, misses, and whom the misses displace."""

from typing import Any

import triton
import triton.language as tl
from torch import Tensor

from wavekv.kernels.cuda.launch import launch, power_of_two
from wavekv.kernels.step import (
    AHEAD,
    ATTENDED,
    CHOSEN,
    StepPages,
    StepPool,
    StepScratch,
    StepShape,
    StepTotals,
)

_PROBES = 4
_WALK = 1024
"""Slots that are asked at once whether a miss may have them."""


@triton.jit
def _best(bits, is_there, count, PROBES: tl.constexpr):
    """The `count` highest of bits [n] (not negative where `is_there`), of equal ones the first."""
    j = tl.arange(0, PROBES)
    low = tl.zeros([], tl.int64)
    width = tl.full([], 1 << 32, tl.int64)
    while width > 1:
        width = width // PROBES
        probe = low + (j + 1) * width - 1
        is_above = is_there[:, None] & (bits[:, None] > probe[None, :])
        is_far = tl.sum(is_above.to(tl.int32), 0) < count
        low = low + tl.min(tl.where(is_far, j, PROBES - 1), 0) * width
    last = low.to(tl.int32)
    is_above = is_there & (bits > last)
    is_tie = is_there & (bits == last)
    before = tl.sum(is_above.to(tl.int32), 0) + tl.cumsum(is_tie.to(tl.int32), 0) - 1
    return is_above | (is_tie & (before < count))


@triton.jit
def _unused(order, age, victims, now, most, S, BLOCK: tl.constexpr):
    """The first slots of `order` that are not of this step, at most `most`, into `victims`; and
    their number."""
    i = tl.arange(0, BLOCK)
    found = 0
    start = 0
    while (found < most) & (start < S):
        slot = tl.load(order + start + i, mask=start + i < S, other=0)
        used = tl.load(age + slot, mask=start + i < S, other=now, cache_modifier=".cg")
        is_free = used != now
        at = found + tl.cumsum(is_free.to(tl.int32), 0) - 1
        tl.store(victims + at, slot, mask=is_free & (at < most))
        found += tl.sum(is_free.to(tl.int32), 0)
        start += BLOCK
    return tl.minimum(found, most)


@triton.jit
def _resolve(
    counters,
    chosen,
    rank,
    counts,
    arena_ids,
    host_slots,
    table,
    owner,
    age,
    ahead,
    order,
    slots,
    tokens,
    status,
    victims,
    wanted,
    num_misses,
    paging,
    N,
    M,
    S,
    X,
    MP: tl.constexpr,
    WALK: tl.constexpr,
    PROBES: tl.constexpr,
    MARK: tl.constexpr,
    ATTENDS: tl.constexpr,
    IS_AHEAD: tl.constexpr,
    HAS_TIERS: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    now = tl.load(counters + 1)
    j = tl.arange(0, MP)
    page = tl.load(chosen + row * M + j, mask=j < M, other=-1)
    slot = tl.load(table + row * N + page, mask=page >= 0, other=-1)
    is_hit, is_miss = slot >= 0, (page >= 0) & (slot < 0)
    tl.store(age + row * S + slot, now, mask=is_hit)
    num_hits, num_missing = tl.sum(is_hit.to(tl.int32), 0), tl.sum(is_miss.to(tl.int32), 0)
    num_late = 0
    if HAS_TIERS:
        # what is on the disk only is not to be had now
        id = tl.load(arena_ids + row * N + page, mask=is_miss, other=0)
        is_miss = is_miss & (tl.load(host_slots + id, mask=is_miss, other=-1) >= 0)
        num_late = num_missing
        num_missing = tl.sum(is_miss.to(tl.int32), 0)
        num_late -= num_missing
    if ATTENDS:
        brought = tl.load(ahead + row * S + slot, mask=is_hit, other=-1)
        # what was fetched ahead for this step was not found
        num_new = tl.sum((is_hit & (brought == now)).to(tl.int32), 0)
    taken = 0
    if num_missing > 0:
        # ages are read by other threads than wrote them
        tl.debug_barrier()
        most = tl.minimum(num_missing, X)
        taken = _unused(order + row * S, age + row * S, victims + row * X, now, most, S, WALK)
    tl.store(num_misses + row, taken)
    if taken > 0:
        is_taken = is_miss
        if taken < num_missing:
            bits = tl.load(rank + row * N + page, mask=is_miss, other=-1)
            is_taken = _best(bits, is_miss, taken, PROBES)
        turn = tl.cumsum(is_taken.to(tl.int32), 0) - 1
        arena = tl.load(arena_ids + row * N + page, mask=is_taken, other=0)
        if HAS_TIERS:
            arena = tl.load(host_slots + arena, mask=is_taken, other=0)
        tl.store(wanted + row * X + turn, arena, mask=is_taken)
        tl.debug_barrier()
        # others wrote these
        filled = tl.load(victims + row * X + turn, mask=is_taken, other=-1, cache_modifier=".cg")
        previous = tl.load(owner + row * S + filled, mask=is_taken, other=-1)
        # nor may one load what another has stored
        tl.debug_barrier()
        tl.store(table + row * N + previous, tl.full([MP], -1, tl.int32), mask=previous >= 0)
        tl.store(table + row * N + page, filled, mask=is_taken)
        tl.store(owner + row * S + filled, page, mask=is_taken)
        tl.store(age + row * S + filled, now, mask=is_taken)
        if IS_AHEAD:
            tl.store(ahead + row * S + filled, now, mask=is_taken)
        slot = tl.where(is_taken, filled, slot)
    if ATTENDS:
        is_held = slot >= 0
        count = tl.load(counts + row * N + page, mask=is_held, other=0).to(tl.int32)
        tl.store(slots + row * M + j, slot, mask=j < M)
        tl.store(tokens + row * M + j, count, mask=j < M)
        tl.store(status + row * N + page, tl.full([MP], MARK, tl.uint8), mask=is_held)
        num_tokens = tl.sum(count, 0)
    totals = paging + row * 5
    if ATTENDS:
        tl.store(totals, tl.load(totals) + num_hits - num_new)
        tl.store(totals + 1, tl.load(totals + 1) + taken + num_new)
        tl.store(totals + 2, tl.load(totals + 2) + num_missing - taken + num_late)
        tl.store(totals + 3, tl.load(totals + 3) + num_tokens)
        tl.store(totals + 4, tl.load(totals + 4) - num_new)
    else:
        tl.store(totals + 4, tl.load(totals + 4) + taken)


def resolve(
    pages: StepPages,
    pool: StepPool,
    counters: Tensor,
    scratch: StepScratch,
    totals: StepTotals,
    shape: StepShape,
    *,
    purpose: int = CHOSEN,
) -> None:
    """Find the slot of each chosen page. Misses take the slots that were used least recently, never
    one of this step; `fetch` fills them. Misses beyond `shape.misses` are left to the estimate.

    For another purpose than `CHOSEN` pages are made resident, which counts as a use, but nothing is
    attended to."""
    N, M, S = shape.capacity, scratch.chosen.shape[2], shape.slots
    options: dict[str, Any] = {
        "MP": power_of_two(M),
        "WALK": min(_WALK, power_of_two(S)),
        "PROBES": _PROBES,
        "MARK": ATTENDED,
        "ATTENDS": purpose == CHOSEN,
        "IS_AHEAD": purpose == AHEAD,
        "HAS_TIERS": pages.host_slots is not None,
        # beside other kernels there is room for few
        "num_warps": min(16 if purpose == CHOSEN else 8, max(4, power_of_two(M) // 256)),
    }
    launch(
        _resolve,
        (shape.rows,),
        *(counters, scratch.chosen, scratch.rank, pages.summary.counts, pages.arena_ids),
        pages.arena_ids if pages.host_slots is None else pages.host_slots,
        *(pool.table, pool.owner, pool.age, pool.ahead, pool.order),
        *(scratch.slots, scratch.tokens, scratch.status),
        *(scratch.victims, scratch.wanted, scratch.num_misses, totals.paging),
        *(N, M, S, scratch.victims.shape[2]),
        **options,
    )


@triton.jit
def _settle(counters, age, order, S, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    now = tl.load(counters + 1)
    i = tl.arange(0, BLOCK)
    num = 0
    start = 0
    while start < S:
        is_slot = start + i < S
        slot = tl.load(order + row * S + start + i, mask=is_slot, other=0)
        stays = is_slot & (tl.load(age + row * S + slot, mask=is_slot, other=now) != now)
        at = num + tl.cumsum(stays.to(tl.int32), 0) - 1
        # places that are written now have been read
        tl.debug_barrier()
        tl.store(order + row * S + at, slot, mask=stays)
        num += tl.sum(stays.to(tl.int32), 0)
        start += BLOCK
    start = 0
    while start < S:
        slot = start + i
        moves = tl.load(age + row * S + slot, mask=slot < S, other=-1) == now
        moves = moves & (slot < S)
        at = num + tl.cumsum(moves.to(tl.int32), 0) - 1
        tl.store(order + row * S + at, slot, mask=moves)
        num += tl.sum(moves.to(tl.int32), 0)
        start += BLOCK


def settle(pool: StepPool, counters: Tensor, shape: StepShape) -> None:
    """Put the slots of this step behind the others in `pool.order`, the lower first; once a step,
    after the last `resolve` of a layer."""
    block = min(2 * _WALK, power_of_two(shape.slots))
    launch(
        _settle,
        (shape.rows,),
        *(counters, pool.age, pool.order, shape.slots),
        BLOCK=block,
        num_warps=max(1, min(8, block // 256)),
    )
