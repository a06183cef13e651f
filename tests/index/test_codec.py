"""The codec: products are kept, the metric is that of the queries, codes get what varies most."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from wavekv.index.codec import _KEPT, clustering_map, query_metric, train_codec
from wavekv.kernels.mixing import mixing

from .index_cases import HALF, SEEDS


def randn(seed: int, *shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def scatter_of(pages: Tensor) -> Tensor:
    """[H, D, D] of pages [H, n, P, D]."""
    centred = (pages - pages.mean(2, keepdim=True)).flatten(1, 2)
    return centred.mT @ centred


@HALF
@given(
    heads=st.integers(1, 3),
    dim=st.integers(1, 40),
    share=st.sampled_from([0.0, 0.5, 1.0, None]),
    has_metric=st.booleans(),
    dtype=st.sampled_from([torch.float32, torch.bfloat16, torch.float16]),
    seed=SEEDS,
)
def test_products_are_those_of_the_keys_less_that_of_their_centre(
    heads, dim, share, has_metric, dtype, seed
) -> None:
    segments = [(3 + randn(seed + i, heads, 4 >> i, 8, dim)).to(dtype) for i in range(2)]
    queries = randn(seed + 7, heads, 9, dim)
    most = -(-dim // 8) * 8
    code_dims = None if share is None else max(8, int(share * most) // 8 * 8)
    codec = train_codec(iter(segments), query_metric(queries) if has_metric else None, code_dims)
    if code_dims is not None or not has_metric:
        assert codec.code_dims == (code_dims or most)
    assert codec.code_dims % 8 == 0
    assert 8 <= codec.code_dims <= most
    keys = torch.cat(segments, 1)
    centre = keys.float().mean((1, 2))
    torch.testing.assert_close(codec.centre, centre, rtol=1e-4, atol=1e-4)
    identity = torch.eye(dim).expand(heads, dim, dim)
    torch.testing.assert_close(codec.forward @ codec.backward.mT, identity, rtol=0, atol=2e-4)
    z, y = codec.keys(keys), codec.queries(queries)
    assert z.shape == keys.shape
    assert z.dtype == y.dtype == torch.float32
    assert y.shape == (heads, 9, most)
    assert (y[..., dim:] == 0).all()
    products = queries @ keys.float().flatten(1, 2).mT
    offset = (queries @ codec.centre.unsqueeze(2)).expand_as(products)
    got = y[..., :dim] @ z.flatten(1, 2).mT + offset
    torch.testing.assert_close(got, products, rtol=1e-3, atol=1e-2)


@given(dim=st.integers(1, 30), count=st.integers(1, 60), size=st.sampled_from([1e-15, 1, 1e15]))
def test_a_metric_is_positive_definite_whatever_the_sample(dim, count, size) -> None:
    queries = randn(dim + count, 2, count, dim) * size
    metric = query_metric(queries)
    assert metric.shape == (2, dim, dim)
    assert torch.equal(metric, metric.mT)
    values = torch.linalg.eigvalsh(metric.double())
    assert (values > 0.05).all()
    torch.testing.assert_close(values.mean(1), torch.ones(2).double(), rtol=1e-4, atol=0)
    torch.testing.assert_close(query_metric(queries * 4), metric, rtol=1e-4, atol=1e-5)
    fourth = clustering_map(metric)
    torch.testing.assert_close(fourth @ fourth @ fourth @ fourth, metric, rtol=1e-3, atol=1e-4)


def test_queries_that_are_zero_know_no_direction() -> None:
    metric = query_metric(torch.zeros(1, 5, 8))
    torch.testing.assert_close(metric, metric[:, :1, :1] * torch.eye(8), rtol=1e-6, atol=0)
    codec = train_codec([randn(0, 1, 4, 8, 8)], metric, None)
    assert codec.forward.isfinite().all()
    assert codec.backward.isfinite().all()


@HALF
@given(dim=st.integers(1, 24), code_dims=st.sampled_from([8, None]), seed=SEEDS)
def test_distances_are_errors_as_the_queries_see_them(dim, code_dims, seed) -> None:
    metric = query_metric(randn(seed, 1, 4 * dim, dim) * torch.linspace(0.1, 3, dim))
    codec = train_codec([randn(seed, 1, 4, 8, dim)], metric, code_dims)
    error = randn(seed + 1, 1, 30, dim)
    wanted = torch.einsum("hnd,hde,hne->hn", error, metric, error)
    got = (error @ codec.forward).square().sum(-1)
    torch.testing.assert_close(got, wanted, rtol=1e-3, atol=1e-4)


def test_without_a_metric_lengths_are_kept() -> None:
    keys = 5 + randn(0, 2, 8, 4, 12)
    codec = train_codec([keys], None, None)
    lengths = (keys - keys.mean((1, 2), keepdim=True)).norm(dim=-1)
    torch.testing.assert_close(codec.keys(keys).norm(dim=-1), lengths, rtol=1e-4, atol=1e-4)


@HALF
@given(dim=st.integers(2, 40), has_metric=st.booleans(), seed=SEEDS)
def test_the_dimensions_with_codes_hold_the_most_spread(dim, has_metric, seed) -> None:
    """As much as the largest eigenvalues: no other rotation leaves less without a code."""
    pages = randn(seed, 1, 12, 8, dim) * torch.linspace(0.1, 2, dim)
    metric = query_metric(randn(seed + 1, 1, 60, dim)) if has_metric else None
    whole = scatter_of(train_codec([pages], metric, None).keys(pages)).double()
    codec = train_codec([pages], metric, 8)
    held = scatter_of(codec.keys(pages)).diagonal(dim1=1, dim2=2)[..., :8].sum(-1).double()
    best = torch.linalg.eigvalsh(whole).flip(1)
    torch.testing.assert_close(held, best[..., :8].sum(-1), rtol=1e-3, atol=1e-3)
    if has_metric:
        chosen = train_codec([pages], metric, None).code_dims
        assert best[0, :chosen].sum() >= 0.999 * _KEPT * best.sum()
        # no more than that takes, but for whole vectors of codes
        assert best[0, : max(0, chosen - 16)].sum() < 1.001 * _KEPT * best.sum()


def test_spread_is_shared_among_the_dimensions_with_codes() -> None:
    """The largest component of a key sets its scale: no direction may stand out."""
    scale = torch.cat([torch.full((1,), 30.0), torch.ones(31)])
    pages = randn(0, 1, 50, 8, 32) * scale
    z = train_codec([pages], None, None).keys(pages)

    def peak(x: Tensor) -> float:
        return float((x.abs().amax(-1) / x.norm(dim=-1)).mean())

    assert peak(z) < 0.6 * peak(pages)


@pytest.mark.parametrize("size", [1, 2, 3, 8, 40, 64, 128])
def test_mixing_is_a_rotation_without_large_entries(size: int) -> None:
    matrix = mixing(size)
    torch.testing.assert_close(matrix @ matrix.T, torch.eye(size).double(), rtol=0, atol=1e-12)
    block = size & -size
    assert matrix.abs().max() <= block**-0.5 + 1e-12
    assert torch.equal(matrix, mixing(size))


@pytest.mark.parametrize("has_metric", [False, True])
def test_equal_keys_have_no_spread_and_do_no_harm(has_metric: bool) -> None:
    keys = torch.full((1, 4, 8, 12), 3.0)
    metric = query_metric(randn(0, 1, 20, 12)) if has_metric else None
    codec = train_codec([keys], metric, None)
    assert codec.forward.isfinite().all()
    torch.testing.assert_close(codec.keys(keys), torch.zeros(1, 4, 8, 12), rtol=0, atol=1e-4)
