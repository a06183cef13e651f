"""A decode engine on the torch twins of its kernels, against the same steps taken one by one."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from offload_cases import SMALL, D, limit_slots, same_index
from torch import Tensor

from wavekv.config import OffloadConfig
from wavekv.errors import CapacityError
from wavekv.kernels import step_reference
from wavekv.offload import LayerContext, Logits, OffloadRuntime
from wavekv.offload.engine import DecodeEngine
from wavekv.offload.engine_shape import engine_refusal, wanted_shape

LOGITS = Logits(D**-0.5)
HQ, HKV, LAYERS = 4, 2, 2


class Steps:
    """Random tokens for a stack of layers."""

    def __init__(self, seed: int, batch: int = 1) -> None:
        self.random, self.batch = torch.Generator().manual_seed(seed), batch

    def draw(self, heads: int, tokens: int = 1) -> Tensor:
        return torch.randn(self.batch, heads, tokens, D, generator=self.random)

    def token(self) -> list[tuple[Tensor, Tensor, Tensor]]:
        return [(self.draw(HQ), self.draw(HKV), self.draw(HKV)) for _ in range(LAYERS)]


def prefilled(steps: Steps, length: int, padding: int = 0, **chosen: object) -> list[LayerContext]:
    """Contexts of `length` tokens; the first `padding` of the first sequence are none."""
    runtime = OffloadRuntime(OffloadConfig(**(SMALL | chosen)))  # type: ignore[arg-type]
    valid = None
    if padding:
        valid = torch.ones(steps.batch, length, dtype=torch.bool)
        valid[0, :padding] = False
    contexts = []
    for _ in range(LAYERS):
        q, k, v = (steps.draw(heads, length) for heads in (HQ, HKV, HKV))
        context = LayerContext(runtime, k, v)
        runtime.is_prefilling = True
        context.attend(q, k, v, valid, LOGITS)
        runtime.is_prefilling = False
        context.page_out()
        contexts.append(context)
    return contexts


def eager_step(
    contexts: list[LayerContext], token: list[tuple[Tensor, Tensor, Tensor]]
) -> list[Tensor]:
    return [
        context.attend(*each, None, LOGITS) for context, each in zip(contexts, token, strict=True)
    ]


def engine_step(engine: DecodeEngine, token: list[tuple[Tensor, Tensor, Tensor]]) -> list[Tensor]:
    engine.before_step()
    outs = [engine.attend(i, *each, LOGITS, None).clone() for i, each in enumerate(token)]
    engine.advance()
    engine.after_step()
    engine.check_integrity()
    return outs


def forked(contexts: list[LayerContext]) -> list[LayerContext]:
    runtime = contexts[0].runtime.fork(contexts[0].runtime.config)
    return [context.fork(runtime) for context in contexts]


def started(
    steps: Steps, length: int, padding: int = 0, **chosen: object
) -> tuple[list[LayerContext], list[LayerContext]]:
    """The same contexts twice, with a decode step behind them."""
    contexts = prefilled(steps, length, padding, **chosen)
    eager_step(contexts, steps.token())
    copies = forked(contexts)
    for copy, context in zip(copies, contexts, strict=True):
        context.settle()
        copy.counters.last_query = context.counters.last_query
    return contexts, copies


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


@pytest.mark.parametrize("slots", [1.0, 1.5, 4.0])
def test_what_is_fetched_ahead_changes_no_output(
    monkeypatch: pytest.MonkeyPatch, slots: float
) -> None:
    """Also where slots are scarce: whatever is fetched in vain, all that is chosen has a place."""
    outs: list[list[Tensor]] = []
    ahead, moved = [], []
    for shares in ((0.0, 0.0), (0.75, 0.875)):
        monkeypatch.setattr("wavekv.offload.engine_shape.LIKELY_SHARES", shares)
        steps = Steps(11)
        contexts, _ = started(steps, 400, budget=0.1)
        limit_slots(contexts, int(slots * wanted_shape(contexts).most))
        engine = DecodeEngine(contexts, step_reference)
        outs.append([out for _ in range(25) for out in engine_step(engine, steps.token())])
        paging = sum(layer.totals.paging.sum((0, 1)) for layer in engine.layers)
        found, fetched, left, _, vain = paging.tolist()
        assert left == 0
        moved.append(found + fetched)
        ahead.append((engine.layers[0].pool.ahead >= 0).any())
        assert (vain > 0) <= ahead[-1]
        engine.give_back()
    for one, other in zip(*outs, strict=True):
        assert torch.equal(one, other)
    assert moved[0] == moved[1] > 0
    assert not ahead[0]
    assert ahead[1] == (slots > 1)


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


def test_rehearsals_leave_no_trace_in_a_small_pool(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("wavekv.offload.room.ROOM_TOKENS", 32)
    steps = Steps(10)
    taken, contexts = started(steps, 200, budget=0.5, refine=256)
    slots = wanted_shape(taken).most + 3
    limit_slots(taken, slots)
    engine = DecodeEngine(taken, step_reference)
    assert engine.shape.slots == slots < 2 * engine.shape.most
    rehearsed = steps.token()
    engine.before_step()
    for _ in range(2):
        for number, each in enumerate(rehearsed):
            engine.attend(number, *each, LOGITS, None)
        engine.advance()
    engine.reset()
    for _ in range(12):
        token = steps.token()
        for ours, theirs in zip(
            engine_step(engine, token), eager_step(contexts, token), strict=True
        ):
            torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)
    assert int(engine.layers[0].totals.paging[..., 3].sum()) > 0


def test_misses_beyond_the_cap_are_estimated() -> None:
    steps = Steps(1)
    taken, contexts = started(steps, 200, budget=0.5, max_misses=2)
    engine = DecodeEngine(taken, step_reference)
    token = steps.token()
    ours, theirs = engine_step(engine, token), eager_step(contexts, token)
    paging = engine.layers[0].totals.paging
    assert (paging[..., 1] == 2).all()
    assert (paging[..., 2] > 0).all()
    assert all(bool(out.isfinite().all()) for out in ours)
    assert not torch.allclose(ours[0], theirs[0], rtol=1e-4)
    left = int(paging[..., 2].sum())
    assert int(paging[..., 4].sum()) == left
    engine_step(engine, token)
    # what was left out has come meanwhile: the same choice finds all its pages
    assert int(paging[..., 2].sum()) == left
    assert int(paging[..., 1].sum()) == 2 * paging[..., 1].numel()


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


def test_integrity_check_sees_a_wrong_table() -> None:
    steps = Steps(6)
    taken, _ = started(steps, 150, budget=0.2)
    engine = DecodeEngine(taken, step_reference)
    engine_step(engine, steps.token())
    table = engine.layers[1].pool.table
    table[0, 1, int((table[0, 1] >= 0).nonzero()[0])] = -1
    with pytest.raises(RuntimeError, match="layer 1, sequence 0, KV head 1"):
        engine.check_integrity()
