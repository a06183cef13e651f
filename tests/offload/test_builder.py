"""The page builder: order, errors, and what a built segment holds."""

import gc
import threading
import weakref

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from wavekv.index import page_scatter
from wavekv.kvstore import HostArena, KVLayout, MemoryBudget
from wavekv.offload.builder import PageBuilder, SegmentBatch, build_segments
from wavekv.offload.paged import SegmentPages


def make_arena(device: torch.device, dtype: torch.dtype = torch.float32) -> HostArena:
    layout = KVLayout(4, 8, dtype)
    return HostArena(
        layout, MemoryBudget(1 << 22), pin=device.type == "cuda", chunk_bytes=7 * layout.page_bytes
    )


@given(
    batch=st.integers(1, 3),
    heads=st.integers(1, 3),
    k=st.integers(0, 4),
    start=st.sampled_from([0, 64, 10_000]),
    first_page=st.sampled_from([0, 3, 16]),
    masked=st.booleans(),
    dtype=st.sampled_from([torch.float32, torch.bfloat16, torch.float16]),
    seed=st.integers(0, 999),
)
def test_a_segment_holds_each_valid_token_with_its_key_and_value(
    device, batch, heads, k, start, first_page, masked, dtype, seed
) -> None:
    torch.manual_seed(seed)
    S = 4 << k
    keys, values = torch.randn(2, batch, heads, S, 8).to(device, dtype)
    valid = torch.rand(batch, S) < torch.rand(batch, 1) if masked else None
    arena = make_arena(device, dtype)
    ids = arena.allocate(batch * heads * S // 4)

    def build():
        mask = None if valid is None else valid.to(device)
        segments = SegmentBatch(keys, values, mask, start, S, [ids], first_page)
        return build_segments(segments, arena, 4, 1)

    (built,) = PageBuilder().submit(device, build).result()
    assert (built.start, built.length) == (start, S)
    assert torch.equal(built.index.counts.cpu(), built.counts.to(torch.uint8))
    pages = arena.read(built.page_ids.flatten()).reshape(*built.page_ids.shape, 2, 4, 8)
    for b in range(batch):
        for h in range(heads):
            at = built.token_ids[b, h]
            held = at >= 0
            assert torch.equal(held.sum(-1), built.counts[b, h].long())
            own = at[held].long() - start
            everything = torch.arange(S) if valid is None else valid[b].nonzero().squeeze(1)
            assert torch.equal(own.sort().values, everything)
            assert torch.equal(pages[b, h, :, 0][held], keys[b, h].cpu()[own])
            assert torch.equal(pages[b, h, :, 1][held], values[b, h].cpu()[own])
            assert pages[b, h].isfinite().all()
    assert_scatter(built, pages, first_page)


def assert_scatter(built: SegmentPages, pages: torch.Tensor, first_page: int) -> None:
    """Each span touched has the scatter of its own pages (4 pages a span)."""
    B, H, N = built.page_ids.shape
    span = torch.arange(first_page, first_page + N) // 4
    assert built.scatter.shape[2] == len(span.unique())
    for number, at in enumerate(span.unique()):
        rows = pages[:, :, span == at].flatten(0, 1)
        counts = built.counts[:, :, span == at].flatten(0, 1)
        expected = page_scatter(rows[:, :, 0], rows[:, :, 1], counts).unflatten(0, (B, H))
        torch.testing.assert_close(
            built.scatter[:, :, number].cpu(), expected, rtol=1e-4, atol=1e-4
        )


def test_builds_run_in_order_without_gradients(device: torch.device) -> None:
    builder, done = PageBuilder(), []

    def build(number: int) -> tuple[int, bool, bool]:
        done.append(number)
        return number, torch.is_grad_enabled(), threading.current_thread() is not main

    main = threading.current_thread()
    with torch.enable_grad():
        futures = [builder.submit(device, lambda n=n: build(n)) for n in range(5)]
    results = [future.result() for future in futures]
    assert done == list(range(5))
    # beside the model where it has a device of its own
    assert results == [(n, False, device.type == "cuda") for n in range(5)]


def test_an_error_is_the_futures_and_later_builds_go_on(device: torch.device) -> None:
    builder = PageBuilder()

    def fail() -> int:
        raise ValueError("no pages")

    bad, good = builder.submit(device, fail), builder.submit(device, lambda: 3)
    with pytest.raises(ValueError, match="no pages"):
        bad.result()
    assert good.result() == 3


def test_a_failed_build_leaves_nothing_for_the_collector() -> None:
    """Its error and its future must not hold each other: they hold the segment's tensors."""

    class Segment:
        pass

    def submit() -> weakref.ref[Segment]:
        segment = Segment()

        def fail() -> None:
            raise ValueError(segment)

        PageBuilder().submit(torch.device("cpu"), fail)
        return weakref.ref(segment)

    gc.disable()
    try:
        assert submit()() is None
    finally:
        gc.enable()


@pytest.mark.gpu
def test_a_build_sees_what_the_current_stream_was_given_before() -> None:
    device, builder = torch.device("cuda:0"), PageBuilder()
    for number in range(5):
        source = torch.zeros(1 << 20, device=device)
        torch.cuda._sleep(50_000_000)
        source += number + 1
        # the build waits for `source`
        assert builder.submit(device, lambda s=source: s.max().cpu()).result() == number + 1
