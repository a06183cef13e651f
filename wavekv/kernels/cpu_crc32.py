"""CRC-32 of many rows at once, and of rows joined together (numba); the polynomial is zlib's.

A CRC is the remainder of a polynomial over GF(2), so it is linear in the bits: sixteen bytes at a
time are sixteen table look-ups that are xored (table k says what a byte becomes once k more bytes
have followed it).
"""

# mypy: disallow-untyped-decorators=False
from typing import Any

import numpy as np
from numba import njit, prange
from numba.np.numpy_support import carray

from wavekv.kernels.cpu_math import PRANGE, int64_at, uint8_at

_POLYNOMIAL = 0xEDB88320
_STRIDE = 16
_LOW, _ALL = np.uint64(0xFF), np.uint32(0xFFFFFFFF)


def _tables() -> Any:
    """[16, 256] uint32."""
    tables = np.zeros((_STRIDE, 256), np.uint32)
    tables[0] = np.arange(256, dtype=np.uint32)
    for _ in range(8):
        tables[0] = (tables[0] >> 1) ^ np.where(tables[0] & 1, np.uint32(_POLYNOMIAL), 0)
    for k in range(1, _STRIDE):
        tables[k] = (tables[k - 1] >> 8) ^ tables[0][tables[k - 1] & 255]
    return tables


_TABLES = _tables()


@njit(fastmath=False, nogil=True, cache=True)
def crc32_at(address: int, nbytes: int) -> Any:
    """The CRC of the bytes at an address, by words of eight once it is aligned to them."""
    head = min((8 - address % 8) % 8, nbytes)
    steps = (nbytes - head) // _STRIDE
    words = carray(int64_at(address + head), (2 * steps,))
    octets = carray(uint8_at(address), (nbytes,))
    crc = _ALL
    for i in range(head):
        crc = (crc >> np.uint32(8)) ^ _TABLES[0, (crc ^ octets[i]) & 255]
    for step in range(steps):
        low = np.uint64(words[2 * step]) ^ np.uint64(crc)
        high = np.uint64(words[2 * step + 1])
        crc = (
            _TABLES[15, low & _LOW]
            ^ _TABLES[14, (low >> np.uint64(8)) & _LOW]
            ^ _TABLES[13, (low >> np.uint64(16)) & _LOW]
            ^ _TABLES[12, (low >> np.uint64(24)) & _LOW]
            ^ _TABLES[11, (low >> np.uint64(32)) & _LOW]
            ^ _TABLES[10, (low >> np.uint64(40)) & _LOW]
            ^ _TABLES[9, (low >> np.uint64(48)) & _LOW]
            ^ _TABLES[8, low >> np.uint64(56)]
            ^ _TABLES[7, high & _LOW]
            ^ _TABLES[6, (high >> np.uint64(8)) & _LOW]
            ^ _TABLES[5, (high >> np.uint64(16)) & _LOW]
            ^ _TABLES[4, (high >> np.uint64(24)) & _LOW]
            ^ _TABLES[3, (high >> np.uint64(32)) & _LOW]
            ^ _TABLES[2, (high >> np.uint64(40)) & _LOW]
            ^ _TABLES[1, (high >> np.uint64(48)) & _LOW]
            ^ _TABLES[0, high >> np.uint64(56)]
        )
    for i in range(head + steps * _STRIDE, nbytes):
        crc = (crc >> np.uint32(8)) ^ _TABLES[0, (crc ^ octets[i]) & 255]
    return crc ^ _ALL


@njit(fastmath=False, nogil=True, cache=True, parallel=PRANGE.copy())
def crc32_pages(chunks: Any, chunk_pages: int, page_bytes: int, ids: Any, out: Any) -> bool:
    """Write out [n] int64, the CRC of each page of ids [n]; False where an id is out of range.

    chunks [K] int64 holds the addresses of K times `chunk_pages` pages.
    """
    ok = np.ones(ids.size, np.bool_)
    for index in prange(ids.size):
        i: Any = np.int64(index)  # prange counts unsigned, which would mix into floats
        page = ids[i]
        if page < 0 or page >= chunks.size * chunk_pages:
            ok[i] = False
        else:
            at = chunks[page // chunk_pages] + (page % chunk_pages) * page_bytes
            out[i] = np.int64(crc32_at(at, page_bytes))
    return bool(ok.all())


@njit(fastmath=False, nogil=True, cache=True)
def _apply(operator: Any, crc: Any) -> Any:
    """The image of a CRC under a linear map [32] uint32, the images of its bits."""
    image = np.uint32(0)
    for bit in range(32):
        if (crc >> np.uint32(bit)) & np.uint32(1):
            image ^= operator[bit]
    return image


@njit(fastmath=False, nogil=True, cache=True)
def _composed(outer: Any, inner: Any) -> Any:
    composed = np.empty(32, np.uint32)
    for bit in range(32):
        composed[bit] = _apply(outer, inner[bit])
    return composed


@njit(fastmath=False, nogil=True, cache=True)
def _followed_by(nbytes: int) -> Any:
    """The linear map that takes the CRC of some bytes to its share in the CRC of these bytes and
    `nbytes` more: the map of one byte to the power `nbytes`, by squaring."""
    power, result = np.empty(32, np.uint32), np.empty(32, np.uint32)
    for bit in range(32):
        one = np.uint32(1) << np.uint32(bit)
        result[bit] = one
        power[bit] = (one >> np.uint32(8)) ^ _TABLES[0, one & np.uint32(255)]
    while nbytes:
        if nbytes & 1:
            result = _composed(power, result)
        power = _composed(power, power)
        nbytes >>= 1
    return result


@njit(fastmath=False, nogil=True, cache=True)
def crc32_joined(crcs: Any, nbytes: int, first: int) -> Any:
    """The CRC of blocks of `nbytes`, given theirs [n] int64, behind bytes whose CRC is `first`."""
    operator = _followed_by(nbytes)
    crc = np.uint32(first)
    for i in range(crcs.size):
        crc = _apply(operator, crc) ^ np.uint32(crcs[i])
    return np.int64(crc)
