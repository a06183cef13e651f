"""An index of two levels: what it keeps of pages, and the choice of pages by it."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from wavekv.index import page_scatter, page_statistics
from wavekv.index.levels import (
    LevelPages,
    Logits,
    block_pages,
    choose_of_levels,
    estimate_of_levels,
    index_of_pages,
    num_finalists,
)
from wavekv.kernels.levels import refine_levels, score_levels
from wavekv.kernels.page_index import (
    PageIndex,
    block_means,
    block_values,
    mean_keys,
    mean_values,
)
from wavekv.kernels.planes import steps_of

from .index_cases import SEEDS


def clustered(seed: int, rows: int, pages: int, size: int, D: int) -> tuple[Tensor, Tensor, Tensor]:
    """Pages [R, N, P, D] near those beside them, and counts of which some are small."""
    random = torch.Generator().manual_seed(seed)
    near = torch.randn(rows, -(-pages // 16), 1, 1, D, generator=random)
    near = 3 * near.expand(-1, -1, 16, -1, -1).flatten(1, 2)[:, :pages]
    keys, values = torch.randn(2, rows, pages, size, D, generator=random)
    centres = torch.randn(rows, pages, 1, D, generator=random)
    counts = torch.full((rows, pages), size, dtype=torch.int32)
    odd = torch.rand(rows, pages, generator=random)
    counts[odd < 0.2], counts[odd < 0.1] = 1, 0
    return near + centres + 0.5 * keys, near + centres + values, counts


@given(
    seed=SEEDS,
    K=st.sampled_from([1, 2, 16]),
    D=st.sampled_from([1, 2, 13, 40, 64]),
    size=st.sampled_from([1, 8]),
)
def test_stored_means_are_near(seed: int, K: int, D: int, size: int) -> None:
    keys, values, counts = clustered(seed, 2, 32, size, D)
    index = index_of_pages(keys, values, counts, K)
    exact = page_statistics(keys, values, counts)
    held = counts > 0
    for stored, block, rows, limit in (
        (mean_keys(index), block_means(index), exact.mean, 0.6),
        (mean_values(index), block_values(index), exact.value_mean, 0.2),
    ):
        # as well as so few bits keep what is left beside the block's
        left = (rows - block.repeat_interleave(K, 1))[held]
        assert float((stored - rows)[held].norm()) <= limit * float(left.norm()) + 1e-5
    found = steps_of(index.variance)[held & (exact.variance > 1e-5)]
    ratio = found / exact.variance[held & (exact.variance > 1e-5)]
    assert ((ratio > 0.95) & (ratio < 1.05)).all()
    assert torch.equal(index.counts, counts.to(torch.uint8))


@given(seed=SEEDS, K=st.sampled_from([1, 4, 16]))
def test_what_holds_no_token_has_no_influence(seed: int, K: int) -> None:
    keys, values, counts = clustered(seed, 2, 32, 4, 16)
    clean = index_of_pages(keys, values, counts, K)
    empty = torch.arange(4) >= counts.unsqueeze(-1)
    keys, values = (x.masked_fill(empty.unsqueeze(-1), torch.nan) for x in (keys, values))
    for one, other in zip(index_of_pages(keys, values, counts, K), clean, strict=True):
        assert torch.equal(one, other)


def test_a_block_is_a_function_of_its_pages() -> None:
    keys, values, counts = clustered(3, 2, 64, 8, 32)
    whole = index_of_pages(keys, values, counts, 16)
    for first in range(0, 64, 16):
        part = (slice(None), slice(first, first + 16))
        alone = index_of_pages(keys[part], values[part], counts[part], 16)
        for mine, theirs in zip(whole.in_pages(first, first + 16), alone, strict=True):
            assert torch.equal(mine, theirs)


@pytest.mark.parametrize(
    ("smallest", "page_size", "expected"), [(256, 8, 16), (16, 4, 4), (8, 8, 1), (128, 8, 16)]
)
def test_segments_are_whole_blocks(smallest: int, page_size: int, expected: int) -> None:
    assert block_pages(smallest, page_size) == expected


def level_pages(seed: int, num_pages: int = 256) -> tuple[LevelPages, Tensor]:
    keys, values, _ = clustered(seed, 2, num_pages, 8, 32)
    counts = torch.full((2, num_pages), 8, dtype=torch.int32)
    made = index_of_pages(keys, values, counts, 16)
    scatter = page_scatter(keys, values, counts).bfloat16()
    index = PageIndex._make(part[None] for part in made)
    query = torch.randn(1, 8, 32, generator=torch.Generator().manual_seed(seed))
    return LevelPages(index, scatter[None, :, None], num_pages), query


@pytest.mark.parametrize(("refine", "first", "second"), [(12, 48, 12), (4, 16, 4), (2, 8, 4)])
def test_codes_are_read_of_the_best(refine: int, first: int, second: int) -> None:
    pages, query = level_pages(0)
    choice = choose_of_levels(query, pages, Logits(0.3), least=4, most=4, refine=refine)
    assert num_finalists(refine) * 4 == second
    assert choice.refined.shape == (1, 2, first + second)
    plain = choose_of_levels(query, pages, Logits(0.3), least=4, most=4)
    assert plain.refined.shape == (1, 2, 0)
    differ = (choice.log_mass != plain.log_mass).unflatten(1, (2, 4)).any(2)
    read = torch.zeros(1, 2, 256, dtype=torch.bool).scatter_(2, choice.refined, True)
    assert torch.equal(differ, read)


def hiding(seed: int) -> tuple[PageIndex, Tensor, Tensor]:
    """An index of 512 pages of 16 random keys, the keys, and a query that key 3 of page 77 fits."""
    keys, values = torch.randn(2, 1, 512, 16, 64, generator=torch.Generator().manual_seed(seed))
    counts = torch.full((1, 512), 16, dtype=torch.int32)
    made = index_of_pages(keys, values, counts, 16)
    return PageIndex._make(part[None] for part in made), keys, keys[:, 77, 3:4]


def test_codes_find_a_key_that_its_page_hides() -> None:
    """The mean shows little of one key that fits the query among random ones, the codes all."""
    found = {1: 0, 50: 0}
    for seed in range(20):
        index, _, query = hiding(seed)
        pages = LevelPages(index, torch.zeros(1, 1, 1, 2, 64, 64).bfloat16(), 512)
        for refine in found:
            choice = choose_of_levels(query, pages, Logits(0.25), least=5, most=5, refine=refine)
            found[refine] += 77 in choice.pages
    assert found[50] >= 18
    assert found[1] < found[50]


def test_codes_have_nearly_the_mass_of_the_keys() -> None:
    index, keys, _ = hiding(0)
    query = torch.randn(1, 4, 64, generator=torch.Generator().manual_seed(1))
    logits = torch.einsum("bhd,bnpd->bhnp", query, keys) * 0.125
    everything = torch.arange(512).view(1, 1, -1)
    scores = score_levels(query, index, scale=0.125)
    error = (scores.log_mass - logits.logsumexp(-1)).square().mean().sqrt()
    for use_low in (False, True):
        refined = refine_levels(scores, index, everything, use_low=use_low)
        before, error = error, (refined.log_mass - logits.logsumexp(-1)).square().mean().sqrt()
        assert error < 0.7 * before
    rise = ((logits.softmax(-1) - 1 / 16) * logits).sum(-1)
    assert error < 0.1
    assert (refined.shift - rise).square().mean().sqrt() < 0.2 * rise.square().mean().sqrt()


def test_no_codes_are_read_where_all_pages_are_chosen() -> None:
    pages, query = level_pages(1, 16)
    choice = choose_of_levels(query, pages, Logits(0.3), least=16, most=16, refine=12)
    assert choice.refined.shape[2] == 0
    assert choice.pages.tolist() == [[list(range(16))] * 2]
    out, lse = estimate_of_levels(query, choice, pages, 0.3)
    assert (lse == -torch.inf).all()
    assert (out == 0).all()
