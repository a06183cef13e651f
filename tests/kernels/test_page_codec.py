"""Pages as small integers: how far off they may be, and that all that reads them reads the same."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from wavekv.kernels import attend_pages, use_backend
from wavekv.kernels.page_codec import PageCodec, decode_pages, encode_pages

CODECS = st.builds(
    PageCodec,
    page_size=st.integers(1, 17),
    head_dim=st.sampled_from([2, 6, 64, 80]),
    key_bits=st.sampled_from([2, 4, 8]),
    value_bits=st.sampled_from([2, 4, 8]),
)
SEEDS = st.integers(0, 2**31)


def random_pages(codec: PageCodec, count: int, seed: int, spread: float = 1.0) -> Tensor:
    """[n, 2, P, D]; some channels have means of their own, some far wider ranges than others."""
    random = torch.Generator().manual_seed(seed)
    shape = count, 2, codec.page_size, codec.head_dim
    offset, width = torch.randn(2, count, 2, 1, codec.head_dim, generator=random)
    return spread * (3 * offset + (2 * width).exp() * torch.randn(shape, generator=random))


def counts_of(pages: Tensor, seed: int) -> Tensor:
    random = torch.Generator().manual_seed(seed)
    size = pages.shape[2] + 1
    return torch.randint(0, size, (len(pages),), generator=random, dtype=torch.int32)


def largest_errors(pages: Tensor, bits: int) -> Tensor:
    """[n, 1, D] the most that a number of pages [n, P, D] may be off by, from the ranges alone."""
    least, largest = pages.amin(1, keepdim=True), pages.amax(1, keepdim=True)
    # an offset is rounded down by less than its unit
    unit = least.abs().amax(2, keepdim=True) / 127
    step = (largest - least + unit) / (2**bits - 1)
    return 0.5 * (step + step.amax(2, keepdim=True) / 255)


@given(codec=CODECS, seed=SEEDS, spread=st.sampled_from([1e-30, 1e-3, 1.0, 1e4, 1e30]))
def test_numbers_are_off_by_half_a_step_at_most(codec, seed: int, spread: float) -> None:
    pages = random_pages(codec, 5, seed, spread)
    data = encode_pages(pages, None, codec)
    assert data.shape == (5, codec.page_bytes)
    assert codec.page_bytes % 16 == 0
    back = decode_pages(data, codec, torch.float32)
    for half, bits in enumerate(codec.bits):
        error = (back[:, half] - pages[:, half]).abs()
        assert (error <= 1.0001 * largest_errors(pages[:, half], bits) + 1e-37).all()


@given(codec=CODECS, seed=SEEDS)
def test_what_no_token_is_in_changes_nothing(codec, seed: int) -> None:
    pages = random_pages(codec, 6, seed)
    counts = counts_of(pages, seed)
    behind = (torch.arange(codec.page_size) >= counts[:, None])[:, None, :, None]
    clean, poisoned = pages.masked_fill(behind, 0.5), pages.masked_fill(behind, torch.nan)
    data = encode_pages(clean, counts, codec)
    assert torch.equal(encode_pages(poisoned, counts, codec), data)
    back = decode_pages(data, codec, torch.float32)
    assert back.isfinite().all()
    for page, decoded, count in zip(pages, back, counts.tolist(), strict=True):
        for half, bits in enumerate(codec.bits if count else ()):
            held = page[half, :count]
            most = largest_errors(held[None], bits)[0]
            assert ((decoded[half, :count] - held).abs() <= 1.0001 * most).all()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_equal_tokens_and_zeros_are_close_to_themselves(dtype: torch.dtype) -> None:
    codec = PageCodec(8, 64, 4, 2)
    token = torch.randn(2, 2, 1, 64, generator=torch.Generator().manual_seed(2)).to(dtype)
    token[1] = 0
    pages = token.expand(2, 2, 8, 64).contiguous()
    back = decode_pages(encode_pages(pages, None, codec), codec, dtype)
    assert back.dtype == dtype
    assert (back[1] == 0).all()
    # the offset alone is off, by less than a unit, and the code of the largest mends it
    unit = pages[0].abs().amax() / 127
    assert ((back[0] - pages[0]).abs() <= 0.1 * unit).all()


@given(
    codec=CODECS,
    seed=SEEDS,
    heads=st.integers(1, 3),
    group=st.integers(1, 4),
    per_chunk=st.integers(1, 7),
    softcap=st.sampled_from([None, 3.0]),
)
def test_attention_reads_them_in_place(codec, seed, heads, group, per_chunk, softcap) -> None:
    random = torch.Generator().manual_seed(seed)
    num_pages = heads * 9
    pages = random_pages(codec, num_pages, seed, 0.3)
    counts = counts_of(pages, seed)
    stored = torch.zeros(-(-num_pages // per_chunk) * per_chunk, codec.page_bytes).byte()
    order = torch.randperm(len(stored), generator=random)[:num_pages]
    stored[order] = encode_pages(pages, counts, codec)
    ids = order.reshape(1, heads, 9).masked_fill(torch.rand(1, heads, 9) < 0.2, -1)
    query = torch.randn(1, heads * group, codec.head_dim, generator=random)
    options = {"scale": 0.3, "softcap": softcap}
    arguments = ids, counts.reshape(1, heads, 9)
    decoded = [decode_pages(stored, codec, torch.float32)]
    with use_backend("torch"):
        expected = attend_pages(query, decoded, *arguments, **options)
    chunks = list(stored.split(per_chunk))
    for backend in ("torch", "numba"):
        with use_backend(backend):
            found = attend_pages(query, chunks, *arguments, **options, codec=codec)
        for ours, theirs in zip(found, expected, strict=True):
            torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)


def test_pages_of_another_form_are_refused() -> None:
    query, ids = torch.randn(1, 2, 64), torch.zeros(1, 2, 3, dtype=torch.int64)
    codec, counts = PageCodec(8, 64, 8, 8), torch.zeros(1, 2, 3, dtype=torch.int32)
    wrong = [torch.zeros(4, codec.page_bytes + 1).byte(), torch.zeros(4, codec.page_bytes).char()]
    for chunk in (*wrong, torch.zeros(4, 2, 8, 64)):
        with pytest.raises(ValueError, match=rf"chunks must be \[C, {codec.page_bytes}\] uint8"):
            attend_pages(query, [chunk], ids, counts, scale=1.0, codec=codec)
