"""The largest of many numbers, without sorting them all (numba)."""

# mypy: disallow-untyped-decorators=False
from typing import Any

import numpy as np
from numba import njit

from wavekv.kernels.cpu_math import FASTMATH

_BINS = 1024


@njit(fastmath=FASTMATH, nogil=True, cache=True)
def _bounds(values: Any) -> Any:
    least, most = values[0], values[0]
    for x in values:
        least = min(least, x)
        most = max(most, x)
    return least, most


@njit(nogil=True, cache=True)
def _fill_bins(values: Any, least: Any, most: Any, bins: Any, counts: Any) -> None:
    """bins [n]: which of equal intervals from least to most a value lies in; counts of each. A
    number that overflowed lands in some bin too."""
    counts[:] = 0
    spread = most - least
    factor = np.float32(_BINS - 1) / spread if spread > np.float32(0.0) else np.float32(0.0)
    for i in range(values.size):
        bins[i] = min(max(np.int32((values[i] - least) * factor), 0), _BINS - 1)
    for i in range(values.size):
        counts[bins[i]] += 1


@njit(nogil=True, cache=True)
def top_positions(values: Any, ties: Any, count: int, bins: Any, out: Any) -> Any:
    """Write the positions of the `count` largest values, in any order; return how many there are.

    A histogram of equal intervals finds the one that holds the last of them; only that one is
    sorted. values [n] float32, finite and spanning less than their type can hold. ties [n]: of
    equal values those with the lower tie go first; None: the lower position. bins [n] int32:
    scratch.
    """
    n = values.size
    if count >= n:
        for i in range(n):
            out[i] = i
        return n
    if count <= 0:
        return 0
    counts = np.empty(_BINS, np.int64)
    least, most = _bounds(values)
    _fill_bins(values, least, most, bins, counts)
    edge, above = _BINS - 1, 0
    while above + counts[edge] < count:
        above += counts[edge]
        edge -= 1
    at_edge = np.empty(counts[edge], np.int64)
    filled, num_edge = 0, 0
    for i in range(n):
        if bins[i] > edge:
            out[filled] = i
            filled += 1
        elif bins[i] == edge:
            at_edge[num_edge] = i
            num_edge += 1
    if ties is not None:
        at_edge = at_edge[np.argsort(ties[at_edge])]
    order = np.argsort(-values[at_edge], kind="mergesort")
    for i in range(count - filled):
        out[filled + i] = at_edge[order[i]]
    return count
