"""score, select and estimate: the numba kernels against the torch reference, and laws."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from wavekv.kernels import (
    attend_dense,
    attend_pages,
    estimate,
    merge_state,
    score,
    select,
    use_backend,
)

DTYPES = st.sampled_from([torch.float32, torch.bfloat16, torch.float16])
DIMS = st.fixed_dictionaries(
    {
        "batch": st.integers(1, 3),
        "kv_heads": st.integers(1, 3),
        "group": st.integers(1, 4),
        "width": st.sampled_from([8, 20, 64, 80, 96, 128]),
    }
)
PAGES = st.sampled_from([0, 1, 2, 7, 33, 64, 129])
SEEDS = st.integers(0, 2**31)


def make_statistics(seed: int, shape: tuple[int, ...], dtype: torch.dtype) -> list[Tensor]:
    """Key mean, variance, value mean (views of larger buffers) and counts; NaN in empty pages."""
    rng = torch.Generator().manual_seed(seed)
    batch, kv_heads, pages, width = shape
    counts = torch.randint(0, 18, (batch, kv_heads, pages + 3), generator=rng, dtype=torch.int32)
    empty = (counts == 0)[..., None]
    mean, value = torch.randn(2, batch, kv_heads, pages + 3, width, generator=rng)
    mean, value = (x.masked_fill(empty, torch.nan).to(dtype) for x in (mean, value))
    variance = torch.randn(batch, kv_heads, pages + 3, generator=rng).square()
    variance = variance.masked_fill(counts == 0, torch.nan)
    return [x[:, :, :pages] for x in (mean, variance, value, counts)]


@given(
    dims=DIMS, seed=SEEDS, pages=PAGES, dtype=DTYPES, first_moment=st.booleans(),
    softcap=st.sampled_from([None, 1.5, 30.0]), scale=st.sampled_from([0.05, 0.3, 1.0]),
)  # fmt: skip
def test_score_equals_reference(dims, seed, pages, dtype, first_moment, softcap, scale) -> None:
    shape = (dims["batch"], dims["kv_heads"], pages, dims["width"])
    mean, variance, _, counts = make_statistics(seed, shape, dtype)
    query = torch.randn(
        shape[0], shape[1] * dims["group"], shape[3], generator=torch.Generator().manual_seed(seed)
    )
    arguments = query, mean, None if first_moment else variance, counts
    with use_backend("numba"):
        actual = score(*arguments, scale=scale, softcap=softcap)
    with use_backend("torch"):
        expected = score(*arguments, scale=scale, softcap=softcap)
    for got, want in zip(actual, expected, strict=True):
        torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-4)
    empty = (counts == 0).repeat_interleave(dims["group"], dim=1)
    assert torch.equal(actual[0] == -torch.inf, empty)
    assert (actual[1][empty] == 0).all()


@pytest.mark.parametrize("softcap", [3.0, 20.0])
def test_shift_under_a_soft_cap_is_close_to_that_of_the_keys(softcap: float) -> None:
    """Of the logits before the cap, weighted by the mass after it."""
    query = torch.randn(1, 4, 64)
    keys = 0.6 * torch.randn(1, 1, 200, 32, 64) + 0.5 * torch.randn(1, 1, 200, 1, 64)
    counts = torch.full((1, 1, 200), 32, dtype=torch.int32)
    logits = torch.einsum("bhd,bznpd->bhnp", query, keys) / 8
    weights = (softcap * torch.tanh(logits / softcap)).softmax(-1)
    truth = ((weights - 1 / 32) * logits).sum(-1)
    variance = keys.var(3, correction=0).mean(-1)
    shift = score(query, keys.mean(3), variance, counts, scale=1 / 8, softcap=softcap)[1]
    assert (shift - truth).abs().mean() < 0.3 * truth.abs().mean()


@pytest.mark.parametrize("spread", [0.3, 4.0])
def test_shift_is_how_the_mass_grows_along_the_query(spread: float) -> None:
    """The mean logit of a page, weighted by mass, is the derivative of its log mass by the scale of
    the query; less the logit of the mean key it is the shift. Both sides of the freezing."""
    query, mean = torch.randn(1, 4, 16), torch.randn(1, 1, 4, 16)
    variance = spread * torch.rand(1, 1, 4)
    counts = torch.full((1, 1, 4), 8, dtype=torch.int32)
    step = 1e-2
    less, more = (score(query, mean, variance, counts, scale=1 + x)[0] for x in (-step, step))
    shift = score(query, mean, variance, counts, scale=1.0)[1]
    logit = query @ mean[0].mT
    torch.testing.assert_close((more - less) / (2 * step) - logit, shift, rtol=2e-3, atol=2e-3)


@pytest.mark.parametrize("softcap", [None, 5.0])
def test_score_of_single_tokens_is_their_logit(softcap: float | None) -> None:
    query, mean = torch.randn(1, 2, 8), torch.randn(1, 1, 5, 8)
    counts = torch.ones(1, 1, 5, dtype=torch.int32)
    logits = query @ mean[0].mT
    if softcap is not None:
        logits = softcap * torch.tanh(logits / softcap)
    log_mass, shift = score(query, mean, torch.rand(1, 1, 5), counts, scale=1.0, softcap=softcap)
    torch.testing.assert_close(log_mass, logits)
    assert (shift == 0).all()


@pytest.mark.parametrize("softcap", [None, 20.0])
def test_second_moment_is_closer_to_the_truth_on_gaussian_pages(softcap: float | None) -> None:
    query = torch.randn(1, 4, 64)
    keys = 0.6 * torch.randn(1, 1, 200, 16, 64) + 0.5 * torch.randn(1, 1, 200, 1, 64)
    mean, variance = keys.mean(3), keys.var(3, correction=0).mean(-1)
    counts = torch.full((1, 1, 200), 16, dtype=torch.int32)
    logits = torch.einsum("bhd,bznpd->bhnp", query, keys) / 8
    if softcap is not None:
        logits = softcap * torch.tanh(logits / softcap)
    truth = logits.logsumexp(-1)
    errors = [
        (score(query, mean, var, counts, scale=1 / 8, softcap=softcap)[0] - truth).abs().mean()
        for var in (None, variance)
    ]
    assert errors[1] < 0.5 * errors[0]


def test_correction_is_continuous_where_it_freezes() -> None:
    log_n = math.log(16)
    query = torch.ones(1, 1, 1)
    variance = torch.linspace(1.9 * log_n, 2.1 * log_n, 2001).view(1, 1, -1)
    counts = torch.full((1, 1, 2001), 16, dtype=torch.int32)
    log_mass = score(query, torch.zeros(1, 1, 2001, 1), variance, counts, scale=1.0)[0][0, 0]
    slope = log_mass.double().diff() / variance.double().flatten().diff()
    assert log_mass.diff().abs().max() < 1e-3
    assert slope.min() > 0.45
    assert slope.max() < 0.55


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


@given(
    dims=DIMS, seed=SEEDS, pages=PAGES, dtype=DTYPES, chosen=st.integers(0, 40),
    span_pages=st.sampled_from([None, 1, 8, 70, 1000]),
)  # fmt: skip
def test_estimate_equals_reference(dims, seed, pages, dtype, chosen, span_pages) -> None:
    shape = (dims["batch"], dims["kv_heads"], pages, dims["width"])
    *_, value_mean, counts = make_statistics(seed, shape, dtype)
    masses = make_masses(seed, shape[0], shape[1] * dims["group"], pages, None)
    empty = (counts == 0).repeat_interleave(dims["group"], dim=1)
    masses = masses.masked_fill(empty, -torch.inf)
    arguments: list = [masses, value_mean, select(masses, shape[1], max_pages=chosen).flip(-1)]
    options = {}
    if span_pages is not None:
        rng = torch.Generator().manual_seed(seed)
        spans, options = -(-pages // span_pages), {"span_pages": span_pages}
        arguments.append(torch.randn(masses.shape, generator=rng))
        arguments.append(torch.randn(*masses.shape[:2], spans, shape[3], generator=rng))
    with use_backend("numba"):
        actual = estimate(*arguments, **options)
    with use_backend("torch"):
        expected = estimate(*arguments, **options)
    for got, want in zip(actual, expected, strict=True):
        torch.testing.assert_close(got, want, rtol=2e-5, atol=2e-5)


def make_context(pages: int, page_size: int, spread: float) -> tuple[Tensor, ...]:
    """Dense keys and values [1, 2, N * P, D], and the same as one chunk with ids, counts."""
    keys, values = torch.randn(2, 1, 2, pages, 1, 16) + spread * torch.randn(
        2, 1, 2, pages, page_size, 16
    )
    chunk = torch.stack([keys, values], dim=3).view(2 * pages, 2, page_size, 16)
    ids = torch.arange(2 * pages).view(1, 2, pages)
    counts = torch.full((1, 2, pages), page_size, dtype=torch.int32)
    return keys, values, chunk, ids, counts


@pytest.mark.parametrize("backend", ["torch", "numba"])
@pytest.mark.parametrize("max_pages", [0, 5, 40])
def test_pages_without_variance_are_estimated_exactly(backend: str, max_pages: int) -> None:
    query = torch.randn(1, 6, 16)
    keys, values, chunk, ids, counts = make_context(40, 3, spread=0.0)
    with use_backend(backend):
        variance = keys.var(3, correction=0).mean(-1)
        log_mass, _ = score(query, keys.mean(3), variance, counts, scale=0.25)
        chosen = select(log_mass, 2, max_pages=max_pages)
        page_ids = ids.gather(2, chosen)
        exact = attend_pages(query, [chunk], page_ids, counts[..., :max_pages], scale=0.25)
        state = merge_state(*exact, *estimate(log_mass, values.mean(3), chosen))
        whole = attend_dense(query, keys.flatten(2, 3), values.flatten(2, 3), None, scale=0.25)
    torch.testing.assert_close(state, whole, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("backend", ["torch", "numba"])
def test_all_pages_selected_leaves_nothing_to_estimate(backend: str) -> None:
    query = torch.randn(1, 6, 16)
    keys, values, chunk, ids, counts = make_context(9, 4, spread=1.0)
    with use_backend(backend):
        log_mass, _ = score(query, keys.mean(3), None, counts, scale=0.25)
        chosen = select(log_mass, 2, max_pages=9)
        out, lse = estimate(log_mass, values.mean(3), chosen)
        exact = attend_pages(query, [chunk], ids.gather(2, chosen), counts, scale=0.25)
        whole = attend_dense(query, keys.flatten(2, 3), values.flatten(2, 3), None, scale=0.25)
        state = merge_state(*exact, out, lse)
    assert (out == 0).all()
    assert (lse == -torch.inf).all()
    torch.testing.assert_close(state, whole, rtol=1e-5, atol=1e-5)
