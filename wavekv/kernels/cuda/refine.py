"""The codes of the candidates' keys: what a page's mean hides."""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from wavekv.kernels.cuda.launch import launch, power_of_two, uses_hardware
from wavekv.kernels.cuda.moments import moments, softmax_sum
from wavekv.kernels.step import REFINE_BLOCK, StepPages, StepScratch, StepShape

_HEADS = 4
"""Query heads that share one pass over the codes; larger groups take several."""
_WARPS = 4


@triton.jit
def _four_products(codes, query_words, total, DP4A: tl.constexpr):
    """total + the sum of four products: unsigned bytes of codes with signed bytes of a query."""
    if DP4A:
        total = tl.inline_asm_elementwise(
            "dp4a.u32.s32 $0, $1, $2, $3;",
            "=r,r,r,r",
            [codes, query_words + codes * 0, total],
            dtype=tl.int32,
            is_pure=True,
            pack=1,
        )
    else:
        for i in tl.static_range(4):
            # the sign comes back by shifting up and down
            total += ((codes >> (8 * i)) & 255) * ((query_words << (24 - 8 * i)) >> 24)
    return total


@triton.jit
def _add_products(
    low, high, total, query_words, head, group, G: tl.constexpr, GROUPS, DP4A: tl.constexpr
):
    """Add what one word of each half of the codes gives with the query of one head."""
    # heads beyond the group are computed and not used
    at = query_words + tl.minimum(head, G - 1) * 2 * GROUPS + group
    total = _four_products(low, tl.load(at), total, DP4A)
    return _four_products(high, tl.load(at + GROUPS), total, DP4A)


@triton.jit
def _refine_head(
    products,
    head,
    query_step,
    query_square,
    mean_logits,
    log_mass,
    shift,
    block_max,
    block_sum,
    n,
    is_page,
    is_candidate,
    held,
    step,
    count,
    spread,
    N,
    at_block,
    softcap,
    STATS_STRIDE: tl.constexpr,
    USE_VARIANCE: tl.constexpr,
    SOFTCAP: tl.constexpr,
):
    worth, shifted = tl.load(query_step + head * 2), tl.load(query_step + head * 2 + 1)
    offset = (products.to(tl.float32) - 8.0 * shifted) * step * worth
    offset = tl.where(held, offset, 0.0)
    plain = tl.sum(offset, 1) / tl.maximum(count, 1).to(tl.float32)
    offset -= plain[:, None]
    x = tl.load(mean_logits + head * N + n, mask=is_page, other=0.0)
    logits = offset + x[:, None]
    if SOFTCAP:
        logits = softcap * (2.0 * tl.sigmoid(2.0 * logits / softcap) - 1.0)
    logits = tl.where(held, logits, float("-inf"))
    top = tl.max(logits, 1)
    top = tl.where(top == float("-inf"), 0.0, top)
    weights = tl.exp(logits - top[:, None])
    weight = tl.maximum(tl.sum(weights, 1), 1e-30)
    # what the moments say of the others
    square = tl.full([1], 1.0, tl.float32) * tl.load(query_square + head)
    mass, lean = moments(x[None, :], square, spread, count, softcap, USE_VARIANCE, SOFTCAP)
    is_refined = is_candidate & (count > 0)
    mass = tl.where(is_refined, top + tl.log(weight), tl.sum(mass, 0))
    lean = tl.where(is_refined, tl.sum(weights * offset, 1) / weight, tl.sum(lean, 0))
    tl.store(log_mass + head * N + n, mass, mask=is_page)
    tl.store(shift + head * N + n, lean, mask=is_page)
    largest, total = softmax_sum(tl.where(is_page, mass, float("-inf"))[None, :])
    tl.store(block_max + head * STATS_STRIDE + at_block, tl.sum(largest, 0))
    tl.store(block_sum + head * STATS_STRIDE + at_block, tl.sum(total, 0))


