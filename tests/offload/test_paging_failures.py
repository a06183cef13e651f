"""Pages that cannot be built or do not fit: no token is lost, no page leaks, answers stay right."""

from __future__ import annotations

from contextlib import AbstractContextManager

import pytest
import torch
from offload_cases import D, Tokens, feed, new_context, plain_attention, prefill

from wavekv.errors import CapacityError
from wavekv.growing import GrowingTensor
from wavekv.offload import LayerContext, context, paged

PAGE_BYTES = 2 * 4 * D * 4


class BuildError(Exception):
    pass


def failing_builds(monkeypatch, after: int = 0) -> AbstractContextManager[pytest.MonkeyPatch]:
    """Builds fail inside a with block, all but the first `after`."""
    build, done = context.build_segments, []

    def fail(*args, **kwargs) -> paged.SegmentPages:
        if len(done) < after:
            done.append(1)
            return build(*args, **kwargs)
        raise BuildError

    scope = monkeypatch.context()
    patch = scope.__enter__()
    patch.setattr(context, "build_segments", fail)
    return scope


def assert_answers(one: LayerContext, tokens: Tokens, new: Tokens) -> Tokens:
    """Attend with new tokens, check the answer, return all tokens."""
    query, out = feed(one, new)
    seen = tokens.then(new)
    exact = plain_attention(query, seen.keys, seen.values, seen.valid, scale=D**-0.5)
    torch.testing.assert_close(out, exact, rtol=1e-4, atol=1e-4)
    assert one.num_tokens == len(seen)
    one.paged.arena.check_integrity()
    return seen


@pytest.mark.parametrize("after", [0, 1])
def test_a_failed_build_leaves_the_tokens_local(device, monkeypatch, after: int) -> None:
    tokens = Tokens.random(2, 2, 150)
    one = new_context(tokens, device, budget=1.0)
    tokens = assert_answers(one, tokens.between(0, 0), tokens.between(0, 60))
    one.settle()
    held, start = one.paged.arena.num_pages, one.steady.start

    scope = failing_builds(monkeypatch, after)
    tokens = assert_answers(one, tokens, Tokens.random(2, 2, 50))
    assert one.paged.arena.num_pages > held
    with pytest.raises(BuildError):
        feed(one, Tokens.random(2, 2, 1))
    scope.__exit__(None, None, None)

    assert (one.steady.start, one.num_tokens) == (start, 110)
    assert one.paged.arena.num_pages == held
    tokens = assert_answers(one, tokens, Tokens.random(2, 2, 1))
    tokens = assert_answers(one, tokens, Tokens.random(2, 2, 9))
    one.settle()
    assert one.steady.start > start
    assert_answers(one, tokens, Tokens.random(2, 2, 1))


@pytest.mark.parametrize("length", [1, 3, 30])
def test_a_crop_after_a_failed_build_takes_the_sinks_along(device, monkeypatch, length) -> None:
    """Sinks moved before the build failed, so they may be as recent as the cut."""
    tokens = Tokens.random(1, 2, 40)
    one = new_context(tokens, device, budget=1.0, num_sink_tokens=4)
    scope = failing_builds(monkeypatch)
    feed(one, tokens)
    with pytest.raises(BuildError):
        one.settle()
    scope.__exit__(None, None, None)
    one.truncate(length)
    kept = assert_answers(one, tokens.between(0, length), Tokens.random(1, 2, 60))
    one.settle()
    assert one.steady.start > 0
    assert_answers(one, kept, Tokens.random(1, 2, 1))


# 9 parts, then the scatter
@pytest.mark.parametrize("number", [1, 6, 10])
def test_a_segment_that_cannot_be_taken_in_is_taken_in_not_at_all(
    device, monkeypatch, number: int
) -> None:
    tokens = Tokens.random(1, 2, 100)
    one = new_context(tokens, device, budget=1.0)
    seen = assert_answers(one, tokens.between(0, 0), tokens)
    append, calls = GrowingTensor.append, []

    def full(self: GrowingTensor, rows: torch.Tensor) -> None:
        calls.append(1)
        if len(calls) == number:
            raise MemoryError
        append(self, rows)

    with monkeypatch.context() as patch:
        patch.setattr(GrowingTensor, "append", full)
        with pytest.raises(MemoryError):
            one.settle()
    assert one.paged.num_pages == one.paged.arena.num_pages == 0
    seen = assert_answers(one, seen, Tokens.random(1, 2, 1))
    one.settle()
    assert one.paged.num_pages > 0
    assert_answers(one, seen, Tokens.random(1, 2, 1))


