"""Pages that stay on the device while a prompt is prefilled: attention is the same with all of
them, with some and with none, however the prompt is cut."""

from __future__ import annotations

import signal

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from offload_cases import SMALL, D, Tokens, feed, new_context, plain_attention

from wavekv.errors import CapacityError
from wavekv.offload import LayerContext, builder, context, streaming
from wavekv.offload.interrupts import uninterrupted
from wavekv.offload.paged import PagedZone, SegmentPages
from wavekv.offload.runtime import PrefillPlan

PAGE_BYTES = 2 * 4 * D * 4
HEADS = 2


def planned(one: LayerContext, num_new: int, resident_tokens: int) -> LayerContext:
    """Let a prefill of `num_new` more tokens begin."""
    one.runtime.is_prefilling = True
    one.runtime.plan = PrefillPlan(one.num_tokens + num_new, num_new, resident_tokens)
    return one


def end(one: LayerContext) -> None:
    one.runtime.is_prefilling, one.runtime.plan = False, None
    one.end_prefill()


def run(one: LayerContext, tokens: Tokens, cuts: list[int], seen: Tokens | None = None) -> None:
    """Feed `tokens` in chunks that end at `cuts`, and check each answer."""
    start = 0
    before = tokens.between(0, 0) if seen is None else seen
    for stop in [*sorted(cuts), len(tokens)]:
        if stop == start:
            continue
        query, out = feed(one, tokens.between(start, stop))
        known = before.then(tokens.between(0, stop))
        exact = plain_attention(query, known.keys, known.values, known.valid, scale=D**-0.5)
        visible = tokens.valid[:, None, start:stop, None]
        torch.testing.assert_close(out * visible, exact * visible, rtol=1e-4, atol=1e-4)
        start = stop


def padded(count: int, pads: list[int]) -> Tokens:
    tokens = Tokens.random(len(pads), HEADS, count)
    tokens.valid = torch.arange(count) >= torch.tensor(pads)[:, None]
    return tokens


@given(
    count=st.integers(1, 500),
    cuts=st.lists(st.integers(1, 499), max_size=6),
    resident=st.sampled_from([0, 4, 63, 64, 200, 10**9]),
    pads=st.lists(st.sampled_from([0, 0, 3, 70, 10**6]), min_size=1, max_size=2),
    batch_bytes=st.sampled_from([0, 10**9]),
    block_pages=st.sampled_from([1, 7, 10**6]),
    seed=st.integers(0, 999),
)
def test_attention_does_not_depend_on_what_is_resident(
    device, count, cuts, resident, pads, batch_bytes, block_pages, seed
) -> None:
    torch.manual_seed(seed)
    tokens = padded(count, pads)
    one = planned(new_context(tokens, device), count, resident)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(context, "BATCH_BYTES", batch_bytes)
        patch.setattr(streaming, "BLOCK_BYTES", block_pages * len(pads) * HEADS * PAGE_BYTES)
        run(one, tokens, [cut for cut in cuts if cut < count])
        one.settle()
        kept = one.paged.resident
        if kept is not None:
            assert kept.num_tokens <= min(resident, one.paged.num_tokens)
        end(one)
        # what was resident is in its pages too
        new = Tokens.random(len(pads), HEADS, 5)
        run(one, new, [], tokens)
    one.settle()
    one.paged.arena.check_integrity()


def test_resident_pages_are_not_brought_back(device: torch.device) -> None:
    tokens = Tokens.random(1, HEADS, 400)
    moved = []
    for resident in (0, 128, 10**9):
        one = planned(new_context(tokens, device), 400, resident)
        run(one, tokens, [100, 200, 300])
        moved.append(one.counters.bytes_to_device)
    assert moved[0] > moved[1] > moved[2]
    # the page that sinks have left a gap in, and slots after it, in the three later chunks
    one.settle()
    assert one.paged.resident is not None
    assert one.paged.resident.num_tokens == one.paged.num_tokens - 4
    assert moved[2] == 3 * HEADS * PAGE_BYTES


