"""Pages on their way to a device: streamed in blocks, or fetched by id."""

from __future__ import annotations

from contextlib import nullcontext

import pytest
import torch
from offload_cases import D, Tokens, feed, new_context, plain_attention, prefill
from torch import Tensor

from wavekv.kvstore import HostArena
from wavekv.offload import LayerContext, streaming
from wavekv.offload.streaming import StreamBuffers, stream_pages
from wavekv.offload.transfer import fetch_pages


def prefilled(
    device: torch.device, count: int = 300, pads: tuple[int, ...] = (0, 37), **settings: object
):
    tokens = Tokens.random(len(pads), 2, count)
    tokens.valid = torch.arange(count) >= torch.tensor(pads)[:, None]
    context = new_context(tokens, device, **settings)
    prefill(context, tokens)
    return context, tokens


def block_pages(monkeypatch: pytest.MonkeyPatch, context: LayerContext, pages: int) -> None:
    """Let a block hold so many pages of each head."""
    B, H, _ = context.shape
    page_bytes = context.paged.arena.layout.page_bytes
    monkeypatch.setattr(streaming, "BLOCK_BYTES", B * H * page_bytes * pages)


def rows(keys: Tensor, values: Tensor, valid: Tensor) -> set[tuple[float, ...]]:
    """Key and value of each valid token, as a set."""
    return {tuple(row) for row in torch.cat([keys, values], -1)[valid].tolist()}


@pytest.mark.parametrize("pages", [1, 2, 3, 7, 1000])
@pytest.mark.parametrize("pads", [(0,), (0, 37), (0, 10**6, 64)])
def test_blocks_hold_the_tokens_of_all_pages(device, monkeypatch, pages, pads) -> None:
    context, tokens = prefilled(device, pads=pads)
    block_pages(monkeypatch, context, pages)
    B, H, _ = context.shape
    found = [[set() for _ in range(H)] for _ in range(B)]
    for block in stream_pages(context.paged, device):
        assert block.keys.device.type == device.type
        valid = block.valid
        if valid is None:
            valid = torch.ones(block.keys.shape[:3], dtype=torch.bool, device=device)
        for b in range(B):
            for h in range(H):
                new = rows(block.keys[b, h], block.values[b, h], valid[b, h])
                assert not new & found[b][h]
                found[b][h] |= new
    sinks, end = 2, context.steady.start
    for b in range(B):
        own = tokens.valid[b].nonzero().squeeze(1)[sinks:]
        own = own[own < end]
        for h in range(H):
            everything = torch.ones(len(own), dtype=torch.bool)
            expected = rows(tokens.keys[b, h, own], tokens.values[b, h, own], everything)
            assert found[b][h] == expected


@pytest.mark.parametrize("count", [1, 9])
@pytest.mark.parametrize("pages", [1, 3])
@pytest.mark.parametrize("mode", ["exact", "retrieval"])
def test_attention_over_many_small_blocks(device, monkeypatch, count, pages, mode) -> None:
    context, tokens = prefilled(device)
    config = context.runtime.config.override(mode=mode, budget=1.0)
    context = context.fork(context.runtime.fork(config))
    block_pages(monkeypatch, context, pages)
    for _ in range(3):
        new = Tokens.random(2, 2, count)
        query, out = feed(context, new)
        tokens = tokens.then(new)
        exact = plain_attention(query, tokens.keys, tokens.values, tokens.valid, scale=D**-0.5)
        torch.testing.assert_close(out, exact, rtol=1e-4, atol=1e-4)


def test_no_pages_no_blocks(device: torch.device) -> None:
    context = new_context(Tokens.random(1, 2, 1), device)
    assert list(stream_pages(context.paged, device)) == []


class Still:
    """A stream or an event of a device that does everything at once."""

    def __getattr__(self, name: str) -> object:
        return lambda *_: None


