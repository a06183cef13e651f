"""Inner products with packed codes: the portable kernels, VNNI and numpy agree to the bit."""

from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numba import njit

from wavekv.kernels.cpu_codes import (
    HAS_VNNI,
    LANES,
    VECTOR,
    _portable_dots,
    _vnni_dots,
    byte_dots,
    lay_out_query,
    nibble_dots,
    page_dots,
    quantise_query,
)

SEEDS = st.integers(0, 2**31)


def callable_from_python(dots: Any) -> Any:
    """VNNI kernels are intrinsics, which only compiled code can call."""

    @njit
    def call(codes, query, count, step, high, keys, out):
        dots(codes, query, count, step, high, keys, out)

    return call


KERNELS = {
    "portable": {is_nibble: _portable_dots(is_nibble) for is_nibble in (False, True)},
    "in use": {False: callable_from_python(byte_dots), True: callable_from_python(nibble_dots)},
}
if HAS_VNNI:
    KERNELS["vnni"] = {
        is_nibble: callable_from_python(_vnni_dots(is_nibble)) for is_nibble in (False, True)
    }


def extreme(rng: np.random.Generator, low: int, high: int, size: int, dtype: type) -> np.ndarray:
    """Random integers, many of them the least and the largest."""
    x = rng.integers(low, high + 1, size)
    ends = rng.random(size)
    return np.where(ends < 0.2, low, np.where(ends > 0.8, high, x)).astype(dtype)


@pytest.mark.parametrize("kernel", KERNELS)
@given(
    is_nibble=st.booleans(),
    count=st.integers(0, 20),
    gap=st.sampled_from([0, 1, 64]),
    keys=st.sampled_from([1, 2, 4, 8, 16]),
    seed=SEEDS,
)
def test_dots_are_sums_of_products(kernel, is_nibble, count, gap, keys, seed) -> None:
    rng = np.random.default_rng(seed)
    step = VECTOR + gap
    size = count * step + VECTOR
    codes = extreme(rng, 0, 255, size, np.uint8)
    query = extreme(rng, -127, 127, 2 * size, np.int8)
    out = np.full(LANES + 2, -7, np.int32)
    dots = KERNELS[kernel][is_nibble]
    dots(codes.ctypes.data, query.ctypes.data, count, step, size, keys, out[1:].ctypes.data)
    wanted = np.zeros(LANES, np.int64)
    for v in range(count):
        at = slice(v * step, v * step + VECTOR)
        packed = codes[at].astype(np.int64)
        products = (packed & 15 if is_nibble else packed) * query[at]
        if is_nibble:
            products = products + (packed >> 4) * query[size:][at]
        wanted += products.reshape(LANES, 4).sum(1)
    by_key = np.tile(wanted.reshape(-1, keys).sum(0), LANES // keys)
    assert out[1:-1].tolist() == by_key.tolist()
    assert out[0] == out[-1] == -7


@given(
    page_size=st.sampled_from([1, 2, 3, 4, 5, 8, 9, 16, 24, 32, 64, 256]),
    groups=st.integers(1, 20),
    seed=SEEDS,
)
def test_the_keys_of_a_page_meet_the_query(page_size, groups, seed) -> None:
    rng = np.random.default_rng(seed)
    half = 4 * groups
    # codes 0..15 [P, 2, half], as two nibbles in bytes [groups, P, 4]
    levels = extreme(rng, 0, 15, page_size * 2 * half, np.uint8).reshape(page_size, 2, half)
    by_group = levels.reshape(page_size, 2, groups, 4).transpose(1, 2, 0, 3)
    packed = np.ascontiguousarray(by_group[0] | (by_group[1] << 4))
    query = extreme(rng, -127, 127, 2 * half, np.int8)
    planes = np.empty((2, half * page_size), np.int8)
    for i in range(2):
        lay_out_query(query[i * half : (i + 1) * half], page_size, planes[i])
    wanted = levels.reshape(page_size, -1).astype(np.int64) @ query.astype(np.int64)
    room = max(page_size, LANES)
    out = np.full(room + 1, -7, np.int32)
    page_dots(packed.ctypes.data, planes.ctypes.data, groups, page_size, out.ctypes.data)
    assert out[:page_size].tolist() == wanted.tolist()
    assert out[-1] == -7


@given(
    width=st.integers(1, 130),
    padding=st.integers(0, 7),
    size=st.sampled_from([0.0, 1e-44, 1e-38, 1e-37, 1.0, 1e20, 3e38]),
    seed=SEEDS,
)
def test_a_quantised_query_is_close(width, padding, size, seed) -> None:
    rng = np.random.default_rng(seed)
    query = (rng.uniform(-1, 1, width) * size).astype(np.float32)
    codes = np.full(width + padding, 77, np.int8)
    unit, total = quantise_query(query, codes)
    assert (codes[width:] == 0).all()
    assert total == codes.astype(np.int64).sum()
    largest = float(np.abs(query).max())
    # numbers below the normal ones are as good as nothing
    if largest >= np.finfo(np.float32).tiny:
        assert unit == pytest.approx(largest / 127, rel=1e-5)
        assert np.abs(codes.astype(int)).max() == 127
        wanted = query.astype(np.float64) / largest * 127
        assert np.abs(codes[:width] - wanted).max() <= 0.5001
    else:
        assert unit == 0
        assert (codes == 0).all()


@given(groups=st.integers(1, 9), keys=st.integers(1, 20), seed=SEEDS)
def test_a_query_is_repeated_as_codes_lie(groups, keys, seed) -> None:
    codes = np.random.default_rng(seed).integers(-127, 128, 4 * groups).astype(np.int8)
    plane = np.empty(4 * groups * keys, np.int8)
    lay_out_query(codes, keys, plane)
    wanted = np.broadcast_to(codes.reshape(groups, 1, 4), (groups, keys, 4))
    assert np.array_equal(plane.reshape(groups, keys, 4), wanted)
