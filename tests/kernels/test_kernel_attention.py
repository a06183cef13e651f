"""attend_pages, attend_dense and merge_state: numba against the torch reference, and laws."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from wavekv.kernels import attend_dense, attend_pages, merge_state, use_backend

DTYPES = st.sampled_from([torch.float32, torch.bfloat16, torch.float16])
DIMS = st.fixed_dictionaries(
    {
        "batch": st.integers(1, 3),
        "kv_heads": st.integers(1, 3),
        "group": st.integers(1, 4),
        "width": st.sampled_from([8, 20, 64, 80, 96, 128]),
    }
)
SEEDS = st.integers(0, 2**31)
SOFTCAPS = st.sampled_from([None, 1.5, 30.0])

State = tuple[Tensor, Tensor]


def assert_same(actual: State, expected: State, tolerance: float = 2e-5) -> None:
    for got, want in zip(actual, expected, strict=True):
        torch.testing.assert_close(got, want, rtol=tolerance, atol=tolerance)
        assert not got.isnan().any()


def both(function, *arguments, **options) -> State:
    """Run the numba kernel, check it against the reference, return its result."""
    with use_backend("numba"):
        actual = function(*arguments, **options)
    with use_backend("torch"):
        assert_same(actual, function(*arguments, **options))
    return actual


def make_pages(seed, batch, kv_heads, group, width, pages, page_size, chunk_pages, dtype):
    """A query, chunks that are NaN beyond each page's count, ids with -1 among them, and counts."""
    rng = torch.Generator().manual_seed(seed)
    query = torch.randn(batch, kv_heads * group, width, generator=rng)
    total = batch * kv_heads * pages
    num_chunks = total // chunk_pages + 1
    chunks = torch.randn(num_chunks, chunk_pages, 2, page_size, width, generator=rng)
    ids = torch.randperm(num_chunks * chunk_pages, generator=rng)[:total]
    counts = torch.randint(0, page_size + 1, (total,), generator=rng, dtype=torch.int32)
    beyond = torch.arange(page_size) >= counts[:, None]
    chunks.view(-1, 2, page_size, width)[ids] = chunks.view(-1, 2, page_size, width)[
        ids
    ].masked_fill(beyond[:, None, :, None], torch.nan)
    absent = torch.rand(total, generator=rng) < 0.2
    shape = (batch, kv_heads, pages)
    ids = ids.masked_fill(absent, -1).view(shape)
    return query, list(chunks.to(dtype)), ids, counts.view(shape)


@given(
    dims=DIMS,
    seed=SEEDS,
    pages=st.integers(0, 12),
    page_size=st.integers(1, 17),
    chunk_pages=st.integers(1, 7),
    dtype=DTYPES,
    softcap=SOFTCAPS,
)
def test_attend_pages_equals_reference(
    dims, seed, pages, page_size, chunk_pages, dtype, softcap
) -> None:
    query, chunks, ids, counts = make_pages(
        seed, **dims, pages=pages, page_size=page_size, chunk_pages=chunk_pages, dtype=dtype
    )
    both(attend_pages, query, chunks, ids, counts, scale=0.3, softcap=softcap)


@pytest.mark.parametrize("pages", [63, 300])
def test_attend_pages_over_many_splits(pages: int) -> None:
    query, chunks, ids, counts = make_pages(1, 1, 1, 3, 64, pages, 16, 50, torch.bfloat16)
    both(attend_pages, query.bfloat16(), chunks, ids, counts, scale=0.3)


@given(dims=DIMS, seed=SEEDS, pages=st.integers(0, 12), cut=st.integers(0, 12))
def test_attending_to_two_halves_and_merging_is_attending_to_all(dims, seed, pages, cut) -> None:
    query, chunks, ids, counts = make_pages(
        seed, **dims, pages=pages, page_size=5, chunk_pages=7, dtype=torch.float32
    )
    whole = attend_pages(query, chunks, ids, counts, scale=0.3)
    left = attend_pages(query, chunks, ids[..., :cut], counts[..., :cut], scale=0.3)
    right = attend_pages(query, chunks, ids[..., cut:], counts[..., cut:], scale=0.3)
    assert_same(both(merge_state, *left, *right), whole)


@given(dims=DIMS, seed=SEEDS, pages=st.integers(1, 12))
def test_order_of_pages_does_not_matter(dims, seed, pages) -> None:
    query, chunks, ids, counts = make_pages(
        seed, **dims, pages=pages, page_size=5, chunk_pages=7, dtype=torch.float16
    )
    order = torch.randperm(pages, generator=torch.Generator().manual_seed(seed))
    shuffled = attend_pages(query, chunks, ids[..., order], counts[..., order], scale=0.3)
    assert_same(shuffled, attend_pages(query, chunks, ids, counts, scale=0.3))


