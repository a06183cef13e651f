"""Tokens of pages that are stored as small integers, as rows of float32 (numba). The form of such a
page is `wavekv.kernels.page_codec`."""

# mypy: disallow-untyped-decorators=False
from typing import Any

import numpy as np
from numba import njit
from numba.np.numpy_support import carray

from wavekv.kernels.cpu_math import FASTMATH, float32_at, int8_at, uint8_at
from wavekv.kernels.page_codec import UNIT_BYTES as _UNIT_BYTES

UNIT_BYTES = np.int64(_UNIT_BYTES)


@njit(fastmath=FASTMATH, nogil=True, cache=True)
def open_page(page: int, rows: Any, offset: Any, step: Any) -> None:
    """Write the offsets [2, D] and steps [2, D] of the page at an address. rows: [2], of codes of
    keys and of values."""
    width = offset.shape[1]
    units = carray(float32_at(page), (4,))
    at = page + UNIT_BYTES
    for half in range(2):
        at += rows[half] * width
        offsets = carray(int8_at(at), (width,))
        steps = carray(uint8_at(at + width), (width,))
        for d in range(width):
            offset[half, d] = np.float32(offsets[d]) * units[2 * half]
            step[half, d] = np.float32(steps[d]) * units[2 * half + 1]
        at += 2 * width


@njit(fastmath=FASTMATH, nogil=True, cache=True)
def decode_row(
    codes: int, rows: int, bits: int, token: int, offset: Any, step: Any, out: Any
) -> None:
    """Write the numbers [D] of a token, of a half whose codes begin at an address."""
    width = out.size
    row = carray(uint8_at(codes + (token % rows) * width), (width,))
    shift = np.uint8(token // rows * bits)
    mask = np.uint8((1 << bits) - 1)
    for d in range(width):
        code = np.uint8(row[d] >> shift) & mask
        out[d] = offset[d] + step[d] * np.float32(code)
