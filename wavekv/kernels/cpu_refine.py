"""The mass and shift of candidate pages from quantised keys (numba)."""

# mypy: disallow-untyped-decorators=False
from typing import Any

import numpy as np
from numba import njit, prange
from numba.np.numpy_support import carray

from wavekv.kernels.cpu_codes import LANES, lay_out_query, page_dots, quantise_query
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

_BLOCK = 64
"""Candidates worked on at once: what follows the inner products runs across pages, in vectors."""


@njit(fastmath=False, nogil=True, cache=True)
def _lay_out_group(query: Any, page_size: int, planes: Any, scales: Any, centres: Any) -> None:
    """The queries [G, D] of a head as `page_dots` takes them: planes [G, 2, W / 2 * P] int8, the
    scales [G] of their codes, and centres [G], what key codes of zero give."""
    group, width = query.shape
    half_width = (width + 7) // 8 * 4
    codes = np.empty(2 * half_width, np.int8)
    for g in range(group):
        scales[g], total = quantise_query(query[g], codes)
        centres[g] = np.int32(8) * total
        lay_out_query(codes[:half_width], page_size, planes[g, 0])
        lay_out_query(codes[half_width:], page_size, planes[g, 1])


@njit(fastmath=FASTMATH, nogil=True, cache=True)
def _dots(queries: Any, row: Any, base: Any, m: int) -> None:
    """base [G, m] = queries [G, D] times row [D]."""
    for g in range(queries.shape[0]):
        total = np.float32(0.0)
        for d in range(row.size):
            total += queries[g, d] * row[d]
        base[g, m] = total


@njit(fastmath=FASTMATH, nogil=True, cache=True)
def _mass_and_shift(
    base: Any,
    sums: Any,
    centre: Any,
    unit: Any,
    steps: Any,
    counts: Any,
    softcap: Any,
    scratch: Any,
    masses: Any,
    shifts: Any,
) -> None:
    """masses [m]: the log of the sum of exp(logit) of each page; shifts [m]: the mean by those
    weights of what the logits of its keys lie above that of the mean key. The plain mean of that is
    0, and is made so.

    base [m]: logits of the mean keys. sums [P, m]: codes times query codes; centre: what codes of
    zero give; unit: the scale of the query codes. steps [P, m]: of each key. counts [m] >= 1.
    scratch: [4, P, m].
    """
    page_size, pages = sums.shape
    offsets, logits = scratch[0], scratch[1]
    total, plain = scratch[2, 0], scratch[3, 0]
    plain[:] = np.float32(0.0)
    for p in range(page_size):
        for j in range(pages):
            x = unit * steps[p, j] * np.float32(sums[p, j] - centre)
            x = x if p < counts[j] else np.float32(0.0)
            offsets[p, j] = x
            plain[j] += x
    for j in range(pages):
        plain[j] /= np.float32(counts[j])
    masses[:] = NEG_INF
    for p in range(page_size):
        for j in range(pages):
            offsets[p, j] -= plain[j]
            y = base[j] + offsets[p, j]
            if softcap > np.float32(0.0):
                y = softcap * tanh(y / softcap)
            y = y if p < counts[j] else NEG_INF
            logits[p, j] = y
            masses[j] = max(masses[j], y)
    total[:] = np.float32(0.0)
    shifts[:] = np.float32(0.0)
    for p in range(page_size):
        for j in range(pages):
            w = exp2((logits[p, j] - masses[j]) * LOG2_E)
            total[j] += w
            shifts[j] += w * offsets[p, j]
    for j in range(pages):
        shifts[j] /= total[j]
        masses[j] += np.log2(total[j]) * LN_2


@njit(fastmath=FASTMATH, nogil=True, cache=True, parallel=PRANGE.copy())
def refine(
    batch: int,
    kv_heads: int,
    splits: int,
    group: int,
    width: int,
    code_width: int,
    page_size: int,
    pages: int,
    num_candidates: int,
    query: int,
    code_query: int,
    mean: Any,
    codes: Any,
    code_scale: Any,
    page_scale: Any,
    counts: Any,
    candidates: int,
    scale: Any,
    softcap: Any,
    log_mass: int,
    shift: int,
) -> None:
    """Overwrite log_mass and shift [B, Hq, N] at the candidates [B, Hkv, C] (-1: none). Addresses
    and views; codes and code_scale are views of bytes."""
    masses = carray(float32_at(log_mass), (batch * kv_heads, group, pages))
    shifts = carray(float32_at(shift), (batch * kv_heads, group, pages))
    chosen = carray(int64_at(candidates), (batch * kv_heads, num_candidates))
    groups = (code_width + 7) // 8
    for index in prange(batch * kv_heads * splits):
        task: Any = np.int64(index)
        head, split = task // splits, task % splits
        b, h = head // kv_heads, head % kv_heads
        q = scaled_query(query + head * group * width * 4, group, width, scale)
        planes = np.empty((group, 2, groups * page_size * 4), np.int8)
        units = np.empty(group, np.float32)
        centres = np.empty(group, np.int32)
        y = scaled_query(code_query + head * group * code_width * 4, group, code_width, scale)
        _lay_out_group(y, page_size, planes, units, centres)
        # of the pages of a block
        page_ids = np.empty(_BLOCK, np.int64)
        held = np.ones(_BLOCK, np.int32)
        base = np.zeros((group, _BLOCK), np.float32)
        sums = np.zeros((group, page_size, _BLOCK), np.int32)
        steps = np.zeros((page_size, _BLOCK), np.float32)
        scratch = np.empty((4, page_size, _BLOCK), np.float32)
        states = np.empty((2, _BLOCK), np.float32)
        lanes = np.empty(max(LANES, page_size), np.int32)
        row = np.empty(width, np.float32)
        slot, last = split * num_candidates // splits, (split + 1) * num_candidates // splits
        while slot < last:
            m = 0
            while slot < last and m < _BLOCK:
                n = chosen[head, slot]
                slot += 1
                if n < 0:
                    continue
                count = carray(int32_at(offset(counts, b, h, n)), (1,))[0]
                if count <= 0:
                    masses[head, :, n] = NEG_INF
                    shifts[head, :, n] = np.float32(0.0)
                    continue
                page_ids[m], held[m] = n, count
                mu = row_at(offset(mean, b, h, n), mean[1], width, row.ctypes.data)
                _dots(q, mu, base, m)
                step = carray(float32_at(offset(page_scale, b, h, n)), (1,))[0] / np.float32(255.0)
                shares = carray(uint8_at(offset(code_scale, b, h, n)), (page_size,))
                for p in range(page_size):
                    steps[p, m] = step * np.float32(shares[p])
                at, plane = offset(codes, b, h, n), planes.ctypes.data
                for g in range(group):
                    page_dots(at, plane, groups, page_size, lanes.ctypes.data)
                    plane += 2 * groups * page_size * 4
                    for p in range(page_size):
                        sums[g, p, m] = lanes[p]
                m += 1
            for g in range(group):
                # of the whole block: what lies beyond m is left from before, and not used
                _mass_and_shift(
                    base[g],
                    sums[g],
                    centres[g],
                    units[g],
                    steps,
                    held,
                    softcap,
                    scratch,
                    states[0],
                    states[1],
                )
                for j in range(m):
                    masses[head, g, page_ids[j]] = states[0, j]
                    shifts[head, g, page_ids[j]] = states[1, j]
