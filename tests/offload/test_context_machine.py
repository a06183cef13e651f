"""Whatever is done to contexts: each token stays in exactly one zone, and attention is exact."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    Bundle,
    RuleBasedStateMachine,
    consumes,
    initialize,
    invariant,
    multiple,
    precondition,
    rule,
    run_state_machine_as_test,
)
from offload_cases import D, Tokens, feed, new_context, plain_attention, same_index
from torch import Tensor

from wavekv.index import page_scatter
from wavekv.index.levels import index_of_pages
from wavekv.kernels.page_index import PageIndex
from wavekv.offload import LayerContext
from wavekv.offload.paged import PagedZone
from wavekv.offload.runtime import PrefillPlan

HEADS = 2
NEVER = 10**6  # padding that long is a row without any token
CODED = 0.1
"""The most that numbers stored in eight bits are off by here, however often a crop has them stored
anew."""


class Pair:
    """A context, and all that was given to it; pads[b] is where sequence b begins."""

    def __init__(self, context: LayerContext, tokens: Tokens, pads: list[int]) -> None:
        self.context, self.tokens, self.pads = context, tokens, pads


class ContextMachine(RuleBasedStateMachine):
    """Contexts that share an arena, each beside a model that forgets nothing."""

    device = torch.device("cpu")
    pairs = Bundle("pairs")

    @initialize(
        target=pairs,
        pads=st.lists(st.sampled_from([0, 0, 1, 5, 17, 30, 45, 70, NEVER]), min_size=1, max_size=3),
        sinks=st.integers(0, 4),
        mode=st.sampled_from(["exact", "retrieval"]),
        tail=st.sampled_from(["none", "first", "second"]),
        is_coded=st.booleans(),
        seed=st.integers(0, 999),
    )
    def start(
        self,
        pads: list[int],
        sinks: int,
        mode: str,
        tail: str,
        is_coded: bool,
        seed: int,
    ) -> Pair:
        torch.manual_seed(seed)
        tokens = Tokens.random(len(pads), HEADS, 0)
        context = new_context(
            tokens,
            self.device,
            num_sink_tokens=sinks,
            mode=mode,
            tail_estimate=tail,
            budget=1.0,
            cpu_budget=8 << 20,
            host_dtype="int8" if is_coded else "model",
        )
        self.runtime, self.arena = context.runtime, context.paged.arena
        pair = Pair(context, tokens, pads)
        self.alive = [pair]
        return pair

    @rule(
        pair=pairs,
        chunks=st.lists(st.integers(1, 60), min_size=1, max_size=3),
        masked=st.booleans(),
        resident=st.sampled_from([None, 0, 50, NEVER]),
    )
    def prefill(self, pair: Pair, chunks: list[int], masked: bool, resident: int | None) -> None:
        runtime = pair.context.runtime
        runtime.is_prefilling = True
        if resident is not None:
            runtime.plan = PrefillPlan(len(pair.tokens) + sum(chunks), 0, resident)
        for count in chunks:
            self.forward(pair, count, masked)
        runtime.is_prefilling, runtime.plan = False, None
        pair.context.end_prefill()
        pair.context.page_out()
        self.arena.cancel_orders()

    @rule(pair=pairs, count=st.integers(1, 40), masked=st.booleans())
    def several(self, pair: Pair, count: int, masked: bool) -> None:
        self.forward(pair, count, masked)

    @rule(pair=pairs, steps=st.integers(1, 20), masked=st.booleans())
    def decode(self, pair: Pair, steps: int, masked: bool) -> None:
        for _ in range(steps):
            self.forward(pair, 1, masked)

    @rule(pair=pairs, data=st.data())
    def crop(self, pair: Pair, data: st.DataObject) -> None:
        end = len(pair.tokens)
        edges = [0, 1, 3, pair.context.steady.start, *(stop for stop, _ in segments(pair)), end]
        somewhere = st.sampled_from(edges) | st.integers(0, end)
        length = min(end, data.draw(somewhere))
        pair.context.truncate(length)
        pair.tokens = pair.tokens.between(0, length)

    @rule(pair=pairs, data=st.data())
    def select(self, pair: Pair, data: st.DataObject) -> None:
        row = st.integers(0, len(pair.pads) - 1)
        index = data.draw(st.lists(row, min_size=1, max_size=3))
        pair.context.select(torch.tensor(index, device=self.device))
        pair.tokens = pair.tokens.select(torch.tensor(index))
        pair.pads = [pair.pads[row] for row in index]

    @rule(target=pairs, pair=pairs)
    def fork(self, pair: Pair) -> object:
        if len(self.alive) > 2:
            return multiple()
        runtime = self.runtime.fork(self.runtime.config)
        twin = Pair(pair.context.fork(runtime), pair.tokens, list(pair.pads))
        self.alive.append(twin)
        return twin

    @precondition(lambda self: len(self.alive) > 1)
    @rule(pair=consumes(pairs))
    def forget(self, pair: Pair) -> None:
        self.alive.remove(pair)
        del pair.context

    @rule(pair=pairs)
    def settle(self, pair: Pair) -> None:
        pair.context.settle()
        settled = segments(pair)
        pair.context.settle()
        assert segments(pair) == settled

    def forward(self, pair: Pair, count: int, masked: bool) -> None:
        start = len(pair.tokens)
        new = Tokens.random(len(pair.pads), HEADS, count)
        new.valid = torch.arange(start, start + count) >= torch.tensor(pair.pads)[:, None]
        pair.tokens = pair.tokens.then(new)
        query, out = feed(pair.context, new, masked=masked or not bool(new.valid.all()))
        tokens = pair.tokens
        exact = plain_attention(query, tokens.keys, tokens.values, tokens.valid, scale=D**-0.5)
        # what a padding query gets is nobody's business, but it must be finite
        assert out.isfinite().all()
        seen = new.valid[:, None, :, None]
        atol = CODED if is_coded(pair.context) else 1e-4
        torch.testing.assert_close(out * seen, exact * seen, rtol=1e-4, atol=atol)

    @invariant()
    def every_token_is_in_one_place(self) -> None:
        for pair in getattr(self, "alive", []):
            check_tokens(pair)
            check_pages(pair.context)

    @invariant()
    def pages_are_counted(self) -> None:
        if not hasattr(self, "arena"):
            return
        self.arena.check_integrity()
        held = [ids for pair in self.alive for ids in page_ids(pair.context)]
        expected = np.bincount(
            np.concatenate([np.empty(0, int), *held]), minlength=self.arena.capacity
        )
        assert np.array_equal(self.arena._references, expected)
        assert self.arena.num_pages == (expected > 0).sum()

    def teardown(self) -> None:
        if not hasattr(self, "arena"):
            return
        for pair in self.alive:
            del pair.context
        assert self.arena.num_pages == 0
        self.arena.check_integrity()


def is_coded(context: LayerContext) -> bool:
    return context.paged.arena.layout.codec is not None


def segments(pair: Pair) -> list[tuple[int, int]]:
    return pair.context.paged.segments


def page_ids(context: LayerContext) -> list[np.ndarray]:
    """The arena pages of a context, those under construction included."""
    paged = context.paged
    return [ids.flatten().numpy() for ids in (paged.page_ids.view, *paged._building)]


def check_tokens(pair: Pair) -> None:
    """Each valid token is held once for each head, with its own key and value, and no other is."""
    context, tokens = pair.context, pair.tokens
    B, H, T, _ = tokens.keys.shape
    assert context.shape == (B, H, D)
    assert context.num_tokens == T
    assert len(context.steady.valid) == len(context.steady.keys) == len(context.steady.values)
    times = torch.zeros(B, H, T, dtype=torch.int64)
    for positions, keys, values in (in_steady_zone(context), in_pages(context)):
        b, h, slot = (positions >= 0).nonzero(as_tuple=True)
        at = positions[b, h, slot]
        times.index_put_((b, h, at), torch.tensor(1), accumulate=True)
        atol = CODED if is_coded(context) else 0.0
        for found, given in ((keys, tokens.keys), (values, tokens.values)):
            assert ((found[b, h, slot] - given[b, h, at]).abs() <= atol).all()
    assert torch.equal(times, tokens.valid[:, None].expand(B, H, T).long())
    if context.steady.mask is None:
        assert context.steady.valid.view.all()


def in_steady_zone(context: LayerContext) -> tuple[Tensor, Tensor, Tensor]:
    """(positions [B, H, A + L], -1 for none; keys; values) of sink slots and the local window."""
    steady = context.steady
    B, H, _ = context.shape
    local = torch.arange(steady.start, steady.end).expand(B, -1)
    positions = torch.cat([steady.sink_positions.cpu(), local], 1)
    positions = positions.masked_fill(~steady.valid.view.cpu(), -1)
    # a slot is valid only where it has a position
    assert torch.equal(positions >= 0, steady.valid.view.cpu())
    positions = positions[:, None].expand(B, H, -1)
    return positions, steady.keys.view.cpu(), steady.values.view.cpu()


def in_pages(context: LayerContext) -> tuple[Tensor, Tensor, Tensor]:
    """The same of all page slots."""
    paged, (B, H, _) = context.paged, context.shape
    pages = paged.arena.read(paged.page_ids.view.reshape(-1))
    n, P = paged.num_pages, paged.arena.layout.page_size
    pages = pages.reshape(B, H, n, 2, P, D)
    positions = paged.token_ids.view.long().reshape(B, H, n * P)
    keys, values = (pages[:, :, :, half].reshape(B, H, n * P, D) for half in range(2))
    return positions, keys, values


def check_pages(context: LayerContext) -> None:
    """Counts, statistics and segments of the paged zone describe what its pages hold."""
    paged = context.paged
    held = paged.token_ids.view >= 0
    P = held.shape[-1]
    counts = paged.counts.view
    assert torch.equal(held, torch.arange(P) < counts[..., None])
    assert torch.equal(paged.index.view.counts.cpu(), counts.to(torch.uint8))
    assert {len(part) for part in paged._parts()} == {paged.num_pages}
    assert paged.num_tokens == context.steady.start == paged.num_pages * P
    assert [stop for stop, _ in paged.segments] == [pages * P for _, pages in paged.segments]
    _, keys, values = in_pages(context)
    if not is_coded(context):
        # what is stored in few bits says too little of means and of sums of squares
        check_index(paged, keys, values)
        check_scatter(paged, keys, values)


def check_index(paged: PagedZone, keys: Tensor, values: Tensor) -> None:
    """The index is what the pages make."""
    B, H, N = paged.counts.view.shape
    P = paged.arena.layout.page_size
    keys, values = (x.reshape(B * H, N, P, D) for x in (keys, values))
    counts = paged.counts.view.reshape(B * H, N)
    expected = index_of_pages(keys, values, counts, paged.index.block_pages)
    found = PageIndex._make(part.cpu().flatten(0, 1) for part in paged.index.view)
    same_index(found, expected)


def check_scatter(paged: PagedZone, keys: Tensor, values: Tensor) -> None:
    """Each span has the scatter of its own pages, a page of four tokens being 3 % of a span."""
    B, H, N = paged.counts.view.shape
    P = paged.arena.layout.page_size
    keys, values = (x.reshape(B * H, N, P, D) for x in (keys, values))
    counts, size = paged.counts.view.reshape(B * H, N), paged.scatter.span_pages
    spans = paged.scatter.spans.view.cpu()
    assert paged.statistics_nbytes == spans.nbytes + paged.index.nbytes
    assert spans.shape == (B, H, -(-N // size), 2, D, D)
    for number in range(spans.shape[2]):
        part = slice(number * size, (number + 1) * size)
        expected = page_scatter(keys[:, part], values[:, part], counts[:, part])
        found = spans[:, :, number].reshape(B * H, 2, D, D)
        # what is kept was rounded with each segment
        error = (found.float() - expected).norm(dim=(2, 3))
        assert (error <= 0.01 * expected.norm(dim=(2, 3)) + 1e-4).all()


def test_zones_hold_every_token_once(device: torch.device) -> None:
    class OnDevice(ContextMachine):
        pass

    OnDevice.device = device
    run_state_machine_as_test(OnDevice, settings=settings(stateful_step_count=12))


@pytest.mark.parametrize("pad", [20, 23, 40])
def test_sinks_that_come_from_the_window_are_cropped_with_it(device, pad: int) -> None:
    """Padding that outlasts the first segment: the sinks of that row are its latest tokens."""
    tokens = Tokens.random(2, HEADS, 60)
    tokens.valid[1, :pad] = False
    context = new_context(tokens, device, budget=1.0, num_sink_tokens=4)
    for start in range(24):
        feed(context, tokens.between(start, start + 1))
    context.settle()
    assert context.steady.start == 16
    pair = Pair(context, tokens.between(0, 24), [0, pad])
    check_tokens(pair)
    context.truncate(22)
    pair.tokens = tokens.between(0, 22)
    check_tokens(pair)
    new = Tokens.random(2, HEADS, 30)
    query, out = feed(context, new)
    every = pair.tokens.then(new)
    exact = plain_attention(query, every.keys, every.values, every.valid, scale=D**-0.5)
    torch.testing.assert_close(out, exact, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("length", [0, 15, 16, 40, 128, 134, 160, 270])
def test_a_crop_inside_a_span_takes_its_scatter_along(device, length: int) -> None:
    """Spans of 128 tokens, filled by segments of 16: a crop cuts them anywhere."""
    tokens = Tokens.random(2, HEADS, 310)
    tokens.valid[1, :5] = False
    context = new_context(tokens, device)
    for start in range(0, 280, 20):
        feed(context, tokens.between(start, start + 20))
    context.settle()
    assert context.paged.num_tokens >= 256
    context.truncate(length)
    check_pages(context)
    feed(context, tokens.between(length, length + 30))
    context.settle()
    check_pages(context)


def test_a_crop_without_padding_leaves_no_mask_behind(device: torch.device) -> None:
    tokens = Tokens.random(1, HEADS, 100)
    context = new_context(tokens, device)
    for start in range(0, 100, 5):
        feed(context, tokens.between(start, start + 5))
    context.truncate(30)
    feed(context, tokens.between(30, 100))
    context.settle()
    assert context.steady.mask is None


def test_a_context_dropped_while_its_pages_are_built_frees_them(device: torch.device) -> None:
    tokens = Tokens.random(1, HEADS, 80)
    context = new_context(tokens, device)
    fork = context.fork(context.runtime.fork(context.runtime.config))
    feed(fork, tokens)
    assert fork._pending is not None
    assert context.paged.arena.num_pages > 0
    del fork
    assert context.paged.arena.num_pages == 0
    context.paged.arena.check_integrity()
    feed(context, tokens)
    context.settle()
    check_tokens(Pair(context, tokens, [0]))


def test_changes_made_in_inference_mode_can_be_changed_outside_it(device: torch.device) -> None:
    tokens = Tokens.random(2, HEADS, 80)
    with torch.inference_mode():
        context = new_context(tokens, device)
        feed(context, tokens.between(0, 60))
    feed(context, tokens.between(60, 80))
    with torch.inference_mode():
        context.truncate(50)
    context.select(torch.tensor([1, 1]))
    check_tokens(Pair(context, tokens.between(0, 50).select(torch.tensor([1, 1])), [0, 0]))
