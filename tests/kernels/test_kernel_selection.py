"""select: the numba kernel against the torch reference, and laws."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from wavekv.kernels import select, use_backend

PAGES = st.sampled_from([0, 1, 2, 7, 33, 64, 129])
SEEDS = st.integers(0, 2**31)


def rank_of(log_mass: Tensor, kv_heads: int) -> Tensor:
    batch, heads, pages = log_mass.shape
    grouped = log_mass.double().view(batch, kv_heads, heads // kv_heads, pages)
    return grouped.softmax(-1).nan_to_num(0.0).sum(2)


def make_masses(seed: int, batch: int, heads: int, pages: int, levels: int | None) -> Tensor:
    """Log masses with empty pages, now and then an empty row; few distinct values make ties."""
    rng = torch.Generator().manual_seed(seed)
    masses = 3 * torch.randn(batch, heads, pages, generator=rng)
    if levels is not None:
        masses = torch.randint(0, levels, masses.shape, generator=rng).float()
    masses.masked_fill_(torch.rand(batch, 1, pages, generator=rng) < 0.2, -torch.inf)
    return masses.masked_fill_(torch.rand(batch, heads, 1, generator=rng) < 0.1, -torch.inf)


LEVELS = st.sampled_from([None, 1, 3])
SELECTION = {
    "batch": st.integers(1, 2),
    "kv_heads": st.integers(1, 3),
    "group": st.integers(1, 4),
    "pages": PAGES,
    "max_pages": st.integers(0, 40),
    "levels": LEVELS,
    "seed": SEEDS,
}


@given(**SELECTION, min_pages=st.integers(0, 5), top_p=st.sampled_from([None, 0.1, 0.55, 1.0]))
def test_select_chooses_what_the_reference_chooses(
    batch, kv_heads, group, pages, max_pages, levels, seed, min_pages, top_p
) -> None:
    masses = make_masses(seed, batch, kv_heads * group, pages, levels)
    options = {"max_pages": max_pages, "min_pages": min(min_pages, max_pages), "top_p": top_p}
    with use_backend("numba"):
        actual = select(masses, kv_heads, **options)
    with use_backend("torch"):
        expected = select(masses, kv_heads, **options)
    assert actual.shape == expected.shape == (batch, kv_heads, min(max_pages, pages))
    rank = rank_of(masses, kv_heads)
    for row_rank, got, want in zip(
        rank.flatten(0, 1), actual.flatten(0, 1), expected.flatten(0, 1), strict=True
    ):
        got, want = got[got >= 0], want[want >= 0]
        assert (got.diff() > 0).all()
        assert (got < pages).all()
        # Backends may round two ranks to either order; then what they took weighs the same.
        if top_p is None:
            assert len(got) == len(want)
        if len(got) == len(want):
            torch.testing.assert_close(
                row_rank[got].sort().values, row_rank[want].sort().values, rtol=1e-5, atol=1e-9
            )
        else:
            torch.testing.assert_close(
                row_rank[got].sum(), row_rank[want].sum(), rtol=1e-5, atol=1.01 * row_rank.max()
            )


@pytest.mark.parametrize("backend", ["torch", "numba"])
@given(**SELECTION, top_p=st.sampled_from([0.05, 0.3, 0.8, 0.99]))
def test_top_p_takes_the_fewest_pages_that_reach_it(
    backend, batch, kv_heads, group, pages, max_pages, levels, seed, top_p
) -> None:
    masses = make_masses(seed, batch, kv_heads * group, pages, levels)
    with use_backend(backend):
        chosen = select(masses, kv_heads, max_pages=max_pages, top_p=top_p)
        more = select(masses, kv_heads, max_pages=max_pages, top_p=min(1.0, top_p + 0.1))
    rank = rank_of(masses, kv_heads)
    live = (masses > -torch.inf).view(batch, kv_heads, group, pages).any(2)
    rows = zip(*(x.flatten(0, 1) for x in (rank, live, chosen, more)), strict=True)
    for row_rank, row_live, got, superset in rows:
        got = got[got >= 0]
        assert row_live[got].all()
        assert set(got.tolist()) <= set(superset.tolist())
        best = row_rank[row_live].sort(descending=True).values.cumsum(0)
        wanted = top_p * row_rank.sum()
        if len(got) < min(max_pages, int(row_live.sum())):
            assert row_rank[got].sum() > wanted - 1e-5
        if len(got) > 1:
            assert best[len(got) - 2] < wanted + 1e-5


@pytest.mark.parametrize("backend", ["torch", "numba"])
@pytest.mark.parametrize("top_p", [None, 0.5])
def test_ties_go_to_the_lower_index_and_empty_pages_to_nobody(backend, top_p) -> None:
    masses = torch.zeros(1, 3, 67)
    masses[..., 2] = -torch.inf
    masses[:, 1] = -torch.inf
    with use_backend(backend):
        chosen = select(masses, 1, max_pages=6, top_p=top_p)
        nothing = select(torch.full((1, 3, 67), -torch.inf), 1, max_pages=6, top_p=top_p)
        few = select(masses[..., :4], 1, max_pages=6, min_pages=4, top_p=top_p)
    assert chosen.tolist() == [[[0, 1, 3, 4, 5, 6]]]
    assert nothing.tolist() == [[[-1] * 6]]
    assert few.tolist() == [[[0, 1, 3, -1]]]


@pytest.mark.parametrize("backend", ["torch", "numba"])
def test_pages_of_vanishing_mass_are_still_chosen_in_order(backend: str) -> None:
    masses = torch.tensor([[[-500.0, 0.0, -400.0, -torch.inf, -300.0]]])
    with use_backend(backend):
        assert select(masses, 1, max_pages=3).tolist() == [[[0, 1, 2]]]
        assert select(masses, 1, max_pages=3, top_p=1.0).tolist() == [[[1, -1, -1]]]
        assert select(masses, 1, max_pages=3, top_p=0.5, min_pages=2).tolist() == [[[0, 1, -1]]]
