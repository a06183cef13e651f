"""Merging two attention states (numba)."""

# mypy: disallow-untyped-decorators=False
from typing import Any

import numpy as np
from numba import njit, prange
from numba.np.numpy_support import carray

from wavekv.kernels.cpu_math import FASTMATH, NEG_INF, PRANGE, float32_at


# On its own: in a parallel loop numba takes stores to an array that nobody reads for dead code.
@njit(fastmath=FASTMATH, nogil=True, cache=True)
def _merge_row(
    r: int, width: int, out_a: int, lse_a: int, out_b: int, lse_b: int, out: int, lse: int
) -> None:
    """Row r of out [rows, width], lse [rows] = the union of states a and b, given by address."""
    row_a = carray(float32_at(out_a + 4 * r * width), (width,))
    row_b = carray(float32_at(out_b + 4 * r * width), (width,))
    mass_a = carray(float32_at(lse_a + 4 * r), (1,))[0]
    mass_b = carray(float32_at(lse_b + 4 * r), (1,))[0]
    row = carray(float32_at(out + 4 * r * width), (width,))
    mass = carray(float32_at(lse + 4 * r), (1,))
    top = max(mass_a, mass_b)
    if top == NEG_INF:
        row[:] = np.float32(0.0)
        mass[0] = NEG_INF
    else:
        a = np.exp(mass_a - top)
        b = np.exp(mass_b - top)
        both = a + b
        mass[0] = top + np.log(both)
        a /= both
        b /= both
        for d in range(width):
            row[d] = a * row_a[d] + b * row_b[d]


# A decode step merges a few rows, cheaper than waking the threads; prefill merges thousands. Two
# functions, because numba's cache on disk tells them apart by name and not by their options.
@njit(fastmath=FASTMATH, nogil=True, cache=True)
def merge_serial(
    rows: int, width: int, out_a: int, lse_a: int, out_b: int, lse_b: int, out: int, lse: int
) -> None:
    """Merge all rows, on this thread."""
    for r in range(rows):
        _merge_row(r, width, out_a, lse_a, out_b, lse_b, out, lse)


@njit(fastmath=FASTMATH, nogil=True, cache=True, parallel=PRANGE.copy())
def merge_parallel(
    rows: int, width: int, out_a: int, lse_a: int, out_b: int, lse_b: int, out: int, lse: int
) -> None:
    """Merge all rows, on all threads."""
    for index in prange(rows):
        r: Any = np.int64(index)  # prange counts unsigned
        _merge_row(r, width, out_a, lse_a, out_b, lse_b, out, lse)
