"""WaveIndex.attend: softmax attention where everything is read, close to it where less is."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from wavekv.errors import InputError
from wavekv.index import WaveIndex

from .index_cases import FEW, HALF, PARAMS, SEEDS, SMALL, Data, assert_same_result, make_data

SOFTCAPS = st.sampled_from([None, 3.0, 50.0])


def full_attention(data: Data, scale: float, softcap: float | None = None) -> tuple[Tensor, Tensor]:
    """out [H, Q, D] and lse [H, Q] in float64."""
    logits = scale * data.queries.double() @ data.keys.double().mT
    if softcap is not None:
        logits = softcap * torch.tanh(logits / softcap)
    return logits.softmax(-1) @ data.values.double(), logits.logsumexp(-1)


@HALF
@given(
    num_keys=st.integers(1, 200),
    heads=st.integers(1, 3),
    dim=st.integers(1, 40),
    dtype=st.sampled_from([torch.float32, torch.bfloat16, torch.float16]),
    params=PARAMS,
    group=st.sampled_from([1, 2, 3]),
    softcap=SOFTCAPS,
    scale=st.sampled_from([None, 0.05, 1.0]),
    seed=SEEDS,
)
def test_reading_everything_is_softmax_attention(
    num_keys, heads, dim, dtype, params, group, softcap, scale, seed
) -> None:
    data = make_data(seed, num_keys, heads=heads, dim=dim, dtype=dtype)
    index = WaveIndex.build(data.keys, params, values=data.values)
    options = {"group": group, "softcap": softcap, "scale": scale}
    result = index.attend(data.queries, budget=1.0, **options)
    out, lse = full_attention(data, scale or dim**-0.5, softcap)
    assert result.out.dtype == result.lse.dtype == torch.float32
    torch.testing.assert_close(result.out.double(), out, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(result.lse.double(), lse, rtol=1e-5, atol=1e-4)
    assert (result.keys_attended == num_keys).all()
    assert (result.mass_estimated == 0).all()


@HALF
@given(
    num_keys=st.integers(0, 200),
    params=PARAMS,
    budget=st.one_of(st.sampled_from([0.02, 0.3]), st.integers(1, 100)),
    top_p=st.sampled_from([None, 0.5, 1.0]),
    group=st.sampled_from([1, 2, 6]),
    has_sample=st.booleans(),
    softcap=SOFTCAPS,
    seed=SEEDS,
)
def test_less_is_read_as_the_budget_says(
    num_keys, params, budget, top_p, group, has_sample, softcap, seed
) -> None:
    data = make_data(seed, num_keys)
    sample = data.queries if has_sample else None
    index = WaveIndex.build(data.keys, params, values=data.values, query_sample=sample)
    options = {"budget": budget, "top_p": top_p, "group": group, "softcap": softcap}
    result = index.attend(data.queries, **options)
    assert result.out.isfinite().all()
    assert ((result.mass_estimated >= 0) & (result.mass_estimated <= 1 + 1e-5)).all()
    by_group = result.keys_attended.unflatten(1, (-1, group))
    assert (by_group == by_group[..., :1]).all()
    of_pages = result.keys_attended - index.stats()["num_tail"]
    share = budget * num_keys if isinstance(budget, float) else budget
    assert ((of_pages >= 0) & (of_pages <= share + params.page_size)).all()
    alone = index.attend(data.queries[:, :group], **options)
    torch.testing.assert_close(alone.out, result.out[:, :group], rtol=1e-4, atol=1e-4)
    assert torch.equal(alone.keys_attended, result.keys_attended[:, :group])


@FEW
@given(params=PARAMS, group=st.sampled_from([1, 3]), seed=SEEDS)
def test_more_of_the_softmax_takes_no_fewer_keys(params, group, seed) -> None:
    data = make_data(seed, 200)
    index = WaveIndex.build(data.keys, params, values=data.values)
    attended = [
        index.attend(data.queries, budget=1.0, top_p=top_p, group=group).keys_attended
        for top_p in (0.1, 0.5, 0.9, 1.0)
    ]
    assert (torch.stack(attended).diff(dim=0) >= 0).all()


def test_the_error_falls_with_the_budget_on_average() -> None:
    errors = []
    for seed in range(8):
        data = make_data(seed, 400, dim=32, num_queries=12)
        index = WaveIndex.build(data.keys, SMALL, values=data.values)
        out, _ = full_attention(data, 32**-0.5)
        results = [index.attend(data.queries, budget=b).out for b in (0.02, 0.1, 0.3, 0.7, 1.0)]
        errors.append([float((x - out).norm() / out.norm()) for x in results])
    mean = np.mean(errors, 0)
    assert (np.diff(mean) < 0).all()
    assert mean[0] < 0.3
    assert mean[-1] < 1e-4


def test_an_estimate_is_better_than_leaving_keys_out() -> None:
    data = make_data(0, 600, dim=32, num_queries=12)
    index = WaveIndex.build(data.keys, SMALL, values=data.values)
    result = index.attend(data.queries, budget=0.05)
    _, lse = full_attention(data, 32**-0.5)
    read = result.lse + torch.log1p(-result.mass_estimated)
    assert (result.lse - lse).abs().mean() < 0.2 * (read - lse).abs().mean()


@pytest.mark.parametrize("num_keys", [1, 63])
def test_a_tail_alone_is_read_whole(num_keys: int) -> None:
    data = make_data(0, num_keys)
    index = WaveIndex.build(data.keys, SMALL, values=data.values)
    assert index.stats()["num_pages"] == 0
    result = index.attend(data.queries, budget=1)
    out, lse = full_attention(data, 12**-0.5)
    torch.testing.assert_close(result.out.double(), out, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(result.lse.double(), lse, rtol=1e-4, atol=1e-4)
    assert (result.keys_attended == num_keys).all()
    assert (result.mass_estimated == 0).all()


@pytest.mark.parametrize("is_truncated", [False, True])
def test_an_empty_index_has_nothing_to_attend_to(is_truncated: bool) -> None:
    data = make_data(0, 100 if is_truncated else 0)
    index = WaveIndex.build(data.keys, SMALL, values=data.values)
    if is_truncated:
        index.truncate(0)
    result = index.attend(data.queries, group=2)
    assert (result.out == 0).all()
    assert (result.lse == -torch.inf).all()
    assert (result.keys_attended == 0).all()
    assert (result.mass_estimated == 0).all()


@pytest.mark.parametrize("num_keys", [0, 10, 300])
def test_no_query_no_answer(num_keys: int) -> None:
    data = make_data(0, num_keys)
    index = WaveIndex.build(data.keys, SMALL, values=data.values)
    result = index.attend(data.queries[:, :0])
    assert result.out.shape == (2, 0, 12)
    assert result.lse.shape == result.keys_attended.shape == (2, 0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("size", [1e-4, 1e3, 3e4])
def test_keys_of_any_size_that_their_type_holds_give_finite_results(dtype, size) -> None:
    """Statistics have to hold squares of keys."""
    data = make_data(0, 300)
    keys = (data.keys / data.keys.abs().amax() * size).to(dtype)
    index = WaveIndex.build(keys, SMALL, values=data.values.to(dtype))
    result = index.attend(data.queries / size, budget=0.1)
    assert result.out.isfinite().all()
    assert result.lse.isfinite().all()
    out, _ = full_attention(Data(keys, data.values.to(dtype), data.queries / size), 12**-0.5)
    assert float((result.out - out).norm() / out.norm()) < 0.5


@HALF
@given(key_power=st.integers(-20, 18), value_power=st.integers(-20, 18), seed=SEEDS)
def test_the_size_of_keys_and_values_does_not_matter(key_power, value_power, seed) -> None:
    """Powers of two, so that nothing is rounded in another way."""
    data = make_data(seed, 400)
    wanted = WaveIndex.build(data.keys, SMALL, values=data.values).attend(data.queries, budget=0.1)
    keys, values = data.keys * 2.0**key_power, data.values * 2.0**value_power
    index = WaveIndex.build(keys, SMALL, values=values)
    result = index.attend(data.queries * 2.0**-key_power, budget=0.1)
    assert torch.equal(result.out, wanted.out * 2.0**value_power)
    assert torch.equal(result.lse, wanted.lse)


@pytest.mark.parametrize("size", [1e5, 1e7])
def test_the_largest_numbers_that_are_accepted_give_finite_results(size: float) -> None:
    data = make_data(0, 300)
    keys, queries = (x / x.abs().amax() * size * 0.999 for x in (data.keys, data.queries))
    index = WaveIndex.build(keys, SMALL, values=data.values)
    result = index.attend(queries, budget=0.1)
    assert result.out.isfinite().all()
    assert result.lse.isfinite().all()
    with pytest.raises(InputError, match="at most 1e\\+07, got"):
        index.attend(queries / queries.abs().amax() * 1e8)
    with pytest.raises(InputError, match="at most 1e\\+07, got"):
        index.append(keys / keys.abs().amax() * 1e8, data.values)


def test_flat_numpy_gives_flat_numpy() -> None:
    data = make_data(0, 300, heads=1)
    index = WaveIndex.build(data.keys, SMALL, values=data.values)
    flat = WaveIndex.build(data.keys[0].numpy(), SMALL, values=data.values[0].numpy())
    result = flat.attend(data.queries[0].numpy(), budget=0.2)
    assert isinstance(result.out, np.ndarray)
    assert result.out.shape == (6, 12)
    expected = index.attend(data.queries, budget=0.2)
    for name in ("out", "lse", "keys_attended", "mass_estimated"):
        assert np.array_equal(getattr(result, name), getattr(expected, name)[0].numpy())
    out, lse = expected
    assert out is expected.out
    assert lse is expected.lse
    assert_same_result(expected, index.attend(data.queries, budget=0.2))


def test_attention_needs_values() -> None:
    data = make_data(0, 100)
    with pytest.raises(InputError, match="attend needs values, got an index without"):
        WaveIndex.build(data.keys, SMALL).attend(data.queries)
