"""The estimated mass and shift of every page of an index of two levels (numba)."""

# mypy: disallow-untyped-decorators=False
from typing import Any

import numpy as np
from numba import njit, prange
from numba.np.numpy_support import carray

from wavekv.kernels.cpu_codes import LANES, quantise_query
from wavekv.kernels.cpu_math import (
    FASTMATH,
    NEG_INF,
    PRANGE,
    float32_at,
    int8_at,
    offset,
    tanh,
    uint8_at,
)
from wavekv.kernels.cpu_planes import lay_out_heads, plane_dots
from wavekv.kernels.cpu_state import scaled_query

_BITS = 2
_CENTRE = np.float32(1.5)


@njit(fastmath=FASTMATH, nogil=True, cache=True)
def _mix_query(query: Any, mixing: Any, codes: Any) -> Any:
    """Write codes [W] int8 of a query [D] times mixing [D, D]; return what a step is worth."""
    mixed = np.zeros(query.size, np.float32)
    for d in range(query.size):
        x, row = query[d], mixing[d]
        for e in range(query.size):
            mixed[e] += x * row[e]
    return quantise_query(mixed, codes)[0]


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
    length: Any,
    deviations: Any,
    furthest: Any,
    log_counts: Any,
    softcap: Any,
    masses: Any,
    shifts: Any,
) -> None:
    """masses, shifts [K] of one head, a query of this length, from logits [K] of mean keys: of keys
    with deviations [K], the root of twice the log of the count [K], and that log [K], -inf where a
    page is empty."""
    for j in range(logits.size):
        x = logits[j]
        bend = np.float32(1.0)  # the derivative of the cap
        if softcap > np.float32(0.0):
            capped = tanh(x / softcap)
            x = softcap * capped
            bend = np.float32(1.0) - capped * capped
        deviation = length * deviations[j]
        # no key lies further out than one of so many may: there the mass grows as that key's
        spread = deviation * bend
        reach = min(spread, furthest[j])
        masses[j] = log_counts[j] + x + reach * (spread - np.float32(0.5) * reach)
        shifts[j] = deviation * reach


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
    mixing: int,
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
    mixed: int,
    worth: int,
) -> None:
    """Write log_mass, shift and logits of mean keys [B, Hq, N], and the mixed queries.

    Addresses, and views of the parts of a `PageIndex`; steps: of the 256 step bytes.
    """
    pages, heads = blocks * block_pages, batch * kv_heads
    masses = carray(float32_at(log_mass), (heads, group, pages))
    shifts = carray(float32_at(shift), (heads, group, pages))
    at_means = carray(float32_at(logits), (heads, group, pages))
    codes = carray(int8_at(mixed), (heads, group, code_width))
    units = carray(float32_at(worth), (heads, group))
    table = carray(float32_at(steps), (256,))
    words = (width * _BITS + 31) // 32
    matrix = carray(float32_at(mixing), (width, width))
    for head in range(heads):
        q = scaled_query(query + head * group * width * 4, group, width, scale)
        for g in range(group):
            units[head, g] = _mix_query(q[g], matrix, codes[head, g])
    factors = lay_out_heads(codes, words, block_pages, _BITS)
    for index in prange(heads * splits):
        task: Any = np.int64(index)  # prange counts unsigned, which would mix into floats
        head, split = task // splits, task % splits
        b, h = head // kv_heads, head % kv_heads
        q = scaled_query(query + head * group * width * 4, group, width, scale)
        lengths, centres = np.zeros(group, np.float32), np.zeros(group, np.float32)
        for g in range(group):
            square, total = np.float32(0.0), np.float32(0.0)
            for d in range(width):
                square += q[g, d] * q[g, d]
                total += np.float32(codes[head, g, d])
            lengths[g], centres[g] = np.sqrt(square), _CENTRE * total
        lanes = np.empty(max(LANES, block_pages), np.int32)
        lanes_at, factors_at = lanes.ctypes.data, factors[head].ctypes.data
        row, own = np.empty(width, np.float32), np.empty(group, np.float32)
        first, last = split * blocks // splits, (split + 1) * blocks // splits
        start, size = first * block_pages, (last - first) * block_pages
        own_steps = np.empty(size, np.float32)
        step_bytes = carray(uint8_at(offset(mean_step, b, h, start)), (size,))
        for n in range(size):
            own_steps[n] = table[step_bytes[n]]
        for block in range(first, last):
            of_block = carray(int8_at(offset(block_mean, b, h, block)), (width,))
            unit = carray(float32_at(offset(block_scale, b, h, block)), (1,))[0]
            _block_logits(q, of_block, unit, row, own)
            plane, at = offset(mean, b, h, block), (block - first) * block_pages
            for g in range(group):
                plane_dots(
                    plane,
                    factors_at + g * factors.shape[2],
                    codes[head, g],
                    words,
                    block_pages,
                    _BITS,
                    lanes_at,
                )
                for j in range(block_pages):
                    residual = (np.float32(lanes[j]) - centres[g]) * units[head, g]
                    at_means[head, g, start + at + j] = own[g] + residual * own_steps[at + j]
        # what follows runs across all pages, in vectors
        of_pages = np.zeros((3, size), np.float32)
        page_counts = carray(uint8_at(offset(counts, b, h, start)), (size,))
        last_count, log_count, far = np.int64(1), np.float32(0.0), np.float32(0.0)
        for n in range(size):
            count = np.int64(page_counts[n])
            if count != last_count:  # nearly all pages are full: one logarithm serves them all
                last_count = count
                log_count = np.log(np.float32(count)) if count > 0 else NEG_INF
                far = np.sqrt(np.float32(2.0) * log_count) if count > 0 else np.float32(0.0)
            of_pages[1, n], of_pages[2, n] = far, log_count
        if use_variance:
            variances = carray(uint8_at(offset(variance, b, h, start)), (size,))
            for n in range(size):
                of_pages[0, n] = np.sqrt(table[variances[n]])
        for g in range(group):
            _moments(
                at_means[head, g, start : start + size],
                lengths[g],
                of_pages[0],
                of_pages[1],
                of_pages[2],
                softcap,
                masses[head, g, start : start + size],
                shifts[head, g, start : start + size],
            )
