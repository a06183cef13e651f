"""The estimated attention over the pages that were not selected (numba)."""

# mypy: disallow-untyped-decorators=False
from typing import Any

import numpy as np
from numba import njit, prange
from numba.np.numpy_support import carray

from wavekv.kernels.cpu_math import FASTMATH, LOG2_E, NEG_INF, PRANGE, float32_at, int64_at, offset
from wavekv.kernels.cpu_state import BLOCK, UNROLL, absorb, join_splits


@njit(fastmath=FASTMATH, nogil=True, cache=True)
def _add_lean(weights: Any, shifts: Any, n: int, slope: Any, acc: Any) -> None:
    """acc [G, D] += (weights . shifts) [G, :n] times the span's slope [G, D]."""
    group, width = acc.shape
    for g in range(group):
        shift = np.float32(0.0)
        for t in range(n):
            shift += weights[g, t] * shifts[g, t]
        for d in range(width):
            acc[g, d] += shift * slope[g, d]


@njit(fastmath=FASTMATH, nogil=True, cache=True)
def _weigh_pages(
    log_mass: Any,
    value: int,
    value_stride: int,
    dtype: int,
    selected: Any,
    shift: Any,
    slope: Any,
    span_pages: int,
    first: int,
    peak: Any,
    total: Any,
    acc: Any,
) -> None:
    """Add the unselected pages of log_mass [G, n] to the state; its column 0 is page `first`.

    shift: [G, n]. slope: [G, S, D] of all spans; an empty one means none, and shift is not read.
    """
    group, width = acc.shape
    pages = log_mass.shape[1]
    values = np.empty(BLOCK, np.int64)
    logits = np.empty((group, BLOCK), np.float32)
    shifts = np.empty((group, BLOCK), np.float32)
    scratch = np.empty((UNROLL, width), np.float32)
    taken = np.zeros(pages, np.bool_)
    for m in range(selected.size):
        if first <= selected[m] < first + pages:
            taken[selected[m] - first] = True
    filled = 0
    for n in range(pages):
        live = False
        for g in range(group):
            live |= log_mass[g, n] > NEG_INF
            logits[g, filled] = log_mass[g, n] * LOG2_E
            if slope.size > 0:
                shifts[g, filled] = shift[g, n]
        # An empty page's value mean may be NaN: it must not be read.
        if live and not taken[n]:
            values[filled] = value + n * value_stride
            filled += 1
        # a block lies within one span
        ends = n == pages - 1 or (slope.size > 0 and (first + n + 1) % span_pages == 0)
        if filled == BLOCK or (ends and filled > 0):
            absorb(logits, values, filled, dtype, peak, total, acc, scratch)
            if slope.size > 0:
                _add_lean(logits, shifts, filled, slope[:, (first + n) // span_pages], acc)
            filled = 0


@njit(fastmath=FASTMATH, nogil=True, cache=True, parallel=PRANGE.copy())
def estimate(
    batch: int,
    kv_heads: int,
    splits: int,
    group: int,
    width: int,
    pages: int,
    log_mass: int,
    value_mean: Any,
    selected: int,
    num_selected: int,
    shift: int,
    slope: int,
    span_pages: int,
    out: int,
    lse: int,
) -> None:
    """The state over the pages of the view value_mean that are not in selected [B, Hkv, M].

    log_mass, selected, shift, slope (both may be 0), out and lse are addresses.
    """
    tasks = batch * kv_heads * splits
    masses = carray(float32_at(log_mass), (batch * kv_heads, group, pages))
    shifts = carray(float32_at(shift), (batch * kv_heads, group, pages if slope else 0))
    spans = (pages + span_pages - 1) // span_pages if slope else 0
    slopes = carray(float32_at(slope), (batch * kv_heads, group, spans, width))
    peak = np.full((tasks, group), NEG_INF, np.float32)
    total = np.zeros((tasks, group), np.float32)
    acc = np.zeros((tasks, group, width), np.float32)
    for index in prange(tasks):
        task: Any = np.int64(index)  # prange counts unsigned, which would mix into floats
        head, split = task // splits, task % splits
        first, last = split * pages // splits, (split + 1) * pages // splits
        _weigh_pages(
            masses[head, :, first:last],
            offset(value_mean, head // kv_heads, head % kv_heads, first),
            value_mean[4],
            value_mean[1],
            carray(int64_at(selected + head * num_selected * 8), (num_selected,)),
            shifts[head, :, first:last],
            slopes[head],
            span_pages,
            first,
            peak[task],
            total[task],
            acc[task],
        )
    join_splits(splits, peak, total, acc, out, lse)
