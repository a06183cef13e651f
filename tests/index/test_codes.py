"""Four-bit key codes: error bound, poison, layout."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from wavekv.index import encode_keys


def decode(codes: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    """Residuals [R, N, P, D], written from the layout's description."""
    low, high = (codes & 15).int() - 8, (codes >> 4).int() - 8
    return torch.cat([low, high], -1) * scale.float()[..., None]


@given(
    rows=st.integers(1, 3),
    pages=st.integers(1, 5),
    page_size=st.integers(1, 9),
    half=st.integers(1, 40),
    size=st.sampled_from([1e-6, 1.0, 1e4]),
    seed=st.integers(0, 2**31),
)
def test_error_is_at_most_half_a_step(rows, pages, page_size, half, size, seed) -> None:
    rng = torch.Generator().manual_seed(seed)
    keys = torch.randn(rows, pages, page_size, 2 * half, generator=rng) * size
    mean = keys.mean(2)
    counts = torch.full((rows, pages), page_size)
    codes, scale = encode_keys(keys, mean, counts, dtype=torch.float32)
    assert codes.shape == (rows, pages, page_size, half)
    assert codes.dtype == torch.uint8
    residual = keys - mean.unsqueeze(2)
    error = (decode(codes, scale) - residual).abs().amax(-1)
    assert (error <= residual.abs().amax(-1) / 14 * 1.001).all()


def test_slots_beyond_the_count_decode_to_nothing() -> None:
    keys = torch.randn(1, 2, 4, 8)
    keys[0, 0, 2:] = torch.nan
    codes, scale = encode_keys(
        keys, torch.zeros(1, 2, 8), torch.tensor([[2, 4]]), dtype=torch.float32
    )
    residual = decode(codes, scale)
    assert (residual[0, 0, 2:] == 0).all()
    assert (residual[0, 0, :2] != 0).any()


def test_an_odd_head_dim_is_an_error() -> None:
    with pytest.raises(ValueError, match="even head_dim, got 3"):
        encode_keys(
            torch.zeros(1, 1, 2, 3), torch.zeros(1, 1, 3), torch.ones(1, 1), dtype=torch.float32
        )
