"""value_slope against a fit by loops, and what it does for an estimate."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from wavekv.index import page_scatter
from wavekv.kernels import value_slope


def make_pages(seed: int, rows: int, pages: int, page_size: int, width: int) -> tuple[Tensor, ...]:
    """Keys, values [R, N, P, D] that have to do with each other, and full counts [R, N]."""
    rng = torch.Generator().manual_seed(seed)
    keys = torch.randn(rows, pages, page_size, width, generator=rng)
    mixed = keys @ torch.randn(width, width, generator=rng) / width**0.5
    values = mixed + torch.randn(keys.shape, generator=rng)
    return keys, values, torch.full((rows, pages), page_size, dtype=torch.int32)


def within(x: Tensor) -> Tensor:
    """x [R, N, P, D] less the means of its pages."""
    return x - x.mean(2, keepdim=True)


@given(
    kv_heads=st.integers(1, 3),
    group=st.integers(1, 3),
    spans=st.integers(1, 3),
    scale=st.sampled_from([0.1, 1.0]),
    seed=st.integers(0, 2**16),
)
def test_slope_is_the_least_squares_fit_of_values_to_the_logit(
    kv_heads: int, group: int, spans: int, scale: float, seed: int
) -> None:
    # [Hkv * S, N, P, D]: a row for each span
    keys, values, counts = make_pages(seed, kv_heads * spans, 6, 8, 4)
    scatter = page_scatter(keys, values, counts).bfloat16().reshape(1, kv_heads, spans, 2, 4, 4)
    query = torch.randn(1, kv_heads * group, 4, generator=torch.Generator().manual_seed(seed))
    slope = value_slope(query, scatter, scale=scale)
    assert slope.shape == (1, kv_heads * group, spans, 4)
    for head in range(kv_heads * group):
        for span in range(spans):
            row = head // group * spans + span
            logits = (within(keys[row : row + 1]) @ (query[0, head] * scale)).flatten()
            rows = within(values[row : row + 1]).reshape(-1, 4)
            fit = np.linalg.lstsq(logits[:, None].double().numpy(), rows.double().numpy())[0][0]
            got = slope[0, head, span].double().numpy()
            # the ridge shortens it a little, most where keys vary little along the query
            assert np.linalg.norm(got - fit) <= 0.05 * np.linalg.norm(fit)


def test_values_that_follow_the_logit_are_estimated_exactly() -> None:
    """v = b + a (q . k): given each page's mass and shift, nothing is lost by averaging."""
    keys, _, counts = make_pages(0, 1, 10, 8, 16)
    query = torch.randn(1, 1, 16)
    logits = keys @ query[0, 0]
    values = torch.randn(1, 10, 1, 16) + 0.3 * logits[..., None] * torch.randn(16)
    log_mass = logits.logsumexp(-1)
    shift = (logits.softmax(-1) * (logits - logits.mean(-1, keepdim=True))).sum(-1)
    exact = logits.flatten().softmax(-1)[None] @ values.flatten(0, 2)
    scatter = page_scatter(keys, values, counts).bfloat16()
    slope = value_slope(query, scatter[:, None, None], scale=1.0)
    weights = log_mass.softmax(-1)
    plain = weights @ values[0].mean(1)
    leaning = plain + (weights * shift).sum() * slope[0, :, 0]
    assert (leaning - exact).norm() < 0.01 * (plain - exact).norm()


def test_slope_of_a_view_of_a_larger_buffer() -> None:
    """As a zone keeps it, for a batch; any dtype of query."""
    keys, values, counts = make_pages(1, 12, 6, 8, 4)
    buffer = torch.full((2, 3, 5, 2, 4, 4), torch.nan, dtype=torch.bfloat16)
    buffer[:, :, :2] = page_scatter(keys, values, counts).reshape(2, 3, 2, 2, 4, 4)
    query = torch.randn(2, 6, 4).bfloat16()
    slope = value_slope(query, buffer[:, :, :2], scale=0.5)
    for b in range(2):
        for span in range(2):
            alone = buffer[b : b + 1, :, span : span + 1].contiguous()
            expected = value_slope(query[b : b + 1].float(), alone, scale=0.5)
            torch.testing.assert_close(slope[b : b + 1, :, span : span + 1], expected)
    assert value_slope(query, buffer[:, :, :0], scale=0.5).shape == (2, 6, 0, 4)


@pytest.mark.parametrize("keys", ["equal", "along one direction", "large"])
def test_degenerate_keys_give_a_finite_slope(keys: str) -> None:
    made, values, counts = make_pages(0, 1, 3, 4, 8)
    if keys == "equal":
        made = torch.ones_like(made)
    elif keys == "along one direction":
        made = made[..., :1] * torch.eye(8)[0]
    else:
        made = made * 1e6
    scatter = page_scatter(made, values, counts).bfloat16()[:, None, None]
    for query in (torch.randn(1, 2, 8), torch.eye(8)[1].expand(1, 2, 8), torch.zeros(1, 2, 8)):
        slope = value_slope(query, scatter, scale=0.3)
        assert slope.isfinite().all()
        if keys == "equal" or not query.any():
            assert (slope == 0).all()


def test_wrong_scatter_is_named() -> None:
    query, scatter = torch.randn(1, 4, 8), torch.zeros(1, 2, 3, 2, 8, 8).bfloat16()
    with pytest.raises(ValueError, match=r"scatter must be \[B, Hkv, S, 2, D, D\]"):
        value_slope(query, scatter[:, :, 0], scale=1.0)
    with pytest.raises(ValueError, match=r"scatter must be .*bfloat16, got .*float32"):
        value_slope(query, scatter.float(), scale=1.0)
    with pytest.raises(ValueError, match="query must be"):
        value_slope(query[..., :4], scatter, scale=1.0)
