"""The codes of the candidates' keys: what a page's mean hides."""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from wavekv.kernels.cuda.launch import launch, power_of_two, uses_hardware
from wavekv.kernels.cuda.moments import softmax_sum
from wavekv.kernels.step import COUNT_BLOCK, StepPages, StepScratch, StepShape

_HEADS = 4
"""Query heads that share one pass over the codes; larger groups take several."""
_BLOCK = 16
"""Candidates of one warp: nothing in it waits for other warps."""
_WARPS = 1


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
    mean_logits,
    log_mass,
    shift,
    n,
    is_candidate,
    held,
    step,
    count,
    N,
    softcap,
    SOFTCAP: tl.constexpr,
):
    worth, shifted = tl.load(query_step + head * 2), tl.load(query_step + head * 2 + 1)
    offset = (products.to(tl.float32) - 8.0 * shifted) * step * worth
    offset = tl.where(held, offset, 0.0)
    plain = tl.sum(offset, 1) / tl.maximum(count, 1).to(tl.float32)
    offset -= plain[:, None]
    x = tl.load(mean_logits + head * N + n, mask=is_candidate, other=0.0)
    logits = offset + x[:, None]
    if SOFTCAP:
        logits = softcap * (2.0 * tl.sigmoid(2.0 * logits / softcap) - 1.0)
    logits = tl.where(held, logits, float("-inf"))
    top = tl.max(logits, 1)
    top = tl.where(top == float("-inf"), 0.0, top)
    weights = tl.exp(logits - top[:, None])
    weight = tl.maximum(tl.sum(weights, 1), 1e-30)
    mass = top + tl.log(weight)
    # an empty page keeps its mass of nothing
    is_refined = is_candidate & (count > 0)
    tl.store(log_mass + head * N + n, mass, mask=is_refined)
    tl.store(shift + head * N + n, tl.sum(weights * offset, 1) / weight, mask=is_refined)


@triton.jit
def _refine(
    counters,
    block_count,
    listed,
    counts,
    codes,
    code_scale,
    page_scale,
    query_words,
    query_step,
    mean_logits,
    log_mass,
    shift,
    N,
    softcap,
    G: tl.constexpr,
    HEADS: tl.constexpr,
    P: tl.constexpr,
    PP: tl.constexpr,
    GROUPS: tl.constexpr,
    BLOCK: tl.constexpr,
    COUNTED: tl.constexpr,
    SOFTCAP: tl.constexpr,
    DP4A: tl.constexpr,
):
    chunk, row = tl.program_id(0), tl.program_id(1).to(tl.int64)
    CHUNKS: tl.constexpr = COUNTED // BLOCK
    block, first_of_chunk = chunk // CHUNKS, (chunk % CHUNKS) * BLOCK
    blocks = tl.cdiv(N, COUNTED)
    if block * COUNTED < tl.load(counters + 2):
        num_listed = tl.load(block_count + row * blocks + block)
        if first_of_chunk < num_listed:
            p = tl.arange(0, PP)
            i = first_of_chunk + tl.arange(0, BLOCK)
            is_candidate = i < num_listed
            # each block's list begins where the block does
            n = tl.load(listed + row * N + block * COUNTED + i, mask=is_candidate, other=0)
            at = row * N + n
            count = tl.load(counts + at, mask=is_candidate, other=0)
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
                            mean_logits,
                            log_mass,
                            shift,
                            n,
                            is_candidate,
                            held,
                            step,
                            count,
                            N,
                            softcap,
                            SOFTCAP,
                        )


@triton.jit
def _candidates(counters, rank, threshold, block_count, listed, N, BLOCK: tl.constexpr):
    block, row = tl.program_id(0), tl.program_id(1).to(tl.int64)
    num_pages = tl.load(counters + 2)
    if block * BLOCK < num_pages:
        n = block * BLOCK + tl.arange(0, BLOCK)
        bits = tl.load(rank + row * N + n, mask=n < num_pages, other=-1)
        is_candidate = bits >= tl.load(threshold + row)
        order = tl.cumsum(is_candidate.to(tl.int32), 0) - 1
        tl.store(listed + row * N + block * BLOCK + order, n, mask=is_candidate)
        num_listed = tl.sum(is_candidate.to(tl.int32), 0)
        tl.store(block_count + row * tl.cdiv(N, BLOCK) + block, num_listed)


@triton.jit
def _sums(
    counters,
    log_mass,
    block_max,
    block_sum,
    N,
    G: tl.constexpr,
    GP: tl.constexpr,
    BLOCK: tl.constexpr,
    STRIDE: tl.constexpr,
):
    block, row = tl.program_id(0), tl.program_id(1).to(tl.int64)
    num_pages = tl.load(counters + 2)
    if block * BLOCK < num_pages:
        n = block * BLOCK + tl.arange(0, BLOCK)
        g = tl.arange(0, GP)
        keep = (g < G)[:, None] & (n < num_pages)[None, :]
        at = (row * G + g)[:, None] * N + n[None, :]
        largest, total = softmax_sum(tl.load(log_mass + at, mask=keep, other=float("-inf")))
        to = (row * G + g) * STRIDE + block
        tl.store(block_max + to, largest, mask=g < G)
        tl.store(block_sum + to, total, mask=g < G)


def refine(
    query: Tensor, pages: StepPages, counters: Tensor, scratch: StepScratch, shape: StepShape
) -> None:
    """Replace log mass and shift of the candidates by what the codes of their keys give, with the
    softmax statistics of all log masses. query: as given to `score`, which has rounded it."""
    N, stride = shape.capacity, scratch.block_max.shape[2]
    blocks = triton.cdiv(N, COUNT_BLOCK)
    launch(
        _candidates,
        (blocks, shape.rows),
        *(counters, scratch.rank, scratch.threshold, scratch.block_count, scratch.listed, N),
        BLOCK=COUNT_BLOCK,
        num_warps=8,
    )
    options: dict[str, Any] = {
        "G": shape.group,
        "HEADS": _HEADS,
        "P": shape.page_size,
        "PP": power_of_two(shape.page_size),
        "GROUPS": pages.codes.shape[3],
        "BLOCK": _BLOCK,
        "COUNTED": COUNT_BLOCK,
        "SOFTCAP": shape.softcap is not None,
        "DP4A": uses_hardware(query),
        "num_warps": _WARPS,
    }
    launch(
        _refine,
        (blocks * (COUNT_BLOCK // _BLOCK), shape.rows),
        *(counters, scratch.block_count, scratch.listed, pages.counts),
        *(pages.codes.view(torch.int32), pages.code_scale, pages.page_scale),
        *(scratch.query_words, scratch.query_step, scratch.mean_logits),
        *(scratch.log_mass, scratch.shift),
        *(N, shape.softcap or 1.0),
        **options,
    )
    launch(
        _sums,
        (blocks, shape.rows),
        *(counters, scratch.log_mass, scratch.block_max, scratch.block_sum, N),
        G=shape.group,
        GP=power_of_two(shape.group),
        BLOCK=COUNT_BLOCK,
        STRIDE=stride,
        num_warps=8,
    )
