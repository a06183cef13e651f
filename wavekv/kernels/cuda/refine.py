"""The codes of the candidates' keys: what a page's mean hides."""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from wavekv.kernels.cuda.candidates import list_candidates, sum_masses
from wavekv.kernels.cuda.codes import (
    COLUMNS,
    add_products,
    all_codes,
    high_codes,
    load_plane,
    load_queries,
    mean_products,
)
from wavekv.kernels.cuda.launch import launch, power_of_two, uses_hardware
from wavekv.kernels.cuda.moments import (
    capped,
    exp2_of,
    log_of,
    mass_beyond,
    reach_of,
    root_of,
    step_of,
)
from wavekv.kernels.step import COUNT_BLOCK, FIRST, SECOND, StepPages, StepScratch, StepShape

_ROWS = 16
"""That a product of tensor cores has at least: keys of a set's pages, or pages of all sets."""
_WARPS = 1
"""Nothing in a program waits for other warps."""
_REGISTERS = {FIRST: 96, SECOND: 128}
"""Of a thread at most: with more of them too few warps run at once to hide what a load takes."""
_PARTS = {FIRST: 16, SECOND: 8}
"""Of the candidates of `COUNT_BLOCK` pages: about as many as hold something, where one page in four
is a candidate, and one in sixteen a finalist."""


@triton.jit
def _masses(
    products,
    held,
    step,
    count,
    x,
    worth,
    softcap,
    SOFTCAP: tl.constexpr,
    HARDWARE: tl.constexpr,
):
    """Log mass and shift of pages [PAGES, SETS, GP] whose mean keys have the logits x, from the
    products [PP, PAGES, SETS, GP] with their keys and the steps [PP, PAGES, SETS] of these."""
    LOG2_E: tl.constexpr = 1.4426950408889634
    offset = products * step[:, :, :, None]
    plain = tl.sum(offset, 0) / tl.maximum(count.to(tl.float32), 1.0)[:, :, None]
    if SOFTCAP:
        logits = capped(offset * worth[None, :, :, :] + x[None, :, :, :], softcap)
        logits = tl.where(held[:, :, :, None], logits, -1e30)
        top = tl.max(logits, 0)
        weights = exp2_of((logits - top[None, :, :, :]) * LOG2_E, HARDWARE)
    else:
        # below all that are held, and never a NaN, whatever it is multiplied with
        offset += tl.where(held, 0.0, -1e30)[:, :, :, None]
        top = tl.max(offset, 0)
        scale = tl.maximum(worth * LOG2_E, 1e-20)
        weights = exp2_of(offset * scale[None, :, :, :] - (top * scale)[None, :, :, :], HARDWARE)
        top = x + top * worth
    weight = tl.sum(weights, 0)
    lean = (tl.sum(weights * offset, 0) / weight - plain) * worth
    return top + log_of(weight, HARDWARE), lean


