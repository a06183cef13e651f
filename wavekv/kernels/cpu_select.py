"""Choosing pages by their share of the estimated mass (numba)."""

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
    float_to_bits,
    int64_at,
)


@njit(fastmath=FASTMATH, nogil=True, cache=True)
def _rank_pages(log_mass: Any, rank: Any) -> None:
    """rank [N] = sum over the group of softmax of log_mass [G, N]; -1 for an empty page."""
    group, pages = log_mass.shape
    rank[:] = np.float32(-1.0)
    weights = np.empty(pages, np.float32)
    for g in range(group):
        line = log_mass[g]
        top = NEG_INF
        for n in range(pages):
            top = max(top, line[n])
        if top == NEG_INF:
            continue
        mass = np.float32(0.0)
        for n in range(pages):
            w = exp2((line[n] - top) * LOG2_E)
            weights[n] = w
            mass += w
        for n in range(pages):
            if line[n] > NEG_INF:
                rank[n] = max(rank[n], np.float32(0.0)) + weights[n] / mass


@njit(fastmath=False, nogil=True, cache=True)
def _threshold(keys: Any, rank: Any, min_pages: int, max_pages: int, target: float) -> Any:
    """The rank bits of the last page to take, and how many pages of exactly that rank to take.

    A radix select from the highest byte down, over pages and their mass at once. On each level it
    enters the first bin within which the pages taken reach max_pages, or the target with min_pages.
    """
    counts = np.empty(256, np.int64)
    masses = np.empty(256, np.float64)
    prefix, mask = np.int32(0), np.int32(0)
    taken, mass, digit = 0, 0.0, 0
    for shift in (24, 16, 8, 0):
        counts[:] = 0
        masses[:] = 0.0
        for n in range(keys.size):
            if keys[n] >= 0 and keys[n] & mask == prefix:
                digit = (keys[n] >> shift) & 255
                counts[digit] += 1
                masses[digit] += rank[n]
        digit = 255
        while digit > 0:
            pages = taken + counts[digit]
            enough = mass + masses[digit] >= target and pages >= min_pages
            if counts[digit] > 0 and (pages >= max_pages or enough):
                break
            taken = pages
            mass += masses[digit]
            digit -= 1
        prefix |= np.int32(digit << shift)
        mask |= np.int32(255 << shift)
    # The last bin holds pages of one rank. At least one of them is needed: it is why we entered.
    value = masses[digit] / max(counts[digit], 1)
    ties = 1
    while taken + ties < max_pages and (mass + ties * value < target or taken + ties < min_pages):
        ties += 1
    return prefix, ties


@njit(fastmath=False, nogil=True, cache=True)
def _select_head(log_mass: Any, min_pages: int, top_p: float, page_index: Any) -> None:
    """page_index [M] of one KV head from log_mass [G, N], ascending, -1 padded."""
    pages = log_mass.shape[1]
    rank = np.empty(pages, np.float32)
    keys = np.empty(pages, np.int32)
    _rank_pages(log_mass, rank)
    live, total = 0, 0.0
    for n in range(pages):
        keys[n] = np.int32(-1)
        if rank[n] >= np.float32(0.0):
            keys[n] = float_to_bits(rank[n])
            live += 1
            total += rank[n]
    page_index[:] = -1
    max_pages = min(page_index.size, live)
    if max_pages == 0:
        return
    target = top_p * total if top_p > 0.0 else np.inf
    lowest, ties = _threshold(keys, rank, min_pages, max_pages, target)
    filled = 0
    for n in range(pages):
        if keys[n] == lowest:
            ties -= 1
        if keys[n] > lowest or (keys[n] == lowest and ties >= 0):
            page_index[filled] = n
            filled += 1


@njit(fastmath=False, nogil=True, cache=True, parallel=PRANGE.copy())
def select(
    heads: int,
    group: int,
    pages: int,
    max_pages: int,
    min_pages: int,
    top_p: float,
    log_mass: int,
    page_index: int,
) -> None:
    """Write page_index [heads, max_pages]. The last two are addresses; top_p 0 means none."""
    masses = carray(float32_at(log_mass), (heads, group, pages))
    chosen = carray(int64_at(page_index), (heads, max_pages))
    for head in prange(heads):
        _select_head(masses[head], min_pages, top_p, chosen[head])
