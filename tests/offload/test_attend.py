"""Attention over the zones against plain attention over all tokens, and what retrieval gives up."""

from __future__ import annotations

import math
from dataclasses import replace
from itertools import pairwise

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from offload_cases import D, Tokens, feed, new_context, plain_attention, prefill
from torch import Tensor

from wavekv.errors import LayoutError
from wavekv.offload import LayerContext, Logits
from wavekv.offload.budget import page_limits

TAILS = ["none", "first", "second"]


def padded(batch: int, heads: int, count: int, pads: list[int]) -> Tokens:
    tokens = Tokens.random(batch, heads, count)
    tokens.valid = torch.arange(count) >= torch.tensor(pads[:batch])[:, None]
    return tokens


def assert_exact(
    query: Tensor, out: Tensor, seen: Tokens, tolerance: float = 1e-4, **options
) -> None:
    expected = plain_attention(query, seen.keys, seen.values, seen.valid, **options)
    is_token = seen.valid[:, None, -query.shape[2] :, None]
    torch.testing.assert_close(out * is_token, expected * is_token, rtol=tolerance, atol=tolerance)
    assert out.isfinite().all()


@given(
    batch=st.integers(1, 3),
    heads=st.integers(1, 2),
    group=st.integers(1, 4),
    history=st.integers(0, 150),
    pads=st.lists(st.sampled_from([0, 3, 30, 70, 1000]), min_size=3, max_size=3),
    count=st.sampled_from([1, 2, 7, 33]),
    settings=st.sampled_from(
        [{"mode": "exact"}, {"budget": 1.0}, {"budget": 1000}, {"budget": 1.0, "top_p": 1.0}]
    ),
    tail=st.sampled_from(TAILS),
    softcap=st.sampled_from([None, 1.5, 30.0]),
    sinks=st.booleans(),
    scale=st.sampled_from([D**-0.5, 1.0]),
    seed=st.integers(0, 999),
)
def test_reading_everything_is_full_attention(
    device, batch, heads, group, history, pads, count, settings, tail, softcap, sinks, scale, seed
) -> None:
    torch.manual_seed(seed)
    tokens = padded(batch, heads, history + count, pads)
    context = new_context(tokens, device, **settings, tail_estimate=tail)
    logits = Logits(scale, softcap)
    sink_logits = torch.randn(heads * group).to(device) if sinks else None
    if history:
        prefill(context, tokens.between(0, history), chunk=64, logits=logits, group=group)
    new = tokens.between(history, history + count)
    query, out = feed(context, new, group=group, logits=logits, sink_logits=sink_logits)
    options = {"scale": scale, "softcap": softcap, "sink_logits": sink_logits}
    assert_exact(query, out, tokens, **options)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("count", [1, 5])
@pytest.mark.parametrize("softcap", [None, 20.0])
def test_half_precision_is_close_to_full_attention(device, dtype, count, softcap) -> None:
    tokens = padded(2, 2, 130, [0, 40])
    tokens.keys, tokens.values = (x.to(dtype).float() for x in (tokens.keys, tokens.values))
    context = new_context(tokens, device, dtype, budget=1.0)
    logits = Logits(D**-0.5, softcap)
    prefill(context, tokens.between(0, 130 - count), logits=logits)
    query, out = feed(context, tokens.between(130 - count, 130), logits=logits)
    assert_exact(query, out, tokens, tolerance=2e-2, scale=D**-0.5, softcap=softcap)


@pytest.mark.parametrize("tail", TAILS)
@pytest.mark.parametrize("mode", ["retrieval", "exact"])
@pytest.mark.parametrize("count", [1, 6])
def test_the_order_of_pages_does_not_matter(device, tail: str, mode: str, count: int) -> None:
    tokens = padded(2, 2, 310, [0, 40])
    settings = {"mode": mode, "budget": 12, "tail_estimate": tail}
    context = new_context(tokens, device, **settings)
    prefill(context, tokens.between(0, 310 - count))
    shuffled = context.fork(context.runtime)
    # whole blocks anywhere within their span, and the two whole spans trade places
    paged = shuffled.paged
    K = paged.index.block_pages
    size, num_blocks = paged.scatter.span_pages // K, paged.num_pages // K
    assert 2 * size < num_blocks < 3 * size
    blocks = torch.cat([a + torch.randperm(size) for a in (size, 0)])
    blocks = torch.cat([blocks, 2 * size + torch.randperm(num_blocks - 2 * size)])
    pages = (blocks[:, None] * K + torch.arange(K)).flatten()
    spans = shuffled.paged.scatter.spans.view
    spans.copy_(spans[:, :, [1, 0, 2]])
    tables = paged.page_ids.view, paged.counts.view, paged.token_ids.view
    for rows in (*tables, *paged.index.view):
        order = pages if rows.shape[2] == paged.num_pages else blocks
        rows.copy_(rows[:, :, order.to(rows.device)])
    new = tokens.between(310 - count, 310)
    outs = []
    for one in (context, shuffled):
        torch.manual_seed(1)
        outs.append(feed(one, new)[1])
    torch.testing.assert_close(*outs, rtol=1e-5, atol=1e-5)


