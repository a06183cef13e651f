"""The codes of the candidates' keys: what a page's mean hides."""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from wavekv.kernels.cuda.launch import launch, power_of_two
from wavekv.kernels.cuda.moments import moments, softmax_sum
from wavekv.kernels.step import REFINE_BLOCK, StepPages, StepScratch, StepShape


@triton.jit
def _four_products(words, query_words, SHIFT: tl.constexpr):
    """Sums of four products of codes (SHIFT 0: the low half of each byte, 4: the high) with int8."""
    total = words * 0
    for i in tl.static_range(4):
        code = (words >> (8 * i + SHIFT)) & 15
        # the sign comes back by shifting up and down
        total += code * ((query_words << (24 - 8 * i)) >> 24)
    return total


@triton.jit
def _dp4a(codes, query_words, total):
    return tl.inline_asm_elementwise(
        "dp4a.u32.s32 $0, $1, $2, $3;",
        "=r,r,r,r",
        [codes, query_words, total],
        dtype=tl.int32,
        is_pure=True,
        pack=1,
    )


@triton.jit
def _query_words(
    query,
    start,
    largest,
    D: tl.constexpr,
    GROUPS: tl.constexpr,
    GROUPS_P: tl.constexpr,
    HALF: tl.constexpr,
):
    """[GROUPS_P] int32: components 4 w .. + 3 of one half of a query as four int8, and their sum."""
    w, i = tl.arange(0, GROUPS_P)[:, None], tl.arange(0, 4)[None, :]
    d = 4 * (HALF * GROUPS + w) + i
    inside = (w < GROUPS) & (d < D)
    q = tl.load(query + start + d, mask=inside, other=0.0).to(tl.float32)
    rounded = tl.floor(q / largest * 127.0 + 0.5).to(tl.int32)
    return tl.sum((rounded & 255) << (8 * i), 1), tl.sum(tl.sum(rounded, 1), 0)


