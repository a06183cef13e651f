"""The search kernels: numba against the torch reference, ties and padding included."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from wavekv.index.codes import decode_means, encode_keys, encode_means
from wavekv.kernels import SearchParts, checked, score_means, search_pages, use_backend
from wavekv.kernels.cpu_top import top_positions

DTYPES = st.sampled_from([torch.float32, torch.bfloat16, torch.float16])


def in_larger(x: Tensor) -> Tensor:
    """The same numbers with room behind them in each head, as a buffer that grows has."""
    room = x.new_empty(x.shape[0], 2 * x.shape[1] + 16, *x.shape[2:])
    room.view(torch.uint8).fill_(255)
    room[:, : x.shape[1]] = x
    return room[:, : x.shape[1]]


def make_parts(
    seed: int,
    heads: int,
    blocks: int,
    page_size: int,
    dim: int,
    tail: int,
    *,
    dtype: torch.dtype = torch.float32,
    code_dims: int = 1000,
    levels: int = 0,
) -> SearchParts:
    """Parts of random keys, not clustered; `levels` > 0: small integers, for many ties."""
    rng = torch.Generator().manual_seed(seed)
    pages = 16 * max(blocks, 1)

    def randn(*shape: int) -> Tensor:
        if levels:
            return torch.randint(-levels, levels + 1, shape, generator=rng).float()
        return torch.randn(*shape, generator=rng)

    keys = randn(heads, pages, 2, page_size, dim).to(dtype)
    z = keys[:, :, 0].float()
    mean = z.mean(2)
    made = encode_means(mean)
    width = min(code_dims, -(-dim // 8) * 8)
    kept, about = min(width, dim), decode_means(made)
    counts = torch.full((heads, pages), page_size)
    codes = encode_keys(z[..., :kept], about[..., :kept], counts)
    ids = torch.rand(heads, pages * page_size, generator=rng).argsort(1).to(torch.int32)
    spread = (z - mean.unsqueeze(2)).square().mean((2, 3)).sqrt()
    parts = SearchParts(
        *(made.codes, made.scale, spread, codes.codes, codes.scale, codes.page_scale),
        keys=keys,
        ids=ids.view(heads, pages, page_size),
        tail=randn(heads, tail, dim).to(dtype),
    )
    if blocks == 0:
        parts = SearchParts(*(x[:, :0] for x in parts[:8]), parts.tail)
    parts = SearchParts(*(in_larger(x) for x in parts[:9]))
    return checked(parts._replace(keys=parts.keys[:, :, 0]))


def padded(query: Tensor) -> Tensor:
    return torch.nn.functional.pad(query, (0, -query.shape[-1] % 8))


def both(function, *arguments, **options) -> list:
    results = []
    for backend in ("numba", "torch"):
        with use_backend(backend):
            results.append(function(*arguments, **options))
    return results


@given(
    shape=st.tuples(st.integers(1, 3), st.integers(0, 4)),
    num_queries=st.integers(0, 4),
    dim=st.integers(1, 130),
    seed=st.integers(0, 2**31),
)
def test_scores_of_means_equal_the_reference(shape, num_queries, dim, seed) -> None:
    heads, blocks = shape
    parts = make_parts(seed, heads, blocks, 1, dim, 0)
    query = padded(torch.randn(heads, num_queries, dim))
    arguments = query, parts.mean_codes, parts.mean_scale
    got, want = both(score_means, *arguments)
    assert got.shape == (heads, num_queries, 16 * blocks)
    # half-way components may be rounded either way
    step = float(query.abs().max()) if query.numel() else 0.0
    largest = float(parts.mean_scale.max()) * 127 if blocks else 0
    torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-4 + 2 * step / 127 * largest)
    assert (~torch.isclose(got, want, rtol=1e-4, atol=1e-4)).sum() <= 0.02 * got.numel() + 1
    with use_backend("numba"):
        for count in (1, 2):
            assert torch.equal(score_means(*arguments, num_threads=count), got)


@given(
    heads=st.integers(1, 2),
    blocks=st.integers(0, 4),
    page_size=st.sampled_from([1, 2, 4, 8, 16, 32, 64]),
    dim=st.sampled_from([3, 8, 20, 64, 96, 130]),
    tail=st.sampled_from([0, 1, 40]),
    num_queries=st.integers(0, 3),
    dtype=DTYPES,
    code_dims=st.sampled_from([8, 1000]),
    k=st.sampled_from([1, 3, 5000]),
    max_pages=st.sampled_from([0, 1, 5, 1000]),
    num_candidates=st.sampled_from([0, 1, 7, 100000]),
    given_pages=st.sampled_from([None, "some", "none", "all"]),
    levels=st.sampled_from([0, 1]),
    seed=st.integers(0, 2**31),
)
def test_a_search_equals_the_reference(
    heads, blocks, page_size, dim, tail, num_queries, dtype, code_dims, k, max_pages,
    num_candidates, given_pages, levels, seed,
) -> None:  # fmt: skip
    parts = make_parts(
        seed, heads, blocks, page_size, dim, tail, dtype=dtype, code_dims=code_dims, levels=levels
    )
    rng = torch.Generator().manual_seed(seed)
    query = torch.randn(heads, num_queries, dim, generator=rng)
    if levels:
        query = query.round()
    chosen = None
    if given_pages is not None:
        order = torch.rand(heads, num_queries, 16 * blocks, generator=rng).argsort(-1)
        chosen = order[..., : max_pages if given_pages == "some" else None].clone()
        if given_pages == "some":
            chosen[..., chosen.shape[2] // 2 :] = -1
        if given_pages == "none":
            chosen.fill_(-1)
    options = {
        "k": k, "max_pages": max_pages, "num_candidates": num_candidates, "optimism": 1.5
    }  # fmt: skip
    got, want = both(search_pages, query, padded(query), chosen, parts, **options)
    for x, y in zip(got, want, strict=True):
        assert x.shape == y.shape
        assert x.dtype == y.dtype
    assert torch.equal(got[2], want[2])
    # all that is found is what it says, whichever of two close estimates went first
    assert_right(got, query, parts)
    same = torch.isclose(got[0], want[0], rtol=1e-4, atol=1e-4)
    assert (~same).sum() <= 0.05 * same.numel() + 3
    needs_no_codes = num_candidates >= 16 * blocks * page_size
    if needs_no_codes and (chosen is not None or max_pages >= 16 * blocks):
        assert same.all()
        if levels:
            assert torch.equal(got[1], want[1])
    with use_backend("numba"):
        for count in (1, 2):
            other = search_pages(query, padded(query), chosen, parts, num_threads=count, **options)
            assert all(torch.equal(x, y) for x, y in zip(other, got, strict=True))


def assert_right(found: tuple[Tensor, ...], query: Tensor, parts: SearchParts) -> None:
    scores, ids, work = found
    counts, _, scanned, compared = work
    assert (counts <= compared).all()
    assert (compared <= scanned).all()
    heads = len(ids)
    held = torch.arange(ids.shape[2]) < counts.unsqueeze(-1)
    assert torch.equal(ids >= 0, held)
    assert (scores[~held] == -torch.inf).all()
    ordered = (scores[..., :-1] > scores[..., 1:]) | (
        (scores[..., :-1] == scores[..., 1:]) & ((ids[..., :-1] < ids[..., 1:]) | ~held[..., 1:])
    )
    assert ordered.all()
    by_id = torch.empty(heads, parts.ids[0].numel() + parts.tail.shape[1], query.shape[2])
    by_id[:, parts.ids[0].numel() :] = parts.tail
    place = parts.ids.flatten(1).long().unsqueeze(-1).expand(-1, -1, query.shape[2])
    by_id.scatter_(1, place, parts.keys.flatten(1, 2).float())
    if by_id.shape[1]:
        true = (query.double() @ by_id.double().mT).gather(2, ids.clamp_min(0))
        torch.testing.assert_close(scores[held].double(), true[held], rtol=1e-4, atol=1e-4)


def test_the_best_pages_are_scanned_and_the_best_codes_compared() -> None:
    """What the reference does, written out for one query."""
    parts = make_parts(0, 1, 4, 8, 32, 0)
    query = torch.randn(1, 1, 32)
    means = score_means(query, parts.mean_codes, parts.mean_scale)
    rank = means[0, 0] + 1.5 * query.norm() * parts.spread[0]
    chosen = rank.topk(10).indices
    products = (parts.keys[0, chosen] @ query[0, 0]).flatten()
    best = parts.ids[0, chosen].flatten()[products.topk(5).indices]
    options = {"k": 5, "max_pages": 10, "num_candidates": 80, "optimism": 1.5}
    for found in both(search_pages, query, query, None, parts, **options):
        assert found[1][0, 0].tolist() == best.tolist()
        assert found[2].flatten().tolist() == [5, 64, 80, 80]


@pytest.mark.parametrize("page_size", [1, 4, 16, 32])
@pytest.mark.parametrize("dim", [8, 40, 96])
def test_as_many_candidates_as_answers_are_those_of_the_reference(page_size, dim) -> None:
    """Without a second look the answer shows which estimates were largest."""
    parts = make_parts(0, 2, 8, page_size, dim, 0)
    query = torch.randn(2, 30, dim)
    options = {"k": 5, "max_pages": 40, "num_candidates": 5, "optimism": 1.5}
    got, want = both(search_pages, query, query, None, parts, **options)
    assert (got[1] == want[1]).float().mean() > 0.98
    best = both(search_pages, query, query, None, parts, **(options | {"num_candidates": 10**6}))[0]
    assert (got[0] >= best[0][..., -1:] - 1e-4).float().mean() > 0.6


NUMBERS = st.one_of(
    st.lists(st.floats(-(2.0**100), 2.0**100, width=32), max_size=300),
    st.lists(st.integers(-2, 2), max_size=300),
    st.builds(
        lambda x, n: [x] * n, st.floats(-(2.0**100), 2.0**100, width=32), st.integers(0, 200)
    ),
    st.lists(st.sampled_from([-3e38, -1e-45, -0.0, 0.0, 1e-45, 1e-38, 1.0, 3e38]), max_size=300),
    st.builds(
        lambda seed, n, size: (size + np.random.default_rng(seed).normal(size=n)).tolist(),
        st.integers(0, 2**31),
        st.integers(0, 9000),
        st.sampled_from([0.0, 1e3, 1e7, -1e8]),
    ),
)


@given(numbers=NUMBERS, share=st.floats(0, 1.2), has_ties=st.booleans(), seed=st.integers(0, 99))
def test_top_positions_are_the_first_of_a_sort(numbers, share, has_ties, seed) -> None:
    values = np.array(numbers, np.float32)
    count = int(share * values.size)
    ties = np.random.default_rng(seed).permutation(values.size) if has_ties else None
    out = np.empty(values.size + 1, np.int64)
    taken = top_positions(values, ties, count, np.empty(values.size, np.int32), out)
    assert taken == min(count, values.size)
    order = np.lexsort((np.arange(values.size) if ties is None else ties, -values))
    assert sorted(out[:taken].tolist()) == sorted(order[:taken].tolist())


@pytest.mark.parametrize("n", [2047, 2048, 5000, 50000])
@pytest.mark.parametrize("kind", ["ascending", "descending", "constant", "one peak", "sampled low"])
def test_top_positions_of_patterns_that_mislead_a_sample(n: int, kind: str) -> None:
    values = {
        "ascending": np.arange(n),
        "descending": -np.arange(n),
        "constant": np.ones(n),
        "one peak": np.where(np.arange(n) == 17, 1e30, np.arange(n) % 3),
        "sampled low": np.where(np.arange(n) % 16 == 0, -1e20, np.arange(n) % 7),
    }[kind].astype(np.float32)
    for count in (1, 16, n // 16, n // 2, n - 1):
        out = np.empty(n + 1, np.int64)
        assert top_positions(values, None, count, np.empty(n, np.int32), out) == count
        order = np.argsort(-values, kind="stable")[:count]
        assert sorted(out[:count].tolist()) == sorted(order.tolist())


@pytest.mark.parametrize("name", SearchParts._fields[:9])
def test_parts_that_do_not_fit_are_named(name: str) -> None:
    parts = make_parts(0, 2, 2, 4, 16, 3)
    wrong = getattr(parts, name)
    shorter = wrong[..., :-1] if name in ("tail", "keys") else wrong[:, :-1]
    with pytest.raises(ValueError, match=r"must .*, got"):
        checked(parts._replace(**{name: shorter}))
    with pytest.raises(ValueError, match=r"must .*, got .*float64"):
        checked(parts._replace(**{name: wrong.double()}))


def test_queries_that_do_not_fit_are_named() -> None:
    parts = make_parts(0, 2, 2, 4, 16, 3)
    options = {"k": 1, "max_pages": 1, "num_candidates": 1, "optimism": 1.0}
    query = torch.randn(2, 3, 16)
    with pytest.raises(ValueError, match=r"query must be \(2, 3, 16\).*, got \(2, 3, 15\)"):
        search_pages(query[..., :15], query, None, parts, **options)
    with pytest.raises(ValueError, match=r"turned must be \(2, 3, 16\).*, got \(2, 3, 8\)"):
        search_pages(query, query[..., :8], None, parts, **options)
    chosen = torch.zeros(2, 3, 1, dtype=torch.int32)
    with pytest.raises(ValueError, match=r"given must be .*int64, got .*int32"):
        search_pages(query, query, chosen, parts, **options)
    for wrong in ({"k": 0}, {"num_candidates": -1}, {"max_pages": -1}):
        with pytest.raises(ValueError, match=r"expected k >= 1.* got"):
            search_pages(query, query, None, parts, **(options | wrong))
    with pytest.raises(ValueError, match=r"query must be \[H=2, Q, W\].* got \(2, 3, 15\)"):
        score_means(query[..., :15], parts.mean_codes, parts.mean_scale)
