"""Page statistics and scatter against plain float64 loops, and what must not leak into them."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from wavekv.index import PageStatistics, page_scatter, page_statistics


def make(seed: int, R: int, N: int, P: int, D: int) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    keys = torch.randn(R, N, P, D, generator=generator)
    values = torch.randn(R, N, P, D, generator=generator)
    counts = torch.randint(0, P + 1, (R, N), generator=generator, dtype=torch.int32)
    return keys, values, counts


def reference(keys: Tensor, values: Tensor, counts: Tensor) -> list[np.ndarray]:
    R, N, _, D = keys.shape
    mean, value_mean = (np.zeros((R, N, D)) for _ in range(2))
    variance = np.zeros((R, N))
    for r in range(R):
        for c in range(N):
            n = int(counts[r, c])
            if n:
                k = keys[r, c, :n].double().numpy()
                mean[r, c], variance[r, c] = k.mean(0), k.var(0).mean()
                value_mean[r, c] = values[r, c, :n].double().numpy().mean(0)
    return [mean, variance, value_mean]


@given(
    R=st.integers(1, 3),
    N=st.integers(1, 4),
    P=st.integers(1, 17),
    D=st.integers(1, 9),
    dtype=st.sampled_from((torch.float32, torch.bfloat16, torch.float16)),
    poison=st.sampled_from((float("nan"), float("inf"), 1e4)),
    seed=st.integers(0, 2**16),
)
def test_equals_a_float64_loop_whatever_lies_beyond_the_count(
    R: int, N: int, P: int, D: int, dtype: torch.dtype, poison: float, seed: int
) -> None:
    keys, values, counts = make(seed, R, N, P, D)
    beyond = (torch.arange(P) >= counts.unsqueeze(-1)).unsqueeze(-1)
    keys = keys.masked_fill(beyond, poison).to(dtype)
    values = values.masked_fill(beyond, poison).to(dtype)
    got = page_statistics(keys, values, counts)
    assert isinstance(got, PageStatistics)
    for ours, expected in zip(got, reference(keys, values, counts), strict=True):
        assert ours.dtype == torch.float32
        np.testing.assert_allclose(ours.numpy(), expected, rtol=1e-5, atol=1e-6)
    assert (got.variance >= 0).all()


def test_empty_pages_are_zero() -> None:
    keys = torch.full((1, 2, 4, 3), float("nan"))
    got = page_statistics(keys, keys, torch.zeros(1, 2, dtype=torch.int32))
    for x, shape in zip(got, ((1, 2, 3), (1, 2), (1, 2, 3)), strict=True):
        assert torch.equal(x, torch.zeros(shape))


def test_variance_survives_a_large_mean() -> None:
    keys, values, _ = make(0, 2, 3, 16, 8)
    counts = torch.full((2, 3), 16)
    keys = keys + 2.0**14
    _, variance, _ = reference(keys, values, counts)
    np.testing.assert_allclose(
        page_statistics(keys, values, counts).variance.numpy(), variance, rtol=1e-5
    )


def test_identical_keys_have_no_variance() -> None:
    keys = torch.full((1, 1, 8, 4), 1.7, dtype=torch.bfloat16)
    got = page_statistics(keys, keys, torch.tensor([[7]], dtype=torch.int32))
    assert got.variance.max() <= 1e-12


def test_dtype_is_that_of_the_means_only() -> None:
    keys, values, counts = make(1, 2, 3, 8, 4)
    full = page_statistics(keys, values, counts)
    half = page_statistics(keys, values, counts, dtype=torch.bfloat16)
    assert torch.equal(full.mean.bfloat16(), half.mean)
    assert torch.equal(full.variance, half.variance)
    assert torch.equal(full.value_mean.bfloat16(), half.value_mean)


def test_variance_of_keys_whose_squares_float16_does_not_hold() -> None:
    keys = 1e4 * torch.tensor([1.0, -1.0]).view(1, 1, 2, 1).expand(1, 1, 2, 4).half()
    got = page_statistics(keys, keys, torch.tensor([[2]]), dtype=torch.float16)
    assert got.variance.item() == 1e8


def test_counts_out_of_range_are_clamped() -> None:
    keys, values, _ = make(2, 1, 2, 4, 3)
    got = page_statistics(keys, values, torch.tensor([[-1, 9]], dtype=torch.int32))
    expected = page_statistics(keys, values, torch.tensor([[0, 4]], dtype=torch.int32))
    for a, b in zip(got, expected, strict=True):
        assert torch.equal(a, b)


def test_nothing_waits_for_the_device() -> None:
    x = torch.empty(2, 3, 8, 4, device="meta")
    counts = torch.empty(2, 3, dtype=torch.int32, device="meta")
    assert page_statistics(x, x, counts).mean.shape == (2, 3, 4)


@pytest.mark.parametrize(
    ("keys", "values", "counts", "message"),
    [
        ((2, 3, 4), (2, 3, 4), (2, 3), r"must both be \[R, N, P, D\]"),
        ((2, 3, 4, 5), (2, 3, 4, 6), (2, 3), r"got \(2, 3, 4, 5\) and \(2, 3, 4, 6\)"),
        ((2, 3, 4, 5), (2, 3, 4, 5), (3, 2), r"counts must be .*, got torch.int32 \(3, 2\)"),
    ],
)  # fmt: skip
def test_shapes_that_do_not_fit(
    keys: tuple[int, ...], values: tuple[int, ...], counts: tuple[int, ...], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        page_statistics(
            torch.zeros(keys), torch.zeros(values), torch.zeros(counts, dtype=torch.int32)
        )


def test_counts_must_be_integers() -> None:
    x = torch.zeros(1, 1, 2, 2)
    with pytest.raises(ValueError, match=r"got torch.float32"):
        page_statistics(x, x, torch.ones(1, 1))


@given(
    R=st.integers(1, 3),
    N=st.integers(0, 4),
    P=st.integers(1, 9),
    D=st.integers(1, 6),
    dtype=st.sampled_from((torch.float32, torch.bfloat16)),
    poison=st.sampled_from((float("nan"), float("inf"), 1e4)),
    seed=st.integers(0, 2**16),
)
def test_scatter_equals_a_loop_whatever_lies_beyond_the_count(
    R: int, N: int, P: int, D: int, dtype: torch.dtype, poison: float, seed: int
) -> None:
    keys, values, counts = (
        x.to(dtype) if x.is_floating_point() else x for x in make(seed, R, N, P, D)
    )
    expected = np.zeros((R, 2, D, D))
    for r in range(R):
        for c in range(N):
            k, v = (x[r, c, : int(counts[r, c])].double().numpy() for x in (keys, values))
            if len(k):
                k, v = k - k.mean(0), v - v.mean(0)
                expected[r] += k.T @ k, v.T @ k
    beyond = (torch.arange(P) >= counts.unsqueeze(-1)).unsqueeze(-1)
    poisoned = (x.masked_fill(beyond, poison) for x in (keys, values))
    got = page_scatter(*poisoned, counts)
    assert got.dtype == torch.float32
    np.testing.assert_allclose(got.numpy(), expected, rtol=1e-4, atol=1e-4)


def test_scatter_of_disjoint_pages_adds_up() -> None:
    keys, values, counts = make(3, 2, 6, 8, 4)
    whole = page_scatter(keys, values, counts)
    parts = [
        page_scatter(keys[:, a:b], values[:, a:b], counts[:, a:b]) for a, b in ((0, 2), (2, 6))
    ]
    torch.testing.assert_close(parts[0] + parts[1], whole, rtol=1e-5, atol=1e-5)
    assert (whole[:, 0].diagonal(dim1=1, dim2=2) > 0).all()


def test_scatter_does_not_see_where_a_page_lies() -> None:
    keys, values, counts = make(4, 1, 3, 8, 4)
    moved = page_scatter(keys + 100 * torch.randn(1, 3, 1, 4), values - 7, counts)
    torch.testing.assert_close(moved, page_scatter(keys, values, counts), rtol=1e-3, atol=1e-2)
