"""WaveIndex.search: exact where everything is scanned, right in what it returns elsewhere."""

from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from wavekv.index import IndexParams, WaveIndex, exact_search, recall_at_k
from wavekv.index import search as search_module
from wavekv.kernels import use_backend

from .index_cases import (
    FEW,
    HALF,
    PARAMS,
    SEEDS,
    SMALL,
    assert_right,
    assert_same_result,
    close,
    inner_products,
    make_data,
)

KS = st.sampled_from([1, 2, 10, 500])
BUDGETS = st.one_of(st.sampled_from([0.01, 0.1, 0.5, 1.0]), st.integers(1, 500))


@HALF
@given(
    num_keys=st.integers(0, 200),
    heads=st.integers(1, 3),
    dim=st.integers(1, 40),
    dtype=st.sampled_from([torch.float32, torch.bfloat16, torch.float16]),
    params=PARAMS,
    k=KS,
    group=st.sampled_from([1, 2]),
    seed=SEEDS,
)
def test_scanning_everything_is_exact(num_keys, heads, dim, dtype, params, k, group, seed) -> None:
    keys, _, queries = make_data(seed, num_keys, heads=heads, dim=dim, dtype=dtype)
    result = WaveIndex.build(keys, params).search(queries, k, budget=1.0, group=group)
    assert_right(result, keys, queries, k)
    exact = exact_search(keys, queries, k)
    assert_right(exact, keys, queries, k)
    atol = 2 * close(keys, queries)
    torch.testing.assert_close(result.scores, exact.scores, rtol=0, atol=atol)
    # where ids differ, their products are ties up to rounding
    true = inner_products(keys, queries)
    ids, wanted = (x.ids.clamp_min(0) for x in (result, exact))
    if num_keys:
        assert ((true.gather(2, ids) - true.gather(2, wanted)).abs() <= 2 * atol).all()
    assert (result.keys_scanned == num_keys).all()
    assert (result.keys_reranked == num_keys).all()


@given(
    num_keys=st.integers(0, 200),
    params=PARAMS,
    k=KS,
    budget=BUDGETS,
    top_p=st.sampled_from([None, 0.3, 1.0]),
    group=st.sampled_from([1, 2, 3]),
    rerank=st.sampled_from([1.0, 2.5, 100.0]),
    has_sample=st.booleans(),
    seed=SEEDS,
)
def test_whatever_is_scanned_the_answer_is_right(
    num_keys, params, k, budget, top_p, group, rerank, has_sample, seed
) -> None:
    keys, _, queries = make_data(seed, num_keys)
    index = WaveIndex.build(keys, params, query_sample=queries if has_sample else None)
    options = {"budget": budget, "top_p": top_p, "group": group, "rerank": rerank}
    result = index.search(queries, k, **options)
    assert_right(result, keys, queries, k)
    assert (result.keys_scanned <= num_keys).all()
    assert (result.keys_reranked <= result.keys_scanned).all()
    pages = result.keys_scanned - index.stats()["num_tail"]
    share = budget * num_keys if isinstance(budget, float) else budget
    assert (pages <= max(share, k) + params.page_size).all()
    by_group = result.keys_scanned.unflatten(1, (-1, group))
    assert (by_group == by_group[..., :1]).all()


@FEW
@given(
    params=PARAMS,
    group=st.sampled_from([1, 2]),
    top_p=st.sampled_from([None, 0.6]),
    seed=SEEDS,
)
def test_neither_the_batch_nor_threads_nor_chunks_matter(params, group, top_p, seed) -> None:
    keys, _, queries = make_data(seed, 200)
    index = WaveIndex.build(keys, params)
    options = {"budget": 0.3, "group": group, "top_p": top_p}
    together = index.search(queries, 7, **options)
    assert_same_result(together, index.search(queries, 7, **options, num_threads=1))
    assert_same_result(together, index.search(queries, 7, **options, num_threads=2))
    for start in range(0, queries.shape[1], group):
        asked = slice(start, start + group)
        alone = index.search(queries[:, asked], 7, **options)
        atol = close(keys, queries)
        torch.testing.assert_close(alone.scores, together.scores[:, asked], rtol=0, atol=atol)
        assert torch.equal(alone.keys_scanned, together.keys_scanned[:, asked])
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(search_module, "_SCORES_AT_ONCE", 1)
        chunked = index.search(queries, 7, **options)
    torch.testing.assert_close(chunked.scores, together.scores, rtol=0, atol=atol)
    assert torch.equal(chunked.keys_scanned, together.keys_scanned)


@FEW
@given(params=PARAMS, has_sample=st.booleans(), seed=SEEDS)
def test_heads_do_not_influence_each_other(params, has_sample, seed) -> None:
    keys, _, queries = make_data(seed, 200, heads=3)
    sample = queries if has_sample else None
    together = WaveIndex.build(keys, params, query_sample=sample).search(queries, 5, budget=0.5)
    for h in range(3):
        alone = WaveIndex.build(keys[h], params, query_sample=sample[h] if has_sample else None)
        result = alone.search(queries[h], 5, budget=0.5)
        # rounding may move a key across the border of a page: few may differ
        share = recall_at_k(result.ids, together.ids[h]).mean()
        assert share >= 0.9
        wide = alone.search(queries[h], 5, budget=1.0)
        exact = exact_search(keys[h], queries[h], 5)
        torch.testing.assert_close(wide.scores, exact.scores, rtol=0, atol=close(keys, queries))


