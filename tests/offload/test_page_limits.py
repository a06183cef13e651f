"""How many pages a step may retrieve, and how tokens are cut into segments."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from wavekv.config import OffloadConfig
from wavekv.index.segments import cut_segments
from wavekv.offload.budget import page_limits

CONFIGS = st.builds(
    OffloadConfig,
    budget=st.integers(1, 10_000) | st.floats(1e-4, 1.0),
    min_budget=st.integers(0, 2000),
    page_size=st.just(16),
)


@given(config=CONFIGS, tokens=st.integers(0, 10**6))
def test_limits_are_ordered_and_cover_the_budget(config: OffloadConfig, tokens: int) -> None:
    least, most = page_limits(config, tokens)
    page = config.page_size
    assert 0 <= least <= most
    assert least * page < config.min_budget + page
    if isinstance(config.budget, int):
        assert config.budget <= most * page < config.budget + page
    else:
        share = config.budget * tokens
        assert most * page >= max(share * (1 - 1e-9), config.min_budget)
        assert most * page < max(share * (1 + 1e-9), config.min_budget) + page


@given(config=CONFIGS, tokens=st.integers(0, 10**6), more=st.integers(0, 10**5))
def test_limits_never_fall_as_the_context_grows(config, tokens: int, more: int) -> None:
    before, after = page_limits(config, tokens), page_limits(config, tokens + more)
    assert all(b <= a for b, a in zip(before, after, strict=True))


@given(tokens=st.integers(1, 10**5), pages=st.integers(0, 10**5))
def test_a_budget_of_everything_is_every_page(tokens: int, pages: int) -> None:
    config = OffloadConfig(budget=1.0, min_budget=0)
    assert page_limits(config, tokens)[1] * config.page_size >= tokens


@given(
    page=st.integers(1, 20),
    small=st.integers(0, 5),
    longer=st.integers(0, 6),
    tokens=st.integers(-100, 20_000),
)
def test_segments_are_bounded_powers_longest_first(page, small, longer, tokens) -> None:
    smallest = page << small
    segment = smallest << longer
    lengths = cut_segments(tokens, segment=segment, smallest=smallest)
    assert 0 <= max(tokens, 0) - sum(lengths) < smallest
    assert lengths == sorted(lengths, reverse=True)
    for length in lengths:
        factor, rest = divmod(length, smallest)
        assert rest == 0
        assert factor & (factor - 1) == 0
        assert length <= segment
    # no more pieces than whole segments and one of each power below
    assert len(lengths) <= max(tokens, 0) // segment + longer + 1


@pytest.mark.parametrize(
    ("tokens", "expected"),
    [(0, []), (15, []), (16, [16]), (33, [32]), (127, [64, 32, 16]), (200, [64, 64, 64])],
)
def test_cuts(tokens: int, expected: list[int]) -> None:
    assert cut_segments(tokens, segment=64, smallest=16) == expected