@pytest.mark.parametrize("pages", [1, 7, 40, 1000])
@pytest.mark.parametrize("pads", [(0,), (0, 37), (0, 10**6, 64)])
@pytest.mark.parametrize("scattered", [False, True])
@pytest.mark.parametrize("gathers", [False, True])
@pytest.mark.parametrize("host_dtype", ["model", "int8"])
def test_the_buffers_of_a_device_bring_what_the_arena_has(
    monkeypatch, pages, pads, scattered, gathers, host_dtype
) -> None:
    """The way to CUDA without its streams: what is copied where."""
    context, _ = prefilled(torch.device("cpu"), 700, pads, host_dtype=host_dtype)
    zone, device = context.paged, torch.device("cpu")
    if scattered:
        order = torch.randperm(zone.num_pages)
        for part in (zone.page_ids, zone.counts, zone.index.parts[0]):
            part.view.copy_(part.view[:, :, order])
    block_pages(monkeypatch, context, pages)
    expected = list(stream_pages(zone, device))
    monkeypatch.setattr(streaming, "LEAST_RUN", 10**9 if gathers else 0)
    monkeypatch.setattr(streaming, "_copy_stream", lambda _: Still())
    monkeypatch.setattr(torch.cuda, "current_stream", lambda _: Still())
    monkeypatch.setattr(torch.cuda, "Event", Still)
    monkeypatch.setattr(torch.cuda, "stream", lambda _: nullcontext())
    empty, read = torch.empty, []
    monkeypatch.setattr(
        torch, "empty", lambda *size, pin_memory=False, **options: empty(*size, **options)
    )
    whole = HostArena.gather
    monkeypatch.setattr(HostArena, "gather", lambda *a, **k: read.append(1) or whole(*a, **k))
    buffers = StreamBuffers()
    for _ in range(2):
        blocks = streaming._streamed_blocks(zone, streaming._blocks(zone, device), device, buffers)
        for block, wanted in zip(blocks, expected, strict=True):
            assert torch.equal(block.keys, wanted.keys)
            assert torch.equal(block.values, wanted.values)
            assert (block.valid is None) == (wanted.valid is None)
            assert block.valid is None or torch.equal(block.valid, wanted.valid)
            num_pages = block.keys.shape[:3].numel() // zone.arena.layout.page_size
            assert block.moved == wanted.moved == num_pages * zone.arena.layout.page_bytes
    assert bool(read) == gathers
    (held,) = buffers._held.values()
    assert len(held.sides) == 2


@pytest.mark.parametrize("none", [False, True])
def test_fetched_pages_are_those_of_the_arena(device: torch.device, none: bool) -> None:
    context, _ = prefilled(device)
    zone = context.paged
    ids = zone.page_ids.view[:, :, torch.randperm(zone.num_pages)[:11]].clone()
    ids[torch.ones_like(ids, dtype=torch.bool) if none else torch.rand(ids.shape) < 0.3] = -1
    chunks, local, codec, num_from_disk = fetch_pages(zone, ids, device)
    assert codec is None
    assert num_from_disk == 0
    assert local.shape == ids.shape
    assert torch.equal(local.cpu() < 0, ids < 0)
    assert chunks
    assert all(chunk.device.type == device.type for chunk in chunks)
    present = ids >= 0
    at = local.cpu()[present]
    C = len(chunks[0])
    fetched = [chunks[i // C][i % C].cpu() for i in at.tolist()]
    expected = zone.arena.read(ids[present])
    assert torch.equal(torch.stack(fetched) if fetched else expected[:0], expected)


@pytest.mark.gpu
def test_a_stream_holds_two_blocks_however_far_the_host_is_ahead(monkeypatch) -> None:
    device = torch.device("cuda:0")
    context, _ = prefilled(device, count=3000)
    block_pages(monkeypatch, context, 4)
    block_bytes = streaming.BLOCK_BYTES
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    for block in stream_pages(context.paged, device):
        torch.cuda._sleep(2_000_000)  # the device falls behind
        del block
    torch.cuda.synchronize()
    assert torch.cuda.max_memory_allocated() - before < 16 * block_bytes
    assert context.paged.arena.nbytes > 100 * block_bytes


@pytest.mark.gpu
def test_a_slow_device_reads_blocks_before_they_are_overwritten(monkeypatch) -> None:
    device = torch.device("cuda:0")
    context, _ = prefilled(device, count=2000)
    block_pages(monkeypatch, context, 1)  # a page alone may be a view of the copy's buffer
    fast = [block.keys.clone() for block in stream_pages(context.paged, device)]
    torch.cuda.synchronize()
    slow = []
    for block in stream_pages(context.paged, device):
        torch.cuda._sleep(1_000_000)
        slow.append(block.keys.clone())
    assert all(torch.equal(a, b) for a, b in zip(slow, fast, strict=True))


@pytest.mark.gpu
def test_a_stream_may_be_left_early(monkeypatch) -> None:
    device = torch.device("cuda:0")
    context, _ = prefilled(device, count=2000)
    block_pages(monkeypatch, context, 2)
    for _ in range(20):
        blocks = stream_pages(context.paged, device)
        kept = next(blocks).keys.clone()
        blocks.close()
        noise = torch.full((1 << 20,), torch.nan, device=device)
        assert kept.isfinite().all()
        del noise