def test_no_more_is_kept_than_the_prefill_pages_out(device: torch.device) -> None:
    tokens = Tokens.random(1, HEADS, 200)
    one = planned(new_context(tokens, device), 200, 10**9)
    run(one, tokens, [])
    assert one.paged.resident is not None
    assert one.paged.resident._states.shape[3] == 192


def test_pages_of_an_earlier_prefill_are_streamed(device: torch.device) -> None:
    tokens = Tokens.random(2, HEADS, 300)
    one = planned(new_context(tokens, device), 150, 10**9)
    run(one, tokens.between(0, 150), [70])
    end(one)
    planned(one, 150, 10**9)
    run(one, tokens.between(150, 300), [70], tokens.between(0, 150))
    one.settle()
    assert one.paged.resident is not None
    assert 0 < one.paged.resident.num_tokens < one.paged.num_tokens


@pytest.mark.parametrize("change", ["truncate", "select", "fork"])
def test_a_change_drops_what_is_resident(device: torch.device, change: str) -> None:
    tokens = Tokens.random(2, HEADS, 300)
    one = planned(new_context(tokens, device), 300, 10**9)
    run(one, tokens.between(0, 200), [100])
    seen = tokens.between(0, 200)
    if change == "truncate":
        one.truncate(130)
        seen = tokens.between(0, 130)
    elif change == "select":
        index = torch.tensor([1, 1])
        one.select(index)
        seen = seen.select(index)
    else:
        one = one.fork(one.runtime.fork(one.runtime.config))
        one.runtime.is_prefilling = True
    assert one.paged.resident is None
    run(one, Tokens.random(2, HEADS, 170), [60, 120], seen)


def test_a_failed_build_leaves_nothing_resident(device, monkeypatch) -> None:
    tokens = Tokens.random(1, HEADS, 400)
    one = planned(new_context(tokens, device), 400, 10**9)
    run(one, tokens.between(0, 100), [])
    one.settle()
    assert one.paged.resident is not None
    held, build = one.paged.resident.num_tokens, builder.build_segments

    def fail(*args, **kwargs) -> None:
        build(*args, **kwargs)
        raise MemoryError

    with monkeypatch.context() as patch:
        patch.setattr(context, "build_segments", fail)
        feed(one, tokens.between(100, 200))
        with pytest.raises(MemoryError):
            one.settle()
    assert one.paged.resident.num_tokens == held
    run(one, tokens.between(200, 400), [100], tokens.between(0, 200))
    one.settle()
    assert one.paged.resident.num_tokens == one.paged.num_tokens - 4


def test_several_segments_built_at_once_are_those_built_alone(device, monkeypatch) -> None:
    tokens = padded(300, [0, 5])
    made = []
    for size in (0, 10**9):
        monkeypatch.setattr(context, "BATCH_BYTES", size)
        one = planned(new_context(tokens, device), 300, 0)
        run(one, tokens, [])
        one.settle()
        made.append(one)
    alone, together = (one.paged for one in made)
    assert alone.segments == together.segments
    assert torch.equal(alone.token_ids.view, together.token_ids.view)
    for a, b in zip(alone._parts()[1:], together._parts()[1:], strict=True):
        torch.testing.assert_close(a.view, b.view)
    torch.testing.assert_close(alone.scatter.spans.view, together.scatter.spans.view)
    pages = [zone.arena.read(zone.page_ids.view.flatten()) for zone in (alone, together)]
    assert torch.equal(*pages)


def test_host_memory_of_a_prefill_is_ordered_when_it_begins(device: torch.device) -> None:
    tokens = Tokens.random(1, HEADS, 400)
    one = planned(new_context(tokens, device), 400, 0)
    feed(one, tokens.between(0, 1))
    arena = one.paged.arena
    assert arena.num_pages == 0
    due = (400 - SMALL["window"]) // SMALL["append_segment"] * SMALL["append_segment"]
    assert one.runtime.budget.used >= due * HEADS // 4 * PAGE_BYTES
    run(one, tokens.between(1, 400), [], tokens.between(0, 1))
    used = one.runtime.budget.used
    end(one)
    one.page_out()
    one.settle()
    assert one.paged.num_tokens == due
    assert one.runtime.budget.used == used


