"""Pages that an engine fetches, ahead or when missed, into a pool with few slots."""

from __future__ import annotations

import pytest
import torch
from engine_cases import LOGITS, Steps, eager_step, engine_step, started
from offload_cases import limit_slots
from torch import Tensor

from wavekv.kernels import step_reference
from wavekv.offload.engine import DecodeEngine
from wavekv.offload.engine_shape import wanted_shape


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
