"""The rank of every page, and a threshold for the best."""

from typing import Any

import triton
import triton.language as tl
from torch import Tensor

from wavekv.kernels.cuda.in_use import pages_in_use
from wavekv.kernels.cuda.launch import launch, power_of_two, uses_hardware
from wavekv.kernels.cuda.moments import LOG2_E, exp2_of, log_of, reach_of, root_of
from wavekv.kernels.step import (
    BIN_SHIFT,
    CANDIDATES,
    COUNT_BLOCK,
    FINALISTS,
    FIRST,
    LIKELY,
    MOST,
    NUM_BINS,
    REFINED,
    SAMPLES,
    SCORE_BLOCK,
    SECOND,
    WIDE,
    StepPages,
    StepScratch,
    StepShape,
    bin_base,
)

_BLOCK = 1024
_WARPS = 4
_REGISTERS = 64
"""Of a thread at most: so the programs of 8 KV heads and a million tokens all run at once."""
_NEVER = 0x7FFFFFFF


@triton.jit
def _softmax_statistics(
    maxima,
    sums,
    num,
    WARPS: tl.constexpr,
    STATS: tl.constexpr,
    STRIDE: tl.constexpr,
    HARDWARE: tl.constexpr,
):
    """The largest log mass of a head in octaves, and one over the sum of all masses
    [WARPS, 1, 1]: each warp reads them all, and none waits for another."""
    # as pages lie: four numbers of each thread
    LINE: tl.constexpr = min(STATS, 128)
    i = tl.arange(0, STATS // LINE)[:, None] * LINE + tl.arange(0, LINE)[None, :]
    i += tl.zeros([WARPS], tl.int32)[:, None, None]
    # four at a time, though some of the last four may be of no pages
    near = (i < (num + 3) // 4 * 4) & (i < STRIDE)
    tops = tl.where(i < num, tl.load(maxima + i, mask=near, other=0.0), float("-inf"))
    parts = tl.where(i < num, tl.load(sums + i, mask=near, other=0.0), 0.0)
    # nothing is less than nothing
    top = tl.max(tl.reshape(tops, [WARPS, STATS]), 1)
    largest = (tl.maximum(top, -1e30) * LOG2_E)[:, None, None]
    masses = parts * exp2_of(tops * LOG2_E - largest, HARDWARE)
    total = tl.sum(tl.reshape(masses, [WARPS, STATS]), 1)[:, None, None]
    return largest, 1.0 / tl.maximum(total, 1e-30)


@triton.jit
def _is_counted(
    bits,
    n,
    is_page,
    row,
    every,
    status,
    threshold,
    N,
    STAGE,
    ROWS,
    NEVER,
    REFINED,
):
    """Which pages tell where the wanted ones begin."""
    # see `wavekv.kernels.step.is_sampled`
    is_counted = is_page & (bits >= 0) & (((n ^ (n >> 4)) & (every - 1)) == 0)
    if STAGE > 0:
        # the best few of all are among those that were ranked again, or nearly so; were there too
        # few, all would be listed
        least = tl.load(threshold + (STAGE - 1) * ROWS + row)
        if STAGE == 1:
            mark = tl.load(status + row * N + n, mask=is_page, other=0)
            is_counted = is_counted & ((mark == REFINED) | (least == NEVER))
        else:
            is_counted = is_counted & ((bits >= least) | (least == NEVER))
    return is_counted


@triton.jit
def _least_of(counted, wanted, BINS: tl.constexpr, BASE: tl.constexpr, SHIFT: tl.constexpr):
    """The least rank of the highest bin with enough ranks in it and above; 0 if all are wanted."""
    above = tl.sum(counted, 0) - tl.cumsum(counted, 0) + counted
    last = tl.max(tl.where(above >= wanted, tl.arange(0, BINS), 0), 0)
    return tl.where(last == 0, 0, (last + BASE) << SHIFT)


@triton.jit
def _rank(
    counters,
    limits,
    counts,
    variance,
    query_square,
    log_mass,
    shift,
    status,
    block_max,
    block_sum,
    rank,
    histogram,
    arrived,
    threshold,
    likely,
    N,
    G: tl.constexpr,
    K: tl.constexpr,
    STAGE: tl.constexpr,
    LIMIT: tl.constexpr,
    LIKELY: tl.constexpr,
    CANDIDATES: tl.constexpr,
    MOST: tl.constexpr,
    ROWS: tl.constexpr,
    BINS: tl.constexpr,
    SHIFT: tl.constexpr,
    BASE: tl.constexpr,
    NEVER: tl.constexpr,
    REFINED: tl.constexpr,
    SOME: tl.constexpr,
    OF_SOME: tl.constexpr,
    MANY: tl.constexpr,
    OF_MANY: tl.constexpr,
    STATS: tl.constexpr,
    STATS_BLOCK: tl.constexpr,
    STRIDE: tl.constexpr,
    WARPS: tl.constexpr,
    BLOCK: tl.constexpr,
    USE_VARIANCE: tl.constexpr,
    SOFTCAP: tl.constexpr,
    HARDWARE: tl.constexpr,
):
    block, row = tl.program_id(0), tl.program_id(1).to(tl.int64)
    num_pages = pages_in_use(counters, K)
    num_blocks = tl.cdiv(num_pages, BLOCK)
    if (block < num_blocks) | (block == 0):
        # each warp has lines of pages, in which each thread has four
        LINES: tl.constexpr = BLOCK // (WARPS * 128)
        line = tl.arange(0, WARPS)[:, None, None] * LINES + tl.arange(0, LINES)[:, None]
        n = block * BLOCK + line * 128 + tl.arange(0, 128)
        is_page = n < num_pages
        if STAGE == 0 and USE_VARIANCE and not SOFTCAP:
            # four bytes a thread, so that these lie where the masses do
            at = tl.max_contiguous(n, [1, 1, 4])
            log_count = log_of(tl.load(counts + row * N + at, mask=is_page, other=0), HARDWARE)
            root = root_of(tl.load(variance + row * N + at, mask=is_page, other=0), HARDWARE)
        top = tl.full([WARPS, LINES, 128], float("-inf"), tl.float32)
        share = tl.zeros([WARPS, LINES, 128], tl.float32)
        # head by head: all that belongs to a page is in one thread
        for k in tl.static_range(G):
            head = row * G + k
            mass = tl.load(log_mass + head * N + n, mask=is_page, other=float("-inf"))
            if STAGE == 0:
                # a mean hides the key that stands out: the shift says how far one may
                if SOFTCAP:
                    mass += tl.load(shift + head * N + n, mask=is_page, other=0.0)
                elif USE_VARIANCE:
                    deviation = tl.sqrt(tl.load(query_square + head)) * root
                    mass += deviation * reach_of(deviation, log_count)
            maxima, sums = block_max + head * STRIDE, block_sum + head * STRIDE
            num_stats = tl.cdiv(num_pages, STATS_BLOCK)
            largest, worth = _softmax_statistics(
                maxima, sums, num_stats, WARPS, STATS, STRIDE, HARDWARE
            )
            share += exp2_of(mass * LOG2_E - largest, HARDWARE) * worth
            top = tl.maximum(top, mass)
        is_alive = is_page & (top > float("-inf"))
        bits = tl.where(is_alive, share.to(tl.int32, bitcast=True), -1)
        tl.store(rank + row * N + n, bits, mask=is_page)
        bins = tl.minimum(tl.maximum((bits >> SHIFT) - BASE, 0), BINS - 1)
        here = histogram + (STAGE * ROWS + row) * BINS
        wanted = tl.load(limits + LIMIT)
        every = 1
        if STAGE < 2:
            every = tl.where(wanted >= MANY, OF_MANY, tl.where(wanted >= SOME, OF_SOME, 1))
        is_counted = _is_counted(
            bits,
            n,
            is_page,
            row,
            every,
            status,
            threshold,
            N,
            STAGE,
            ROWS,
            NEVER,
            REFINED,
        )
        tl.atomic_add(here + bins, 1, mask=is_counted, sem="relaxed")
        # the block that comes last knows all bins
        tl.debug_barrier()
        ticket = tl.atomic_add(arrived + STAGE * ROWS + row, 1, sem="acq_rel")
        if ticket >= num_blocks - 1:
            counted = tl.load(here + tl.arange(0, BINS), cache_modifier=".cg")
            least = _least_of(counted, tl.maximum(wanted // every, 1), BINS, BASE, SHIFT)
            if STAGE < 2:
                few = tl.load(limits + LIKELY + STAGE)
                sure = _least_of(counted, tl.maximum(few // every, 1), BINS, BASE, SHIFT)
                # ranks that the bins do not tell apart say nothing
                sure = tl.where((few == 0) | (sure == 0), NEVER, sure)
                tl.store(likely + STAGE * ROWS + row, sure)
                # none are ranked again where none are wanted, or where all are chosen
                is_needless = (tl.load(limits + CANDIDATES) == 0) | (
                    tl.load(limits + MOST) >= num_pages
                )
                least = tl.where(is_needless, NEVER, least)
            tl.store(threshold + STAGE * ROWS + row, least)


def rank_pages(
    pages: StepPages,
    counters: Tensor,
    limits: Tensor,
    scratch: StepScratch,
    shape: StepShape,
    *,
    stage: int,
) -> None:
    """The rank of each page, and the least rank of the bin that holds the last one wanted: for
    candidates by log mass + shift, then by log mass."""
    index = pages.summary
    stats_block = SCORE_BLOCK if stage == FIRST else COUNT_BLOCK
    options: dict[str, Any] = {
        "G": shape.group,
        "K": shape.block_pages,
        "STAGE": stage,
        "LIMIT": {FIRST: CANDIDATES, SECOND: FINALISTS}.get(stage, WIDE),
        "LIKELY": LIKELY,
        "CANDIDATES": CANDIDATES,
        "MOST": MOST,
        "ROWS": shape.rows,
        "BINS": NUM_BINS,
        "SHIFT": BIN_SHIFT,
        "BASE": bin_base(shape.group),
        "NEVER": _NEVER,
        "REFINED": REFINED,
        "SOME": SAMPLES[0][0],
        "OF_SOME": SAMPLES[0][1],
        "MANY": SAMPLES[1][0],
        "OF_MANY": SAMPLES[1][1],
        "STATS": power_of_two(triton.cdiv(shape.capacity, stats_block)),
        "STATS_BLOCK": stats_block,
        "STRIDE": scratch.block_max.shape[2],
        "WARPS": _WARPS,
        "BLOCK": _BLOCK,
        "USE_VARIANCE": shape.tail == "second",
        "SOFTCAP": shape.softcap is not None,
        "HARDWARE": uses_hardware(scratch.rank),
        "num_warps": _WARPS,
        "maxnreg": _REGISTERS,
    }
    launch(
        _rank,
        (triton.cdiv(shape.capacity, _BLOCK), shape.rows),
        *(counters, limits, index.counts, index.variance, scratch.query_square),
        *(scratch.log_mass, scratch.shift, scratch.status),
        *(scratch.block_max, scratch.block_sum, scratch.rank),
        *(scratch.histogram, scratch.arrived, scratch.threshold),
        *(scratch.likely, shape.capacity),
        **options,
    )
