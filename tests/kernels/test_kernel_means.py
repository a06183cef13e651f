"""Rows of means as small integers: rounded once, packed again without loss."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from wavekv.kernels.means import KEY_BITS, VALUE_BITS, pack_rows, unpack_rows

BITS = [KEY_BITS, VALUE_BITS]


def rows_of(seed: int, dim: int, exponent: int) -> Tensor:
    """Rows [3, 5, dim] of many magnitudes; one is nothing, one has a single component."""
    random = torch.Generator().manual_seed(seed)
    rows = torch.randn(3, 5, dim, generator=random)
    rows *= 2.0 ** torch.randint(-4, 5, (3, 5, 1), generator=random)
    rows[0, 0] = 0
    rows[1, 1, 1:] = 0
    return rows * 2.0**exponent


@given(
    seed=st.integers(0, 10**6),
    dim=st.integers(1, 70),
    dtype=st.sampled_from([torch.float32, torch.bfloat16, torch.float16]),
    bits=st.sampled_from(BITS),
    exponent=st.integers(-8, 8),
)
def test_what_is_unpacked_is_packed_again_without_loss(
    seed: int, dim: int, dtype: torch.dtype, bits: int, exponent: int
) -> None:
    rows = rows_of(seed, dim, exponent)
    codes, scale = pack_rows(rows, bits)
    assert codes.shape[-1] == (dim if bits == KEY_BITS else -(-dim // 2))
    assert scale.dtype == torch.float32
    rounded = unpack_rows(codes, scale, dim, dtype)
    assert rounded.dtype == dtype
    again = pack_rows(rounded, bits)
    assert torch.equal(unpack_rows(*again, dim, dtype), rounded)
    # a power of two, no larger than it must be
    assert (torch.frexp(scale).mantissa == 0.5).all()
    largest, most = rows.abs().amax(-1), 2 ** (bits - 1) - 1
    assert (largest <= most * scale).all()
    assert ((2 * largest > most * scale) | (largest == 0)).all()
    assert ((rounded.float() - rows).abs() <= 0.5 * scale.unsqueeze(-1)).all()


@pytest.mark.gpu
@pytest.mark.parametrize("bits", BITS)
def test_a_device_packs_as_the_cpu(bits: int) -> None:
    most = 2 ** (bits - 1) - 1
    edges = torch.tensor([2.0**k * most for k in range(-9, 10)])
    edges = torch.cat([edges, edges.nextafter(edges + 1), edges.nextafter(edges * 0)])
    rows = torch.cat([edges[:, None] * torch.tensor([1.0, 0.3, -0.7]), torch.zeros(1, 3)])
    rows = torch.cat([rows, rows_of(3, 3, 0).flatten(0, 1)])
    for ours, theirs in zip(pack_rows(rows.cuda(), bits), pack_rows(rows, bits), strict=True):
        assert torch.equal(ours.cpu(), theirs)


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
