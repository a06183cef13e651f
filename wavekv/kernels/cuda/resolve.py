"""From pages to slots of the pool: hits, misses, and whom the misses displace."""

from typing import Any

import triton
import triton.language as tl
from torch import Tensor

from wavekv.kernels.cuda.launch import launch, power_of_two
from wavekv.kernels.step import (
    AGES,
    AHEAD,
    ATTENDED,
    CHOSEN,
    StepPages,
    StepPool,
    StepScratch,
    StepShape,
    StepTotals,
)

_LOOKUPS = 256
"""Pages that one program looks up."""
_PROBES = 4
_PACKED = 1 << 15
"""More than the slots of a pool of which two counts share an int32; larger pools count in int64."""


@triton.jit
def _lookup(
    counters,
    chosen,
    counts,
    table,
    age,
    ahead,
    slots,
    tokens,
    status,
    paging,
    N,
    M,
    S,
    BLOCK: tl.constexpr,
    MARK: tl.constexpr,
    ATTENDS: tl.constexpr,
):
    """What is found: its slot is of this step."""
    row = tl.program_id(1).to(tl.int64)
    j = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    now = tl.load(counters + 1)
    page = tl.load(chosen + row * M + j, mask=j < M, other=-1)
    slot = tl.load(table + row * N + page, mask=page >= 0, other=-1)
    is_hit = slot >= 0
    tl.store(age + row * S + slot, now, mask=is_hit)
    if ATTENDS:
        count = tl.load(counts + row * N + page, mask=is_hit, other=0).to(tl.int32)
        is_new = tl.load(ahead + row * S + slot, mask=is_hit, other=-1) == now
        tl.store(slots + row * M + j, slot, mask=j < M)
        tl.store(tokens + row * M + j, count, mask=j < M)
        tl.store(status + row * N + page, tl.full([BLOCK], MARK, tl.uint8), mask=is_hit)
        num_hits, num_tokens = tl.sum(is_hit.to(tl.int32), 0), tl.sum(count, 0)
        # what was fetched ahead for this step was not found
        num_new = tl.sum((is_hit & is_new).to(tl.int32), 0).to(tl.int64)
        if num_hits > 0:
            tl.atomic_add(paging + row * 5, num_hits.to(tl.int64) - num_new, sem="relaxed")
            tl.atomic_add(paging + row * 5 + 1, num_new, sem="relaxed")
            tl.atomic_add(paging + row * 5 + 3, num_tokens.to(tl.int64), sem="relaxed")
            tl.atomic_add(paging + row * 5 + 4, -num_new, sem="relaxed")


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
def _oldest(rest, count, AGES: tl.constexpr, PACK: tl.constexpr):
    """Which of ages rest [n] (0 for none) are the `count` >= 1 largest, of equal ones the first,
    and their order."""
    numbers = tl.histogram(rest, AGES)
    older = tl.sum(numbers, 0) - tl.cumsum(numbers, 0)
    low = tl.min(tl.where(older < count, tl.arange(0, AGES), AGES), 0)
    is_older, is_tie = rest > low, rest == low
    # both are counted in one pass
    both = tl.cumsum(is_older.to(PACK) + (is_tie.to(PACK) << 16), 0)
    older, ties = both & 0xFFFF, both >> 16
    num_ties = count - tl.sum(is_older.to(tl.int32), 0)
    is_victim = is_older | (is_tie & (ties <= num_ties))
    return is_victim, (older + tl.minimum(ties, num_ties)).to(tl.int32) - 1


