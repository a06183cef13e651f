"""The query against the mean keys of blocks and pages."""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from wavekv.kernels.cuda.in_use import pages_in_use
from wavekv.kernels.cuda.launch import launch, uses_hardware
from wavekv.kernels.cuda.moments import log_of, moments, root_of, step_of
from wavekv.kernels.cuda.prepare import prepare
from wavekv.kernels.cuda.products import HEADS, of_head, plane_products
from wavekv.kernels.page_index import MEAN_BITS
from wavekv.kernels.step import (
    ESTIMATED,
    SCORE_BLOCK,
    StepPages,
    StepScratch,
    StepShape,
    StepSteady,
)

_REGISTERS = 64
"""Of a thread at most: with more of them too few warps run at once to hide what a load takes."""


@triton.jit
def _score_head(
    products,
    head,
    query_step,
    query_square,
    block_logits,
    log_mass,
    shift,
    block_max,
    block_sum,
    n,
    is_page,
    b,
    is_block,
    step,
    root,
    log_count,
    is_empty,
    N,
    blocks,
    stat,
    STRIDE: tl.constexpr,
    softcap,
    USE_VARIANCE: tl.constexpr,
    SOFTCAP: tl.constexpr,
):
    """What one head makes of its products with the mean keys of pages [blocks, pages of one]."""
    worth, shifted = tl.load(query_step + head * 2), tl.load(query_step + head * 2 + 1)
    own = tl.load(block_logits + head * blocks + b, mask=is_block, other=0.0)
    # codes stand for what they are above the middle one
    x = own[:, None] + (products.to(tl.float32) - 1.5 * shifted) * (step * worth)
    deviation = tl.sqrt(tl.load(query_square + head)) * root
    mass, lean = moments(x, deviation, log_count, softcap, USE_VARIANCE, SOFTCAP)
    mass = tl.where(is_empty, float("-inf"), mass)
    lean = tl.where(is_empty, 0.0, lean)
    tl.store(log_mass + head * N + n, mass, mask=is_page)
    if SOFTCAP:
        tl.store(shift + head * N + n, lean, mask=is_page)
    both = mass + lean
    largest = tl.max(tl.max(both, 1), 0)
    safe = tl.where(largest == float("-inf"), 0.0, largest)
    tl.store(block_max + head * STRIDE + stat, largest)
    tl.store(block_sum + head * STRIDE + stat, tl.sum(tl.sum(tl.exp(both - safe), 1), 0))


@triton.jit
def _score(
    counters,
    counts,
    variance,
    mean,
    mean_step,
    query_words,
    query_step,
    query_square,
    block_logits,
    log_mass,
    shift,
    status,
    block_max,
    block_sum,
    N,
    softcap,
    G: tl.constexpr,
    HEADS: tl.constexpr,
    K: tl.constexpr,
    BLOCKS: tl.constexpr,
    WORDS: tl.constexpr,
    W: tl.constexpr,
    BITS: tl.constexpr,
    STRIDE: tl.constexpr,
    USE_VARIANCE: tl.constexpr,
    SOFTCAP: tl.constexpr,
    MARK: tl.constexpr,
    HARDWARE: tl.constexpr,
):
    stat, row = tl.program_id(0), tl.program_id(1).to(tl.int64)
    num_pages = pages_in_use(counters, K)
    if stat * (BLOCKS * K) < num_pages:
        b = stat * BLOCKS + tl.arange(0, BLOCKS)
        n = b[:, None] * K + tl.arange(0, K)[None, :]
        is_block = b * K < num_pages
        is_page = tl.broadcast_to(is_block[:, None], [BLOCKS, K])
        count = tl.load(counts + row * N + n, mask=is_page, other=0)
        step = step_of(tl.load(mean_step + row * N + n, mask=is_page, other=0), HARDWARE)
        # what belongs to an empty page may be anything
        step = tl.where(count == 0, 0.0, step)
        root = root_of(tl.load(variance + row * N + n, mask=is_page, other=0), HARDWARE)
        log_count = log_of(count, HARDWARE)
        # the words of a block's pages lie side by side
        words = mean + row * N * WORDS + b[:, None] * (WORDS * K) + tl.arange(0, K)[None, :]
        zero = tl.zeros([BLOCKS, K], tl.int32)
        for first in tl.static_range(0, G, HEADS):
            here = query_words + (row * G + first) * (W // 2)
            p, q, r, s = plane_products(
                *(words, K, is_page, here, zero, zero, zero, zero),
                *(min(HEADS, G - first), WORDS, W, BITS, HARDWARE),
            )
            for k in tl.static_range(min(HEADS, G - first)):
                _score_head(
                    of_head(p, q, r, s, k),
                    row * G + first + k,
                    query_step,
                    query_square,
                    block_logits,
                    log_mass,
                    shift,
                    block_max,
                    block_sum,
                    n,
                    is_page,
                    b,
                    is_block,
                    step,
                    root,
                    log_count,
                    count == 0,
                    N,
                    N // K,
                    stat,
                    STRIDE,
                    softcap,
                    USE_VARIANCE,
                    SOFTCAP,
                )
        mark = tl.full([BLOCKS, K], MARK, tl.uint8)
        tl.store(status + row * N + n, mark, mask=is_page)


def score(
    query: Tensor,
    new_keys: Tensor | None,
    new_values: Tensor | None,
    new_valid: Tensor | None,
    steady: StepSteady,
    pages: StepPages,
    counters: Tensor,
    scratch: StepScratch,
    shape: StepShape,
) -> None:
    """Log mass of all pages by moments, with softmax statistics of log mass + shift of groups of
    `SCORE_BLOCK` pages; put the new token (if there is one) into the ring."""
    prepare(query, new_keys, new_values, new_valid, steady, pages, counters, scratch, shape)
    index, K = pages.summary, shape.block_pages
    options: dict[str, Any] = {
        "G": shape.group,
        "HEADS": HEADS,
        "K": K,
        "BLOCKS": SCORE_BLOCK // K,
        "WORDS": index.mean.shape[3],
        "W": scratch.query_words.shape[2],
        "BITS": MEAN_BITS,
        "STRIDE": scratch.block_max.shape[2],
        "USE_VARIANCE": shape.tail == "second",
        "SOFTCAP": shape.softcap is not None,
        "MARK": ESTIMATED,
        "HARDWARE": uses_hardware(query),
        "num_warps": 4,
        "maxnreg": _REGISTERS,
    }
    launch(
        _score,
        (triton.cdiv(shape.capacity, SCORE_BLOCK), shape.rows),
        *(counters, index.counts, index.variance),
        *(index.mean.view(torch.int32), index.mean_step),
        *(
            scratch.query_words.view(torch.int64),
            scratch.query_step,
            scratch.query_square,
            scratch.block_logits,
        ),
        *(scratch.log_mass, scratch.shift, scratch.status),
        *(scratch.block_max, scratch.block_sum),
        *(shape.capacity, shape.softcap or 1.0),
        **options,
    )
