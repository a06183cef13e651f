"""The nearest keys of queries by inner product: means, then codes, then the keys (numba)."""

# mypy: disallow-untyped-decorators=False
from typing import Any

import numpy as np
from numba import njit, prange
from numba.np.numpy_support import carray

from wavekv.kernels.cpu_codes import (
    LANES,
    VECTOR,
    byte_dots,
    lay_out_query,
    page_dots,
    quantise_query,
)
from wavekv.kernels.cpu_math import (
    FASTMATH,
    NEG_INF,
    PRANGE,
    float32_at,
    int32_at,
    int64_at,
    row_at,
    uint8_at,
)
from wavekv.kernels.cpu_top import top_positions


@njit(fastmath=FASTMATH, nogil=True, cache=True, parallel=PRANGE.copy())
def score_means(
    heads: int,
    num_queries: int,
    width: int,
    pages: int,
    query: int,
    codes: Any,
    scales: Any,
    out: int,
) -> None:
    """out [H, Q, N] = queries [H, Q, W] times page means. Addresses; of codes and scales a pair:
    address, and bytes from head to head. W and N are multiples of 4 and 16."""
    queries = carray(float32_at(query), (heads, num_queries, width))
    scores = carray(float32_at(out), (heads, num_queries, pages))
    vectors = width // 4
    for index in prange(heads * num_queries):
        task: Any = np.int64(index)
        h, i = task // num_queries, task % num_queries
        query_codes = np.empty(width, np.int8)
        plane = np.empty(vectors * VECTOR, np.int8)
        sums = np.empty(LANES, np.int32)
        unit, total = quantise_query(queries[h, i], query_codes)
        lay_out_query(query_codes, LANES, plane)
        scale = carray(float32_at(scales[0] + h * scales[1]), (pages,))
        centre = np.int32(128) * total
        for block in range(pages // LANES):
            at = codes[0] + h * codes[1] + block * vectors * VECTOR
            byte_dots(at, plane.ctypes.data, vectors, VECTOR, 0, LANES, sums.ctypes.data)
            for lane in range(LANES):
                n = block * LANES + lane
                scores[h, i, n] = unit * scale[n] * np.float32(sums[lane] - centre)


@njit(nogil=True, cache=True, parallel=PRANGE.copy())
def top_pages(rows: int, pages: int, count: int, rank: int, out: int) -> None:
    """out [rows, count]: the pages of the highest rank [rows, N], ascending."""
    ranks = carray(float32_at(rank), (rows, pages))
    chosen = carray(int64_at(out), (rows, count))
    for index in prange(rows):
        row: Any = np.int64(index)
        bins = np.empty(pages, np.int32)
        top_positions(ranks[row], None, count, bins, chosen[row])
        chosen[row].sort()


@njit(fastmath=FASTMATH, nogil=True, cache=True)
def _scan_page(sums: Any, centre: Any, mean: Any, step: Any, shares: Any, out: Any) -> None:
    """out [P]: inner products of the keys of a page, from sums of their codes."""
    for p in range(out.size):
        out[p] = mean + step * np.float32(shares[p]) * np.float32(sums[p] - centre)


@njit(fastmath=FASTMATH, nogil=True, cache=True)
def _dot(query: Any, row: Any) -> Any:
    total = np.float32(0.0)
    for d in range(row.size):
        total += query[d] * row[d]
    return total


@njit(nogil=True, cache=True)
def _write_best(found: Any, who: Any, bins: Any, out_scores: Any, out_ids: Any) -> Any:
    """The best of the candidates, best first, lower ids first among equals; then padding."""
    best = np.empty(out_scores.size, np.int64)
    count = top_positions(found, who, out_scores.size, bins, best)
    best = best[:count]
    best = best[np.argsort(who[best])]
    best = best[np.argsort(-found[best], kind="mergesort")]
    for i in range(count):
        out_scores[i], out_ids[i] = found[best[i]], who[best[i]]
    out_scores[count:] = NEG_INF
    out_ids[count:] = -1
    return count


@njit(nogil=True, cache=True, parallel=PRANGE.copy())
def search_pages(
    heads: int,
    num_queries: int,
    width: int,
    code_groups: int,
    page_size: int,
    pages: int,
    max_pages: int,
    num_candidates: int,
    k: int,
    query: int,
    code_query: int,
    means: int,
    chosen: int,
    codes: Any,
    code_scale: Any,
    page_scale: Any,
    keys: Any,
    ids: Any,
    tail: Any,
    tail_start: int,
    scores: int,
    found_ids: int,
    counts: int,
) -> None:
    """Write scores and ids [H, Q, k], and counts [H, Q]. Addresses; of parts of the index a tuple:
    address, and bytes from head to head; of keys and tail also the dtype, the bytes from page to
    page (of the tail: how many keys it has) and from key to key."""
    queries = carray(float32_at(query), (heads, num_queries, width))
    code_queries = carray(float32_at(code_query), (heads, num_queries, 8 * code_groups))
    mean_scores = carray(float32_at(means), (heads, num_queries, pages))
    chosen_pages = carray(int64_at(chosen), (heads, num_queries, max_pages))
    out_scores = carray(float32_at(scores), (heads, num_queries, k))
    out_ids = carray(int64_at(found_ids), (heads, num_queries, k))
    out_counts = carray(int64_at(counts), (heads, num_queries))
    half = 4 * code_groups
    page_bytes = half * page_size
    most = max_pages * page_size
    for index in prange(heads * num_queries):
        task: Any = np.int64(index)
        h, i = task // num_queries, task % num_queries
        q = queries[h, i]
        mean_of, pages_of = mean_scores[h, i], chosen_pages[h, i]
        num_pages = max_pages
        while num_pages > 0 and pages_of[num_pages - 1] < 0:
            num_pages -= 1
        row = np.empty(width, np.float32)
        estimates = np.empty(most, np.float32)
        positions = np.empty(most, np.int64)
        bins = np.empty(most + tail[3], np.int32)
        size = num_pages * page_size
        if size > num_candidates:
            query_codes = np.empty(2 * half, np.int8)
            planes = np.empty((2, page_bytes), np.int8)
            sums = np.empty(max(LANES, page_size), np.int32)
            unit, total = quantise_query(code_queries[h, i], query_codes)
            lay_out_query(query_codes[:half], page_size, planes[0])
            lay_out_query(query_codes[half:], page_size, planes[1])
            steps = carray(float32_at(page_scale[0] + h * page_scale[1]), (pages,))
            for j in range(num_pages):
                n = pages_of[j]
                at = codes[0] + h * codes[1] + n * page_bytes
                page_dots(at, planes.ctypes.data, code_groups, page_size, sums.ctypes.data)
                shares_at = code_scale[0] + h * code_scale[1] + n * page_size
                shares = carray(uint8_at(shares_at), (page_size,))
                part = estimates[j * page_size : (j + 1) * page_size]
                step = unit * steps[n] / np.float32(255.0)
                _scan_page(sums, np.int32(8) * total, mean_of[n], step, shares, part)
        num_found = top_positions(estimates[:size], None, num_candidates, bins, positions)
        found = np.empty(num_found + tail[3], np.float32)
        who = np.empty(num_found + tail[3], np.int64)
        id_of = carray(int32_at(ids[0] + h * ids[1]), (pages * page_size,))
        for c in range(num_found):
            n, p = pages_of[positions[c] // page_size], positions[c] % page_size
            at = keys[0] + h * keys[1] + n * keys[3] + p * keys[4]
            who[c] = id_of[n * page_size + p]
            found[c] = _dot(q, row_at(at, keys[2], width, row.ctypes.data))
        for t in range(tail[3]):
            at = tail[0] + h * tail[1] + t * tail[4]
            who[num_found + t] = tail_start + t
            found[num_found + t] = _dot(q, row_at(at, tail[2], width, row.ctypes.data))
        out_counts[h, i] = _write_best(found, who, bins, out_scores[h, i], out_ids[h, i])
