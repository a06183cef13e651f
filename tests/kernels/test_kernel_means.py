"""Rows of means as small integers: what is rounded once is packed without loss."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from wavekv.kernels.means import KEY_BITS, VALUE_BITS, pack_rows, round_rows, unpack_rows

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
BITS = [KEY_BITS, VALUE_BITS]


def rows_of(seed: int, dim: int, dtype: torch.dtype, exponent: int) -> Tensor:
    """Rows [3, 5, dim] of many magnitudes; one is nothing, one has a single component."""
    random = torch.Generator().manual_seed(seed)
    rows = torch.randn(3, 5, dim, generator=random)
    rows *= 2.0 ** torch.randint(-4, 5, (3, 5, 1), generator=random)
    rows[0, 0] = 0
    rows[1, 1, 1:] = 0
    return (rows * 2.0**exponent).to(dtype)


@given(
    seed=st.integers(0, 10**6),
    dim=st.integers(1, 70),
    dtype=st.sampled_from(DTYPES),
    bits=st.sampled_from(BITS),
    exponent=st.integers(-8, 13),
)
def test_rounded_rows_are_packed_without_loss(
    seed: int, dim: int, dtype: torch.dtype, bits: int, exponent: int
) -> None:
    rows = rows_of(seed, dim, dtype, exponent)
    rounded = round_rows(rows, bits)
    assert rounded.dtype == dtype
    codes, scale = pack_rows(rounded, bits)
    assert codes.shape[-1] == (dim if bits == KEY_BITS else -(-dim // 2))
    assert scale.dtype == torch.float32
    assert torch.equal(unpack_rows(codes, scale, dim, dtype), rounded)
    assert torch.equal(round_rows(rounded, bits), rounded)
    # the scale is that of the rows themselves: a power of two, no larger than it must be
    assert torch.equal(scale, pack_rows(rows, bits)[1])
    assert (torch.frexp(scale).mantissa == 0.5).all()
    largest, most = rows.float().abs().amax(-1), 2 ** (bits - 1) - 1
    assert (largest <= most * scale).all()
    assert ((2 * largest > most * scale) | (largest == 0)).all()
    error = (rounded.float() - rows.float()).abs()
    is_inside = rows.float().abs() < 0.9 * torch.finfo(dtype).max
    assert (error <= 0.5 * scale.unsqueeze(-1))[is_inside].all()


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_the_largest_numbers_of_a_type_stay_finite(dtype: torch.dtype, bits: int) -> None:
    largest = torch.finfo(dtype).max
    rows = torch.tensor([[largest, -largest, largest / 2], [0.88 * largest, 0, 1]]).to(dtype)
    rounded = round_rows(rows, bits)
    assert rounded.isfinite().all()
    assert torch.equal(unpack_rows(*pack_rows(rounded, bits), 3, dtype), rounded)
    assert (rounded / rows)[0].min() > 0.7


@pytest.mark.gpu
@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_device_packs_as_the_cpu(dtype: torch.dtype, bits: int) -> None:
    most = 2 ** (bits - 1) - 1
    edges = torch.tensor([2.0**k * most for k in range(-9, 10)])
    edges = torch.cat([edges, edges.nextafter(edges + 1), edges.nextafter(edges * 0)])
    rows = torch.cat([edges[:, None] * torch.tensor([1.0, 0.3, -0.7]), torch.zeros(1, 3)])
    rows = torch.cat([rows.to(dtype), rows_of(3, 3, dtype, 0).flatten(0, 1)])
    for ours, theirs in zip(pack_rows(rows.cuda(), bits), pack_rows(rows, bits), strict=True):
        assert torch.equal(ours.cpu(), theirs)
    assert torch.equal(round_rows(rows.cuda(), bits).cpu(), round_rows(rows, bits))


@pytest.mark.parametrize("bits", BITS)
def test_the_largest_level_is_reached_and_not_passed(bits: int) -> None:
    most = 2 ** (bits - 1) - 1
    for exponent in (-3, 0, 5):
        rows = torch.tensor([[float(most), -float(most), 1.0, 0.0]]) * 2.0**exponent
        codes, scale = pack_rows(rows, bits)
        assert float(scale) == 2.0**exponent
        assert torch.equal(unpack_rows(codes, scale, 4, torch.float32), rows)
        beyond = rows.clone()
        beyond[0, 0] *= 1.01
        assert float(pack_rows(beyond, bits)[1]) == 2.0 ** (exponent + 1)


def test_four_bits_lie_in_halves() -> None:
    codes, scale = pack_rows(torch.tensor([[1.0, 2.0, 3.0, -7.0, 5.0]]), VALUE_BITS)
    assert float(scale) == 1
    assert codes.tolist() == [[9 + 16 * 1, 10 + 16 * 13, 11 + 16 * 8]]


@pytest.mark.parametrize("bits", BITS)
def test_no_rows(bits: int) -> None:
    codes, scale = pack_rows(torch.empty(2, 0, 6), bits)
    assert scale.shape == (2, 0)
    assert unpack_rows(codes, scale, 6, torch.float16).shape == (2, 0, 6)
