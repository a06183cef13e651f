"""The mass and shift of candidate pages from quantised keys (numba)."""

# mypy: disallow-untyped-decorators=False
from typing import Any

import numpy as np
from numba import njit, prange
from numba.np.numpy_support import carray

from wavekv.kernels.cpu_math import (
    FASTMATH,
    LN_2,
    LOG2_E,
    NEG_INF,
    PRANGE,
    exp2,
    float32_at,
    int32_at,
    int64_at,
    offset,
    row_at,
    tanh,
    uint8_at,
)
from wavekv.kernels.cpu_state import scaled_query


@njit(fastmath=FASTMATH, nogil=True, cache=True)
def _mass_and_shift(logits: Any, offsets: Any) -> Any:
    """The log of the sum of exp(logits), and the offsets' mean by those weights less their plain
    mean. All [count]."""
    peak = NEG_INF
    for x in logits:
        peak = max(peak, x)
    total, weighted, plain = np.float32(0.0), np.float32(0.0), np.float32(0.0)
    for p in range(logits.size):
        w = exp2((logits[p] - peak) * LOG2_E)
        total += w
        weighted += w * offsets[p]
        plain += offsets[p]
    shift = weighted / total - plain / np.float32(logits.size)
    return peak + np.log2(total) * LN_2, shift


@njit(fastmath=FASTMATH, nogil=True, cache=True)
def _refine_page(
    query: Any,
    mean: Any,
    codes: int,
    code_scale: Any,
    count: int,
    softcap: Any,
    logits: Any,
    offsets: Any,
    row: Any,
) -> None:
    """Of the first `count` tokens of one page: logits [G, P], and offsets [G, P] of the logits from
    that of the mean, before the soft cap. row [D]: scratch."""
    group, width = query.shape
    half = width // 2
    for g in range(group):
        x = np.float32(0.0)
        for d in range(width):
            x += query[g, d] * mean[d]
        for p in range(count):
            logits[g, p] = x
    for p in range(count):
        packed = carray(uint8_at(codes + p * half), (half,))
        for d in range(half):
            row[d] = np.float32(np.int32(packed[d] & np.uint8(15)) - np.int32(8))
            row[half + d] = np.float32(np.int32(packed[d] >> np.uint8(4)) - np.int32(8))
        for g in range(group):
            x = np.float32(0.0)
            for d in range(width):
                x += query[g, d] * row[d]
            offsets[g, p] = code_scale[p] * x
            x = logits[g, p] + offsets[g, p]
            if softcap > np.float32(0.0):
                x = softcap * tanh(x / softcap)
            logits[g, p] = x


@njit(fastmath=FASTMATH, nogil=True, cache=True, parallel=PRANGE.copy())
def refine(
    batch: int,
    kv_heads: int,
    splits: int,
    group: int,
    width: int,
    page_size: int,
    pages: int,
    num_candidates: int,
    query: int,
    mean: Any,
    codes: Any,
    code_scale: Any,
    counts: Any,
    candidates: int,
    scale: Any,
    softcap: Any,
    log_mass: int,
    shift: int,
) -> None:
    """Overwrite log_mass and shift [B, Hq, N] at the candidates [B, Hkv, C] (-1: none). Addresses
    and views; codes is a view of bytes."""
    masses = carray(float32_at(log_mass), (batch * kv_heads, group, pages))
    shifts = carray(float32_at(shift), (batch * kv_heads, group, pages))
    chosen = carray(int64_at(candidates), (batch * kv_heads, num_candidates))
    for index in prange(batch * kv_heads * splits):
        task: Any = np.int64(index)
        head, split = task // splits, task % splits
        b, h = head // kv_heads, head % kv_heads
        q = scaled_query(query + head * group * width * 4, group, width, scale)
        logits = np.empty((group, page_size), np.float32)
        offsets = np.empty((group, page_size), np.float32)
        scratch = np.empty((3, max(width, page_size)), np.float32)
        buffer, stride = scratch.ctypes.data, 4 * scratch.shape[1]
        first, last = split * num_candidates // splits, (split + 1) * num_candidates // splits
        for slot in range(first, last):
            n = chosen[head, slot]
            if n < 0:
                continue
            count = carray(int32_at(offset(counts, b, h, n)), (1,))[0]
            if count <= 0:
                masses[head, :, n] = NEG_INF
                shifts[head, :, n] = np.float32(0.0)
                continue
            mu = row_at(offset(mean, b, h, n), mean[1], width, buffer)
            steps = row_at(offset(code_scale, b, h, n), code_scale[1], page_size, buffer + stride)
            at = offset(codes, b, h, n)
            _refine_page(q, mu, at, steps, count, softcap, logits, offsets, scratch[2])
            for g in range(group):
                state = _mass_and_shift(logits[g, :count], offsets[g, :count])
                masses[head, g, n], shifts[head, g, n] = state
