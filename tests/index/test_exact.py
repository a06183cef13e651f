"""exact_search and recall_at_k: against numpy, with ties, padding and chunks."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from wavekv.errors import DtypeError, InputError
from wavekv.index import exact, exact_search, recall_at_k

from .index_cases import SEEDS, assert_right, assert_same_result, make_data


def sorted_by_hand(keys: np.ndarray, queries: np.ndarray, k: int) -> tuple[np.ndarray, np.ndarray]:
    """scores and ids [H, Q, min(k, N)], lower ids first among equals."""
    scores = np.einsum("hqd,hnd->hqn", queries, keys)
    ids = np.argsort(-scores, axis=-1, kind="stable")[..., :k]
    return np.take_along_axis(scores, ids, -1), ids


@given(
    heads=st.integers(1, 3),
    num_keys=st.integers(0, 60),
    num_queries=st.integers(0, 5),
    dim=st.integers(1, 9),
    k=st.sampled_from([1, 2, 7, 60, 100]),
    levels=st.sampled_from([0, 1, 3]),
    seed=SEEDS,
)
def test_it_is_a_sort_of_all_products(heads, num_keys, num_queries, dim, k, levels, seed) -> None:
    """Small integers: many ties, and every product is exact."""
    rng = np.random.default_rng(seed)
    keys, queries = (
        rng.integers(-levels, levels + 1, (heads, n, dim)).astype(np.float32)
        for n in (num_keys, num_queries)
    )
    result = exact_search(keys, queries, k)
    scores, ids = sorted_by_hand(keys, queries, k)
    found = min(k, num_keys)
    assert np.array_equal(result.scores[..., :found], scores)
    assert np.array_equal(result.ids[..., :found], ids)
    assert (result.scores[..., found:] == -np.inf).all()
    assert (result.ids[..., found:] == -1).all()
    assert (result.counts == found).all()
    assert (result.keys_scanned == num_keys).all()
    assert (result.keys_reranked == num_keys).all()
    assert (result.pages_scored == 0).all()


@given(
    at_once=st.sampled_from([1, 100, 500]),
    dtype=st.sampled_from([torch.float32, torch.bfloat16, torch.float16]),
    seed=SEEDS,
)
def test_queries_that_come_in_parts_are_answered_alike(at_once, dtype, seed) -> None:
    keys, _, queries = make_data(seed, 50, dtype=dtype)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(exact, "_SCORES_AT_ONCE", at_once)
        result = exact_search(keys, queries.to(dtype), 9)
    assert_right(result, keys, queries.to(dtype), 9)
    whole = exact_search(keys, queries.to(dtype), 9)
    torch.testing.assert_close(result.scores, whole.scores, rtol=1e-5, atol=1e-4)


def test_the_kind_of_array_is_kept() -> None:
    keys, _, queries = make_data(0, 30, heads=1)
    expected = exact_search(keys, queries, 3)
    flat = exact_search(keys[0].numpy(), queries[0].numpy(), 3)
    assert isinstance(flat.ids, np.ndarray)
    assert flat.ids.dtype == np.int64
    assert flat.scores.dtype == np.float32
    assert flat.ids.shape == (6, 3)
    assert np.array_equal(flat.ids, expected.ids[0].numpy())
    mixed = exact_search(keys.numpy(), queries, 3)
    assert_same_result(mixed, expected)


@pytest.mark.parametrize(
    ("keys", "queries", "k", "error", "message"),
    [
        (np.zeros((4, 3)), np.zeros((1, 3), np.float32), 1, DtypeError, "keys .* got float64"),
        (np.zeros((4, 3), "f4"), np.zeros((1, 3), int), 1, DtypeError, "queries .* got int64"),
        (np.zeros((4, 3), "f4"), np.zeros(3, "f4"), 1, InputError, r"\[N, D\], got \(3,\)"),
        (np.zeros((4, 3), "f4"), np.zeros((1, 1, 3), "f4"), 1, InputError, r"got \(1, 1, 3\)"),
        (np.zeros((4, 3), "f4"), np.zeros((1, 2), "f4"), 1, InputError, "3 dim.* got 1 and 2"),
        (np.zeros((2, 4, 3), "f4"), np.zeros((3, 1, 3), "f4"), 1, InputError, "2 heads.*got 3 and"),
        (np.full((4, 3), np.nan, "f4"), np.zeros((1, 3), "f4"), 1, InputError, "keys .* got nan"),
        (np.zeros((4, 3), "f4"), np.full((1, 3), np.inf, "f4"), 1, InputError, "queries .*got inf"),
        (np.zeros((4, 3), "f4"), np.zeros((1, 3), "f4"), 0, InputError, "at least 1, got 0"),
    ],
)
def test_errors_say_what_was_expected_and_what_came(keys, queries, k, error, message) -> None:
    with pytest.raises(error, match=message):
        exact_search(keys, queries, k)


@given(
    shape=st.tuples(st.integers(0, 3), st.integers(0, 4)),
    found=st.integers(1, 12),
    wanted=st.integers(1, 12),
    seed=SEEDS,
)
def test_recall_is_the_share_of_a_set_in_another(shape, found, wanted, seed) -> None:
    rng = np.random.default_rng(seed)

    def some(count: int) -> np.ndarray:
        ids = rng.permuted(np.tile(np.arange(20), (*shape, 1)), axis=-1)[..., :count]
        return np.where(rng.random(ids.shape) < 0.2, -1, ids)

    ids, true = some(found), some(wanted)
    recall = recall_at_k(ids, true)
    assert recall.shape == shape
    assert recall.dtype == np.float64
    for at in np.ndindex(shape):
        held, missing = set(ids[at]) - {-1}, set(true[at]) - {-1}
        assert recall[at] == (len(held & missing) / len(missing) if missing else 1)
    in_torch = recall_at_k(torch.from_numpy(ids), torch.from_numpy(true))
    torch.testing.assert_close(in_torch.double(), torch.from_numpy(recall), rtol=1e-6, atol=0)


def test_recall_wants_answers_to_the_same_queries() -> None:
    with pytest.raises(InputError, match=r"got \(2, 3\) and \(3, 3\)"):
        recall_at_k(np.zeros((2, 3), int), np.zeros((3, 3), int))
    assert recall_at_k([[1, 2, 3]], [[3, 4]]).tolist() == [0.5]


@pytest.mark.gpu
def test_a_device_gives_the_same_answer() -> None:
    keys, _, queries = make_data(0, 500, num_queries=20)
    result = exact_search(keys.cuda(), queries.cuda(), 10)
    assert result.ids.device.type == "cuda"
    assert_right(
        type(result)(*(getattr(result, n).cpu() for n in result.__slots__)), keys, queries, 10
    )
    assert float(recall_at_k(result.ids.cpu(), exact_search(keys, queries, 10).ids).mean()) > 0.99
    with pytest.raises(InputError, match="queries must be on cuda:0 as the index, got cpu"):
        exact_search(keys.cuda(), queries, 1)