def test_a_crop_that_fails_changes_nothing(device, monkeypatch) -> None:
    tokens = Tokens.random(1, 2, 100)
    one = new_context(tokens, device, budget=1.0)
    for start in range(0, 100, 20):
        feed(one, tokens.between(start, start + 20))
    one.settle()

    def fail(*args) -> torch.Tensor:
        raise MemoryError

    with monkeypatch.context() as patch:
        patch.setattr(paged, "page_scatter", fail)
        with pytest.raises(MemoryError):
            one.truncate(40)
    seen = assert_answers(one, tokens, Tokens.random(1, 2, 1))
    one.truncate(40)
    assert_answers(one, seen.between(0, 40), Tokens.random(1, 2, 1))


@pytest.mark.parametrize("count", [1, 40])
def test_a_full_budget_is_an_error_before_anything_changed(device, count: int) -> None:
    # room for 32 tokens of both heads
    tokens = Tokens.random(1, 2, 200)
    one = new_context(tokens, device, budget=1.0, cpu_budget=16 * PAGE_BYTES)
    seen, fitting = tokens.between(0, 0), 55 if count == 1 else 40
    while len(seen) < fitting:
        seen = assert_answers(one, seen, tokens.between(len(seen), len(seen) + count))
    for _ in range(2):
        with pytest.raises(CapacityError, match="raise cpu_budget"):
            feed(one, tokens.between(fitting, fitting + count))
        assert one.num_tokens == fitting
    # what is there still answers, where the steady zone has room
    one.truncate(len(seen) - 5)
    seen = seen.between(0, len(seen) - 5)
    for _ in range(3):
        seen = assert_answers(one, seen, Tokens.random(1, 2, 1))
    # and goes on once there is room
    one.runtime.budget.limit *= 4
    for _ in range(20):
        seen = assert_answers(one, seen, Tokens.random(1, 2, 1))
    one.settle()
    assert one.paged.num_tokens > 32


def test_paging_out_a_prompt_that_does_not_fit_keeps_it_local(device: torch.device) -> None:
    tokens = Tokens.random(1, 2, 60)
    one = new_context(tokens, device, budget=1.0, cpu_budget=4 * PAGE_BYTES)
    one.runtime.is_prefilling = True
    feed(one, tokens)
    one.runtime.is_prefilling = False
    with pytest.raises(CapacityError):
        one.page_out()
    assert (one.num_tokens, one.steady.num_local) == (60, 60)
    assert one.steady.mask is None
    one.runtime.budget.limit *= 16
    one.page_out()
    assert_answers(one, tokens, Tokens.random(1, 2, 1))


def test_pages_under_construction_are_not_reserved_again(device: torch.device) -> None:
    tokens = Tokens.random(1, 2, 72)
    one = new_context(tokens, device, budget=1.0)
    one.runtime.is_prefilling = True
    feed(one, tokens)
    assert one._pending is not None
    assert one.segments_after(63) == []
    assert one.segments_after(64) == [64]
    one.settle()
    assert one.segments_after(63) == []
    assert one.segments_after(64) == [64]


def test_a_build_interrupted_at_its_start_frees_its_pages(monkeypatch) -> None:
    tokens = Tokens.random(1, 2, 60)
    one = new_context(tokens, budget=1.0)

    def interrupt(*args, **kwargs) -> paged.SegmentPages:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(context, "build_segments", interrupt)
        with pytest.raises(KeyboardInterrupt):
            feed(one, tokens)
    assert one.paged.arena.num_pages == 0
    assert_answers(one, tokens, Tokens.random(1, 2, 1))


def test_a_failed_fork_releases_no_page_of_the_original(monkeypatch) -> None:
    tokens = Tokens.random(1, 2, 100)
    one = new_context(tokens, budget=1.0)
    prefill(one, tokens)
    clone, calls = GrowingTensor.clone, []

    def full(self: GrowingTensor) -> GrowingTensor:
        calls.append(1)
        if len(calls) == 8:
            raise MemoryError
        return clone(self)

    with monkeypatch.context() as patch:
        patch.setattr(GrowingTensor, "clone", full)
        with pytest.raises(MemoryError):
            one.fork(one.runtime)
    held = one.paged.page_ids.view.numel()
    assert one.paged.arena.num_pages == held
    one.paged.arena.check_integrity()
    assert_answers(one, tokens, Tokens.random(1, 2, 1))
