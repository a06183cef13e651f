"""Exact attention of one query per head over selected pages, in place (numba).

Each KV head's pages are cut into `splits` tasks. `splits` comes from shapes alone, so the result is
the same to the bit on any number of threads.
"""

# mypy: disallow-untyped-decorators=False
from typing import Any

import numpy as np
from numba import njit, prange
from numba.np.numpy_support import carray

from wavekv.kernels.cpu_math import FASTMATH, FLOAT32, NEG_INF, PRANGE, int32_at, int64_at
from wavekv.kernels.cpu_page_codec import UNIT_BYTES, decode_row, open_page
from wavekv.kernels.cpu_state import BLOCK, UNROLL, attend_block, join_splits, scaled_query


@njit(fastmath=FASTMATH, nogil=True, cache=True)
def _attend_list(
    query: Any,
    chunks: Any,
    chunk_pages: int,
    page_size: int,
    dtype: int,
    bits: Any,
    page_bytes: int,
    page_ids: Any,
    counts: Any,
    softcap: Any,
    peak: Any,
    total: Any,
    acc: Any,
) -> bool:
    """Attend to page_ids [n]; False where an id or a count lies outside what the chunks hold."""
    width = acc.shape[1]
    is_coded = bits[0] > 0
    row_type = FLOAT32 if is_coded else dtype
    row_bytes = width * (4 if row_type == FLOAT32 else 2)
    keys = np.empty(BLOCK, np.int64)
    values = np.empty(BLOCK, np.int64)
    logits = np.empty((acc.shape[0], BLOCK), np.float32)
    scratch = np.empty((UNROLL, width), np.float32)
    # of pages of small integers: a block of rows, and what codes of the page at hand stand for
    tokens = np.empty((2, BLOCK if is_coded else 0, width), np.float32)
    offset, step = np.empty((2, width), np.float32), np.empty((2, width), np.float32)
    rows = (page_size * bits + 7) // 8
    for t in range(tokens.shape[1]):
        keys[t], values[t] = tokens[0, t].ctypes.data, tokens[1, t].ctypes.data
    filled = 0
    for m in range(page_ids.size):
        page, count = page_ids[m], counts[m]
        if page < 0:
            continue
        if page >= chunks.size * chunk_pages or count < 0 or count > page_size:
            return False
        at = chunks[page // chunk_pages] + (page % chunk_pages) * page_bytes
        key_codes = at + UNIT_BYTES
        value_codes = key_codes + (rows[0] + 2) * width
        if is_coded:
            open_page(at, rows, offset, step)
        for t in range(count):
            if is_coded:
                # fmt: off
                decode_row(key_codes, rows[0], bits[0], t, offset[0], step[0], tokens[0, filled])
                decode_row(value_codes, rows[1], bits[1], t, offset[1], step[1], tokens[1, filled])
                # fmt: on
            else:
                keys[filled] = at + t * row_bytes
                values[filled] = at + (page_size + t) * row_bytes
            filled += 1
            if filled == BLOCK:
                # fmt: off
                attend_block(query, keys, values, filled, row_type, row_type, softcap, logits,
                             scratch, peak, total, acc)
                # fmt: on
                filled = 0
    # fmt: off
    attend_block(query, keys, values, filled, row_type, row_type, softcap, logits, scratch, peak,
                 total, acc)
    # fmt: on
    return True


@njit(fastmath=FASTMATH, nogil=True, cache=True, parallel=PRANGE.copy())
def attend_pages(
    heads: int,
    splits: int,
    group: int,
    width: int,
    pages: int,
    query: int,
    chunks: Any,
    chunk_pages: int,
    page_size: int,
    dtype: int,
    bits: Any,
    page_bytes: int,
    page_ids: int,
    counts: int,
    scale: Any,
    softcap: Any,
    out: int,
    lse: int,
) -> bool:
    """The state over page_ids [heads, pages]; False where an id or a count is out of range.

    chunks holds their addresses; query, page_ids, counts, out and lse are addresses. bits: [2], of
    keys and of values, for pages of small integers; zeros for pages of `dtype`.
    """
    tasks = heads * splits
    peak = np.full((tasks, group), NEG_INF, np.float32)
    total = np.zeros((tasks, group), np.float32)
    acc = np.zeros((tasks, group, width), np.float32)
    ok = np.ones(tasks, np.bool_)
    for index in prange(tasks):
        task: Any = np.int64(index)  # prange counts unsigned, which would mix into floats
        head, split = task // splits, task % splits
        first, last = split * pages // splits, (split + 1) * pages // splits
        start = head * pages + first
        scaled = scaled_query(query + head * group * width * 4, group, width, scale)
        ids = carray(int64_at(page_ids + start * 8), (last - first,))
        held = carray(int32_at(counts + start * 4), (last - first,))
        # fmt: off
        ok[task] = _attend_list(scaled, chunks, chunk_pages, page_size, dtype, bits, page_bytes,
                                ids, held, softcap, peak[task], total[task], acc[task])
        # fmt: on
    join_splits(splits, peak, total, acc, out, lse)
    return bool(ok.all())
