"""The codes of the candidates' keys: what a page's mean hides."""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from wavekv.kernels.cuda.candidates import list_candidates, sum_masses
from wavekv.kernels.cuda.launch import launch, power_of_two, uses_hardware
from wavekv.kernels.cuda.moments import capped, log_of, mass_beyond, reach_of, root_of, step_of
from wavekv.kernels.cuda.products import HEADS, of_head, plane_products
from wavekv.kernels.page_index import HIGH_BITS, LOW_BITS, MEAN_BITS
from wavekv.kernels.step import COUNT_BLOCK, FIRST, SECOND, StepPages, StepScratch, StepShape

_BLOCK = 16
"""Candidates of one warp: nothing in it waits for other warps."""
_WARPS = 1
_REGISTERS = {FIRST: 64, SECOND: 128}
"""Of a thread at most: with more of them too few warps run at once to hide what a load takes."""
_PARTS = {FIRST: 16, SECOND: 8}
"""Of the candidates of `COUNT_BLOCK` pages: about as many as hold something, where one page in four
is a candidate, and one in sixteen a finalist."""


@triton.jit
def _refine_head(
    products,
    at_mean,
    head,
    query_step,
    query_square,
    block_logits,
    log_mass,
    shift,
    n,
    is_candidate,
    held,
    key_step,
    mean_step,
    root,
    log_count,
    count,
    N,
    K: tl.constexpr,
    MIDDLE: tl.constexpr,
    softcap,
    BY_MASS: tl.constexpr,
    USE_VARIANCE: tl.constexpr,
    SOFTCAP: tl.constexpr,
):
    """Log mass and shift of candidates for one head, from its products with their keys [BLOCK, PP]
    and their mean keys [BLOCK]."""
    worth, shifted = tl.load(query_step + head * 2), tl.load(query_step + head * 2 + 1)
    # codes stand for what they are above the middle one
    offset = (products.to(tl.float32) - MIDDLE * shifted) * (key_step * worth)
    offset = tl.where(held, offset, 0.0)
    own = head * N + n
    if BY_MASS:
        # the log mass by moments, less all but the logit of the mean key
        x = tl.load(log_mass + own, mask=is_candidate, other=0.0) - log_count
        if USE_VARIANCE:
            deviation = tl.sqrt(tl.load(query_square + head)) * root
            x -= mass_beyond(deviation, reach_of(deviation, log_count))
    else:
        x = tl.load(block_logits + head * (N // K) + n // K, mask=is_candidate, other=0.0)
        x += (at_mean.to(tl.float32) - 1.5 * shifted) * (mean_step * worth)
    logits = offset + x[:, None]
    if SOFTCAP:
        logits = capped(logits, softcap)
    logits = tl.where(held, logits, float("-inf"))
    top = tl.max(logits, 1)
    top = tl.where(top == float("-inf"), 0.0, top)
    weights = tl.exp(logits - top[:, None])
    weight = tl.maximum(tl.sum(weights, 1), 1e-30)
    # an empty page keeps its mass of nothing
    is_refined = is_candidate & (count > 0)
    tl.store(log_mass + own, top + tl.log(weight), mask=is_refined)
    plain = tl.sum(offset, 1) / tl.maximum(count.to(tl.float32), 1.0)
    lean = tl.sum(weights * offset, 1) / weight - plain
    tl.store(shift + own, lean, mask=is_refined)


@triton.jit
def _refine(
    counters,
    block_count,
    listed,
    counts,
    variance,
    mean,
    mean_step,
    high,
    low,
    key_step,
    query_words,
    query_step,
    query_square,
    block_logits,
    log_mass,
    shift,
    N,
    softcap,
    G: tl.constexpr,
    HEADS: tl.constexpr,
    K: tl.constexpr,
    P: tl.constexpr,
    PP: tl.constexpr,
    MEAN_WORDS: tl.constexpr,
    MEAN_BITS: tl.constexpr,
    HIGH_WORDS: tl.constexpr,
    HIGH_BITS: tl.constexpr,
    LOW_WORDS: tl.constexpr,
    LOW_BITS: tl.constexpr,
    W: tl.constexpr,
    BLOCK: tl.constexpr,
    COUNTED: tl.constexpr,
    PARTS: tl.constexpr,
    USE_LOW: tl.constexpr,
    BY_MASS: tl.constexpr,
    USE_VARIANCE: tl.constexpr,
    SOFTCAP: tl.constexpr,
    HARDWARE: tl.constexpr,
):
    program, row = tl.program_id(0), tl.program_id(1).to(tl.int64)
    # of what all bits stand for, in steps, the middle
    MIDDLE: tl.constexpr = (
        (2 ** (HIGH_BITS + LOW_BITS) - 1) / 2 if USE_LOW else ((2**HIGH_BITS - 1) / 2 * 2**LOW_BITS)
    )
    block, start = program // PARTS, (program % PARTS) * BLOCK
    if block * COUNTED < tl.load(counters + 2):
        num_listed = tl.load(block_count + row * tl.cdiv(N, COUNTED) + block)
        while start < num_listed:
            p = tl.arange(0, PP)
            i = start + tl.arange(0, BLOCK)
            is_candidate = i < num_listed
            # each block's list begins where the block does
            n = tl.load(listed + row * N + block * COUNTED + i, mask=is_candidate, other=0)
            count = tl.load(counts + row * N + n, mask=is_candidate, other=0)
            held = is_candidate[:, None] & (p[None, :] < count[:, None])
            steps = key_step + row * N * P + n[:, None] * P + p[None, :]
            step = step_of(tl.load(steps, mask=held, other=0))
            log_count = log_of(count, HARDWARE)
            root, own_step = log_count, log_count
            if BY_MASS:
                if USE_VARIANCE:
                    root = root_of(tl.load(variance + row * N + n, mask=is_candidate, other=0))
            else:
                own_step = step_of(tl.load(mean_step + row * N + n, mask=is_candidate, other=0))
            wanted = is_candidate[:, None] & (p[None, :] < P)
            # words of four bytes; those of one key lie P apart, those of one mean key K
            highs = high + row * N * (HIGH_WORDS * P) + n[:, None] * (HIGH_WORDS * P) + p[None, :]
            lows = low + row * N * (LOW_WORDS * P) + n[:, None] * (LOW_WORDS * P) + p[None, :]
            means = mean + row * N * MEAN_WORDS + (n // K) * (MEAN_WORDS * K) + n % K
            zero, none = tl.zeros([BLOCK, PP], tl.int32), tl.zeros([BLOCK], tl.int32)
            for first in tl.static_range(0, G, HEADS):
                here = query_words + (row * G + first) * (W // 2)
                a, b, c, d = plane_products(
                    *(highs, P, wanted, here, zero, zero, zero, zero),
                    *(min(HEADS, G - first), HIGH_WORDS, W, HIGH_BITS, HARDWARE),
                )
                a, b, c, d = a << LOW_BITS, b << LOW_BITS, c << LOW_BITS, d << LOW_BITS
                if USE_LOW:
                    a, b, c, d = plane_products(
                        *(lows, P, wanted, here, a, b, c, d),
                        *(min(HEADS, G - first), LOW_WORDS, W, LOW_BITS, HARDWARE),
                    )
                q, r, s, t = none, none, none, none
                if not BY_MASS:
                    q, r, s, t = plane_products(
                        *(means, K, is_candidate, here, none, none, none, none),
                        *(min(HEADS, G - first), MEAN_WORDS, W, MEAN_BITS, HARDWARE),
                    )
                for k in tl.static_range(min(HEADS, G - first)):
                    _refine_head(
                        of_head(a, b, c, d, k),
                        of_head(q, r, s, t, k),
                        row * G + first + k,
                        query_step,
                        query_square,
                        block_logits,
                        log_mass,
                        shift,
                        n,
                        is_candidate,
                        held,
                        step,
                        own_step,
                        root,
                        log_count,
                        count,
                        N,
                        K,
                        MIDDLE,
                        softcap,
                        BY_MASS,
                        USE_VARIANCE,
                        SOFTCAP,
                    )
            start += PARTS * BLOCK


def refine(
    pages: StepPages, counters: Tensor, scratch: StepScratch, shape: StepShape, *, stage: int
) -> None:
    """Log mass and shift of the pages whose rank reaches `threshold[stage]`, by the high plane of
    the codes of their keys in the `FIRST` stage, by both planes in the `SECOND`; with the softmax
    statistics of all log masses."""
    list_candidates(counters, scratch, shape, stage)
    index, N = pages.summary, shape.capacity
    options: dict[str, Any] = {
        "G": shape.group,
        "HEADS": HEADS,
        "K": shape.block_pages,
        "P": shape.page_size,
        "PP": power_of_two(shape.page_size),
        "MEAN_WORDS": index.mean.shape[3],
        "MEAN_BITS": MEAN_BITS,
        "HIGH_WORDS": index.high.shape[3],
        "HIGH_BITS": HIGH_BITS,
        "LOW_WORDS": index.low.shape[3],
        "LOW_BITS": LOW_BITS,
        "W": scratch.query_words.shape[2],
        "BLOCK": _BLOCK,
        "COUNTED": COUNT_BLOCK,
        "PARTS": _PARTS[stage],
        "USE_LOW": stage == SECOND,
        # a cap cannot be undone
        "BY_MASS": stage == FIRST and shape.softcap is None,
        "USE_VARIANCE": shape.tail == "second",
        "SOFTCAP": shape.softcap is not None,
        "HARDWARE": uses_hardware(scratch.rank),
        "num_warps": _WARPS,
        "maxnreg": _REGISTERS[stage],
    }
    launch(
        _refine,
        (triton.cdiv(N, COUNT_BLOCK) * _PARTS[stage], shape.rows),
        *(counters, scratch.block_count, scratch.listed, index.counts, index.variance),
        *(index.mean.view(torch.int32), index.mean_step),
        *(index.high.view(torch.int32), index.low.view(torch.int32), index.key_step),
        *(
            scratch.query_words.view(torch.int64),
            scratch.query_step,
            scratch.query_square,
            scratch.block_logits,
        ),
        *(scratch.log_mass, scratch.shift, N, shape.softcap or 1.0),
        **options,
    )
    sum_masses(counters, scratch, shape)
