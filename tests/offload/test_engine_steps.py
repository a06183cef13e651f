"""A decode engine on the torch twins of its kernels, against the same steps taken one by one."""

from __future__ import annotations

import pytest
import torch
from engine_cases import Steps, eager_step, engine_step, started
from hypothesis import given, settings
from hypothesis import strategies as st
from offload_cases import limit_slots, same_index

from wavekv.kernels import step_reference
from wavekv.offload.engine import DecodeEngine
from wavekv.offload.engine_shape import engine_refusal, wanted_shape


@pytest.mark.parametrize(
    "chosen",
    [
        {},
        {"budget": 1.0},
        {"budget": 0.2, "top_p": 0.5},
        {"tail_estimate": "first"},
        {"tail_estimate": "none"},
        {"refine": 1},
        {"prefetch": "runners-up"},
        {"host_dtype": "int8", "budget": 1.0},
        {"host_dtype": "int4-int2"},
        {"budget": 8},
    ],
    ids=str,
)
def test_as_steps_one_by_one(chosen: dict[str, object]) -> None:
    steps = Steps(0)
    # an engine's candidates are whole bins of ranks: alike only where they are all pages
    taken, contexts = started(steps, 150, **({"budget": 0.1, "refine": 256} | chosen))
    assert engine_refusal(taken) is None
    if chosen.get("budget") == 8:
        limit_slots(taken, wanted_shape(taken).most)
    engine = DecodeEngine(taken, step_reference)
    for _ in range(60):
        token = steps.token()
        for ours, theirs in zip(
            engine_step(engine, token), eager_step(contexts, token), strict=True
        ):
            torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)
    engine.give_back()
    for one, other in zip(taken, contexts, strict=True):
        other.settle()
        assert one.num_tokens == other.num_tokens
        assert one.paged.segments == other.paged.segments
        assert one.steady.start == other.steady.start
        end = one.paged.num_tokens
        for mine, expected in zip(
            one.paged.recover(0, end), other.paged.recover(0, end), strict=True
        ):
            assert torch.equal(mine, expected)
        for name in ("counts", "token_ids"):
            assert torch.equal(getattr(one.paged, name).view, getattr(other.paged, name).view)
        same_index(one.paged.index.view, other.paged.index.view)
        torch.testing.assert_close(one.paged.scatter.spans.view, other.paged.scatter.spans.view)
        assert torch.equal(one.steady.keys.view, other.steady.keys.view)
        assert one.counters.steps == other.counters.steps
        one.paged.arena.check_integrity()
    for _ in range(20):
        token = steps.token()
        for ours, theirs in zip(eager_step(taken, token), eager_step(contexts, token), strict=True):
            torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)


@settings(max_examples=20)
@given(
    seed=st.integers(0, 2**20),
    batch=st.integers(1, 3),
    length=st.integers(30, 200),
    padding=st.integers(0, 12),
    before=st.integers(0, 20),
    after=st.integers(0, 20),
    cut=st.integers(0, 60),
)
def test_any_length_padding_and_crop(
    seed: int, batch: int, length: int, padding: int, before: int, after: int, cut: int
) -> None:
    """With a budget of everything a step is full attention: whatever is lost or doubled shows."""
    steps = Steps(seed, batch)
    taken, contexts = started(steps, length, padding, budget=1.0)
    for count in (before, after):
        engine = DecodeEngine(taken, step_reference)
        for _ in range(count):
            if engine.is_full:
                break
            token = steps.token()
            for ours, theirs in zip(
                engine_step(engine, token), eager_step(contexts, token), strict=True
            ):
                torch.testing.assert_close(ours, theirs, rtol=1e-3, atol=1e-4)
        engine.give_back()
        for context in (*taken, *contexts):
            context.settle()
            context.truncate(max(1, context.num_tokens - cut))
            context.page_out()
            context.settle()


def test_to_the_end_of_the_room(monkeypatch: pytest.MonkeyPatch) -> None:
    """Budgets grow with the context: the last step of an engine chooses the most pages."""
    monkeypatch.setattr("wavekv.offload.room.ROOM_TOKENS", 64)
    steps = Steps(7)
    taken, contexts = started(steps, 150, budget=0.6, refine=256, prefetch="runners-up")
    engine = DecodeEngine(taken, step_reference)
    count = 0
    while not engine.is_full:
        token = steps.token()
        for ours, theirs in zip(
            engine_step(engine, token), eager_step(contexts, token), strict=True
        ):
            torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)
        count += 1
    assert count > 64
    engine.give_back()
    for context in taken:
        # due, and without room in the engine
        context.page_out()
        context.settle()
    token = steps.token()
    for ours, theirs in zip(eager_step(taken, token), eager_step(contexts, token), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)


def test_sinks_of_a_short_prompt_are_its_first_tokens() -> None:
    steps = Steps(8)
    taken, contexts = started(steps, 5, budget=1.0)
    engine = DecodeEngine(taken, step_reference)
    while not engine.is_full:
        token = steps.token()
        engine_step(engine, token)
        eager_step(contexts, token)
    engine.give_back()
    for _ in range(20):
        token = steps.token()
        for ours, theirs in zip(eager_step(taken, token), eager_step(contexts, token), strict=True):
            torch.testing.assert_close(ours, theirs, rtol=1e-3, atol=1e-4)
    for one, other in zip(taken, contexts, strict=True):
        assert torch.equal(one.steady.sink_positions, other.steady.sink_positions)
        assert one.steady.sink_positions.tolist() == [[0, 1]]
