"""Which pages are refined, and what all masses are afterwards."""

import triton
import triton.language as tl
from torch import Tensor

from wavekv.kernels.cuda.in_use import pages_in_use
from wavekv.kernels.cuda.launch import launch, power_of_two
from wavekv.kernels.cuda.moments import softmax_sum
from wavekv.kernels.step import COUNT_BLOCK, REFINED, StepScratch, StepShape


@triton.jit
def _candidates(
    counters,
    rank,
    threshold,
    block_count,
    listed,
    status,
    N,
    K: tl.constexpr,
    BLOCK: tl.constexpr,
    MARK: tl.constexpr,
):
    block, row = tl.program_id(0), tl.program_id(1).to(tl.int64)
    num_pages = pages_in_use(counters, K)
    if block * BLOCK < num_pages:
        n = block * BLOCK + tl.arange(0, BLOCK)
        bits = tl.load(rank + row * N + n, mask=n < num_pages, other=-1)
        is_candidate = bits >= tl.load(threshold + row)
        order = tl.cumsum(is_candidate.to(tl.int32), 0) - 1
        tl.store(listed + row * N + block * BLOCK + order, n, mask=is_candidate)
        num_listed = tl.sum(is_candidate.to(tl.int32), 0)
        tl.store(block_count + row * tl.cdiv(N, BLOCK) + block, num_listed)
        tl.store(status + row * N + n, tl.full([BLOCK], MARK, tl.uint8), mask=is_candidate)


def list_candidates(counters: Tensor, scratch: StepScratch, shape: StepShape, stage: int) -> None:
    """List and mark the pages whose rank reaches `threshold[stage]`, those of each `COUNT_BLOCK`
    from its own start on."""
    launch(
        _candidates,
        (triton.cdiv(shape.capacity, COUNT_BLOCK), shape.rows),
        *(counters, scratch.rank, scratch.threshold[stage]),
        *(scratch.block_count, scratch.listed, scratch.status, shape.capacity),
        K=shape.block_pages,
        BLOCK=COUNT_BLOCK,
        MARK=REFINED,
        num_warps=8,
    )


@triton.jit
def _sums(
    counters,
    log_mass,
    block_max,
    block_sum,
    N,
    G: tl.constexpr,
    GP: tl.constexpr,
    K: tl.constexpr,
    BLOCK: tl.constexpr,
    STRIDE: tl.constexpr,
):
    block, row = tl.program_id(0), tl.program_id(1).to(tl.int64)
    num_pages = pages_in_use(counters, K)
    if block * BLOCK < num_pages:
        n = block * BLOCK + tl.arange(0, BLOCK)
        g = tl.arange(0, GP)
        keep = (g < G)[:, None] & (n < num_pages)[None, :]
        at = row * G * N + g[:, None] * N + n[None, :]
        largest, total = softmax_sum(tl.load(log_mass + at, mask=keep, other=float("-inf")))
        to = (row * G + g) * STRIDE + block
        tl.store(block_max + to, largest, mask=g < G)
        tl.store(block_sum + to, total, mask=g < G)


def sum_masses(counters: Tensor, scratch: StepScratch, shape: StepShape) -> None:
    """The softmax statistics of log masses, of groups of `COUNT_BLOCK` pages."""
    launch(
        _sums,
        (triton.cdiv(shape.capacity, COUNT_BLOCK), shape.rows),
        *(counters, scratch.log_mass, scratch.block_max, scratch.block_sum, shape.capacity),
        G=shape.group,
        GP=power_of_two(shape.group),
        K=shape.block_pages,
        BLOCK=COUNT_BLOCK,
        STRIDE=scratch.block_max.shape[2],
        num_warps=8,
    )