@FEW
@given(params=PARAMS, has_sample=st.booleans(), seed=SEEDS)
def test_recall_does_not_fall_when_the_budget_rises(params, has_sample, seed) -> None:
    keys, _, queries = make_data(seed, 200)
    index = WaveIndex.build(keys, params, query_sample=queries if has_sample else None)
    truth = exact_search(keys, queries, 10).scores[..., -1:] - close(keys, queries)
    before = torch.zeros(queries.shape[:2])
    for budget in (0.05, 0.1, 0.2, 0.4, 0.8, 1.0):
        result = index.search(queries, 10, budget=budget, rerank=300.0)
        recall = (result.scores >= truth).float().mean(-1)
        assert (recall >= before).all()
        before = recall
    assert (before == 1).all()


def test_at_the_default_rerank_recall_rises_on_average() -> None:
    budgets = (0.05, 0.1, 0.2, 0.4, 0.8)
    recalls = []
    for seed in range(10):
        keys, _, queries = make_data(seed, 600, dim=32, num_queries=20)
        index, truth = WaveIndex.build(keys, SMALL), exact_search(keys, queries, 10).ids
        results = [index.search(queries, 10, budget=budget) for budget in budgets]
        recalls.append([float(recall_at_k(result.ids, truth).mean()) for result in results])
    means = np.mean(recalls, 0)
    assert (np.diff(means) >= -0.01).all()
    assert means[-1] > 0.95


@FEW
@given(params=PARAMS, group=st.sampled_from([1, 2, 6]), seed=SEEDS)
def test_more_of_the_softmax_takes_no_fewer_pages(params, group, seed) -> None:
    keys, _, queries = make_data(seed, 200)
    index = WaveIndex.build(keys, params)
    options = {"group": group, "budget": 1.0}
    scanned = [
        index.search(queries, 1, top_p=top_p, **options).keys_scanned
        for top_p in (0.1, 0.5, 0.9, 0.99, 1.0)
    ]
    assert (torch.stack(scanned).diff(dim=0) >= 0).all()
    capped = index.search(queries, 1, top_p=0.99, group=group, budget=0.25).keys_scanned
    assert (capped <= scanned[3]).all()


def test_a_group_of_equal_queries_is_that_query() -> None:
    keys, _, queries = make_data(0, 300)
    index = WaveIndex.build(keys, SMALL)
    alone = index.search(queries, 5, top_p=0.5, budget=1.0)
    result = index.search(queries.repeat_interleave(3, 1), 5, top_p=0.5, budget=1.0, group=3)
    assert torch.equal(result.ids, alone.ids.repeat_interleave(3, 1))
    assert torch.equal(result.keys_scanned, alone.keys_scanned.repeat_interleave(3, 1))


@FEW
@given(has_sample=st.booleans(), budget=st.sampled_from([0.3, 1.0]), seed=SEEDS)
def test_a_constant_that_is_added_to_all_keys_changes_no_ids(has_sample, budget, seed) -> None:
    """Integers, so that sums are exact: only the rounding of means differs."""
    keys, _, queries = make_data(seed, 200, heads=1)
    keys, queries = (4 * keys).round(), (4 * queries).round()
    shift = torch.randint(-64, 64, (1, 1, 12), generator=torch.Generator().manual_seed(seed))
    sample = queries if has_sample else None
    plain, moved = (
        WaveIndex.build(x, SMALL, query_sample=sample).search(queries, 5, budget=budget)
        for x in (keys, keys + shift)
    )
    offset = (queries * shift).sum(-1, keepdim=True)
    if budget == 1.0:
        assert torch.equal(moved.ids, plain.ids)
        assert torch.equal(moved.scores, plain.scores + offset)
    else:
        assert recall_at_k(moved.ids, plain.ids).mean() >= 0.9


def test_of_equal_keys_the_lower_ids_come_first() -> None:
    index = WaveIndex.build(torch.ones(1, 150, 8), SMALL)
    for budget in (0.1, 1.0):
        result = index.search(torch.ones(1, 2, 8), 4, budget=budget)
        assert (result.ids.diff(dim=-1) > 0).all()
        assert (result.scores == 8).all()
    assert result.ids[0, 0].tolist() == [0, 1, 2, 3]


def test_a_search_from_several_threads_is_a_search() -> None:
    keys, _, queries = make_data(0, 500, num_queries=40)
    params = IndexParams(page_size=4, segment=256)
    expected = WaveIndex.build(keys, params).search(queries, 5)
    # never searched before: the threads also race to be first
    index = WaveIndex.build(keys, params)
    with ThreadPoolExecutor(4) as pool:
        for result in pool.map(lambda _: index.search(queries, 5), range(20)):
            assert_same_result(result, expected)


def test_the_backend_of_one_search_does_not_bind_the_next() -> None:
    data = make_data(0, 300)
    index = WaveIndex.build(data.keys, SMALL)
    with use_backend("torch"):
        first = index.search(data.queries, 5)
    assert torch.equal(index.search(data.queries, 5).ids, first.ids)


def test_numbers_may_be_those_of_numpy() -> None:
    data = make_data(0, 300)
    index = WaveIndex.build(data.keys, SMALL)
    plain = index.search(data.queries, 5, budget=40, rerank=2.0)
    found = index.search(
        data.queries, np.uint8(5), budget=np.int32(40), rerank=np.float32(2), group=np.int64(1)
    )
    assert torch.equal(found.ids, plain.ids)
    index.truncate(np.int64(200))
    assert len(index) == 200
