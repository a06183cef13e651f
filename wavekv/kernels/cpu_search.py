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


@njit(fastmath=FASTMATH, nogil=True, cache=True)
def _score_means(query: Any, codes: int, scales: Any, out: Any) -> None:
    """out [N] = a query [W] times page means, from their codes. W and N are multiples of 4, 16."""
    vectors = query.size // 4
    query_codes = np.empty(query.size, np.int8)
    plane = np.empty(vectors * VECTOR, np.int8)
    sums = np.empty(LANES, np.int32)
    unit, total = quantise_query(query, query_codes)
    lay_out_query(query_codes, LANES, plane)
    centre = np.int32(128) * total
    at, factors, address = codes, plane.ctypes.data, sums.ctypes.data
    for first in range(0, out.size, LANES):
        byte_dots(at, factors, vectors, VECTOR, 0, LANES, address)
        at += vectors * VECTOR
        for lane in range(LANES):
            out[first + lane] = unit * scales[first + lane] * np.float32(sums[lane] - centre)
    plane[0] = 0  # alive until here, for its address


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
    address, and bytes from head to head."""
    queries = carray(float32_at(query), (heads, num_queries, width))
    scores = carray(float32_at(out), (heads, num_queries, pages))
    for index in prange(heads * num_queries):
        task: Any = np.int64(index)
        h, i = task // num_queries, task % num_queries
        scale = carray(float32_at(scales[0] + h * scales[1]), (pages,))
        _score_means(queries[h, i], codes[0] + h * codes[1], scale, scores[h, i])


@njit(fastmath=FASTMATH, nogil=True, cache=True)
def _rank_optimistically(query: Any, means: Any, spread: Any, optimism: Any, out: Any) -> None:
    """out [N]: products with the mean, plus what a page's best key may have more."""
    length = np.float32(0.0)
    for x in query:
        length += x * x
    reach = optimism * np.sqrt(length)
    for n in range(out.size):
        out[n] = means[n] + reach * spread[n]


@njit(fastmath=FASTMATH, nogil=True, cache=True)
def _scan_codes(
    query: Any,
    chosen: Any,
    means: Any,
    codes: int,
    shares: int,
    steps: Any,
    page_size: int,
    out: Any,
) -> None:
    """out [M * P] = a query [W] times the keys of the chosen pages [M], from their codes."""
    groups = query.size // 8
    page_bytes = 4 * groups * page_size
    query_codes = np.empty(query.size, np.int8)
    planes = np.empty((2, page_bytes), np.int8)
    unit, total = quantise_query(query, query_codes)
    lay_out_query(query_codes[: 4 * groups], page_size, planes[0])
    lay_out_query(query_codes[4 * groups :], page_size, planes[1])
    centre = np.int32(8) * total
    # each page may write a whole vector of sums
    sums = np.empty(chosen.size * page_size + LANES, np.int32)
    factors, address = planes.ctypes.data, sums.ctypes.data
    for j in range(chosen.size):
        at = address + 4 * j * page_size
        page_dots(codes + chosen[j] * page_bytes, factors, groups, page_size, at)
    for j in range(chosen.size):
        n = chosen[j]
        share = carray(uint8_at(shares + n * page_size), (page_size,))
        step, mean = unit * steps[n] / np.float32(255.0), means[n]
        first = j * page_size
        for p in range(page_size):
            x = np.float32(sums[first + p] - centre)
            out[first + p] = mean + step * np.float32(share[p]) * x
    planes[0, 0] = 0  # alive until here, for its address


@njit(fastmath=FASTMATH, nogil=True, cache=True)
def _dot(query: Any, row: Any) -> Any:
    total = np.float32(0.0)
    for d in range(row.size):
        total += query[d] * row[d]
    return total


@njit(fastmath=False, nogil=True, cache=True)
def _write_best(found: Any, who: Any, bins: Any, out_scores: Any, out_ids: Any) -> Any:
    """The best of the candidates, best first, lower ids first among equals; then padding."""
    best = np.empty(found.size + 1, np.int64)
    count = top_positions(found, who, out_scores.size, bins, best)
    best = best[:count]
    best = best[np.argsort(who[best])]
    best = best[np.argsort(-found[best], kind="mergesort")]
    for i in range(count):
        out_scores[i], out_ids[i] = found[best[i]], who[best[i]]
    out_scores[count:] = NEG_INF
    out_ids[count:] = -1
    return count


