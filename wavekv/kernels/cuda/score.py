"""The query against the mean keys of blocks and pages."""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from wavekv.kernels.cuda.in_use import pages_in_use
from wavekv.kernels.cuda.codes import COLUMNS, block_products, load_pairs
from wavekv.kernels.cuda.launch import launch, power_of_two, uses_hardware
from wavekv.kernels.cuda.moments import exp2_of, log_or_nothing, moments, root_of, step_of
from wavekv.kernels.cuda.prepare import prepare
from wavekv.kernels.step import (
    ESTIMATED,
    SCORE_BLOCK,
    StepPages,
    StepScratch,
    StepShape,
    StepSteady,
)

_WARPS = 4
_REGISTERS = 64
"""Of a thread at most: with more of them too few warps run at once to hide what a load takes."""


@triton.jit
def _score(
    counters,
    counts,
    variance,
    mean,
    mean_step,
    query_bytes,
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
    K: tl.constexpr,
    PAGES: tl.constexpr,
    WORDS: tl.constexpr,
    QUADS: tl.constexpr,
    WIDTH: tl.constexpr,
    COLUMNS: tl.constexpr,
    SETS: tl.constexpr,
    WARPS: tl.constexpr,
    STRIDE: tl.constexpr,
    USE_VARIANCE: tl.constexpr,
    SOFTCAP: tl.constexpr,
    MARK: tl.constexpr,
    HARDWARE: tl.constexpr,
):
    stat, row = tl.program_id(0), tl.program_id(1).to(tl.int64)
    num_pages = pages_in_use(counters, K)
    GP: tl.constexpr = COLUMNS // SETS
    if stat * PAGES < num_pages:
        PART: tl.constexpr = K if K < 4 else 4
        TIMES: tl.constexpr = PAGES // (PART * SETS * WARPS * 8)
        pair = tl.arange(0, COLUMNS // 2)[:, None, None, None, None]
        lane = tl.arange(0, 8)[:, None, None, None]
        warp = tl.arange(0, WARPS)[:, None, None]
        time = tl.arange(0, TIMES)[:, None]
        part = ((warp * SETS + pair // (GP // 2)) * TIMES + time) * 8 + lane
        inner = part[:, :, :, :, :, None] * PART + tl.arange(0, PART)
        in_use = num_pages - stat * PAGES
        is_page = inner < in_use
        here = row * N + stat * PAGES
        own_mean = mean + here * (WORDS * 4)
        count = tl.load(counts + here + inner, mask=is_page, other=0)
        step = step_of(tl.load(mean_step + here + inner, mask=is_page, other=0), HARDWARE)
        root = root_of(tl.load(variance + here + inner, mask=is_page, other=0), HARDWARE)
        if SOFTCAP:
            step = tl.where(count == 0, 0.0, step)
        log_count = log_or_nothing(count, HARDWARE)
        for first in tl.static_range(0, G, COLUMNS):
            own_query = query_bytes + (row * G + first) * WIDTH
            even, odd = (), ()
            for s in tl.static_range(SETS):
                even += (load_pairs(own_query, 0, s, SETS, COLUMNS, WARPS, G - first, WIDTH, QUADS),)
                odd += (load_pairs(own_query, 1, s, SETS, COLUMNS, WARPS, G - first, WIDTH, QUADS),)
            products = block_products(
                *(own_mean, in_use // K - 1, even, odd, SETS, WARPS, PAGES, K, WORDS, HARDWARE)
            )
            g = 2 * (tl.arange(0, COLUMNS // 2) % (GP // 2))[:, None, None, None, None, None] + tl.arange(0, 2)[:, None]
            head = row * G + first + g
            worth = tl.load(query_step + head * 2, mask=first + g < G, other=0.0)
            shifted = tl.load(query_step + head * 2 + 1, mask=first + g < G, other=0.0)
            spread = tl.sqrt(tl.load(query_square + head, mask=first + g < G, other=0.0))
            wanted = (first + g < G) & is_page
            b = (part // (K // PART))[:, :, :, :, :, None]
            logits = block_logits + (row * G + first) * (N // K) + stat * (PAGES // K)
            own = tl.load(logits + (g * (N // K) + b), mask=(b < in_use // K) & (first + g < G), other=0.0)
            products -= 12582912.0 + 6.0 * shifted
            x = own + products * (worth * 0.25) * step
            deviation = spread * root
            mass, lean = moments(x, deviation, log_count, softcap, USE_VARIANCE, SOFTCAP)
            at = g * N + inner
            masses = log_mass + (row * G + first) * N + stat * PAGES
            tl.store(masses + at, mass, mask=wanted)
            if SOFTCAP:
                tl.store(shift + (row * G + first) * N + stat * PAGES + at, lean, mask=wanted)
            both = mass + lean
            both = tl.reshape(both, [SETS, GP // 2, 8, WARPS, TIMES, 2, PART])
            both = tl.reshape(tl.permute(both, (0, 2, 3, 4, 6, 1, 5)), [PAGES, GP])
            largest = tl.max(both, 0)
            safe = tl.maximum(largest, -1e30) * 1.4426950408889634
            g = first + tl.arange(0, GP)
            head = row * G + g
            tl.store(block_max + head * STRIDE + stat, largest, mask=g < G)
            total = tl.sum(exp2_of(both * 1.4426950408889634 - safe[None, :], HARDWARE), 0)
            tl.store(block_sum + head * STRIDE + stat, total, mask=g < G)
        tl.store(status + here + inner, tl.full(inner.shape, MARK, tl.uint8), mask=is_page)


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
    sets = COLUMNS // power_of_two(min(max(shape.group, 2), COLUMNS))
    options: dict[str, Any] = {
        "G": shape.group,
        "K": K,
        "PAGES": SCORE_BLOCK,
        "WORDS": index.mean.shape[3],
        "QUADS": power_of_two(-(-index.mean.shape[3] // 4)),
        "WIDTH": 4 * scratch.query_words.shape[2],
        "COLUMNS": COLUMNS,
        "SETS": sets,
        "WARPS": _WARPS,
        "STRIDE": scratch.block_max.shape[2],
        "USE_VARIANCE": shape.tail == "second",
        "SOFTCAP": shape.softcap is not None,
        "MARK": ESTIMATED,
        "HARDWARE": uses_hardware(query),
        "num_warps": _WARPS,
        "maxnreg": _REGISTERS,
    }
    launch(
        _score,
        (triton.cdiv(shape.capacity, SCORE_BLOCK), shape.rows),
        *(counters, index.counts, index.variance),
        *(index.mean.view(torch.int8), index.mean_step),
        *(
            scratch.query_words.view(torch.int8),
            scratch.query_step,
            scratch.query_square,
            scratch.block_logits,
        ),
        *(scratch.log_mass, scratch.shift, scratch.status),
        *(scratch.block_max, scratch.block_sum),
        *(shape.capacity, shape.softcap or 1.0),
        **options,
    )
