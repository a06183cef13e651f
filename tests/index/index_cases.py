"""What tests of an index share: keys, small parameters, and what has to hold of any answer."""

from __future__ import annotations

from dataclasses import fields
from typing import Any, NamedTuple

import torch
from hypothesis import settings
from hypothesis import strategies as st
from torch import Tensor

from wavekv.index import IndexParams, SearchResult, WaveIndex

SMALL = IndexParams(page_size=4, segment=128)
FEW = settings(max_examples=max(1, settings.default.max_examples // 5))
HALF = settings(max_examples=max(1, settings.default.max_examples // 2))
"""For properties that build several indexes an example."""

SEEDS = st.integers(0, 2**31)
PARAMS = st.sampled_from(
    [
        IndexParams(page_size=page_size, segment=segment)
        for page_size, segment in ((4, 64), (4, 128), (8, 128), (2, 256), (1, 64))
    ]
)


class Data(NamedTuple):
    keys: Tensor
    values: Tensor
    queries: Tensor


def make_data(
    seed: int,
    num_keys: int,
    *,
    heads: int = 2,
    dim: int = 12,
    num_queries: int = 6,
    dtype: torch.dtype = torch.float32,
) -> Data:
    """Keys in topics, a few of them twice, far from zero; queries in the same topics."""
    rng = torch.Generator().manual_seed(seed)

    def randn(*shape: int) -> Tensor:
        return torch.randn(*shape, dim, generator=rng)

    topics, shift = 2 * randn(heads, 8), 3 * randn(heads, 1)
    head = torch.arange(heads)[:, None]
    topic = torch.randint(8, (heads, num_keys + num_queries), generator=rng)
    points = topics[head, topic] + randn(heads, num_keys + num_queries)
    keys, queries = points.split([num_keys, num_queries], 1)
    keys = keys + shift
    if num_keys > 10:
        keys[:, 7] = keys[:, 3]
    return Data(keys.to(dtype), randn(heads, num_keys).to(dtype), queries.contiguous())


def inner_products(keys: Tensor, queries: Tensor) -> Tensor:
    """[H, Q, N] float64."""
    return queries.double() @ keys.double().mT


def close(keys: Tensor, queries: Tensor) -> float:
    """How far float32 inner products may lie apart."""
    largest = [float(x.float().abs().amax()) if x.numel() else 0.0 for x in (keys, queries)]
    return 1e-6 * keys.shape[-1] * largest[0] * largest[1] + 1e-30


def assert_right(result: SearchResult, keys: Tensor, queries: Tensor, k: int) -> None:
    """What holds of every search of keys [H, N, D], however little it looked at."""
    H, Q = queries.shape[:2]
    found = min(k, keys.shape[1])
    assert result.scores.shape == result.ids.shape == (H, Q, k)
    assert result.scores.dtype == torch.float32
    assert result.ids.dtype == torch.int64
    assert (result.counts == found).all()
    assert (result.scores[..., found:] == -torch.inf).all()
    assert (result.ids[..., found:] == -1).all()
    scores, ids = result.scores[..., :found], result.ids[..., :found]
    assert ((ids >= 0) & (ids < keys.shape[1])).all()
    assert (ids.sort(-1).values.diff(dim=-1) > 0).all()
    assert (scores.diff(dim=-1) <= 0).all()
    tied = scores.diff(dim=-1) == 0
    assert (ids.diff(dim=-1)[tied] > 0).all()
    true = inner_products(keys, queries).gather(2, ids)
    assert ((scores - true).abs() <= close(keys, queries)).all()


def assert_same_result(a: Any, b: Any) -> None:
    """All fields of two results are the same bits."""
    for field in fields(a):
        x, y = (torch.as_tensor(getattr(result, field.name)) for result in (a, b))
        assert torch.equal(x, y), field.name


def snapshot(index: WaveIndex) -> dict[str, Tensor]:
    return {name: tensor.clone() for name, tensor in index._state.tensors().items()}


def assert_same_tensors(a: dict[str, Tensor], b: dict[str, Tensor]) -> None:
    """All that two indexes hold is the same, bit by bit."""
    assert a.keys() == b.keys()
    for name in a:
        assert a[name].dtype == b[name].dtype
        assert torch.equal(a[name], b[name]), name