def test_a_prefill_that_cannot_fit_orders_nothing(device: torch.device) -> None:
    tokens = Tokens.random(1, HEADS, 400)
    one = new_context(tokens, device, cpu_budget=100 * PAGE_BYTES)
    planned(one, 400, 10**9)
    with pytest.raises(CapacityError, match="raise cpu_budget"):
        feed(one, tokens.between(0, 1))
    assert one.runtime.budget.used == 0
    assert one.paged.resident is None
    assert one.num_tokens == 0


def test_an_interrupt_while_pages_are_built_loses_nothing(monkeypatch) -> None:
    """Ctrl-C reaches the thread that waits: pages under construction are still written."""
    tokens = Tokens.random(1, HEADS, 200)
    one = planned(new_context(tokens), 200, 10**9)
    feed(one, tokens)
    held = one.paged.arena.num_pages

    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(context, "wait", interrupt)
        with pytest.raises(KeyboardInterrupt):
            one.settle()
    assert one.paged.arena.num_pages == held
    one.settle()
    assert one.paged.num_tokens == 192
    run(one, Tokens.random(1, HEADS, 40), [], tokens)


def test_ctrl_c_does_not_cut_the_taking_in_of_pages(monkeypatch) -> None:
    """A segment whose pages are taken in leaves the window too, then the interrupt comes."""
    tokens = Tokens.random(1, HEADS, 200)
    one = planned(new_context(tokens), 200, 10**9)
    feed(one, tokens)
    append = PagedZone.append

    def interrupted(self: PagedZone, segment: SegmentPages) -> None:
        signal.raise_signal(signal.SIGINT)
        append(self, segment)
        signal.raise_signal(signal.SIGINT)

    with monkeypatch.context() as patch:
        patch.setattr(PagedZone, "append", interrupted)
        with pytest.raises(KeyboardInterrupt):
            one.settle()
    assert (one.paged.num_tokens, one.steady.start) == (192, 192)
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    run(one, Tokens.random(1, HEADS, 40), [], tokens)


def test_an_interrupt_that_waited_knows_of_an_error_before_it() -> None:
    @uninterrupted()
    def fail() -> None:
        signal.raise_signal(signal.SIGINT)
        raise ValueError("inside")

    with pytest.raises(KeyboardInterrupt) as caught:
        fail()
    assert isinstance(caught.value.__context__, ValueError)


@pytest.mark.parametrize("host_dtype", ["int8", "int4-int2"])
def test_what_stays_on_the_device_is_what_the_pages_say(device, host_dtype: str) -> None:
    """Also where pages are stored as integers: answers do not depend on the memory there is."""
    outs = []
    tokens = padded(400, [0, 30])
    for resident in (0, 100, 10**9):
        one = planned(new_context(tokens, device, host_dtype=host_dtype), 400, resident)
        for start in range(0, 400, 80):
            torch.manual_seed(start)
            out = feed(one, tokens.between(start, start + 80))[1]
        assert one.paged.resident is None or one.paged.resident.num_tokens <= resident
        outs.append(out)
        end(one)
    for out in outs[1:]:
        torch.testing.assert_close(out, outs[0], rtol=1e-5, atol=1e-5)
    # and it is not what was given
    torch.manual_seed(320)
    query, out = torch.randn(2, 2 * HEADS, 80, D), outs[0]
    exact = plain_attention(query, tokens.keys, tokens.values, tokens.valid, scale=D**-0.5)
    seen = tokens.valid[:, None, 320:, None]
    assert not torch.allclose(out * seen, exact * seen, rtol=1e-4, atol=1e-4)


def test_without_memory_for_them_pages_are_streamed(device, monkeypatch) -> None:
    def full(*_: object) -> None:
        raise torch.OutOfMemoryError("too many pieces")

    monkeypatch.setattr(context, "ResidentPages", full)
    tokens = Tokens.random(1, HEADS, 300)
    one = planned(new_context(tokens, device), 300, 10**9)
    run(one, tokens, [100, 200])
    assert one.paged.resident is None
