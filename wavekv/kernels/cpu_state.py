"""Accumulating an attention state over blocks of rows, and joining partial states (numba).

Logits are in base 2 here (natural logit * log2 e), so that one exp2 serves everywhere. A running
state of G heads is peak [G] (largest logit), total [G] (sum of 2**(logit - peak)) and acc [G, D]
(that sum times the values): the online softmax of Milakov and Gimelshein, arXiv:1805.02867.
"""

# mypy: disallow-untyped-decorators=False
from typing import Any

import numpy as np
from numba import njit
from numba.np.numpy_support import carray

from wavekv.kernels.cpu_math import FASTMATH, LN_2, LOG2_E, NEG_INF, exp2, float32_at, row_at, tanh

# Rows handled at once: enough for vector loops over a block, few enough to stay in the L1 cache.
BLOCK = 64
# Rows of values added together, so that the accumulator is loaded and stored once for all of them.
UNROLL = 4


@njit(fastmath=FASTMATH, nogil=True, cache=True)
def scaled_query(address: int, group: int, width: int, scale: Any) -> Any:
    """A scaled copy of the query rows [group, width] of one KV head."""
    source = carray(float32_at(address), (group, width))
    query = np.empty((group, width), np.float32)
    for g in range(group):
        for d in range(width):
            query[g, d] = source[g, d] * scale
    return query


@njit(fastmath=FASTMATH, nogil=True, cache=True)
def _dot_rows(
    query: Any, addresses: Any, n: int, dtype: int, softcap: Any, logits: Any, scratch: Any
) -> None:
    """logits [G, :n] = base-2 logits of the scaled query [G, D] and n key rows."""
    group, width = query.shape
    buffer = scratch.ctypes.data
    for t in range(n):
        row = row_at(addresses[t], dtype, width, buffer)
        for g in range(group):
            q = query[g]
            dot = np.float32(0.0)
            for d in range(width):
                dot += q[d] * row[d]
            logits[g, t] = dot
    for g in range(group):
        line = logits[g]
        if softcap > np.float32(0.0):
            for t in range(n):
                line[t] = softcap * tanh(line[t] / softcap) * LOG2_E
        else:
            for t in range(n):
                line[t] *= LOG2_E


@njit(fastmath=FASTMATH, nogil=True, cache=True)
def _add_values(weights: Any, addresses: Any, n: int, dtype: int, acc: Any, scratch: Any) -> None:
    """acc [G, D] += weights [G, :n] @ n value rows."""
    group, width = acc.shape
    buffer, line = scratch.ctypes.data, 4 * width
    whole = n - n % UNROLL
    for t in range(0, whole, UNROLL):
        v0 = row_at(addresses[t], dtype, width, buffer)
        v1 = row_at(addresses[t + 1], dtype, width, buffer + line)
        v2 = row_at(addresses[t + 2], dtype, width, buffer + 2 * line)
        v3 = row_at(addresses[t + 3], dtype, width, buffer + 3 * line)
        for g in range(group):
            a = acc[g]
            w0, w1, w2, w3 = weights[g, t], weights[g, t + 1], weights[g, t + 2], weights[g, t + 3]
            for d in range(width):
                a[d] += w0 * v0[d] + w1 * v1[d] + w2 * v2[d] + w3 * v3[d]
    for t in range(whole, n):
        v = row_at(addresses[t], dtype, width, buffer)
        for g in range(group):
            a = acc[g]
            w = weights[g, t]
            for d in range(width):
                a[d] += w * v[d]


@njit(fastmath=FASTMATH, nogil=True, cache=True)
def _absorb(
    logits: Any, values: Any, n: int, dtype: int, peak: Any, total: Any, acc: Any, scratch: Any
) -> None:
    """Add n value rows with base-2 logits [G, :n] to the running state. Overwrites logits."""
    group, width = acc.shape
    for g in range(group):
        line = logits[g]
        top = peak[g]
        for t in range(n):
            top = max(top, line[t])
        if top == NEG_INF:  # all empty so far for this head, and -inf - -inf would be NaN
            for t in range(n):
                line[t] = np.float32(0.0)
            continue
        if top > peak[g]:
            shrink = exp2(peak[g] - top)
            total[g] *= shrink
            a = acc[g]
            for d in range(width):
                a[d] *= shrink
            peak[g] = top
        mass = np.float32(0.0)
        for t in range(n):
            w = exp2(line[t] - top)
            line[t] = w
            mass += w
        total[g] += mass
    _add_values(logits, values, n, dtype, acc, scratch)


@njit(fastmath=FASTMATH, nogil=True, cache=True)
def attend_block(
    query: Any,
    keys: Any,
    values: Any,
    n: int,
    key_dtype: int,
    value_dtype: int,
    softcap: Any,
    logits: Any,
    scratch: Any,
    peak: Any,
    total: Any,
    acc: Any,
) -> None:
    """Add the n key and value rows at these addresses to the running state."""
    _dot_rows(query, keys, n, key_dtype, softcap, logits, scratch)
    _absorb(logits, values, n, value_dtype, peak, total, acc, scratch)


@njit(fastmath=FASTMATH, nogil=True, cache=True)
def join_splits(
    splits: int, peak: Any, total: Any, acc: Any, out_address: int, lse_address: int
) -> None:
    """Join the partial states of heads * splits tasks into out [heads, G, D], lse [heads, G]."""
    tasks, group, width = acc.shape
    heads = tasks // splits
    out = carray(float32_at(out_address), (heads, group, width))
    lse = carray(float32_at(lse_address), (heads, group))
    for head in range(heads):
        first = head * splits
        for g in range(group):
            row = out[head, g]
            row[:] = np.float32(0.0)
            top = NEG_INF
            for task in range(first, first + splits):
                top = max(top, peak[task, g])
            if top == NEG_INF:
                lse[head, g] = NEG_INF
                continue
            mass = np.float32(0.0)
            for task in range(first, first + splits):
                w = exp2(peak[task, g] - top)
                mass += w * total[task, g]
                a = acc[task, g]
                for d in range(width):
                    row[d] += w * a[d]
            for d in range(width):
                row[d] /= mass
            lse[head, g] = (top + np.log2(mass)) * LN_2
