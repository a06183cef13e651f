"""Whatever is done to contexts: each token stays in exactly one zone, and attention is exact."""

from __future__ import annotations

import numpy as np
import torch
from context_checks import (
    CODED,
    HEADS,
    Pair,
    check_pages,
    check_tokens,
    is_coded,
    page_ids,
    segments,
)
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
from offload_cases import D, Tokens, feed, new_context, plain_attention

from wavekv.offload.runtime import PrefillPlan

NEVER = 10**6  # padding that long is a row without any token


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
        assert np.array_equal(self.arena.ids.references, expected)
        assert self.arena.num_pages == (expected > 0).sum()

    def teardown(self) -> None:
        if not hasattr(self, "arena"):
            return
        for pair in self.alive:
            del pair.context
        assert self.arena.num_pages == 0
        self.arena.check_integrity()


def test_zones_hold_every_token_once(device: torch.device) -> None:
    class OnDevice(ContextMachine):
        pass

    OnDevice.device = device
    run_state_machine_as_test(OnDevice, settings=settings(stateful_step_count=12))