@triton.jit
def _key_products(
    own_list,
    start,
    num_listed,
    high,
    low,
    even,
    odd,
    SETS: tl.constexpr,
    PAGES: tl.constexpr,
    P: tl.constexpr,
    PP: tl.constexpr,
    HIGH_WORDS: tl.constexpr,
    LOW_WORDS: tl.constexpr,
    USE_LOW: tl.constexpr,
    HARDWARE: tl.constexpr,
):
    """Four times the products of the codes of keys of listed pages with the queries, as floats
    2^23 + 2^22 above them [PP, PAGES, SETS, GP]."""
    QUADS: tl.constexpr = even[0].shape[1] // 32
    COLUMNS: tl.constexpr = even[0].shape[2]
    highs, lows = (), ()
    for s in tl.static_range(SETS):
        i = start + s * PAGES + tl.arange(0, PAGES)
        n = tl.load(own_list + i, mask=i < num_listed, other=0)
        x = load_plane(high, n, i < num_listed, P, PP, HIGH_WORDS, QUADS, 0, HARDWARE)
        highs += (x,)  # type: ignore[assignment]
        if USE_LOW:
            x = load_plane(low, n, i < num_listed, P, PP, LOW_WORDS, QUADS, 1, HARDWARE)
            lows += (x,)  # type: ignore[assignment]
    total = tl.zeros([PP * PAGES, COLUMNS], tl.int32)
    for s in tl.static_range(SETS):
        if USE_LOW:
            first, second = all_codes(highs[s], lows[s], 0, HARDWARE)
        else:
            first, second = high_codes(highs[s], 0, HARDWARE)
        total = add_products(first, second, even[s], total)
    # integers from here on are floats of the same bits: their last bit counts one
    total = total * 4 + 0x4B400000
    for s in tl.static_range(SETS):
        if USE_LOW:
            first, second = all_codes(highs[s], lows[s], 1, HARDWARE)
        else:
            first, second = high_codes(highs[s], 1, HARDWARE)
        total = add_products(first, second, odd[s], total)
    total = tl.reshape(total, [PP, PAGES, SETS, COLUMNS // SETS])
    return total.to(tl.float32, bitcast=True)


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
    query_bytes,
    query_step,
    query_square,
    block_logits,
    log_mass,
    shift,
    N,
    softcap,
    G: tl.constexpr,
    K: tl.constexpr,
    P: tl.constexpr,
    PP: tl.constexpr,
    HIGH_WORDS: tl.constexpr,
    LOW_WORDS: tl.constexpr,
    QUADS: tl.constexpr,
    WIDTH: tl.constexpr,
    COLUMNS: tl.constexpr,
    SETS: tl.constexpr,
    PAGES: tl.constexpr,
    COUNTED: tl.constexpr,
    PARTS: tl.constexpr,
    USE_LOW: tl.constexpr,
    BY_MASS: tl.constexpr,
    USE_VARIANCE: tl.constexpr,
    SOFTCAP: tl.constexpr,
    HARDWARE: tl.constexpr,
):
    program, row = tl.program_id(0), tl.program_id(1).to(tl.int64)
    block = program // PARTS
    GP: tl.constexpr = COLUMNS // SETS
    BLOCK: tl.constexpr = SETS * PAGES
    # four times what the middle of the codes is, and what a fourth of a code is worth in steps
    MIDDLE: tl.constexpr = 14.0 if USE_LOW else 6.0
    UNIT: tl.constexpr = 0.25 if USE_LOW else 0.5
    if block * COUNTED < tl.load(counters + 2):
        num_listed = tl.load(block_count + row * tl.cdiv(N, COUNTED) + block)
        # each block's list begins where the block does
        own_list = listed + row * N + block * COUNTED
        own_high = high + row * N * (HIGH_WORDS * P * 4)
        own_low = low + row * N * (LOW_WORDS * P * 4)
        own_mean = mean + row * N * (HIGH_WORDS * 4)
        for first in tl.static_range(0, G, COLUMNS):
            start = (program % PARTS) * BLOCK
            own_query = query_bytes + (row * G + first) * WIDTH
            even, odd = (), ()
            for s in tl.static_range(SETS):
                even += (load_queries(own_query, 0, s, SETS, COLUMNS, 1, G - first, WIDTH, QUADS),)  # type: ignore[assignment]
                odd += (load_queries(own_query, 1, s, SETS, COLUMNS, 1, G - first, WIDTH, QUADS),)  # type: ignore[assignment]
            g = first + tl.arange(0, GP)
            head = row * G + g
            worth = tl.load(query_step + head * 2, mask=g < G, other=0.0)
            shifted = tl.load(query_step + head * 2 + 1, mask=g < G, other=0.0)
            deviation = tl.sqrt(tl.load(query_square + head, mask=g < G, other=0.0))
            while start < num_listed:
                products = _key_products(
                    *(own_list, start, num_listed, own_high, own_low, even, odd),
                    *(SETS, PAGES, P, PP, HIGH_WORDS, LOW_WORDS, USE_LOW, HARDWARE),
                )
                products -= (12582912.0 + MIDDLE * shifted)[None, None, None, :]
                i = tl.arange(0, PAGES)[:, None] + tl.arange(0, SETS)[None, :] * PAGES + start
                is_candidate = i < num_listed
                n = tl.load(own_list + i, mask=is_candidate, other=0)
                count = tl.load(counts + row * N + n, mask=is_candidate, other=0).to(tl.int32)
                p = tl.arange(0, PP)[:, None, None]
                held = p < count[None, :, :]
                steps = key_step + row * N * P + n[None, :, :] * P + p
                step = step_of(tl.load(steps, mask=held, other=0), HARDWARE)
                log_count = log_of(count, HARDWARE)[:, :, None]
                wanted = is_candidate[:, :, None] & (g < G)[None, None, :]
                own = head[None, None, :] * N + n[:, :, None]
                if BY_MASS:
                    # the log mass by moments, less all but the logit of the mean key
                    x = tl.load(log_mass + own, mask=wanted, other=0.0) - log_count
                    if USE_VARIANCE:
                        root = root_of(
                            tl.load(variance + row * N + n, mask=is_candidate, other=0), HARDWARE
                        )
                        far = deviation[None, None, :] * root[:, :, None]
                        x -= mass_beyond(far, reach_of(far, log_count))
                else:
                    at = head[None, None, :] * (N // K) + n[:, :, None] // K
                    x = tl.load(block_logits + at, mask=wanted, other=0.0)
                    i = start + tl.arange(0, BLOCK)
                    m = tl.load(own_list + i, mask=i < num_listed, other=0)
                    at_mean = mean_products(
                        *(own_mean, m, i < num_listed, even, odd, SETS, K, HIGH_WORDS, HARDWARE)
                    ).to(tl.float32)
                    own_step = step_of(
                        tl.load(mean_step + row * N + n, mask=is_candidate, other=0), HARDWARE
                    )
                    at_mean -= (6.0 * shifted)[None, None, :]
                    x += at_mean * (worth * 0.25)[None, None, :] * own_step[:, :, None]
                lean_worth = (worth * UNIT)[None, None, :]
                mass, lean = _masses(
                    products, held, step, count, x, lean_worth, softcap, SOFTCAP, HARDWARE
                )
                # an empty page keeps its mass of nothing
                wanted &= (count > 0)[:, :, None]
                tl.store(log_mass + own, mass, mask=wanted)
                tl.store(shift + own, lean, mask=wanted)
                start += PARTS * BLOCK


def refine(
    pages: StepPages, counters: Tensor, scratch: StepScratch, shape: StepShape, *, stage: int
) -> None:
    """Log mass and shift of the pages whose rank reaches `threshold[stage]`, by the high plane of
    the codes of their keys in the `FIRST` stage, by both planes in the `SECOND`; with the softmax
    statistics of all log masses."""
    list_candidates(counters, scratch, shape, stage)
    index, N, PP = pages.summary, shape.capacity, power_of_two(shape.page_size)
    # one head alone is taken as two: more sets would leave too few registers
    sets = COLUMNS // power_of_two(min(max(shape.group, 2), COLUMNS))
    options: dict[str, Any] = {
        "G": shape.group,
        "K": shape.block_pages,
        "P": shape.page_size,
        "PP": PP,
        "HIGH_WORDS": index.high.shape[3],
        "LOW_WORDS": index.low.shape[3],
        "QUADS": power_of_two(-(-index.high.shape[3] // 4)),
        "WIDTH": 4 * scratch.query_words.shape[2],
        "COLUMNS": COLUMNS,
        "SETS": sets,
        "PAGES": max(_ROWS // min(sets, 2), _ROWS // PP),
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
        *(index.mean.view(torch.int8), index.mean_step),
        *(index.high.view(torch.int8), index.low.view(torch.int8), index.key_step),
        *(
            scratch.query_words.view(torch.int8),
            scratch.query_step,
            scratch.query_square,
            scratch.block_logits,
        ),
        *(scratch.log_mass, scratch.shift, N, shape.softcap or 1.0),
        **options,
    )
    sum_masses(counters, scratch, shape)