def test_no_page_is_the_empty_state() -> None:
    query = torch.randn(2, 4, 8)
    chunk = torch.full((3, 2, 4, 8), torch.nan)
    ids = torch.full((2, 2, 5), -1)
    counts = torch.zeros(2, 2, 5, dtype=torch.int32)
    for chunks, page_ids in (([chunk], ids), ([chunk], torch.zeros_like(ids)), ([], ids[..., :0])):
        out, lse = both(
            attend_pages, query, chunks, page_ids, counts[..., : page_ids.shape[2]], scale=1.0
        )
        assert (out == 0).all()
        assert (lse == -torch.inf).all()


@pytest.mark.parametrize(("page", "count"), [(6, 1), (0, 5), (0, -1)])
def test_pages_out_of_range_are_an_error_not_a_wild_read(page: int, count: int) -> None:
    chunks = [torch.randn(3, 2, 4, 8), torch.randn(3, 2, 4, 8)]
    ids = torch.tensor([[[page]]])
    counts = torch.tensor([[[count]]], dtype=torch.int32)
    with use_backend("numba"), pytest.raises(IndexError, match=r"below 6 and counts in 0\.\.4"):
        attend_pages(torch.randn(1, 2, 8), chunks, ids, counts, scale=1.0)


@given(
    dims=DIMS, seed=SEEDS, tokens=st.integers(0, 150), dtype=DTYPES, softcap=SOFTCAPS,
    masked=st.booleans(), token_major=st.booleans(),
)  # fmt: skip
def test_attend_dense_equals_reference(
    dims, seed, tokens, dtype, softcap, masked, token_major
) -> None:
    rng = torch.Generator().manual_seed(seed)
    batch, kv_heads, width = dims["batch"], dims["kv_heads"], dims["width"]
    query = torch.randn(batch, kv_heads * dims["group"], width, generator=rng)
    if token_major:  # [B, S, Hkv, D] in memory
        buffer = torch.randn(2, batch, tokens + 9, kv_heads, width, generator=rng)
        buffer = buffer.transpose(2, 3)
    else:
        buffer = torch.randn(2, batch, kv_heads, tokens + 9, width, generator=rng)
    keys, values = buffer.to(dtype)[..., 4 : 4 + tokens, :]
    valid = None
    if masked:
        valid = torch.rand(batch, tokens, generator=rng) < 0.6
        poison = ~valid[:, None, :, None]
        keys.masked_fill_(poison, torch.nan)
        values.masked_fill_(poison, torch.nan)
    both(attend_dense, query.to(dtype), keys, values, valid, scale=0.3, softcap=softcap)


def test_attend_dense_over_many_splits() -> None:
    query = torch.randn(1, 3, 64)
    keys, values = torch.randn(2, 1, 1, 5001, 64)
    valid = torch.rand(1, 5001) < 0.9
    both(attend_dense, query, keys, values, valid, scale=0.3)


def test_large_logits_neither_overflow_nor_vanish() -> None:
    query = torch.full((1, 1, 8), 100.0)
    keys = torch.tensor([1.0, -1.0, 1.0]).view(1, 1, 3, 1).expand(1, 1, 3, 8).contiguous()
    values = torch.arange(24.0).view(1, 1, 3, 8)
    out, lse = both(attend_dense, query, keys, values, None, scale=10.0)
    torch.testing.assert_close(out[0, 0], (values[0, 0, 0] + values[0, 0, 2]) / 2)
    torch.testing.assert_close(lse[0, 0], torch.tensor(8000.0) + torch.tensor(2.0).log())


def random_state(seed: int, shape: tuple[int, ...], width: int) -> State:
    """A state with a few empty rows."""
    rng = torch.Generator().manual_seed(seed)
    lse = 10 * torch.randn(shape, generator=rng)
    empty = torch.rand(shape, generator=rng) < 0.3
    out = torch.randn(*shape, width, generator=rng)
    return out.masked_fill(empty[..., None], 0.0), lse.masked_fill(empty, -torch.inf)


SHAPES = st.lists(st.integers(0, 4), max_size=3).map(tuple)


@given(seed=SEEDS, shape=SHAPES, width=st.sampled_from([1, 8, 20]))
def test_merge_state_is_associative_and_commutative_and_has_an_identity(seed, shape, width) -> None:
    a, b, c = (random_state(seed + i, shape, width) for i in range(3))
    none = torch.zeros_like(a[0]), torch.full_like(a[1], -torch.inf)
    left = both(merge_state, *both(merge_state, *a, *b), *c)
    assert_same(both(merge_state, *a, *both(merge_state, *b, *c)), left)
    assert_same(both(merge_state, *b, *a), both(merge_state, *a, *b))
    assert_same(both(merge_state, *a, *none), a)
    assert_same(both(merge_state, *none, *none), none)


@pytest.mark.usefixtures("_two_threads")
def test_merge_state_of_many_rows_uses_threads_and_agrees() -> None:
    a, b = random_state(1, (2, 8, 100), 64), random_state(2, (2, 8, 100), 64)
    both(merge_state, *a, *b)
    strided = a[0].transpose(1, 2), a[1].transpose(1, 2)
    both(merge_state, *strided, b[0].transpose(1, 2), b[1].transpose(1, 2))
