"""The pages that each KV head attends to exactly: the best by rank, without a sort of all.

Ranks above the threshold of the histogram are collected in the order of their pages; they are
hardly more than the pages wanted. Among these the last rank to take is found by bisection of its
bits.
"""

from typing import Any

import triton
import triton.language as tl
from torch import Tensor

from wavekv.kernels.cuda.in_use import pages_in_use
from wavekv.kernels.cuda.launch import launch, power_of_two
from wavekv.kernels.step import (
    BIN_SHIFT,
    COUNT_BLOCK,
    FINAL,
    LEAST,
    MOST,
    WIDE,
    StepScratch,
    StepShape,
)

_PROBE_BITS = 2
_LIST_BLOCK = 4096


@triton.jit
def _count(counters, rank, threshold, block_count, N, K: tl.constexpr, BLOCK: tl.constexpr):
    block, row = tl.program_id(0), tl.program_id(1).to(tl.int64)
    num_pages = pages_in_use(counters, K)
    if block * BLOCK < num_pages:
        n = block * BLOCK + tl.arange(0, BLOCK)
        bits = tl.load(rank + row * N + n, mask=n < num_pages, other=-1)
        reaches = bits >= tl.load(threshold + row)
        tl.store(block_count + row * tl.cdiv(N, BLOCK) + block, tl.sum(reaches.to(tl.int32), 0))


