"""The estimated mass and shift of every page, from its statistics (numba)."""

# mypy: disallow-untyped-decorators=False
from typing import Any

import numpy as np
from numba import njit, prange
from numba.np.numpy_support import carray

from wavekv.kernels.cpu_math import (
    FASTMATH,
    NEG_INF,
    PRANGE,
    float32_at,
    int32_at,
    offset,
    row_at,
    tanh,
)
from wavekv.kernels.cpu_state import scaled_query


@njit(fastmath=FASTMATH, nogil=True, cache=True)
def _score_pages(
    query: Any,
    b: int,
    h: int,
    first: int,
    mean: Any,
    variance: Any,
    counts: Any,
    softcap: Any,
    scratch: Any,
    log_mass: Any,
    shift: Any,
) -> None:
    """log_mass, shift [G, n] of the n pages from `first` on of KV head (b, h)."""
    group, width = query.shape
    squares = np.zeros(group, np.float32)
    for g in range(group):
        for d in range(width):
            squares[g] += query[g, d] * query[g, d]
    last_count, log_count = np.int32(1), np.float32(0.0)
    for n in range(log_mass.shape[1]):
        count = carray(int32_at(offset(counts, b, h, first + n)), (1,))[0]
        if count <= 0:
            log_mass[:, n] = NEG_INF
            shift[:, n] = np.float32(0.0)
            continue
        if count != last_count:  # nearly all pages are full: one logarithm serves them all
            last_count, log_count = count, np.log(np.float32(count))
        mu = row_at(offset(mean, b, h, first + n), mean[1], width, scratch.ctypes.data)
        page_variance = np.float32(0.0)
        if variance[0] != 0:
            page_variance = carray(float32_at(offset(variance, b, h, first + n)), (1,))[0]
        for g in range(group):
            q = query[g]
            x = np.float32(0.0)
            for d in range(width):
                x += q[d] * mu[d]
            bend = np.float32(1.0)  # the derivative of the cap
            if softcap > np.float32(0.0):
                capped = tanh(x / softcap)
                x = softcap * capped
                bend = np.float32(1.0) - capped * capped
            page_shift = np.float32(0.0)
            if variance[0] != 0:
                uncapped = squares[g] * page_variance
                spread = uncapped * bend * bend
                page_shift = uncapped * bend
                if spread <= np.float32(2.0) * log_count:
                    x += np.float32(0.5) * spread
                else:
                    x += np.sqrt(np.float32(2.0) * log_count * spread) - log_count
                    page_shift *= np.sqrt(np.float32(2.0) * log_count / spread)
            log_mass[g, n] = log_count + x
            shift[g, n] = page_shift


@njit(fastmath=FASTMATH, nogil=True, cache=True, parallel=PRANGE.copy())
def score(
    batch: int,
    kv_heads: int,
    splits: int,
    group: int,
    width: int,
    pages: int,
    query: int,
    mean: Any,
    variance: Any,
    counts: Any,
    scale: Any,
    softcap: Any,
    log_mass: int,
    shift: int,
) -> None:
    """Write log_mass and shift [B, Hq, N] from the views mean, variance (address 0: none), counts.

    query, log_mass and shift are addresses.
    """
    masses = carray(float32_at(log_mass), (batch * kv_heads, group, pages))
    shifts = carray(float32_at(shift), (batch * kv_heads, group, pages))
    for index in prange(batch * kv_heads * splits):
        task: Any = np.int64(index)  # prange counts unsigned, which would mix into floats
        head, split = task // splits, task % splits
        first, last = split * pages // splits, (split + 1) * pages // splits
        _score_pages(
            scaled_query(query + head * group * width * 4, group, width, scale),
            head // kv_heads,
            head % kv_heads,
            first,
            mean,
            variance,
            counts,
            softcap,
            np.empty(width, np.float32),
            masses[head, :, first:last],
            shifts[head, :, first:last],
        )