@triton.jit
def _replace(
    counters,
    chosen,
    rank,
    counts,
    arena_ids,
    table,
    owner,
    age,
    ahead,
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
    SP: tl.constexpr,
    AGES: tl.constexpr,
    PROBES: tl.constexpr,
    PACK: tl.constexpr,
    MARK: tl.constexpr,
    ATTENDS: tl.constexpr,
    IS_AHEAD: tl.constexpr,
):
    """What is not found takes the slots that were used least recently."""
    row = tl.program_id(0).to(tl.int64)
    now = tl.load(counters + 1)
    j, s = tl.arange(0, MP), tl.arange(0, SP)
    page = tl.load(chosen + row * M + j, mask=j < M, other=-1)
    used = tl.load(age + row * S + s, mask=s < S, other=now)
    slot = tl.load(table + row * N + page, mask=page >= 0, other=0)
    is_miss = slot < 0
    num_missing = tl.sum(is_miss.to(tl.int32), 0)
    is_free = used != now
    taken = tl.minimum(tl.minimum(num_missing, X), tl.sum(is_free.to(tl.int32), 0))
    tl.store(num_misses + row, taken)
    if taken > 0:
        is_taken = is_miss
        if taken < num_missing:
            bits = tl.load(rank + row * N + page, mask=is_miss, other=-1)
            is_taken = _best(bits, is_miss, taken, PROBES)
        # a slot of this step has age 0, and does not count; from some age on all are equally old
        rest = tl.where(is_free, tl.maximum(tl.minimum(now - used, AGES - 1), 1), 0)
        is_victim, at = _oldest(rest, taken, AGES, PACK)
        tl.store(victims + row * X + at, s, mask=is_victim)
        order = tl.cumsum(is_taken.to(tl.int32), 0) - 1
        arena = tl.load(arena_ids + row * N + page, mask=is_taken, other=0)
        tl.store(wanted + row * X + order, arena, mask=is_taken)
        tl.debug_barrier()
        filled = tl.load(victims + row * X + order, mask=is_taken, other=-1, cache_modifier=".cg")
        previous = tl.load(owner + row * S + filled, mask=is_taken, other=-1)
        tl.store(table + row * N + previous, tl.full([MP], -1, tl.int32), mask=previous >= 0)
        tl.store(table + row * N + page, filled, mask=is_taken)
        tl.store(owner + row * S + filled, page, mask=is_taken)
        tl.store(age + row * S + filled, now, mask=is_taken)
        if IS_AHEAD:
            tl.store(ahead + row * S + filled, now, mask=is_taken)
        if ATTENDS:
            count = tl.load(counts + row * N + page, mask=is_taken, other=0).to(tl.int32)
            tl.store(slots + row * M + j, filled, mask=is_taken)
            tl.store(tokens + row * M + j, count, mask=is_taken)
            tl.store(status + row * N + page, tl.full([MP], MARK, tl.uint8), mask=is_taken)
            tl.store(paging + row * 5 + 3, tl.load(paging + row * 5 + 3) + tl.sum(count, 0))
    fetched = paging + row * 5 + (1 if ATTENDS else 4)
    tl.store(fetched, tl.load(fetched) + taken)
    if ATTENDS:
        left = paging + row * 5 + 2
        tl.store(left, tl.load(left) + num_missing - taken)


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
    found = scratch.slots, scratch.tokens, scratch.status
    launch(
        _lookup,
        (triton.cdiv(M, _LOOKUPS), shape.rows),
        *(counters, scratch.chosen, pages.summary.counts, pool.table, pool.age, pool.ahead),
        *(*found, totals.paging, N, M, S),
        BLOCK=_LOOKUPS,
        MARK=ATTENDED,
        ATTENDS=purpose == CHOSEN,
        num_warps=4,
    )
    options: dict[str, Any] = {
        "MP": power_of_two(M),
        "SP": power_of_two(S),
        "AGES": AGES,
        "PROBES": _PROBES,
        "PACK": tl.int32 if power_of_two(S) < _PACKED else tl.int64,
        "MARK": ATTENDED,
        "ATTENDS": purpose == CHOSEN,
        "IS_AHEAD": purpose == AHEAD,
        "num_warps": min(32, max(4, power_of_two(S) // 256)),
    }
    launch(
        _replace,
        (shape.rows,),
        *(counters, scratch.chosen, scratch.rank, pages.summary.counts, pages.arena_ids),
        *(pool.table, pool.owner, pool.age, pool.ahead, *found),
        *(scratch.victims, scratch.wanted, scratch.num_misses, totals.paging),
        *(N, M, S, scratch.victims.shape[2]),
        **options,
    )
