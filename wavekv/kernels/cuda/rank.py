"""The rank of every page, and a threshold for the best."""

from typing import Any

import triton
import triton.language as tl
from torch import Tensor

from wavekv.kernels.cuda.launch import launch, power_of_two
from wavekv.kernels.step import (
    BIN_SHIFT,
    CANDIDATES,
    COUNT_BLOCK,
    MOST,
    NUM_BINS,
    SAMPLE,
    SAMPLED_PAGES,
    SCORE_BLOCK,
    WIDE,
    StepScratch,
    StepShape,
    bin_base,
)

_BLOCK = 1024
_NEVER = 0x7FFFFFFF


@triton.jit
def _rank(
    counters,
    limits,
    log_mass,
    shift,
    block_max,
    block_sum,
    rank,
    histogram,
    arrived,
    threshold,
    N,
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
    SAMPLED: tl.constexpr,
    SAMPLE: tl.constexpr,
    STATS: tl.constexpr,
    STATS_BLOCK: tl.constexpr,
    STRIDE: tl.constexpr,
    BLOCK: tl.constexpr,
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
        at = (row * G + g)[:, None] * STRIDE + part[None, :]
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
        mass = tl.load(log_mass + at, mask=keep, other=float("-inf"))
        if PART == 0:
            # a mean hides the key that stands out: the shift says how far one may
            mass += tl.load(shift + at, mask=keep, other=0.0)
        share = tl.exp(mass - largest[:, None]) * (1.0 / tl.maximum(total, 1e-30))[:, None]
        share = tl.sum(tl.where(keep, share, 0.0), 0)
        is_alive = is_page & (tl.max(mass, 0) > float("-inf"))
        bits = tl.where(is_alive, share.to(tl.int32, bitcast=True), -1)
        tl.store(rank + row * N + n, bits, mask=is_page)
        bins = tl.minimum(tl.maximum((bits >> SHIFT) - BASE, 0), BINS - 1)
        here = histogram + (PART * ROWS + row) * BINS
        if PART == 0:
            # of many pages a sample shows where the candidates begin
            every = tl.where(num_pages >= SAMPLED, SAMPLE, 1)
            is_counted = is_alive & (n % every == 0)
        else:
            # the best few of all are among those that were candidates, or nearly so; were there too
            # few, all would be listed
            least = tl.load(threshold + row)
            is_counted = is_alive & ((bits >= least) | (least == NEVER))
        tl.atomic_add(here + bins, 1, mask=is_counted, sem="relaxed")
        # the block that comes last knows all bins
        tl.debug_barrier()
        ticket = tl.atomic_add(arrived + PART * ROWS + row, 1, sem="acq_rel")
        if ticket >= num_blocks - 1:
            wanted = tl.load(limits + LIMIT)
            if PART == 0:
                wanted = tl.maximum(wanted // tl.where(num_pages >= SAMPLED, SAMPLE, 1), 1)
            b = tl.arange(0, BINS)
            counted = tl.load(here + b, cache_modifier=".cg")
            above = tl.sum(counted, 0) - tl.cumsum(counted, 0) + counted
            # the highest bin with enough ranks in it and above
            last = tl.max(tl.where(above >= wanted, b, 0), 0)
            least = tl.where(last == 0, 0, (last + BASE) << SHIFT)
            if PART == 0:
                # none are ranked again where none are wanted, or where all are chosen
                is_needless = (tl.load(limits + LIMIT) == 0) | (
                    tl.load(limits + MOST_LIMIT) >= num_pages
                )
                least = tl.where(is_needless, NEVER, least)
            tl.store(threshold + PART * ROWS + row, least)


def rank_pages(
    counters: Tensor, limits: Tensor, scratch: StepScratch, shape: StepShape, *, is_final: bool
) -> None:
    """The rank of each page, and the least rank of the bin that holds the last one wanted: for
    candidates by log mass + shift, at the end by log mass."""
    stride = scratch.block_max.shape[2]
    stats_block = COUNT_BLOCK if is_final else SCORE_BLOCK
    options: dict[str, Any] = {
        "G": shape.group,
        "GP": power_of_two(shape.group),
        "PART": int(is_final),
        "LIMIT": WIDE if is_final else CANDIDATES,
        "MOST_LIMIT": MOST,
        "ROWS": shape.rows,
        "BINS": NUM_BINS,
        "SHIFT": BIN_SHIFT,
        "BASE": bin_base(shape.group),
        "NEVER": _NEVER,
        "SAMPLED": SAMPLED_PAGES,
        "SAMPLE": SAMPLE,
        "STATS": power_of_two(triton.cdiv(shape.capacity, stats_block)),
        "STATS_BLOCK": stats_block,
        "STRIDE": stride,
        "BLOCK": _BLOCK,
        "num_warps": 8,
    }
    launch(
        _rank,
        (triton.cdiv(shape.capacity, _BLOCK), shape.rows),
        *(counters, limits, scratch.log_mass, scratch.shift),
        *(scratch.block_max, scratch.block_sum, scratch.rank),
        *(scratch.histogram, scratch.arrived, scratch.threshold, shape.capacity),
        **options,
    )
