"""The largest of many numbers, without sorting them all (numba)."""

# mypy: disallow-untyped-decorators=False
from typing import Any

import numpy as np
from numba import njit

from wavekv.kernels.cpu_math import FASTMATH

_BINS = 256
_SAMPLE = 16
"""One number in so many is looked at to guess how large the wanted ones are."""
_MIN_SAMPLED = 2048
"""Fewer numbers are not worth a guess."""


@njit(fastmath=FASTMATH, nogil=True, cache=True)
def _bounds(values: Any) -> Any:
    least, most = values[0], values[0]
    for x in values:
        least = min(least, x)
        most = max(most, x)
    return least, most


@njit(fastmath=False, nogil=True, cache=True)
def _border(values: Any, count: int, bins: Any) -> Any:
    """Two numbers around the `count`-th largest value: at least `count` values reach the lower one,
    fewer exceed the upper (the ends of one of many equal intervals). bins [n]: scratch. A number
    that overflowed lands in some interval too."""
    least, most = _bounds(values)
    width = (most - least) / np.float32(_BINS)
    if not width > np.float32(0.0) or count >= values.size:
        return least, most
    for i in range(values.size):
        bins[i] = min(max(np.int32((values[i] - least) / width), 0), _BINS - 1)
    counts = np.zeros(_BINS, np.int64)
    for i in range(values.size):
        counts[bins[i]] += 1
    edge = _BINS - 1
    reached = counts[edge]
    while reached < count:
        edge -= 1
        reached += counts[edge]
    # further apart by the rounding of the division above, so that the interval is inside
    slack = np.float32(1e-3) * width
    low = least + np.float32(edge) * width - slack if edge > 0 else least
    return low, least + np.float32(edge + 1) * width + slack if edge < _BINS - 1 else most


@njit(fastmath=False, nogil=True, cache=True)
def _reach(values: Any, level: Any, out: Any) -> int:
    """Write the positions of the values that reach a level, ascending; return their number."""
    filled = 0
    for i in range(values.size):
        # stores always and counts after, since a branch would be guessed wrong often
        out[filled] = i
        filled += values[i] >= level
    return filled


@njit(fastmath=False, nogil=True, cache=True)
def top_positions(values: Any, ties: Any, count: int, bins: Any, out: Any) -> Any:
    """Write the positions of the `count` largest values, in any order; return how many there are.

    A guess from a sample leaves a few more than are wanted, a histogram of those tells the border,
    and only what lies around it is sorted.

    values [n] float32. ties [n]: of equal values those with the lower tie go first; None:
    the lower position. bins [n] int32: scratch. out: room for n + 1 positions.
    """
    n = values.size
    if count >= n:
        for i in range(n):
            out[i] = i
        return n
    if count <= 0:
        return 0
    reached = n
    if n >= _MIN_SAMPLED:
        sample = values[::_SAMPLE].copy()
        expected = count // _SAMPLE
        wanted = min(sample.size, expected + expected // 4 + 16)
        reached = _reach(values, _border(sample, wanted, bins)[0], out)
        if reached < count:
            reached = n
    if reached == n:
        for i in range(n):
            out[i] = i
    few = values[out[:reached]]
    low, high = _border(few, count, bins)
    kept, between = 0, 0
    at_border = np.empty(reached + 1, np.int64)
    for i in range(reached):
        at_border[between] = out[i]
        between += (few[i] >= low) & (few[i] <= high)
        out[kept] = out[i]
        kept += few[i] > high
    if kept + between < count:
        # only where there is a NaN, which is nowhere in order: last of all
        out[:count] = np.argsort(-values)[:count]
        return count
    at_border = at_border[:between]
    if ties is not None:
        at_border = at_border[np.argsort(ties[at_border])]
    order = np.argsort(-values[at_border], kind="mergesort")
    for i in range(count - kept):
        out[kept + i] = at_border[order[i]]
    return count
