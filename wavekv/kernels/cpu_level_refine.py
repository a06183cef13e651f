"""The mass and shift of candidate pages from planes of their keys' codes (numba)."""

# mypy: disallow-untyped-decorators=False
from typing import Any

import numpy as np
from numba import njit, prange
from numba.np.numpy_support import carray

from wavekv.kernels.cpu_codes import LANES
from wavekv.kernels.cpu_math import (
    FASTMATH,
    LN_2,
    LOG2_E,
    NEG_INF,
    PRANGE,
    exp2,
    float32_at,
    int8_at,
    int32_at,
    int64_at,
    offset,
    tanh,
    uint8_at,
)
from wavekv.kernels.cpu_planes import lay_out_heads, plane_dots

_BLOCK = 64
"""Candidates worked on at once: what follows the inner products runs across pages, in vectors."""
_HIGH_BITS, _LOW_BITS = 2, 1


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
    weights of the logits of its keys before the cap, less their plain mean.

    base [m]: logits of the mean keys as stored. sums [P, m]: codes times query codes; centre: what
    codes in the middle give; unit: the worth of a step of the query. steps [P, m]: of each key.
    counts [m] >= 1. scratch: [4, P, m].
    """
    page_size, pages = sums.shape
    offsets, logits = scratch[0], scratch[1]
    total, plain = scratch[2, 0], scratch[3, 0]
    plain[:] = np.float32(0.0)
    masses[:] = NEG_INF
    for p in range(page_size):
        for j in range(pages):
            x = unit * steps[p, j] * (np.float32(sums[p, j]) - centre)
            y = base[j] + x
            if softcap > np.float32(0.0):
                y = softcap * tanh(y / softcap)
            is_held = p < counts[j]
            x = x if is_held else np.float32(0.0)
            y = y if is_held else NEG_INF
            offsets[p, j] = x
            plain[j] += x
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
        shifts[j] = shifts[j] / total[j] - plain[j] / np.float32(counts[j])
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
    mixed: int,
    worth: int,
    table: int,
    logits: int,
    counts: Any,
    high: Any,
    low: Any,
    key_step: Any,
    use_low: bool,
    candidates: int,
    softcap: Any,
    log_mass: int,
    shift: int,
) -> None:
    """Overwrite log_mass and shift [B, Hq, N] at the candidates [B, Hkv, C] (-1: none). Addresses,
    and views of the parts of a `PageIndex`; logits [B, Hq, N]: of mean keys."""
    masses = carray(float32_at(log_mass), (batch * kv_heads, group, pages))
    shifts = carray(float32_at(shift), (batch * kv_heads, group, pages))
    at_means = carray(float32_at(logits), (batch * kv_heads, group, pages))
    chosen = carray(int64_at(candidates), (batch * kv_heads, num_candidates))
    codes = carray(int8_at(mixed), (batch * kv_heads, group, code_width))
    units = carray(float32_at(worth), (batch * kv_heads, group))
    steps_of = carray(float32_at(table), (256,))
    high_words, low_words = (width * _HIGH_BITS + 31) // 32, (width * _LOW_BITS + 31) // 32
    middle = np.float32(3.5) if use_low else np.float32(3.0)
    upper = lay_out_heads(codes, high_words, page_size, _HIGH_BITS)
    lower = lay_out_heads(codes, low_words if use_low else 0, page_size, _LOW_BITS)
    for index in prange(batch * kv_heads * splits):
        task: Any = np.int64(index)
        head, split = task // splits, task % splits
        b, h = head // kv_heads, head % kv_heads
        centres = np.zeros(group, np.float32)
        for g in range(group):
            for d in range(width):
                centres[g] += middle * np.float32(codes[head, g, d])
        # of the pages of a block
        page_ids = np.empty(_BLOCK, np.int64)
        held = np.ones(_BLOCK, np.int32)
        base = np.zeros((group, _BLOCK), np.float32)
        sums = np.zeros((group, page_size, _BLOCK), np.int32)
        steps = np.zeros((page_size, _BLOCK), np.float32)
        scratch = np.empty((4, page_size, _BLOCK), np.float32)
        states = np.empty((2, _BLOCK), np.float32)
        lanes = np.empty((2, max(LANES, page_size)), np.int32)
        first_lane, second_lane = lanes[0].ctypes.data, lanes[1].ctypes.data
        ours = carray(int32_at(first_lane), (page_size,))
        theirs = carray(int32_at(second_lane), (page_size,))
        slot, last = split * num_candidates // splits, (split + 1) * num_candidates // splits
        while slot < last:
            m = 0
            while slot < last and m < _BLOCK:
                n = chosen[head, slot]
                slot += 1
                if n < 0:
                    continue
                count = np.int32(carray(uint8_at(offset(counts, b, h, n)), (1,))[0])
                if count <= 0:
                    masses[head, :, n] = NEG_INF
                    shifts[head, :, n] = np.float32(0.0)
                    continue
                page_ids[m], held[m] = n, count
                own_steps = carray(uint8_at(offset(key_step, b, h, n)), (page_size,))
                for p in range(page_size):
                    steps[p, m] = steps_of[own_steps[p]]
                at_high, at_low = offset(high, b, h, n), offset(low, b, h, n)
                for g in range(group):
                    base[g, m] = at_means[head, g, n]
                    at = upper[head, g].ctypes.data
                    query = codes[head, g]
                    plane_dots(at_high, at, query, high_words, page_size, _HIGH_BITS, first_lane)
                    for p in range(page_size):
                        sums[g, p, m] = np.int32(2) * ours[p]
                    if use_low:
                        at = lower[head, g].ctypes.data
                        plane_dots(at_low, at, query, low_words, page_size, _LOW_BITS, second_lane)
                        for p in range(page_size):
                            sums[g, p, m] += theirs[p]
                m += 1
            for g in range(group):
                # of the whole block: what lies beyond m is left from before, and not used
                _mass_and_shift(
                    base[g],
                    sums[g],
                    centres[g],
                    units[head, g],
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
