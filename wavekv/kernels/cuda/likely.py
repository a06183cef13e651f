"""The pages that a stage of ranking finds likely to be chosen."""

import triton
import triton.language as tl
from torch import Tensor

from wavekv.kernels.cuda.in_use import pages_in_use
from wavekv.kernels.cuda.launch import launch, power_of_two
from wavekv.kernels.cuda.select import count_ranks
from wavekv.kernels.step import COUNT_BLOCK, StepScratch, StepShape


@triton.jit
def _list_likely(
    counters,
    rank,
    likely,
    block_count,
    chosen,
    N,
    M,
    K: tl.constexpr,
    BLOCKS: tl.constexpr,
    BLOCK: tl.constexpr,
    PAD: tl.constexpr,
):
    block, row = tl.program_id(0), tl.program_id(1).to(tl.int64)
    num_pages = pages_in_use(counters, K)
    if (block * BLOCK < num_pages) | (block == 0):
        b = tl.arange(0, BLOCKS)
        earlier = tl.load(block_count + row * tl.cdiv(N, BLOCK) + b, mask=b < block, other=0)
        n = block * BLOCK + tl.arange(0, BLOCK)
        bits = tl.load(rank + row * N + n, mask=n < num_pages, other=-1)
        reaches = bits >= tl.load(likely + row)
        before = tl.sum(earlier, 0)
        at = before + tl.cumsum(reaches.to(tl.int32), 0) - 1
        tl.store(chosen + row * M + at, n, mask=reaches & (at < M))
        if (block + 1) * BLOCK >= num_pages:
            j = tl.arange(0, PAD)
            is_spare = (j >= before + tl.sum(reaches.to(tl.int32), 0)) & (j < M)
            tl.store(chosen + row * M + j, tl.full([PAD], -1, tl.int32), mask=is_spare)


def list_likely(counters: Tensor, scratch: StepScratch, shape: StepShape, *, stage: int) -> None:
    """The pages whose rank reaches `likely[stage]`, ascending, as many as `chosen` has room for;
    then -1."""
    blocks, most = triton.cdiv(shape.capacity, COUNT_BLOCK), scratch.chosen.shape[2]
    count_ranks(counters, scratch, scratch.likely[stage], shape)
    launch(
        _list_likely,
        (blocks, shape.rows),
        *(counters, scratch.rank, scratch.likely[stage], scratch.block_count),
        *(scratch.chosen, shape.capacity, most),
        K=shape.block_pages,
        BLOCKS=power_of_two(blocks),
        BLOCK=COUNT_BLOCK,
        PAD=power_of_two(most),
        num_warps=4,
    )
