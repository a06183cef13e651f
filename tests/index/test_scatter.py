"""The scatter of spans: what is kept in bfloat16, beside the same sums in float32."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from wavekv.index.scatter import SpanScatter, add_rounded, pages_of_span, scatter_by_span

P, H = 4, 2


def make_pages(seed: int, num_pages: int, width: int, loudest: float) -> tuple[Tensor, ...]:
    """Keys, values [H, N, P, D] whose size differs from page to page, and counts [H, N]."""
    random = torch.Generator().manual_seed(seed)
    size = (H, num_pages, P, width)
    loudness = loudest ** torch.rand(H, num_pages, 1, 1, generator=random)
    keys = loudness * torch.randn(size, generator=random)
    mixed = keys @ torch.randn(width, width, generator=random) / width**0.5
    values = mixed + torch.randn(size, generator=random)
    return keys, values, torch.randint(1, P + 1, (H, num_pages), generator=random)


def parts_of(scatter: SpanScatter) -> Tensor:
    """[H, S, 2, D, D]"""
    return scatter.spans.view[0]


@given(
    width=st.sampled_from([32, 64]),
    span_pages=st.sampled_from([32, 64, 128]),
    per_span=st.sampled_from([1, 2.5, 8, 32]),
    num_spans=st.sampled_from([1, 1.6, 2.4]),
    loudest=st.sampled_from([1.0, 8.0]),
    seed=st.integers(0, 2**16),
)
def test_spans_that_grow_by_segments_are_near_their_float32_sums(
    width: int, span_pages: int, per_span: float, num_spans: float, loudest: float, seed: int
) -> None:
    num_pages, step = int(num_spans * span_pages), int(span_pages / per_span)
    made = make_pages(seed, num_pages, width, loudest)
    kept = SpanScatter(torch.empty(1, H, 0, width), span_pages)
    for first in range(0, num_pages, step):
        part = (x[:, first : first + step] for x in made)
        kept.add(first, scatter_by_span(*part, first_page=first, span_pages=span_pages)[None])
    exact = scatter_by_span(*made, first_page=0, span_pages=span_pages)
    assert parts_of(kept).dtype == torch.bfloat16
    assert parts_of(kept).shape == exact.shape
    error = (parts_of(kept).float() - exact).norm(dim=(3, 4))
    assert (error < 0.01 * exact.norm(dim=(3, 4))).all()


def test_a_sum_is_made_in_float32_and_rounded_once() -> None:
    kept, new = torch.randn(2, 3, 8, 8).bfloat16(), torch.randn(2, 3, 8, 8) / 64
    expected = (kept.float() + new).bfloat16()
    assert not torch.equal(expected, kept + new.bfloat16())
    add_rounded(kept, new)
    assert torch.equal(kept, expected)


@pytest.mark.parametrize("width", [13, 80, 128])
@pytest.mark.parametrize("block_pages", [1, 4, 16])
def test_a_span_is_of_whole_blocks(width: int, block_pages: int) -> None:
    for segment in (16 * P, 8192):
        pages = pages_of_span(segment, P, width, block_pages)
        assert pages % block_pages == 0
        assert max(segment, 16 * width) <= P * pages < max(segment, 16 * width) + P * block_pages


@pytest.mark.parametrize("width", [64, 128])
def test_a_span_takes_at_most_a_sixteenth_of_bfloat16_pages(width: int) -> None:
    for segment in (16, 256, 8192):
        pages = pages_of_span(segment, P, width, 4)
        kept = SpanScatter(torch.empty(1, 1, 0, width), pages)
        assert 16 * kept.spans.row_nbytes <= 2 * 2 * pages * P * width