@triton.jit
def _refine(
    query,
    counters,
    threshold,
    rank,
    counts,
    variance,
    codes,
    code_scale,
    page_scale,
    mean_logits,
    query_square,
    log_mass,
    shift,
    block_max,
    block_sum,
    N,
    scale,
    softcap,
    G: tl.constexpr,
    D: tl.constexpr,
    DP: tl.constexpr,
    P: tl.constexpr,
    PP: tl.constexpr,
    GROUPS: tl.constexpr,
    GROUPS_P: tl.constexpr,
    BLOCK: tl.constexpr,
    STATS_STRIDE: tl.constexpr,
    USE_VARIANCE: tl.constexpr,
    SOFTCAP: tl.constexpr,
    DP4A: tl.constexpr,
):
    block, row = tl.program_id(0), tl.program_id(1).to(tl.int64)
    num_pages = tl.load(counters + 2)
    if block * BLOCK < num_pages:
        d, p, w = tl.arange(0, DP), tl.arange(0, PP), tl.arange(0, GROUPS_P)
        n = block * BLOCK + tl.arange(0, BLOCK)
        is_page = n < num_pages
        at = row * N + n
        count = tl.load(counts + at, mask=is_page, other=0)
        spread = tl.load(variance + at, mask=is_page, other=0.0)
        least = tl.load(threshold + row)
        is_candidate = is_page & (tl.load(rank + at, mask=is_page, other=-1) >= least)
        # [BLOCK, GROUPS_P, PP] words of four bytes, in the order of memory
        word = at[:, None, None] * (GROUPS * P) + w[None, :, None] * P + p[None, None, :]
        inside = (w < GROUPS)[None, :, None] & (p < P)[None, None, :]
        words = tl.load(codes + word, mask=is_candidate[:, None, None] & inside, other=0)
        held = is_candidate[:, None] & (p[None, :] < count[:, None])
        share = tl.load(code_scale + at[:, None] * P + p[None, :], mask=held, other=0)
        step = tl.load(page_scale + at, mask=is_candidate, other=0.0)
        step = step[:, None] * share.to(tl.float32) / 255.0
        for head in tl.static_range(G):
            start = (row * G + head) * D
            q = tl.load(query + start + d, mask=d < D, other=0.0).to(tl.float32)
            largest = tl.max(tl.abs(q), 0)
            safe = tl.where(largest == 0.0, 1.0, largest)
            low, low_sum = _query_words(query, start, safe, D, GROUPS, GROUPS_P, 0)
            high, high_sum = _query_words(query, start, safe, D, GROUPS, GROUPS_P, 1)
            if DP4A:
                total = _dp4a(words & 0x0F0F0F0F, low[None, :, None], words * 0)
                total = _dp4a((words >> 4) & 0x0F0F0F0F, high[None, :, None], total)
            else:
                total = _four_products(words, low[None, :, None], 0)
                total += _four_products(words, high[None, :, None], 4)
            # [BLOCK, PP]
            products = tl.sum(total, 1) - 8 * (low_sum + high_sum)
            offset = products.to(tl.float32) * step * (largest / 127.0 * scale)
            offset = tl.where(held, offset, 0.0)
            plain = tl.sum(offset, 1) / tl.maximum(count, 1).to(tl.float32)
            offset -= plain[:, None]
            x = tl.load(mean_logits + (row * G + head) * N + n, mask=is_page, other=0.0)
            logits = offset + x[:, None]
            if SOFTCAP:
                logits = softcap * (2.0 * tl.sigmoid(2.0 * logits / softcap) - 1.0)
            logits = tl.where(held, logits, float("-inf"))
            top, weight = softmax_sum(logits)
            top = tl.where(top == float("-inf"), 0.0, top)
            weight = tl.maximum(weight, 1e-30)
            weights = tl.where(held, tl.exp(logits - top[:, None]), 0.0)
            # what the moments say of the others
            square = tl.full([1], 1.0, tl.float32) * tl.load(query_square + row * G + head)
            mass, lean = moments(x[None, :], square, spread, count, softcap, USE_VARIANCE, SOFTCAP)
            is_refined = is_candidate & (count > 0)
            mass = tl.where(is_refined, top + tl.log(weight), tl.sum(mass, 0))
            lean = tl.where(is_refined, tl.sum(weights * offset, 1) / weight, tl.sum(lean, 0))
            at_page = (row * G + head) * N + n
            tl.store(log_mass + at_page, mass, mask=is_page)
            tl.store(shift + at_page, lean, mask=is_page)
            largest_mass = tl.max(tl.where(is_page, mass, float("-inf")), 0)
            safe_mass = tl.where(largest_mass == float("-inf"), 0.0, largest_mass)
            sum_mass = tl.sum(tl.where(is_page, tl.exp(mass - safe_mass), 0.0), 0)
            at_block = (row * G + head) * STATS_STRIDE + block
            tl.store(block_max + at_block, largest_mass)
            tl.store(block_sum + at_block, sum_mass)


def refine(
    query: Tensor,
    pages: StepPages,
    counters: Tensor,
    scratch: StepScratch,
    shape: StepShape,
) -> None:
    """Log mass and shift of every page: of candidates from the codes of their keys, of the others
    from the moments; with the softmax statistics of log mass."""
    groups = pages.codes.shape[3]
    options: dict[str, Any] = dict(
        G=shape.group,
        D=shape.head_dim,
        DP=power_of_two(shape.head_dim),
        P=shape.page_size,
        PP=power_of_two(shape.page_size),
        GROUPS=groups,
        GROUPS_P=power_of_two(groups),
        BLOCK=REFINE_BLOCK,
        STATS_STRIDE=scratch.block_max.shape[2],
        USE_VARIANCE=shape.tail == "second",
        SOFTCAP=shape.softcap is not None,
        DP4A=query.is_cuda,
        num_warps=8,
    )
    launch(
        _refine,
        (triton.cdiv(shape.capacity, REFINE_BLOCK), shape.rows),
        *(query, counters, scratch.threshold, scratch.rank, pages.counts, pages.variance),
        *(pages.codes.view(torch.int32), pages.code_scale, pages.page_scale),
        *(scratch.mean_logits, scratch.query_square, scratch.log_mass, scratch.shift),
        *(scratch.block_max, scratch.block_sum),
        *(shape.capacity, shape.scale, shape.softcap or 1.0),
        **options,
    )