def clustered(count: int, width: int, topics: int = 24) -> Tokens:
    """Keys around topics of unequal spread, as real keys are, and values that go with them."""
    tokens = Tokens.random(1, 2, count, width)
    topic = torch.randint(topics, (1, 2, count, 1)).expand(-1, -1, -1, width)
    spread = torch.empty(1, 2, topics, 1).uniform_(-2.3, 0.5).exp().expand(-1, -1, -1, width)
    key_centres, value_centres = torch.randn(2, 1, 2, topics, width)
    tokens.keys = key_centres.gather(2, topic) + spread.gather(2, topic) * tokens.keys
    tokens.values = value_centres.gather(2, topic) + 0.4 * tokens.values
    return tokens


def mean_error(context: LayerContext, tokens: Tokens, steps: int = 8, **settings) -> float:
    """Relative error of decode steps under other settings, over random queries."""
    torch.manual_seed(7)
    errors = []
    for _ in range(steps):
        config = context.runtime.config.override(**settings)
        twin = context.fork(context.runtime.fork(config))
        new = Tokens.random(1, 2, 1, tokens.keys.shape[3])
        query, out = feed(twin, new)
        seen = tokens.then(new)
        scale = query.shape[-1] ** -0.5
        exact = plain_attention(query, seen.keys, seen.values, seen.valid, scale=scale)
        errors.append((out - exact).norm() / exact.norm())
    return float(torch.stack(errors).mean())


@pytest.fixture(scope="module")
def long_context(device: torch.device) -> tuple[LayerContext, Tokens]:
    torch.manual_seed(3)
    tokens = clustered(2048, 32)
    context = new_context(tokens, device, segment=1024, append_segment=64, page_size=8)
    prefill(context, tokens)
    return context, tokens


@pytest.mark.parametrize("tail", TAILS)
def test_the_error_falls_as_the_budget_rises(long_context, tail: str) -> None:
    budgets = (0.05, 0.2, 0.6, 1.0)
    errors = [mean_error(*long_context, budget=b, tail_estimate=tail) for b in budgets]
    assert all(after < 0.9 * before for before, after in pairwise(errors)), errors
    assert errors[-1] < 1e-4


@pytest.mark.parametrize("budget", [8, 0.05, 0.2])
def test_a_better_tail_estimate_has_a_smaller_error(long_context, budget: int | float) -> None:
    none, first, second = (
        mean_error(*long_context, budget=budget, tail_estimate=tail, refine=1) for tail in TAILS
    )
    assert second < 0.9 * first
    assert first < 0.7 * none


@pytest.mark.parametrize(("budget", "share"), [(8, 0.62), (0.05, 0.4)])
def test_values_that_go_with_keys_are_estimated_better(device, budget, share: float) -> None:
    """Values are nearly linear in the keys, by another map in each half of the text: the second
    moment knows which, also of generated tokens and after a crop. With the maps exchanged it would
    leave 0.71 and 0.44 of the first moment's error, without them all of it."""
    tokens = clustered(2048, 16)
    maps = torch.randn(2, 1, 2, 16, 16) / 4
    halves = zip(tokens.keys.split(1024, 2), maps, strict=True)
    tokens.values = torch.cat([keys @ each for keys, each in halves], 2) + 0.3 * tokens.values
    context = new_context(tokens, device, segment=1024, append_segment=64, page_size=8)
    prefill(context, tokens.between(0, 1200))
    for start in range(1200, 2048, 53):
        feed(context, tokens.between(start, min(start + 53, 2048)))
    context.settle()

    def assert_better(seen: Tokens) -> None:
        first, second = (
            mean_error(context, seen, budget=budget, refine=32, tail_estimate=tail)
            for tail in ("first", "second")
        )
        assert second < share * first

    assert_better(tokens)
    context.truncate(1500)
    assert_better(tokens.between(0, 1500))


@pytest.mark.parametrize("budget", [8, 0.05])
def test_a_look_at_the_keys_has_a_smaller_error(long_context, budget: int | float) -> None:
    means, some, many = (mean_error(*long_context, budget=budget, refine=n) for n in (1, 4, 1000))
    assert many < 0.9 * means
    assert many <= some <= means


