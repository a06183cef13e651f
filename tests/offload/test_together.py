"""Layers that are paged out together hold what each of them would hold by itself."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from offload_cases import Tokens, feed, new_context, prefill, same_index

from wavekv.errors import CapacityError
from wavekv.offload import LayerContext, together
from wavekv.offload.together import page_out_together

HEADS = 2


def layers(count: int, lengths: list[int], pads: list[int], device, **settings) -> list:
    """Contexts of one runtime, with tokens that wait to be paged out, and copies of them."""
    first = new_context(Tokens.random(len(pads), HEADS, 0), device, **settings)
    made = []
    for number in range(count):
        tokens = Tokens.random(len(pads), HEADS, lengths[number % len(lengths)])
        tokens.valid = torch.arange(len(tokens)) >= torch.tensor(pads)[:, None]
        like = first.steady.keys.view
        context = LayerContext(first.runtime, like, like)
        context.runtime.is_prefilling = True
        feed(context, tokens)
        context.settle()
        context.runtime.is_prefilling = False
        made.append(context)
    return made


def same(one: LayerContext, other: LayerContext) -> None:
    assert one.paged.segments == other.paged.segments
    end = one.paged.num_tokens
    if end:
        held = one.paged.recover(0, end), other.paged.recover(0, end)
        assert all(torch.equal(mine, theirs) for mine, theirs in zip(*held, strict=True))
    for name in ("counts", "token_ids"):
        assert torch.equal(getattr(one.paged, name).view, getattr(other.paged, name).view)
    same_index(one.paged.index.view, other.paged.index.view)
    torch.testing.assert_close(one.paged.scatter.spans.view, other.paged.scatter.spans.view)
    assert torch.equal(one.steady.keys.view, other.steady.keys.view)
    assert (one.steady.start, one.steady.end) == (other.steady.start, other.steady.end)


@given(
    count=st.integers(1, 5),
    lengths=st.lists(st.integers(1, 260), min_size=1, max_size=2),
    pads=st.lists(st.sampled_from([0, 0, 3, 70]), min_size=1, max_size=2),
    at_once=st.sampled_from([1, 1 << 13, 1 << 30]),
    host_dtype=st.sampled_from(["model", "int8"]),
    seed=st.integers(0, 999),
)
def test_as_one_by_one(device, count, lengths, pads, at_once, host_dtype, seed) -> None:
    torch.manual_seed(seed)
    made = layers(count, lengths, pads, device, host_dtype=host_dtype)
    copies = [one.fork(one.runtime) for one in made]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(together, "BATCH_BYTES", at_once)
        page_out_together(made)
    for one, copy in zip(made, copies, strict=True):
        copy.page_out()
        for context in (one, copy):
            context.settle()
        assert one.segments_after(0) == []
        same(one, copy)
    made[0].paged.arena.check_integrity()


def test_pages_that_do_not_fit_leave_everything_as_it_was(device) -> None:
    made = layers(3, [100], [0], device)
    arena = made[0].paged.arena
    arena.allocate(arena.capacity - arena.num_pages)
    arena.budget.limit = arena.budget.used
    before = arena.num_pages
    with pytest.raises(CapacityError, match="cpu_budget"):
        page_out_together(made)
    assert arena.num_pages == before
    arena.check_integrity()
    for context in made:
        assert context._pending is None
        assert context.num_tokens == 100


def test_a_build_that_fails_leaves_the_tokens_local(device, monkeypatch) -> None:
    made = layers(2, [100], [0], device)

    def fail(*_: object, **__: object) -> None:
        raise RuntimeError("no memory")

    with monkeypatch.context() as patch:
        patch.setattr(together, "build_segments", fail)
        page_out_together(made)
        for context in made:
            with pytest.raises(RuntimeError, match="no memory"):
                context.settle()
            assert context.paged.num_tokens + context.steady.num_local == 100
    made[0].paged.arena.check_integrity()
    page_out_together(made)
    for context in made:
        context.settle()
        assert context.segments_after(0) == []


def test_nothing_due_is_nothing_done(device) -> None:
    tokens = Tokens.random(1, HEADS, 5)
    context = new_context(tokens, device)
    prefill(context, tokens)
    page_out_together([context])
    page_out_together([])
    assert context._pending is None
