"""Inner products with planes of codes: the portable kernels, VNNI and torch agree to the bit."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from numba import njit

from wavekv.kernels.cpu_codes import HAS_VNNI, LANES, VECTOR
from wavekv.kernels.cpu_planes import (
    _dots_1,
    _dots_2,
    _portable_dots,
    _vnni_dots,
    lay_out_query,
    num_factors,
    plane_dots,
)
from wavekv.kernels.planes import num_words, pack_plane

SEEDS = st.integers(0, 2**31)


def callable_from_python(dots: Any) -> Any:
    """VNNI kernels are intrinsics, which only compiled code can call."""

    @njit
    def call(codes, query, count, step, keys, out):
        dots(codes, query, count, step, keys, out)

    return call


KERNELS = {
    "portable": {bits: _portable_dots(bits) for bits in (1, 2)},
    "in use": {1: callable_from_python(_dots_1), 2: callable_from_python(_dots_2)},
}
if HAS_VNNI:
    KERNELS["vnni"] = {bits: callable_from_python(_vnni_dots(bits)) for bits in (1, 2)}


@pytest.mark.parametrize("kernel", KERNELS)
@given(
    bits=st.sampled_from([1, 2]),
    count=st.integers(0, 6),
    gap=st.sampled_from([0, 1, 64]),
    keys=st.sampled_from([1, 2, 4, 8, 16]),
    seed=SEEDS,
)
def test_dots_are_sums_of_products(
    kernel: str, bits: int, count: int, gap: int, keys: int, seed: int
) -> None:
    rng = np.random.default_rng(seed)
    step, shifts = VECTOR + gap, 8 // bits
    codes = rng.integers(0, 256, count * step + VECTOR, np.uint8)
    query = rng.integers(-127, 128, (count, shifts, VECTOR)).astype(np.int8)
    out = np.full(LANES + 2, -7, np.int32)
    KERNELS[kernel][bits](
        codes.ctypes.data, query.ctypes.data, count, step, keys, out[1:].ctypes.data
    )
    sums = np.zeros(LANES, np.int64)
    for v in range(count):
        packed = codes[v * step : v * step + VECTOR]
        for k in range(shifts):
            products = (packed >> (bits * k) & (2**bits - 1)).astype(np.int64) * query[v, k]
            sums += products.reshape(LANES, 4).sum(1)
    expected = sums.reshape(-1, keys).sum(0)
    assert (out[1:-1] == np.tile(expected, LANES // keys)).all()
    assert out[0] == out[-1] == -7


@given(
    bits=st.sampled_from([1, 2]),
    dim=st.integers(1, 140),
    rows=st.sampled_from([1, 2, 3, 4, 5, 8, 16, 20, 32, 48]),
    seed=SEEDS,
)
def test_a_plane_times_a_query(bits: int, dim: int, rows: int, seed: int) -> None:
    random = torch.Generator().manual_seed(seed)
    codes = torch.randint(0, 2**bits, (rows, dim), generator=random, dtype=torch.uint8)
    query = torch.zeros(32 * num_words(dim, 1), dtype=torch.int8)
    query[:dim] = torch.randint(-127, 128, (dim,), generator=random)
    plane, words = pack_plane(codes, bits).numpy(), num_words(dim, bits)
    factors = np.full(num_factors(words, rows, bits) + 2, 77, np.int8)
    lay_out_query(query.numpy(), words, rows, bits, factors[1:-1])
    assert factors[0] == factors[-1] == 77
    out = np.full(max(rows, LANES) + 2, -7, np.int32)
    plane_dots(
        plane.ctypes.data,
        factors[1:].ctypes.data,
        query.numpy(),
        words,
        rows,
        bits,
        out[1:].ctypes.data,
    )
    assert out[0] == out[-1] == -7
    assert torch.equal(torch.from_numpy(out[1 : rows + 1]), (codes.int() @ query[:dim].int()).int())
