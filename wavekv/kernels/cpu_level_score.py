"""The estimated mass and shift of every page of an index of two levels (numba)."""

# mypy: disallow-untyped-decorators=False
from typing import Any

import numpy as np
from numba import njit, prange
from numba.np.numpy_support import carray

from wavekv.kernels.cpu_codes import LANES
from wavekv.kernels.cpu_math import (
    FASTMATH,
    NEG_INF,
    PRANGE,
    float32_at,
    int8_at,
    int32_at,
    offset,
    tanh,
    uint8_at,
)
from wavekv.kernels.cpu_planes import lay_out_query, num_factors, plane_dots
from wavekv.kernels.cpu_state import scaled_query

_BITS = 2
_CENTRE = np.float32(1.5)


@njit(fastmath=FASTMATH, nogil=True, cache=True)
def _block_logits(query: Any, codes: Any, scale: Any, row: Any, logits: Any) -> None:
    """logits [G] of queries [G, D] and a block's mean key, int8 codes [D] times a scale."""
    for d in range(row.size):
        row[d] = np.float32(codes[d])
    for g in range(query.shape[0]):
        total = np.float32(0.0)
        for d in range(row.size):
            total += query[g, d] * row[d]
        logits[g] = total * scale


@njit(fastmath=FASTMATH, nogil=True, cache=True)
def _moments(
    logits: Any,
    square: Any,
    variance: Any,
    log_count: Any,
    softcap: Any,
    use_variance: bool,
    masses: Any,
    shifts: Any,
) -> None:
    """masses, shifts [K] of one head from logits [K] of mean keys, variance [K], and log_count [K],
    -inf where a page is empty."""
    for j in range(logits.size):
        x = logits[j]
        bend = np.float32(1.0)  # the derivative of the cap
        if softcap > np.float32(0.0):
            capped = tanh(x / softcap)
            x = softcap * capped
            bend = np.float32(1.0) - capped * capped
        shift = np.float32(0.0)
        most = np.float32(2.0) * max(log_count[j], np.float32(0.0))
        if use_variance:
            deviation = np.sqrt(square * variance[j])
            # no key lies further out than one of so many may: there the mass grows as that key's
            spread = deviation * bend
            reach = min(spread, np.sqrt(most))
            x += reach * (spread - np.float32(0.5) * reach)
            shift = deviation * reach
        is_empty = log_count[j] == NEG_INF
        masses[j] = log_count[j] + x
        shifts[j] = np.float32(0.0) if is_empty else shift


@njit(fastmath=FASTMATH, nogil=True, cache=True, parallel=PRANGE.copy())
def score(
    batch: int,
    kv_heads: int,
    splits: int,
    group: int,
    width: int,
    code_width: int,
    blocks: int,
    block_pages: int,
    query: int,
    mixed: int,
    worth: int,
    steps: int,
    counts: Any,
    variance: Any,
    mean: Any,
    mean_step: Any,
    block_mean: Any,
    block_scale: Any,
    use_variance: bool,
    scale: Any,
    softcap: Any,
    log_mass: int,
    shift: int,
    logits: int,
) -> None:
    """Write log_mass, shift and logits of mean keys [B, Hq, N]. Addresses, and views of the parts
    of a `PageIndex`; steps: of the 256 step bytes."""
    pages, heads = blocks * block_pages, batch * kv_heads
    masses = carray(float32_at(log_mass), (heads, group, pages))
    shifts = carray(float32_at(shift), (heads, group, pages))
    at_means = carray(float32_at(logits), (heads, group, pages))
    codes = carray(int8_at(mixed), (heads, group, code_width))
    units = carray(float32_at(worth), (heads, group))
    table = carray(float32_at(steps), (256,))
    words = (width * _BITS + 31) // 32
    for index in prange(heads * splits):
        task: Any = np.int64(index)  # prange counts unsigned, which would mix into floats
        head, split = task // splits, task % splits
        b, h = head // kv_heads, head % kv_heads
        q = scaled_query(query + head * group * width * 4, group, width, scale)
        factors = np.empty((group, num_factors(words, block_pages, _BITS)), np.int8)
        squares, centres = np.zeros(group, np.float32), np.zeros(group, np.float32)
        for g in range(group):
            lay_out_query(codes[head, g], words, block_pages, _BITS, factors[g])
            for d in range(width):
                squares[g] += q[g, d] * q[g, d]
                centres[g] += _CENTRE * np.float32(codes[head, g, d])
        lanes = np.empty(max(LANES, block_pages), np.int32)
        row, own = np.empty(width, np.float32), np.empty(group, np.float32)
        spreads, log_counts = np.empty(block_pages, np.float32), np.empty(block_pages, np.float32)
        own_steps = np.empty(block_pages, np.float32)
        last_count, last_log = np.int64(1), np.float32(0.0)
        for block in range(split * blocks // splits, (split + 1) * blocks // splits):
            first = block * block_pages
            of_block = carray(int8_at(offset(block_mean, b, h, block)), (width,))
            unit = carray(float32_at(offset(block_scale, b, h, block)), (1,))[0]
            _block_logits(q, of_block, unit, row, own)
            page_counts = carray(uint8_at(offset(counts, b, h, first)), (block_pages,))
            variances = carray(uint8_at(offset(variance, b, h, first)), (block_pages,))
            step_bytes = carray(uint8_at(offset(mean_step, b, h, first)), (block_pages,))
            for j in range(block_pages):
                count = np.int64(page_counts[j])
                if count != last_count:  # nearly all pages are full: one logarithm serves them all
                    last_count = count
                    last_log = np.log(np.float32(count)) if count > 0 else NEG_INF
                log_counts[j] = last_log
                spreads[j] = table[variances[j]]
                own_steps[j] = table[step_bytes[j]]
            plane = offset(mean, b, h, block)
            sums = carray(int32_at(lanes.ctypes.data), (block_pages,))
            for g in range(group):
                at = factors.ctypes.data + g * factors.shape[1]
                plane_dots(plane, at, codes[head, g], words, block_pages, _BITS, lanes.ctypes.data)
                x = at_means[head, g, first : first + block_pages]
                for j in range(block_pages):
                    residual = (np.float32(sums[j]) - centres[g]) * units[head, g]
                    x[j] = own[g] + residual * own_steps[j]
                _moments(
                    x,
                    squares[g],
                    spreads,
                    log_counts,
                    softcap,
                    use_variance,
                    masses[head, g, first : first + block_pages],
                    shifts[head, g, first : first + block_pages],
                )