@given(
    top_p=st.floats(0.01, 1.0),
    budget=st.integers(1, 2000) | st.floats(0.01, 1.0),
    min_budget=st.integers(0, 300),
)
def test_top_p_keeps_to_its_floor_and_cap(long_context, top_p, budget, min_budget) -> None:
    context, _ = long_context
    config = replace(context.runtime.config, top_p=top_p, budget=budget, min_budget=min_budget)
    twin = context.fork(context.runtime.fork(config))
    torch.manual_seed(5)
    feed(twin, Tokens.random(1, 2, 1, 32))
    least, most = page_limits(config, 2049)
    chosen = twin.counters.last_choice.chosen
    taken = (chosen >= 0).sum(-1)
    assert int(taken.min()) >= min(least, context.paged.num_pages)
    assert int(taken.max()) <= most
    # and takes no page that it need not: without the last one the share is not reached
    log_mass = twin.counters.last_choice.log_mass.unflatten(1, (2, -1))
    rank = log_mass.softmax(-1).sum(2)
    rank = rank / rank.sum(-1, keepdim=True)
    for head in range(2):
        pages = chosen[0, head][chosen[0, head] >= 0]
        share = rank[0, head, pages].sort().values
        if len(pages) > least:
            assert share[1:].sum() < top_p + 1e-5
        if len(pages) < min(most, context.paged.num_pages):
            assert share.sum() > top_p - 1e-5


def test_a_single_token_of_a_prompt_is_attended_to_exactly(device: torch.device) -> None:
    tokens = Tokens.random(1, 2, 201)
    context = new_context(tokens, device, budget=1, tail_estimate="none")
    prefill(context, tokens.between(0, 200))
    step = context.fork(context.runtime.fork(context.runtime.config))
    context.runtime.is_prefilling = True
    query, out = feed(context, tokens.between(200, 201))
    assert_exact(query, out, tokens, scale=D**-0.5)
    # the check can fail: as a decode step it is far off
    query, out = feed(step, tokens.between(200, 201))
    exact = plain_attention(query, tokens.keys, tokens.values, tokens.valid, scale=D**-0.5)
    assert (out - exact).norm() > 0.1 * exact.norm()


def test_autocast_does_not_reach_the_zones(device: torch.device) -> None:
    tokens = clustered(301, 16)
    outs = []
    for is_on in (False, True):
        torch.manual_seed(1)
        with torch.autocast(device.type, torch.bfloat16, enabled=is_on):
            context = new_context(tokens, device, budget=16)
            prefill(context, tokens.between(0, 300))
            outs.append(feed(context, tokens.between(300, 301))[1])
    torch.testing.assert_close(*outs, rtol=1e-5, atol=1e-5)


def test_counters_stay_numbers_where_a_sequence_is_all_padding(device: torch.device) -> None:
    tokens = padded(2, 2, 101, [0, 1000])
    context = new_context(tokens, device, budget=8)
    prefill(context, tokens.between(0, 100))
    feed(context, tokens.between(100, 101))
    counters = context.counters
    assert counters.steps == 1
    assert 0 < float(counters.tail_mass) < 1
    assert 0 < float(counters.retrieved_share) < 1


def test_a_batch_of_nothing_but_padding_gives_zeros(device: torch.device) -> None:
    tokens = padded(2, 2, 101, [1000, 1000])
    for settings in ({"budget": 8}, {"mode": "exact"}):
        context = new_context(tokens, device, **settings)
        prefill(context, tokens.between(0, 100))
        assert (feed(context, tokens.between(100, 101))[1] == 0).all()


@pytest.mark.parametrize(
    ("keys", "values", "valid"),
    [
        ((1, 2, 3, D), (1, 2, 3, D), None),
        ((2, 1, 3, D), (2, 1, 3, D), None),
        ((2, 2, 3, D + 1), (2, 2, 3, D + 1), None),
        ((2, 2, 3, D), (2, 2, 2, D), None),
        ((2, 2, 3, D), (2, 2, 3, D), (2, 1)),
        ((2, 2, 3, D), (2, 2, 3, D), (1, 3)),
    ],
)
def test_tokens_of_another_shape_are_an_error_and_change_nothing(keys, values, valid) -> None:
    tokens = Tokens.random(2, 2, 30)
    context = new_context(tokens)
    feed(context, tokens)
    mask = None if valid is None else torch.ones(valid, dtype=torch.bool)
    with pytest.raises(
        LayoutError, match=r"must be \[B=2, Hkv=2, T, D=8\] and valid \[B, T\], got"
    ):
        context.attend(
            torch.zeros(2, 4, 3, D), torch.zeros(keys), torch.zeros(values), mask, Logits(1.0)
        )
    assert context.num_tokens == 30


def test_values_of_another_size_than_keys_are_an_error() -> None:
    with pytest.raises(LayoutError, match="must have one shape"):
        LayerContext(
            new_context(Tokens.random(1, 2, 1)).runtime,
            torch.zeros(1, 2, 0, D),
            torch.zeros(1, 2, 0, 2 * D),
        )


def test_scale_of_large_logits_survives_the_merge_of_zones(device: torch.device) -> None:
    tokens = Tokens.random(1, 1, 120)
    context = new_context(tokens, device, budget=1.0)
    prefill(context, tokens.between(0, 119))
    scale = 40.0 / math.sqrt(D)
    query, out = feed(context, tokens.between(119, 120), logits=Logits(scale))
    assert_exact(query, out, tokens, tolerance=1e-3, scale=scale)
