"""The rank of every page, and a threshold for the best."""

from typing import Any

import triton
import triton.language as tl
from torch import Tensor

from wavekv.kernels.cuda.launch import launch, power_of_two
from wavekv.kernels.cuda.moments import moments
from wavekv.kernels.step import (
    BIN_SHIFT,
    CANDIDATES,
    MOST,
    NUM_BINS,
    REFINE_BLOCK,
    SCORE_BLOCK,
    WIDE,
    StepPages,
    StepScratch,
    StepShape,
    bin_base,
)

_RANK_BLOCK = 2048
_NEVER = 0x7FFFFFFF


@triton.jit
def _rank(
    counters,
    limits,
    counts,
    variance,
    mean_logits,
    query_square,
    log_mass,
    block_max,
    block_sum,
    rank,
    histogram,
    arrived,
    threshold,
    N,
    softcap,
    G: tl.constexpr,
    GP: tl.constexpr,
    PART: tl.constexpr,
    LIMIT: tl.constexpr,
    MOST_LIMIT: tl.constexpr,
    ROWS: tl.constexpr,
    BINS: tl.constexpr,
    SHIFT: tl.constexpr,
    BASE: tl.constexpr,
    NEVER: tl.constexpr,
    STATS: tl.constexpr,
    STATS_BLOCK: tl.constexpr,
    STATS_STRIDE: tl.constexpr,
    BLOCK: tl.constexpr,
    USE_VARIANCE: tl.constexpr,
    SOFTCAP: tl.constexpr,
):
    block, row = tl.program_id(0), tl.program_id(1).to(tl.int64)
    num_pages = tl.load(counters + 2)
    num_blocks = tl.cdiv(num_pages, BLOCK)
    if (block < num_blocks) | (block == 0):
        g = tl.arange(0, GP)
        is_head = g < G
        # the softmax statistics of all pages
        part = tl.arange(0, STATS)
        held = is_head[:, None] & (part * STATS_BLOCK < num_pages)[None, :]
        at = (row * G + g)[:, None] * STATS_STRIDE + part[None, :]
        maxima = tl.load(block_max + at, mask=held, other=float("-inf"))
        largest = tl.max(maxima, 1)
        largest = tl.where(largest == float("-inf"), 0.0, largest)
        sums = tl.load(block_sum + at, mask=held, other=0.0)
        total = tl.sum(sums * tl.exp(maxima - largest[:, None]), 1)
        # the rank of this block's pages
        n = block * BLOCK + tl.arange(0, BLOCK)
        is_page = n < num_pages
        keep = is_head[:, None] & is_page[None, :]
        at = (row * G + g)[:, None] * N + n[None, :]
        if PART == 0:
            x = tl.load(mean_logits + at, mask=keep, other=0.0)
            square = tl.load(query_square + row * G + g, mask=is_head, other=0.0)
            count = tl.load(counts + row * N + n, mask=is_page, other=0)
            spread = tl.load(variance + row * N + n, mask=is_page, other=0.0)
            mass, shift = moments(x, square, spread, count, softcap, USE_VARIANCE, SOFTCAP)
            mass = tl.where(keep, mass + shift, float("-inf"))
        else:
            mass = tl.load(log_mass + at, mask=keep, other=float("-inf"))
        share = tl.exp(mass - largest[:, None]) / tl.maximum(total, 1e-30)[:, None]
        share = tl.sum(tl.where(keep, share, 0.0), 0)
        is_alive = is_page & (tl.max(mass, 0) > float("-inf"))
        bits = tl.where(is_alive, share.to(tl.int32, bitcast=True), -1)
        tl.store(rank + row * N + n, bits, mask=is_page)
        bins = tl.minimum(tl.maximum((bits >> SHIFT) - BASE, 0), BINS - 1)
        here = histogram + (PART * ROWS + row) * BINS
        # what is not alive is counted with the lowest bin, and taken off
        b = tl.arange(0, BINS)
        counted = tl.histogram(tl.where(is_alive, bins, 0), BINS)
        counted -= tl.where(b == 0, BLOCK - tl.sum(is_alive.to(tl.int32), 0), 0)
        tl.atomic_add(here + b, counted, mask=counted > 0, sem="relaxed")
        # the block that comes last knows all bins
        tl.debug_barrier()
        ticket = tl.atomic_add(arrived + PART * ROWS + row, 1, sem="acq_rel")
        if ticket >= num_blocks - 1:
            wanted = tl.load(limits + LIMIT)
            held_bins = tl.load(here + b, cache_modifier=".cg")
            above = tl.sum(held_bins, 0) - tl.cumsum(held_bins, 0) + held_bins
            # the highest bin with enough ranks in it and above
            last = tl.max(tl.where(above >= wanted, b, 0), 0)
            least = tl.where(last == 0, 0, (last + BASE) << SHIFT)
            if PART == 0:
                # none are ranked again where none are wanted, or where all are chosen
                is_needless = (wanted == 0) | (tl.load(limits + MOST_LIMIT) >= num_pages)
                least = tl.where(is_needless, NEVER, least)
            tl.store(threshold + PART * ROWS + row, least)


def rank_pages(
    pages: StepPages,
    counters: Tensor,
    limits: Tensor,
    scratch: StepScratch,
    shape: StepShape,
    *,
    is_final: bool,
) -> None:
    """The rank of each page, and the least rank of the bin that holds the last one wanted: for
    candidates by log mass + shift, at the end by log mass."""
    stats_block = REFINE_BLOCK if is_final else SCORE_BLOCK
    options: dict[str, Any] = dict(
        G=shape.group,
        GP=power_of_two(shape.group),
        PART=int(is_final),
        LIMIT=WIDE if is_final else CANDIDATES,
        MOST_LIMIT=MOST,
        ROWS=shape.rows,
        BINS=NUM_BINS,
        SHIFT=BIN_SHIFT,
        BASE=bin_base(shape.group),
        NEVER=_NEVER,
        STATS=power_of_two(triton.cdiv(shape.capacity, stats_block)),
        STATS_BLOCK=stats_block,
        STATS_STRIDE=scratch.block_max.shape[2],
        BLOCK=_RANK_BLOCK,
        USE_VARIANCE=shape.tail == "second",
        SOFTCAP=shape.softcap is not None,
        num_warps=8,
    )
    launch(
        _rank,
        (triton.cdiv(shape.capacity, _RANK_BLOCK), shape.rows),
        *(counters, limits, pages.counts, pages.variance),
        *(scratch.mean_logits, scratch.query_square, scratch.log_mass),
        *(scratch.block_max, scratch.block_sum, scratch.rank),
        *(scratch.histogram, scratch.arrived, scratch.threshold),
        *(shape.capacity, shape.softcap or 1.0),
        **options,
    )
