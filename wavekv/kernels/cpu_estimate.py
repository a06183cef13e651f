"""The estimated attention over the pages that were not selected (numba)."""

# mypy: disallow-untyped-decorators=False
from typing import Any

import numpy as np
from numba import njit, prange
from numba.np.numpy_support import carray

from wavekv.kernels.cpu_math import FASTMATH, LOG2_E, NEG_INF, PRANGE, float32_at, int64_at, offset
from wavekv.kernels.cpu_state import BLOCK, UNROLL, absorb, join_splits


@njit(fastmath=FASTMATH, nogil=True, cache=True)
def _weigh_pages(
    log_mass: Any,
    value: int,
    value_stride: int,
    dtype: int,
    selected: Any,
    first: int,
    peak: Any,
    total: Any,
    acc: Any,
) -> None:
    """Add the unselected pages of log_mass [G, n] to the state; its column 0 is page `first`."""
    group, width = acc.shape
    pages = log_mass.shape[1]
    values = np.empty(BLOCK, np.int64)
    logits = np.empty((group, BLOCK), np.float32)
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
        # An empty page's value mean may be NaN: it must not be read.
        if live and not taken[n]:
            values[filled] = value + n * value_stride
            filled += 1
        if filled == BLOCK or (n == pages - 1 and filled > 0):
            absorb(logits, values, filled, dtype, peak, total, acc, scratch)
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
    out: int,
    lse: int,
) -> None:
    """The state over the pages of the view value_mean that are not in selected [B, Hkv, M].

    log_mass, selected, out and lse are addresses.
    """
    tasks = batch * kv_heads * splits
    masses = carray(float32_at(log_mass), (batch * kv_heads, group, pages))
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
            first,
            peak[task],
            total[task],
            acc[task],
        )
    join_splits(splits, peak, total, acc, out, lse)
