"""The query against the mean keys of blocks and pages."""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from wavekv.kernels.cuda.codes import COLUMNS, load_queries
from wavekv.kernels.cuda.in_use import pages_in_use
from wavekv.kernels.cuda.launch import launch, power_of_two, uses_hardware
from wavekv.kernels.cuda.means import LANES, all_mean_products, part_of
from wavekv.kernels.cuda.moments import LOG2_E, exp2_of, log_or_nothing, moments, root_of, step_of
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
_REGISTERS = (80, 128)
"""Of a thread at most, where heads or dimensions are few, and where they are many: with more of
them too few warps run at once to hide what a load takes."""


@triton.jit
def _statistics(both, SETS: tl.constexpr, HARDWARE: tl.constexpr):
    """The largest number [GP] of each head, and the sum of exp(number - largest), of numbers
    [columns / 2, LANES, WARPS, TIMES, 2, PART]."""
    PAIRS: tl.constexpr = both.shape[0] // SETS
    WARPS: tl.constexpr = both.shape[2]
    TIMES: tl.constexpr = both.shape[3]
    PART: tl.constexpr = both.shape[5]
    both = tl.reshape(both, [SETS, PAIRS, LANES, WARPS, TIMES, 2, PART])
    both = tl.permute(both, (1, 5, 0, 2, 3, 4, 6))
    both = tl.reshape(both, [2 * PAIRS, SETS * LANES * WARPS * TIMES * PART])
    largest = tl.max(both, 1)
    less = tl.maximum(largest, -1e30) * LOG2_E
    return largest, tl.sum(exp2_of(both * LOG2_E - less[:, None], HARDWARE), 1)


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
    PART: tl.constexpr,
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
    num_pages = pages_in_use(counters, K) - stat * PAGES
    GP: tl.constexpr = COLUMNS // SETS
    TIMES: tl.constexpr = PAGES // (SETS * LANES * WARPS * PART)
    if num_pages > 0:
        # two columns of a product, of two heads of one set, are in one thread
        pair = tl.arange(0, COLUMNS // 2)[:, None, None, None, None]
        part = part_of(pair // (GP // 2), WARPS, SETS, TIMES)[:, :, :, :, :, None]
        n, b = part * PART + tl.arange(0, PART), part // (K // PART)
        is_page, is_block = n < num_pages, b < num_pages // K
        here = row * N + stat * PAGES
        count = tl.load(counts + here + n, mask=is_page, other=0)
        step = step_of(tl.load(mean_step + here + n, mask=is_page, other=0), HARDWARE)
        root = root_of(tl.load(variance + here + n, mask=is_page, other=0), HARDWARE)
        log_count = log_or_nothing(count, HARDWARE)
        if SOFTCAP:
            # what belongs to an empty page may be anything
            step = tl.where(count == 0, 0.0, step)
        for first in tl.static_range(0, G, COLUMNS):
            even, odd = (), ()
            for s in tl.static_range(SETS):
                q = query_bytes + (row * G + first) * WIDTH
                even += (load_queries(q, 0, s, SETS, COLUMNS, WARPS, G - first, WIDTH, QUADS),)  # type: ignore[assignment]
                odd += (load_queries(q, 1, s, SETS, COLUMNS, WARPS, G - first, WIDTH, QUADS),)  # type: ignore[assignment]
            products = all_mean_products(
                *(mean + here * (WORDS * 4), num_pages // K - 1, even, odd),
                *(SETS, TIMES, PART, K, WORDS, HARDWARE),
            )
            g = (2 * (pair % (GP // 2)) + tl.arange(0, 2))[:, :, :, :, :, None]
            is_head = g < G - first
            head = row * G + first + g
            worth = tl.load(query_step + head * 2, mask=is_head, other=0.0)
            shifted = tl.load(query_step + head * 2 + 1, mask=is_head, other=0.0)
            square = tl.load(query_square + head, mask=is_head, other=0.0)
            own = block_logits + (row * G + first) * (N // K) + stat * (PAGES // K)
            x = tl.load(own + (g * (N // K) + b), mask=is_head & is_block, other=0.0)
            # codes stand for what they are above the middle one
            products -= 12582912.0 + 6.0 * shifted
            x += products * (worth * 0.25) * step
            deviation = tl.sqrt(square) * root
            mass, lean = moments(x, deviation, log_count, softcap, USE_VARIANCE, SOFTCAP)
            at = (row * G + first) * N + stat * PAGES
            tl.store(log_mass + at + (g * N + n), mass, mask=is_head & is_page)
            if SOFTCAP:
                tl.store(shift + at + (g * N + n), lean, mask=is_head & is_page)
            largest, total = _statistics(mass + lean, SETS, HARDWARE)
            g = first + tl.arange(0, GP)
            at = (row * G + g) * STRIDE + stat
            tl.store(block_max + at, largest, mask=g < G)
            tl.store(block_sum + at, total, mask=g < G)
        tl.store(status + here + n, tl.full(n.shape, MARK, tl.uint8), mask=is_page)


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
    index, K, words = pages.summary, shape.block_pages, pages.summary.mean.shape[3]
    # one head alone is taken as two: a thread has the products of two
    sets, part = COLUMNS // power_of_two(min(max(shape.group, 2), COLUMNS)), min(K, 4)
    options: dict[str, Any] = {
        "G": shape.group,
        "K": K,
        "PAGES": SCORE_BLOCK,
        "PART": part,
        "WORDS": words,
        "QUADS": power_of_two(-(-words // 4)),
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
        "maxnreg": _REGISTERS[shape.group > 4 or words > 8],
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
