"""Engines that may not start, that run out of memory, or whose tables are wrong."""

from __future__ import annotations

import pytest
import torch
from engine_cases import Steps, eager_step, engine_step, prefilled, started
from offload_cases import limit_slots

from wavekv.errors import CapacityError
from wavekv.kernels import step_reference
from wavekv.offload.engine import DecodeEngine
from wavekv.offload.engine_shape import engine_refusal, wanted_shape


def test_refusals() -> None:
    steps = Steps(5)
    contexts = prefilled(steps, 100)
    assert engine_refusal([None, *contexts]) == "some layers hold no tokens yet"
    assert engine_refusal(contexts) == "no decode step has run yet"
    eager_step(contexts, steps.token())
    assert engine_refusal(contexts) is None
    exact = prefilled(steps, 100, mode="exact")
    eager_step(exact, steps.token())
    assert engine_refusal(exact) == 'mode is "exact"'


def test_device_budget_too_small() -> None:
    taken, contexts = started(Steps(2), 200, budget=0.5)
    limit_slots(taken, wanted_shape(taken).most - 1)
    pattern = r"needs .* MiB for index, .* device_budget comes to .* MiB; raise device_budget"
    with pytest.raises(CapacityError, match=pattern):
        DecodeEngine(taken, step_reference)
    token = Steps(3).token()
    for ours, theirs in zip(eager_step(taken, token), eager_step(contexts, token), strict=True):
        torch.testing.assert_close(ours, theirs)


def test_host_budget_runs_out_between_steps() -> None:
    steps = Steps(4)
    taken, _ = started(steps, 100, cpu_budget=1 << 20)
    engine = DecodeEngine(taken, step_reference)
    arena = taken[0].paged.arena
    arena.allocate(arena.capacity - arena.num_pages)
    arena.budget.limit = arena.budget.used

    def run_on() -> None:
        for _ in range(40):
            engine_step(engine, steps.token())

    with pytest.raises(CapacityError, match="cpu_budget"):
        run_on()
    length = engine.num_tokens
    engine.give_back()
    assert all(context.num_tokens == length for context in taken)


def test_giving_back_may_fail_and_be_repeated(monkeypatch: pytest.MonkeyPatch) -> None:
    steps = Steps(9)
    taken, contexts = started(steps, 150, budget=1.0)
    engine = DecodeEngine(taken, step_reference)
    for _ in range(40):
        token = steps.token()
        engine_step(engine, token)
        eager_step(contexts, token)
    whole = taken[1].steady.values.reserve

    def fails(length: int) -> None:
        raise RuntimeError("out of memory")

    monkeypatch.setattr(taken[1].steady.values, "reserve", fails)
    with pytest.raises(RuntimeError, match="out of memory"):
        engine.give_back()
    monkeypatch.setattr(taken[1].steady.values, "reserve", whole)
    engine.give_back()
    for one, other in zip(taken, contexts, strict=True):
        other.settle()
        assert one.paged.segments == other.paged.segments
        assert torch.equal(one.steady.keys.view, other.steady.keys.view)
    taken[0].paged.arena.check_integrity()


def test_integrity_check_sees_a_wrong_table() -> None:
    steps = Steps(6)
    taken, _ = started(steps, 150, budget=0.2)
    engine = DecodeEngine(taken, step_reference)
    engine_step(engine, steps.token())
    table = engine.layers[1].pool.table
    table[0, 1, int((table[0, 1] >= 0).nonzero()[0])] = -1
    with pytest.raises(RuntimeError, match="layer 1, sequence 0, KV head 1"):
        engine.check_integrity()