@njit(fastmath=False, nogil=True, cache=True, parallel=PRANGE.copy())
def search_pages(
    heads: int,
    num_queries: int,
    width: int,
    mean_width: int,
    code_width: int,
    page_size: int,
    pages: int,
    most: int,
    num_candidates: int,
    k: int,
    optimism: Any,
    query: int,
    turned: int,
    given: int,
    mean_codes: Any,
    mean_scale: Any,
    spread: Any,
    codes: Any,
    code_scale: Any,
    page_scale: Any,
    keys: Any,
    ids: Any,
    tail: Any,
    scores: int,
    found_ids: int,
    work: int,
) -> None:
    """Write scores and ids [H, Q, k], and work [4, H, Q]. Addresses (given: 0 for none); of parts
    of the index a tuple: address, and bytes from head to head; of keys and tail also the dtype, the
    bytes from page to page (of the tail: how many keys it has) and from key to key. See
    `wavekv.kernels.search`."""
    queries = carray(float32_at(query), (heads, num_queries, width))
    turned_queries = carray(float32_at(turned), (heads, num_queries, mean_width))
    given_pages = carray(int64_at(given), (heads, num_queries, most))
    out_scores = carray(float32_at(scores), (heads, num_queries, k))
    out_ids = carray(int64_at(found_ids), (heads, num_queries, k))
    out_work = carray(int64_at(work), (4, heads, num_queries))
    needs_codes = given != 0 or most < pages
    for index in prange(heads * num_queries):
        task: Any = np.int64(index)
        h, i = task // num_queries, task % num_queries
        q, y = queries[h, i], turned_queries[h, i]
        bins = np.empty(max(pages, most * page_size) + tail[3], np.int32)
        chosen = np.empty(pages + 1, np.int64)
        means = np.empty(pages if needs_codes else 0, np.float32)
        if needs_codes:
            scale = carray(float32_at(mean_scale[0] + h * mean_scale[1]), (pages,))
            _score_means(y, mean_codes[0] + h * mean_codes[1], scale, means)
        if given != 0:
            num_pages = 0
            while num_pages < most and 0 <= given_pages[h, i, num_pages] < pages:
                chosen[num_pages] = given_pages[h, i, num_pages]
                num_pages += 1
        elif most < pages:
            rank = np.empty(pages, np.float32)
            spreads = carray(float32_at(spread[0] + h * spread[1]), (pages,))
            _rank_optimistically(y, means, spreads, optimism, rank)
            num_pages = top_positions(rank, None, most, bins, chosen)
        else:
            num_pages = pages
            chosen[:pages] = np.arange(pages)
        size = num_pages * page_size
        positions = np.empty(size + 1, np.int64)
        if needs_codes and num_candidates < size:
            estimates = np.empty(size, np.float32)
            _scan_codes(
                y[:code_width],
                chosen[:num_pages],
                means,
                codes[0] + h * codes[1],
                code_scale[0] + h * code_scale[1],
                carray(float32_at(page_scale[0] + h * page_scale[1]), (pages,)),
                page_size,
                estimates,
            )
            num_found = top_positions(estimates, None, num_candidates, bins, positions)
        else:
            num_found = size
            positions[:size] = np.arange(size)
        found = np.empty(num_found + tail[3], np.float32)
        who = np.empty(num_found + tail[3], np.int64)
        row = np.empty(width, np.float32)
        buffer = row.ctypes.data
        id_of = carray(int32_at(ids[0] + h * ids[1]), (pages * page_size,))
        for c in range(num_found):
            n, p = chosen[positions[c] // page_size], positions[c] % page_size
            at = keys[0] + h * keys[1] + n * keys[3] + p * keys[4]
            who[c] = id_of[n * page_size + p]
            found[c] = _dot(q, row_at(at, keys[2], width, buffer))
        for t in range(tail[3]):
            at = tail[0] + h * tail[1] + t * tail[4]
            who[num_found + t] = pages * page_size + t
            found[num_found + t] = _dot(q, row_at(at, tail[2], width, buffer))
        row[0] = 0.0  # alive until here, for its address
        out_work[0, h, i] = _write_best(found, who, bins, out_scores[h, i], out_ids[h, i])
        out_work[1, h, i] = means.size
        out_work[2, h, i] = size + tail[3]
        out_work[3, h, i] = num_found + tail[3]