@triton.jit
def _refine(
    counters,
    threshold,
    rank,
    counts,
    variance,
    codes,
    code_scale,
    page_scale,
    query_words,
    query_step,
    query_square,
    mean_logits,
    log_mass,
    shift,
    block_max,
    block_sum,
    N,
    softcap,
    G: tl.constexpr,
    HEADS: tl.constexpr,
    P: tl.constexpr,
    PP: tl.constexpr,
    GROUPS: tl.constexpr,
    BLOCK: tl.constexpr,
    STATS_STRIDE: tl.constexpr,
    USE_VARIANCE: tl.constexpr,
    SOFTCAP: tl.constexpr,
    DP4A: tl.constexpr,
):
    block, row = tl.program_id(0), tl.program_id(1).to(tl.int64)
    num_pages = tl.load(counters + 2)
    if block * BLOCK < num_pages:
        p = tl.arange(0, PP)
        n = block * BLOCK + tl.arange(0, BLOCK)
        is_page = n < num_pages
        at = row * N + n
        count = tl.load(counts + at, mask=is_page, other=0)
        spread = tl.load(variance + at, mask=is_page, other=0.0)
        least = tl.load(threshold + row)
        is_candidate = is_page & (tl.load(rank + at, mask=is_page, other=-1) >= least)
        held = is_candidate[:, None] & (p[None, :] < count[:, None])
        share = tl.load(code_scale + at[:, None] * P + p[None, :], mask=held, other=0)
        step = tl.load(page_scale + at, mask=is_candidate, other=0.0)
        step = step[:, None] * share.to(tl.float32) / 255.0
        # [BLOCK, PP] words of four bytes; those of one key lie P apart
        words = codes + at[:, None] * (GROUPS * P) + p[None, :]
        wanted = is_candidate[:, None] & (p[None, :] < P)
        for first in tl.static_range(0, G, HEADS):
            a = tl.zeros([BLOCK, PP], tl.int32)
            b = tl.zeros([BLOCK, PP], tl.int32)
            c = tl.zeros([BLOCK, PP], tl.int32)
            d = tl.zeros([BLOCK, PP], tl.int32)
            here = query_words + row * G * 2 * GROUPS
            for w in tl.static_range(GROUPS):
                both = tl.load(words + w * P, mask=wanted, other=0)
                low, high = both & 0x0F0F0F0F, (both >> 4) & 0x0F0F0F0F
                a = _add_products(low, high, a, here, first, w, G, GROUPS, DP4A)
                if first + 1 < G:
                    b = _add_products(low, high, b, here, first + 1, w, G, GROUPS, DP4A)
                if first + 2 < G:
                    c = _add_products(low, high, c, here, first + 2, w, G, GROUPS, DP4A)
                if first + 3 < G:
                    d = _add_products(low, high, d, here, first + 3, w, G, GROUPS, DP4A)
            for k in tl.static_range(HEADS):
                if first + k < G:
                    products = a
                    if k == 1:
                        products = b
                    if k == 2:
                        products = c
                    if k == 3:
                        products = d
                    _refine_head(
                        products,
                        row * G + first + k,
                        query_step,
                        query_square,
                        mean_logits,
                        log_mass,
                        shift,
                        block_max,
                        block_sum,
                        n,
                        is_page,
                        is_candidate,
                        held,
                        step,
                        count,
                        spread,
                        N,
                        block,
                        softcap,
                        STATS_STRIDE,
                        USE_VARIANCE,
                        SOFTCAP,
                    )


def refine(
    query: Tensor, pages: StepPages, counters: Tensor, scratch: StepScratch, shape: StepShape
) -> None:
    """Log mass and shift of every page: of candidates from the codes of their keys, of the others
    from the moments; with the softmax statistics of log mass. query: as given to `score`, which has
    rounded it."""
    options: dict[str, Any] = dict(
        G=shape.group,
        HEADS=_HEADS,
        P=shape.page_size,
        PP=power_of_two(shape.page_size),
        GROUPS=pages.codes.shape[3],
        BLOCK=REFINE_BLOCK,
        STATS_STRIDE=scratch.block_max.shape[2],
        USE_VARIANCE=shape.tail == "second",
        SOFTCAP=shape.softcap is not None,
        DP4A=uses_hardware(query),
        num_warps=_WARPS,
    )
    launch(
        _refine,
        (triton.cdiv(shape.capacity, REFINE_BLOCK), shape.rows),
        *(counters, scratch.threshold, scratch.rank, pages.counts, pages.variance),
        *(pages.codes.view(torch.int32), pages.code_scale, pages.page_scale),
        *(scratch.query_words, scratch.query_step, scratch.query_square, scratch.mean_logits),
        *(scratch.log_mass, scratch.shift, scratch.block_max, scratch.block_sum),
        *(shape.capacity, shape.softcap or 1.0),
        **options,
    )
