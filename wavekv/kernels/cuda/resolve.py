"""From pages to slots of the pool: hits, misses, and whom the misses displace."""

from typing import Any

import triton
import triton.language as tl
from torch import Tensor

from wavekv.kernels.cuda.launch import launch, power_of_two
from wavekv.kernels.step import AGES, StepPages, StepPool, StepScratch, StepShape, StepTotals


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
def _resolve(
    counters,
    chosen,
    rank,
    counts,
    arena_ids,
    table,
    owner,
    age,
    slots,
    tokens,
    attended,
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
    PREFETCH: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    now = tl.load(counters + 1)
    j, s = tl.arange(0, MP), tl.arange(0, SP)
    page = tl.load(chosen + row * M + j, mask=j < M, other=-1)
    is_page = page >= 0
    slot = tl.load(table + row * N + page, mask=is_page, other=-1)
    is_hit = slot >= 0
    tl.store(age + row * S + slot, now, mask=is_hit)
    is_miss = is_page & (slot < 0)
    num_missing = tl.sum(is_miss.to(tl.int32), 0)
    # victims by age, never a slot of this step
    tl.debug_barrier()
    used = tl.load(age + row * S + s, mask=s < S, other=now, cache_modifier=".cg")
    is_free = (s < S) & (used != now)
    # a slot of this step has age 0, and does not count; beyond the last bin all are equally old
    rest = tl.where(is_free, tl.maximum(tl.minimum(now - used, AGES - 1), 1), 0)
    taken = tl.minimum(tl.minimum(num_missing, X), tl.sum(is_free.to(tl.int32), 0))
    is_taken = is_miss
    if taken < num_missing:
        bits = tl.load(rank + row * N + page, mask=is_miss, other=-1)
        # with no slot left to take, none is
        is_taken = _best(bits, is_miss, taken, PROBES) & (taken > 0)
    order = tl.cumsum(is_taken.to(tl.int32), 0) - 1
    # the youngest age taken: the largest that leaves enough at or above it
    bins = tl.arange(0, AGES)
    counted = tl.histogram(rest, AGES)
    at_least = tl.sum(counted, 0) - tl.cumsum(counted, 0) + counted
    low = tl.max(tl.where((at_least >= taken) & (bins > 0), bins, 0), 0)
    is_older = is_free & (rest > low)
    num_older = tl.sum(is_older.to(tl.int32), 0)
    is_tie = is_free & (rest == low)
    tie = tl.cumsum(is_tie.to(tl.int32), 0) - 1
    is_victim = is_older | (is_tie & (num_older + tie < taken))
    at = tl.cumsum(is_victim.to(tl.int32), 0) - 1
    tl.store(victims + row * X + at, s, mask=is_victim)
    previous = tl.load(owner + row * S + s, mask=is_victim, other=-1)
    tl.store(table + row * N + previous, tl.full([SP], -1, tl.int32), mask=previous >= 0)
    tl.debug_barrier()
    filled = tl.load(victims + row * X + order, mask=is_taken, other=-1, cache_modifier=".cg")
    tl.store(table + row * N + page, filled, mask=is_taken)
    tl.store(owner + row * S + filled, page, mask=is_taken)
    arena = tl.load(arena_ids + row * N + page, mask=is_taken, other=0)
    tl.store(wanted + row * X + order, arena, mask=is_taken)
    tl.store(num_misses + row, taken)
    tl.store(age + row * S + filled, now, mask=is_taken)
    if PREFETCH:
        tl.store(paging + row * 5 + 4, tl.load(paging + row * 5 + 4) + taken)
    else:
        slot = tl.where(is_taken, filled, slot)
        is_here = is_page & (slot >= 0)
        count = tl.load(counts + row * N + page, mask=is_here, other=0)
        tl.store(slots + row * M + j, tl.where(is_here, slot, -1), mask=j < M)
        tl.store(tokens + row * M + j, count, mask=j < M)
        tl.store(attended + row * N + page, tl.full([MP], 1, tl.int8), mask=is_here)
        num_hits = tl.sum(is_hit.to(tl.int32), 0)
        num_left = num_missing - taken
        tl.store(paging + row * 5, tl.load(paging + row * 5) + num_hits)
        tl.store(paging + row * 5 + 1, tl.load(paging + row * 5 + 1) + taken)
        tl.store(paging + row * 5 + 2, tl.load(paging + row * 5 + 2) + num_left)
        tl.store(paging + row * 5 + 3, tl.load(paging + row * 5 + 3) + tl.sum(count, 0))


def resolve(
    pages: StepPages,
    pool: StepPool,
    counters: Tensor,
    scratch: StepScratch,
    totals: StepTotals,
    shape: StepShape,
    *,
    is_prefetch: bool = False,
) -> None:
    """Find the slot of each chosen page. Misses take the slots that were used least recently, never
    one of this step; `fetch` fills them. Misses beyond `shape.misses` are left to the estimate.

    A prefetch makes its pages resident and counts as a use, but nothing is attended to."""
    options: dict[str, Any] = {
        "MP": power_of_two(scratch.chosen.shape[2]),
        "SP": power_of_two(shape.slots),
        "AGES": AGES,
        "PROBES": 16,
        "PREFETCH": is_prefetch,
        "num_warps": min(32, max(4, power_of_two(shape.slots) // 128)),
    }
    launch(
        _resolve,
        (shape.rows,),
        *(counters, scratch.chosen, scratch.rank, pages.counts, pages.arena_ids),
        *(pool.table, pool.owner, pool.age),
        *(scratch.slots, scratch.tokens, scratch.attended),
        *(scratch.victims, scratch.wanted, scratch.num_misses, totals.paging),
        *(shape.capacity, scratch.chosen.shape[2], shape.slots, scratch.victims.shape[2]),
        **options,
    )