@triton.jit
def _collect(
    counters,
    rank,
    threshold,
    block_count,
    listed,
    listed_rank,
    N,
    K: tl.constexpr,
    BLOCKS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    block, row = tl.program_id(0), tl.program_id(1).to(tl.int64)
    num_pages = pages_in_use(counters, K)
    if block * BLOCK < num_pages:
        b = tl.arange(0, BLOCKS)
        earlier = tl.load(block_count + row * tl.cdiv(N, BLOCK) + b, mask=b < block, other=0)
        n = block * BLOCK + tl.arange(0, BLOCK)
        bits = tl.load(rank + row * N + n, mask=n < num_pages, other=-1)
        reaches = bits >= tl.load(threshold + row)
        at = row * N + tl.sum(earlier, 0) + tl.cumsum(reaches.to(tl.int32), 0) - 1
        tl.store(listed + at, n, mask=reaches)
        tl.store(listed_rank + at, bits, mask=reaches)


@triton.jit
def _pick(
    counters,
    limits,
    threshold,
    block_count,
    listed,
    listed_rank,
    chosen,
    N,
    M,
    wanted_mass,
    LEAST_LIMIT: tl.constexpr,
    MOST_LIMIT: tl.constexpr,
    WIDE_LIMIT: tl.constexpr,
    TOP_P: tl.constexpr,
    BLOCKS: tl.constexpr,
    COUNT: tl.constexpr,
    BLOCK: tl.constexpr,
    PROBES: tl.constexpr,
    WIDTH_OF_BIN: tl.constexpr,
    WIDTH_OF_ALL: tl.constexpr,
    PAD: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    num_pages = tl.load(counters + 2)
    least, most = tl.load(limits + LEAST_LIMIT), tl.load(limits + MOST_LIMIT)
    b = tl.arange(0, BLOCKS)
    is_block = b * COUNT < num_pages
    counted = tl.load(block_count + row * tl.cdiv(N, COUNT) + b, mask=is_block, other=0)
    num_listed = tl.sum(counted, 0)
    i, j = tl.arange(0, BLOCK), tl.arange(0, PROBES)
    # the last rank taken lies in [low, low + width): ranks above it are few enough, or light
    # enough; with top_p, or in a list made for a wider choice, it may be anywhere above
    low = tl.load(threshold + row).to(tl.int64)
    # all that is alive is listed where the histogram could not tell: then the rank may be any
    is_wider = most < tl.load(limits + WIDE_LIMIT)
    width = tl.where((low == 0) | is_wider | TOP_P, WIDTH_OF_ALL, WIDTH_OF_BIN).to(tl.int64)
    while width > 1:
        width = width // PROBES
        probe = low + (j + 1) * width - 1
        above = tl.zeros([PROBES], tl.int32)
        mass = tl.zeros([PROBES], tl.float32)
        start = 0
        while start < num_listed:
            is_held = start + i < num_listed
            bits = tl.load(listed_rank + row * N + start + i, mask=is_held, other=-1)
            is_above = bits[:, None] > probe[None, :]
            above += tl.sum(is_above.to(tl.int32), 0)
            if TOP_P:
                share = bits.to(tl.float32, bitcast=True)
                mass += tl.sum(tl.where(is_above, share[:, None], 0.0), 0)
            start += BLOCK
        is_far = above < most
        if TOP_P:
            is_far = is_far & ((mass < wanted_mass) | (above < least))
        # of the probes that are far enough the first; the last one always is
        first = tl.min(tl.where(is_far, j, PROBES - 1), 0)
        low = low + first * width
    last = low.to(tl.int32)
    above = 0
    mass = 0.0
    start = 0
    while start < num_listed:
        is_held = start + i < num_listed
        bits = tl.load(listed_rank + row * N + start + i, mask=is_held, other=-1)
        above += tl.sum((bits > last).to(tl.int32), 0)
        if TOP_P:
            share = bits.to(tl.float32, bitcast=True)
            mass += tl.sum(tl.where(bits > last, share, 0.0), 0)
        start += BLOCK
    num_chosen = 0
    num_ties = 0
    start = 0
    while start < num_listed:
        is_held = start + i < num_listed
        bits = tl.load(listed_rank + row * N + start + i, mask=is_held, other=-1)
        page = tl.load(listed + row * N + start + i, mask=is_held, other=-1)
        # of equal ranks the lower page goes first
        is_tie = is_held & (bits == last)
        before = num_ties + tl.cumsum(is_tie.to(tl.int32), 0) - 1
        is_taken = is_tie & (above + before < most)
        if TOP_P:
            share = last.to(tl.float32, bitcast=True)
            is_light = mass + before.to(tl.float32) * share < wanted_mass
            is_taken = is_taken & (is_light | (above + before < least))
        is_taken = is_taken | (is_held & (bits > last))
        at = num_chosen + tl.cumsum(is_taken.to(tl.int32), 0) - 1
        tl.store(chosen + row * M + at, page, mask=is_taken)
        num_chosen += tl.sum(is_taken.to(tl.int32), 0)
        num_ties += tl.sum(is_tie.to(tl.int32), 0)
        start += BLOCK
    spare = tl.arange(0, PAD)
    tl.store(
        chosen + row * M + spare,
        tl.full([PAD], -1, tl.int32),
        mask=(spare >= num_chosen) & (spare < M),
    )


def count_ranks(
    counters: Tensor, scratch: StepScratch, threshold: Tensor, shape: StepShape
) -> None:
    """How many ranks of each `COUNT_BLOCK` reach threshold [B, Hkv], into
    `scratch.block_count`."""
    launch(
        _count,
        (triton.cdiv(shape.capacity, COUNT_BLOCK), shape.rows),
        *(counters, scratch.rank, threshold, scratch.block_count, shape.capacity),
        K=shape.block_pages,
        BLOCK=COUNT_BLOCK,
        num_warps=4,
    )


def select(counters: Tensor, limits: Tensor, scratch: StepScratch, shape: StepShape) -> None:
    """Choose pages by the final ranks into `scratch.chosen`, ascending, then -1."""
    N, rows = shape.capacity, shape.rows
    blocks = triton.cdiv(N, COUNT_BLOCK)
    final = scratch.threshold[FINAL]
    count_ranks(counters, scratch, final, shape)
    launch(
        _collect,
        (blocks, rows),
        *(counters, scratch.rank, final, scratch.block_count),
        *(scratch.listed, scratch.listed_rank, N),
        K=shape.block_pages,
        BLOCKS=power_of_two(blocks),
        BLOCK=COUNT_BLOCK,
        num_warps=4,
    )
    pick(counters, limits, scratch, scratch.chosen, shape)


def pick(
    counters: Tensor,
    limits: Tensor,
    scratch: StepScratch,
    chosen: Tensor,
    shape: StepShape,
    *,
    wide: bool = False,
) -> None:
    """The last step of `select`: from what is listed into `chosen` [B, Hkv, M]. A wide choice is of
    `limits[WIDE]` pages, whatever top_p says."""
    top_p = None if wide else shape.top_p
    blocks = triton.cdiv(shape.capacity, COUNT_BLOCK)
    # the list is hardly longer than the choice
    block = min(_LIST_BLOCK, power_of_two(shape.most + shape.most // 8 + 1))
    options: dict[str, Any] = {
        "LEAST_LIMIT": LEAST,
        "MOST_LIMIT": WIDE if wide else MOST,
        "WIDE_LIMIT": WIDE,
        "TOP_P": top_p is not None,
        "BLOCKS": power_of_two(blocks),
        "COUNT": COUNT_BLOCK,
        "BLOCK": block,
        "PROBES": 1 << _PROBE_BITS,
        "WIDTH_OF_BIN": 1 << _rounded_up(BIN_SHIFT),
        "WIDTH_OF_ALL": 1 << _rounded_up(31),
        "PAD": power_of_two(chosen.shape[2]),
        "num_warps": min(8, max(4, block // 256)),
    }
    launch(
        _pick,
        (shape.rows,),
        *(counters, limits, scratch.threshold[FINAL], scratch.block_count),
        *(scratch.listed, scratch.listed_rank, chosen, shape.capacity, chosen.shape[2]),
        (top_p or 1.0) * shape.group,
        **options,
    )


def _rounded_up(bits: int) -> int:
    """Bits that rounds of `_PROBE_BITS` settle."""
    return -(-bits // _PROBE_BITS) * _PROBE_BITS
