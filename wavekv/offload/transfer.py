"""Bringing pages from the host arena to where the query is.

On a CPU the arena is that place: pages are read in place or gathered. On CUDA they pass through
pinned staging buffers on a copy stream, one block ahead of the attention that uses them.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from wavekv.offload.paged import PagedZone

BLOCK_BYTES = 32 << 20
"""Bytes of pages that are brought at once when all are streamed."""


class Block(NamedTuple):
    """Dense keys and values of some pages, on the device."""

    keys: Tensor
    """[B, Hkv, S, D]."""
    values: Tensor
    """[B, Hkv, S, D]."""
    valid: Tensor | None
    """[B, Hkv, S] bool; None if all slots hold a token."""


def fetch_pages(
    zone: PagedZone, page_ids: Tensor, device: torch.device
) -> tuple[list[Tensor], Tensor]:
    """Make pages readable from `device`: (chunks, ids into them) as `attend_pages` takes them.

    page_ids: [B, Hkv, M] arena ids on the host, -1 for none.
    """
    if device.type == "cpu":
        return zone.arena.chunks, page_ids
    wanted = page_ids.reshape(-1)
    present = (wanted >= 0).nonzero().squeeze(1)
    local = torch.full_like(wanted, -1)
    local[present] = torch.arange(len(present))
    pages = _staging(zone, len(present))
    zone.arena.read(wanted[present], out=pages)
    chunks = [pages.to(device)] if len(present) else []
    return chunks, local.reshape(page_ids.shape).to(device)


def stream_pages(zone: PagedZone, device: torch.device) -> Iterator[Block]:
    """All pages of the zone in dense blocks. A block is valid until the one after the next."""
    # [N]; pages that are full in every sequence need no mask
    is_full = (zone.counts.view == zone.arena.layout.page_size).all(0).all(0)
    groups = [(is_full.nonzero().squeeze(1), False), ((~is_full).nonzero().squeeze(1), True)]
    B, H, _ = zone.page_ids.view.shape
    step = max(1, BLOCK_BYTES // (B * H * zone.arena.layout.page_bytes))
    blocks = [(part, masked) for pages, masked in groups for part in pages.split(step) if len(part)]
    if device.type == "cuda":
        yield from _streamed_blocks(zone, blocks, device)
        return
    for index, masked in blocks:
        yield _dense(zone, zone.arena.read(_ids(zone, index)), index, masked)


def _streamed_blocks(
    zone: PagedZone, blocks: list[tuple[Tensor, bool]], device: torch.device
) -> Iterator[Block]:
    """Copy block i + 1 while the caller's stream works on block i; two staging buffers."""
    compute, copy = torch.cuda.current_stream(device), torch.cuda.Stream(device)
    staging: list[Tensor | None] = [None, None]
    copied: list[torch.cuda.Event | None] = [None, None]

    def start(number: int) -> Tensor:
        index, _ = blocks[number]
        ids, side = _ids(zone, index), number % 2
        buffer, done = staging[side], copied[side]
        if done is not None:
            done.synchronize()
        if buffer is None or len(buffer) < len(ids):
            staging[side] = buffer = _staging(zone, len(ids))
        zone.arena.read(ids, out=buffer[: len(ids)])
        with torch.cuda.stream(copy):
            pages = buffer[: len(ids)].to(device, non_blocking=True)
            copied[side] = copy.record_event()
        return pages

    ahead = start(0) if blocks else None
    for number, (index, masked) in enumerate(blocks):
        pages, event = ahead, copied[number % 2]
        assert pages is not None
        assert event is not None
        compute.wait_event(event)
        pages.record_stream(compute)
        # the copy stream reads pinned memory only, so it need not wait for the attention
        ahead = start(number + 1) if number + 1 < len(blocks) else None
        yield _dense(zone, pages, index, masked)


def _ids(zone: PagedZone, index: Tensor) -> Tensor:
    return zone.page_ids.view[:, :, index].reshape(-1)


def _dense(zone: PagedZone, pages: Tensor, index: Tensor, masked: bool) -> Block:
    B, H, _ = zone.page_ids.view.shape
    n, (_, P, D) = len(index), zone.arena.layout.page_shape
    pages = pages.reshape(B, H, n, 2, P, D)
    keys, values = (pages[:, :, :, half].reshape(B, H, n * P, D) for half in range(2))
    if not masked:
        return Block(keys, values, None)
    counts = zone.counts.view[:, :, index, None].to(pages.device)
    valid = torch.arange(P, device=pages.device) < counts
    return Block(keys, values, valid.reshape(B, H, n * P))


def _staging(zone: PagedZone, num_pages: int) -> Tensor:
    layout = zone.arena.layout
    return torch.empty(num_pages, *layout.page_shape, dtype=layout.dtype, pin_memory=True)
