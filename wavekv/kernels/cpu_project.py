"""Inner products of rows with a weighted sum of them, block by block (numba)."""

# mypy: disallow-untyped-decorators=False
from typing import Any

import numpy as np
from numba import njit, prange
from numba.np.numpy_support import carray

from wavekv.kernels.cpu_math import FASTMATH, PRANGE, float32_at

_TINY = np.float32(1e-30)
_STRIP = 64


@njit(fastmath=FASTMATH, nogil=True, cache=True, parallel=PRANGE.copy())
def project(blocks: int, rows: int, width: int, x: int, weight: int, out: int) -> None:
    """out [b, n] from x [b, n, D] and weight [b, n], all float32 and contiguous: addresses."""
    points = carray(float32_at(x), (blocks, rows, width))
    weights = carray(float32_at(weight), (blocks, rows))
    scores = carray(float32_at(out), (blocks, rows))
    for index in prange(blocks):
        block: Any = np.int64(index)
        direction = np.zeros(width, np.float32)
        part = np.empty(width, np.float32)
        # in strips: weights often sum to zero, and a long sum would lose what is left
        for first in range(0, rows, _STRIP):
            part[:] = np.float32(0.0)
            for i in range(first, min(first + _STRIP, rows)):
                w = weights[block, i]
                for d in range(width):
                    part[d] += w * points[block, i, d]
            for d in range(width):
                direction[d] += part[d]
        largest = _TINY
        for d in range(width):
            largest = max(largest, abs(direction[d]))
        for d in range(width):
            direction[d] /= largest
        for i in range(rows):
            total = np.float32(0.0)
            for d in range(width):
                total += points[block, i, d] * direction[d]
            scores[block, i] = total
