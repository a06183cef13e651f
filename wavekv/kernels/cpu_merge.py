"""Merging two attention states (numba)."""

# mypy: disallow-untyped-decorators=False
import numpy as np
from numba import njit, prange
from numba.np.numpy_support import carray

from wavekv.kernels.cpu_math import FASTMATH, NEG_INF, PRANGE, float32_at


def _merge(
    rows: int, width: int, out_a: int, lse_a: int, out_b: int, lse_b: int, out: int, lse: int
) -> None:
    """out [rows, width], lse [rows] = the union of states a and b, all given by address."""
    values_a = carray(float32_at(out_a), (rows, width))
    values_b = carray(float32_at(out_b), (rows, width))
    mass_a = carray(float32_at(lse_a), (rows,))
    mass_b = carray(float32_at(lse_b), (rows,))
    values = carray(float32_at(out), (rows, width))
    mass = carray(float32_at(lse), (rows,))
    for r in prange(rows):
        top = max(mass_a[r], mass_b[r])
        if top == NEG_INF:
            values[r] = np.float32(0.0)
            mass[r] = NEG_INF
        else:
            a = np.exp(mass_a[r] - top)
            b = np.exp(mass_b[r] - top)
            both = a + b
            mass[r] = top + np.log(both)
            a /= both
            b /= both
            row_a, row_b, row = values_a[r], values_b[r], values[r]
            for d in range(width):
                row[d] = a * row_a[d] + b * row_b[d]


# A decode step merges a few rows, cheaper than waking the threads; prefill merges thousands.
merge_serial = njit(fastmath=FASTMATH, nogil=True, cache=True)(_merge)
merge_parallel = njit(fastmath=FASTMATH, nogil=True, cache=True, parallel=PRANGE.copy())(_merge)
