"""The estimated attention over the pages of an index of two levels (numba)."""

# mypy: disallow-untyped-decorators=False
from typing import Any

import numpy as np
from numba import njit, prange
from numba.np.numpy_support import carray

from wavekv.kernels.cpu_math import (
    FASTMATH,
    LOG2_E,
    NEG_INF,
    PRANGE,
    exp2,
    float32_at,
    int64_at,
    offset,
    uint8_at,
)
from wavekv.kernels.cpu_state import join_splits

_PAGES = 64
"""Pages weighed at once, or one block if that has more."""
_REFINED, _SELECTED = np.uint8(1), np.uint8(2)


@njit(fastmath=FASTMATH, nogil=True, cache=True)
def _add_nibbles(packed: Any, middle: Any, weights: Any, row: Any, acc: Any) -> None:
    """acc [G, D] += weights [G] times codes, two to a byte of packed [D / 2], less the middle one.
    row [D]: scratch."""
    half, width = packed.size, row.size
    for d in range(half):
        row[d] = np.float32(np.int32(packed[d] & np.uint8(15))) - middle
    for d in range(width - half):
        row[half + d] = np.float32(np.int32(packed[d] >> np.uint8(4))) - middle
    for g in range(weights.size):
        w, a = weights[g], acc[g]
        for d in range(width):
            a[d] += w * row[d]


@njit(fastmath=FASTMATH, nogil=True, cache=True)
def _weigh(
    log_mass: Any, status: Any, first: int, n: int, peak: Any, total: Any, acc: Any, weights: Any
) -> None:
    """weights [G, :n] of pages first to first + n, 0 where selected, in the running state of which
    acc [2, G, D] is shrunk where a larger mass has come."""
    group, width = weights.shape[0], acc.shape[2]
    for g in range(group):
        line, row = log_mass[g], weights[g]
        top = peak[g]
        for t in range(n):
            x = line[first + t] * LOG2_E
            x = NEG_INF if status[first + t] == _SELECTED else x
            row[t] = x
            top = max(top, x)
        if top == NEG_INF:  # all empty so far for this head, and -inf - -inf would be NaN
            row[:n] = np.float32(0.0)
            continue
        if top > peak[g]:
            shrink = exp2(peak[g] - top)
            total[g] *= shrink
            for k in range(2):
                for d in range(width):
                    acc[k, g, d] *= shrink
            peak[g] = top
        mass = np.float32(0.0)
        for t in range(n):
            w = exp2(row[t] - top)
            row[t] = w
            mass += w
        total[g] += mass


@njit(fastmath=FASTMATH, nogil=True, cache=True)
def _mix_back(residual: Any, mixing: Any, acc: Any) -> None:
    """acc [G, D] += residual [G, D] times the transpose of mixing [D, D]."""
    group, width = acc.shape
    for d in range(width):
        row = mixing[d]
        for g in range(group):
            total = np.float32(0.0)
            for e in range(width):
                total += residual[g, e] * row[e]
            acc[g, d] += total


@njit(fastmath=FASTMATH, nogil=True, cache=True, parallel=PRANGE.copy())
def estimate(
    batch: int,
    kv_heads: int,
    splits: int,
    group: int,
    width: int,
    blocks: int,
    block_pages: int,
    log_mass: int,
    value: Any,
    value_step: Any,
    block_value: Any,
    block_scale: Any,
    table: int,
    mixing: int,
    selected: int,
    num_selected: int,
    refined: int,
    num_refined: int,
    shift: int,
    slope: int,
    span_pages: int,
    out: int,
    lse: int,
) -> None:
    """The state over the pages that are not in selected [B, Hkv, M]; those in refined [B, Hkv, R]
    have their own mean values. Addresses (shift and slope may be 0), and views of the parts of a
    `PageIndex`."""
    heads, pages = batch * kv_heads, blocks * block_pages
    tasks = heads * splits
    masses = carray(float32_at(log_mass), (heads, group, pages))
    shifts = carray(float32_at(shift), (heads, group, pages if slope else 0))
    spans = (pages + span_pages - 1) // span_pages if slope else 0
    slopes = carray(float32_at(slope), (heads, group, spans, width))
    chosen = carray(int64_at(selected), (heads, num_selected))
    own = carray(int64_at(refined), (heads, num_refined))
    steps = carray(float32_at(table), (256,))
    matrix = carray(float32_at(mixing), (width, width))
    status = np.zeros((heads, pages), np.uint8)
    for head in range(heads):
        for m in range(num_refined):
            if own[head, m] >= 0:
                status[head, own[head, m]] = _REFINED
        for m in range(num_selected):
            if chosen[head, m] >= 0:
                status[head, chosen[head, m]] = _SELECTED
    peak = np.full((tasks, group), NEG_INF, np.float32)
    total = np.zeros((tasks, group), np.float32)
    acc = np.zeros((tasks, 2, group, width), np.float32)
    at_once, half = max(1, _PAGES // block_pages), (width + 1) // 2
    for index in prange(tasks):
        task: Any = np.int64(index)  # prange counts unsigned, which would mix into floats
        head, split = task // splits, task % splits
        b, h = head // kv_heads, head % kv_heads
        weights = np.empty((group, at_once * block_pages), np.float32)
        mass, row = np.empty(group, np.float32), np.empty(width, np.float32)
        state = acc[task]
        block, last = split * blocks // splits, (split + 1) * blocks // splits
        while block < last:
            end = min(last, block + at_once)
            first, span = block * block_pages, 0
            if slope:
                # what is weighed together lies within one span
                span = first // span_pages
                end = min(end, max(block + 1, (span + 1) * span_pages // block_pages))
            n = (end - block) * block_pages
            _weigh(masses[head], status[head], first, n, peak[task], total[task], state, weights)
            for k in range(end - block):
                unit = carray(float32_at(offset(block_scale, b, h, block + k)), (1,))[0]
                for g in range(group):
                    mass[g] = np.float32(0.0)
                    for t in range(k * block_pages, (k + 1) * block_pages):
                        mass[g] += weights[g, t]
                    mass[g] *= unit
                packed = carray(uint8_at(offset(block_value, b, h, block + k)), (half,))
                _add_nibbles(packed, np.float32(8.0), mass, row, state[0])
            for t in range(n):
                if status[head, first + t] == _REFINED:
                    byte = carray(uint8_at(offset(value_step, b, h, first + t)), (1,))[0]
                    for g in range(group):
                        mass[g] = weights[g, t] * steps[byte]
                    packed = carray(uint8_at(offset(value, b, h, first + t)), (half,))
                    _add_nibbles(packed, np.float32(7.5), mass, row, state[1])
            if slope:
                for g in range(group):
                    lean = np.float32(0.0)
                    for t in range(n):
                        lean += weights[g, t] * shifts[head, g, first + t]
                    for d in range(width):
                        state[0, g, d] += lean * slopes[head, g, span, d]
            block = end
        _mix_back(state[1], matrix, state[0])
    join_splits(splits, peak, total, acc[:, 0].copy(), out, lse)
