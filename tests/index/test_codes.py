"""Codes of keys and of page means: error bounds, poison, layout."""

import torch
from hypothesis import given
from hypothesis import strategies as st

from wavekv.index.codes import decode_keys, decode_means, encode_keys, encode_means


@given(
    rows=st.integers(1, 3),
    pages=st.integers(1, 5),
    page_size=st.integers(1, 9),
    width=st.integers(1, 80),
    size=st.sampled_from([1e-6, 1.0, 1e4]),
    seed=st.integers(0, 2**31),
)
def test_the_error_of_a_key_is_bounded(rows, pages, page_size, width, size, seed) -> None:
    rng = torch.Generator().manual_seed(seed)
    keys = torch.randn(rows, pages, page_size, width, generator=rng) * size
    keys *= torch.rand(rows, pages, page_size, 1, generator=rng)
    mean = keys.mean(2)
    counts = torch.full((rows, pages), page_size)
    made = encode_keys(keys, mean, counts)
    assert made.codes.shape == (rows, pages, -(-width // 8), page_size, 4)
    residual = keys - mean.unsqueeze(2)
    decoded = decode_keys(made)
    assert (decoded[..., width:] == 0).all()
    largest = residual.abs().amax(-1)
    bound = largest / 14 + largest.amax(-1, keepdim=True) / 510
    error = (decoded[..., :width] - residual).abs().amax(-1)
    assert (error <= bound * 1.001).all()


def test_the_layout_of_key_codes_is_as_described() -> None:
    keys = torch.randn(2, 3, 4, 16)
    codes, scale, page_scale = encode_keys(keys, torch.zeros(2, 3, 16), torch.full((2, 3), 4))
    for dim in range(16):
        half, rest = divmod(dim, 8)
        byte = codes[1, 2, rest // 4, 3, rest % 4]
        code = int(byte >> 4 if half else byte & 15) - 8
        step = float(page_scale[1, 2] * scale[1, 2, 3] / 255)
        assert abs(code * step - float(keys[1, 2, 3, dim])) <= step * 0.501


def test_slots_beyond_the_count_decode_to_nothing() -> None:
    keys = torch.randn(1, 2, 4, 8)
    keys[0, 0, 2:] = torch.nan
    made = encode_keys(keys, torch.zeros(1, 2, 8), torch.tensor([[2, 4]]))
    residual = decode_keys(made)
    assert (residual[0, 0, 2:] == 0).all()
    assert (residual[0, 0, :2] != 0).any()


@given(
    blocks=st.integers(1, 3),
    width=st.integers(1, 70),
    size=st.sampled_from([0.0, 1e-6, 1e4]),
    seed=st.integers(0, 2**31),
)
def test_the_error_of_a_mean_is_bounded(blocks, width, size, seed) -> None:
    rng = torch.Generator().manual_seed(seed)
    mean = torch.randn(2, 16 * blocks, width, generator=rng) * size
    decoded = decode_means(encode_means(mean))
    assert (decoded[..., width:] == 0).all()
    error = (decoded[..., :width] - mean).abs().amax(-1)
    assert (error <= mean.abs().amax(-1) / 254 * 1.001).all()
