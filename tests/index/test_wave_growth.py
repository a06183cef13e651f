"""How an index grows and shrinks: a function of its keys alone, all or nothing."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from wavekv.growing import GrowingTensor
from wavekv.index import IndexParams, WaveIndex, pages, state, units

from .index_cases import (
    FEW,
    HALF,
    PARAMS,
    SEEDS,
    assert_same_result,
    assert_same_tensors,
    make_data,
    snapshot,
)

DTYPES = st.sampled_from([torch.float32, torch.bfloat16, torch.float16])
LEVELS = IndexParams(page_size=2, segment=256)


def build(data, params, *, has_values=True, has_sample=False, upto=None) -> WaveIndex:
    return WaveIndex.build(
        data.keys[:, :upto],
        params,
        values=data.values[:, :upto] if has_values else None,
        query_sample=data.queries if has_sample else None,
    )


def append(index: WaveIndex, data, start: int, end: int, has_values=True) -> range:
    values = data.values[:, start:end] if has_values else None
    return index.append(data.keys[:, start:end], values)


@HALF
@given(
    cuts=st.lists(st.integers(0, 160), max_size=3).map(sorted),
    params=PARAMS,
    has_values=st.booleans(),
    has_sample=st.booleans(),
    dtype=DTYPES,
    seed=SEEDS,
)
def test_appends_in_any_chunks_equal_one_build(
    cuts, params, has_values, has_sample, dtype, seed
) -> None:
    data = make_data(seed, 160, dtype=dtype)
    whole = build(data, params, has_values=has_values, has_sample=has_sample)
    index = build(data, params, has_values=has_values, has_sample=has_sample, upto=0)
    for start, end in zip([0, *cuts], [*cuts, 160], strict=True):
        assert append(index, data, start, end, has_values) == range(start, end)
        assert len(index) == index.ntotal == end
    assert_same_tensors(snapshot(index), snapshot(whole))
    results = [x.search(data.queries, 9, budget=0.3) for x in (index, whole)]
    assert_same_result(*results)
    assert index.nbytes == whole.nbytes


@FEW
@given(
    n=st.integers(0, 300),
    params=PARAMS,
    has_values=st.booleans(),
    has_sample=st.booleans(),
    seed=SEEDS,
)
def test_a_truncated_index_is_one_that_was_built_so_short(
    n, params, has_values, has_sample, seed
) -> None:
    data = make_data(seed, 300)
    index = build(data, params, has_values=has_values, has_sample=has_sample)
    index.truncate(n)
    assert len(index) == n
    short = build(data, params, has_values=has_values, has_sample=has_sample, upto=n)
    assert_same_tensors(snapshot(index), snapshot(short))
    assert append(index, data, n, 300, has_values) == range(n, 300)
    whole = build(data, params, has_values=has_values, has_sample=has_sample)
    assert_same_tensors(snapshot(index), snapshot(whole))


@pytest.mark.parametrize(
    ("many", "few"),
    # of a span of 256: 128 + 64 + 32 keys, of which 128 + 64 stay
    [(224, 192), (224, 200), (500, 448)],
)
def test_a_span_of_several_segments_is_cut_as_it_was_built(many: int, few: int) -> None:
    data = make_data(0, many)
    index = build(data, LEVELS)
    index.truncate(few)
    assert_same_tensors(snapshot(index), snapshot(build(data, LEVELS, upto=few)))


def test_a_span_of_several_segments_grows_as_if_it_was_built() -> None:
    """256 + 128 + 32 keys become 256 + 128 + 64: the first two segments stay."""
    data, params = make_data(0, 448), IndexParams(page_size=2, segment=512)
    index = build(data, params, upto=416)
    append(index, data, 416, 448)
    assert_same_tensors(snapshot(index), snapshot(build(data, params)))


@pytest.mark.parametrize("dim", [12, 64, 128])
@pytest.mark.parametrize("has_sample", [False, True])
def test_kept_segments_are_coded_anew_as_they_would_be(dim: int, has_sample: bool) -> None:
    """Three full segments and then another: a codec of four instead of two."""
    data, params = make_data(0, 1100, dim=dim), IndexParams(page_size=8, segment=256)
    options = {"has_sample": has_sample, "has_values": False}
    index = build(data, params, upto=900, **options)
    append(index, data, 900, 1100, has_values=False)
    whole = build(data, params, **options)
    assert_same_tensors(snapshot(index), snapshot(whole))
    index.truncate(900)
    assert_same_tensors(snapshot(index), snapshot(build(data, params, upto=900, **options)))


def test_a_span_that_is_no_segment_is_coded_anew_too() -> None:
    """16 keys for each of 12 dimensions are a block and a half: a span is two."""
    data, params = make_data(0, 1024), IndexParams(page_size=8, segment=128)
    index = build(data, params, upto=384)
    append(index, data, 384, 1024)
    assert_same_tensors(snapshot(index), snapshot(build(data, params)))


def test_small_appends_leave_the_codec_alone(monkeypatch) -> None:
    """It is trained anew when the full segments double, not with every block."""
    data, params = make_data(0, 1300), IndexParams(page_size=2, segment=128)
    trained: list[int] = []
    real = state.train_codec
    monkeypatch.setattr(
        state, "train_codec", lambda parts, *rest: trained.append(len(parts)) or real(parts, *rest)
    )
    index = build(data, params, upto=128)
    for start in range(128, 1300, 20):
        append(index, data, start, min(start + 20, 1300))
    assert trained == [1, 2, 4, 8]


@FEW
@given(
    steps=st.lists(st.tuples(st.booleans(), st.integers(0, 150)), min_size=1, max_size=6),
    params=PARAMS,
    seed=SEEDS,
)
def test_a_key_keeps_its_id(steps, params, seed) -> None:
    data = make_data(seed, 1000)
    index = build(data, params, upto=0)
    for is_append, count in steps:
        n = len(index)
        if is_append:
            append(index, data, n, n + count)
        else:
            index.truncate(max(0, n - count))
        n = len(index)
        # every key is most like itself among all, but for what is equal or longer: find all
        result = index.search(data.queries, max(1, n), budget=1.0)
        assert (result.counts == n).all()
        if n:
            found = data.keys[torch.arange(2)[:, None, None], result.ids]
            scores = torch.einsum("hqd,hqkd->hqk", data.queries, found)
            torch.testing.assert_close(result.scores, scores, rtol=1e-4, atol=1e-3)


@pytest.mark.parametrize("is_append", [True, False])
def test_after_an_allocation_that_fails_the_index_is_as_before(is_append) -> None:
    """Each allocation of a growing buffer fails once, until none is left to fail."""
    data = make_data(0, 600)
    failures = 0
    while True:
        error = (MemoryError, RuntimeError)[failures % 2]
        index = build(data, LEVELS, upto=290)
        before = snapshot(index)
        result = index.search(data.queries, 5)
        attended = index.attend(data.queries)
        calls = 0
        grow = GrowingTensor._grow

        def failing(self, capacity, grow=grow, nth=failures, error=error):
            nonlocal calls
            calls += 1
            if calls > nth:
                raise error("no memory")
            grow(self, capacity)

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(GrowingTensor, "_grow", failing)
            try:
                if is_append:
                    append(index, data, 290, 600)
                else:
                    index.truncate(33)
            except error:
                failures += 1
            else:
                break
        assert_same_tensors(snapshot(index), before)
        assert len(index) == 290
        assert_same_result(index.search(data.queries, 5), result)
        assert_same_result(index.attend(data.queries), attended)
    assert failures > 0 or not is_append


@pytest.mark.parametrize(
    ("where", "name"),
    [
        (state, "cluster"),
        (state, "train_codec"),
        (state, "encode"),
        (units, "scatter_by_span"),
        (pages, "balanced_pages"),
        (pages, "encode_keys"),
        (units, "index_of_pages"),
        (state, "units_of"),
        (state.torch, "cat"),
    ],
)
@pytest.mark.parametrize("num_keys", [10, 150])
@pytest.mark.parametrize("is_append", [True, False])
def test_after_any_step_that_fails_the_index_is_as_before(
    monkeypatch, where, name, num_keys, is_append
) -> None:
    data = make_data(0, 260)
    index = build(data, LEVELS, upto=num_keys)
    before = snapshot(index)
    with monkeypatch.context() as patch:

        def fail(*args, **kwargs):
            raise MemoryError("none left")

        patch.setattr(where, name, fail)
        try:
            if is_append:
                append(index, data, num_keys, 260)
            else:
                index.truncate(num_keys - 7)
        except MemoryError:
            assert_same_tensors(snapshot(index), before)
            assert len(index) == num_keys
        else:
            # only a truncation can do without the step
            assert not is_append


def test_keys_are_copied() -> None:
    data = make_data(0, 100)
    index = build(data, LEVELS)
    before = snapshot(index)
    data.keys.zero_()
    data.values.zero_()
    assert_same_tensors(snapshot(index), before)
