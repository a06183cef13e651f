"""Exact attention of one query per head over dense keys and values, in place (numba)."""

# mypy: disallow-untyped-decorators=False
from typing import Any

import numpy as np
from numba import njit, prange
from numba.np.numpy_support import carray

from wavekv.kernels.cpu_math import FASTMATH, NEG_INF, PRANGE, offset, uint8_at
from wavekv.kernels.cpu_state import BLOCK, UNROLL, attend_block, join_splits, scaled_query


@njit(fastmath=FASTMATH, nogil=True, cache=True)
def _attend_rows(
    query: Any,
    key: int,
    key_stride: int,
    key_dtype: int,
    value: int,
    value_stride: int,
    value_dtype: int,
    valid: Any,
    tokens: int,
    softcap: Any,
    peak: Any,
    total: Any,
    acc: Any,
) -> None:
    """Attend to `tokens` rows from these addresses on; an empty `valid` means all of them."""
    group, width = acc.shape
    keys = np.empty(BLOCK, np.int64)
    values = np.empty(BLOCK, np.int64)
    logits = np.empty((group, BLOCK), np.float32)
    scratch = np.empty((UNROLL, width), np.float32)
    filled = 0
    for s in range(tokens):
        if valid.size == 0 or valid[s] != 0:
            keys[filled] = key + s * key_stride
            values[filled] = value + s * value_stride
            filled += 1
        if filled == BLOCK or (s == tokens - 1 and filled > 0):
            # fmt: off
            attend_block(query, keys, values, filled, key_dtype, value_dtype, softcap, logits,
                         scratch, peak, total, acc)
            # fmt: on
            filled = 0


@njit(fastmath=FASTMATH, nogil=True, cache=True, parallel=PRANGE.copy())
def attend_dense(
    batch: int,
    kv_heads: int,
    splits: int,
    group: int,
    width: int,
    tokens: int,
    query: int,
    keys: Any,
    values: Any,
    valid: int,
    scale: Any,
    softcap: Any,
    out: int,
    lse: int,
) -> None:
    """The state over `tokens` rows of each KV head of the views keys and values.

    query, valid, out and lse are addresses; valid 0 means every token.
    """
    tasks = batch * kv_heads * splits
    peak = np.full((tasks, group), NEG_INF, np.float32)
    total = np.zeros((tasks, group), np.float32)
    acc = np.zeros((tasks, group, width), np.float32)
    for index in prange(tasks):
        task: Any = np.int64(index)  # prange counts unsigned, which would mix into floats
        head, split = task // splits, task % splits
        b, h = head // kv_heads, head % kv_heads
        first, last = split * tokens // splits, (split + 1) * tokens // splits
        _attend_rows(
            scaled_query(query + head * group * width * 4, group, width, scale),
            offset(keys, b, h, first),
            keys[4],
            keys[1],
            offset(values, b, h, first),
            values[4],
            values[1],
            carray(uint8_at(valid + b * tokens + first), (last - first if valid else 0,)),
            last - first,
            softcap,
            peak[task],
            total[task],
            acc[task],
        )
    join_splits(splits, peak, total, acc, out, lse)
