"""Reading pages of files into memory with their checksums, without the interpreter (numba): a pool
of threads that read a page a call would wait for its lock most of the time."""

# mypy: disallow-untyped-decorators=False
from typing import Any

import numpy as np
from numba import njit, types

from wavekv.kernels.cpu_crc32 import crc32_at

MOST_BUFFERS = 512
"""Of one call; Linux takes 1024."""
_MOST_BYTES = 1 << 20
"""Of one call."""

# by name, so that what is compiled can be kept on disk
_preadv = types.ExternalFunction(
    "preadv", types.intp(types.int32, types.uintp, types.int32, types.int64)
)


@njit(fastmath=False, nogil=True, cache=True)
def read_pages(descriptors: Any, offsets: Any, addresses: Any, page_bytes: int, crcs: Any) -> Any:
    """Read pages [n] of files to memory at addresses [n], and write their CRCs [n]; all int64.

    Pages that follow each other in a file are one call. Returns how many pages were read: fewer
    than n if the system gave less than it was asked for.
    """
    buffers = np.empty((MOST_BUFFERS, 2), np.int64)
    most = max(1, _MOST_BYTES // page_bytes)
    first = 0
    while first < offsets.size:
        buffers[0, 0], buffers[0, 1] = addresses[first], page_bytes
        last, count = first + 1, 1
        while last < min(offsets.size, first + most):
            if descriptors[last] != descriptors[first]:
                break
            if offsets[last] != offsets[last - 1] + page_bytes:
                break
            if addresses[last] == addresses[last - 1] + page_bytes:
                buffers[count - 1, 1] += page_bytes
            elif count < MOST_BUFFERS:
                buffers[count, 0], buffers[count, 1] = addresses[last], page_bytes
                count += 1
            else:
                break
            last += 1
        got = _preadv(
            np.int32(descriptors[first]), buffers.ctypes.data, np.int32(count), offsets[first]
        )
        if got != (last - first) * page_bytes:
            return first
        for i in range(first, last):
            crcs[i] = crc32_at(addresses[i], page_bytes)
        first = last
    return first
