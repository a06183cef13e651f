"""Bringing pages from the host arena to where the query is.

On a CPU the arena is that place: pages are read in place or gathered. On CUDA they pass through
pinned staging buffers on a copy stream, one block ahead of the attention that uses them.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import cache
from typing import NamedTuple

import torch
from torch import Tensor

from wavekv.kernels.page_codec import PageCodec
from wavekv.offload.paged import PagedZone

BLOCK_BYTES = 32 << 20
"""Bytes of pages that are brought at once when all are streamed."""


class ReadablePages(NamedTuple):
    """Pages as `attend_pages` takes them."""

    chunks: list[Tensor]
    ids: Tensor
    """[B, Hkv, M] int64 pages in the chunks, -1 for none."""
    codec: PageCodec | None
    """The form that they are in, if not [2, P, D]."""


class Block(NamedTuple):
    """Dense keys and values of some pages, on the device."""

    keys: Tensor
    """[B, Hkv, S, D]."""
    values: Tensor
    """[B, Hkv, S, D]."""
    valid: Tensor | None
    """[B, Hkv, S] bool; None if all slots hold a token."""
    stored_bytes: int
    """What the pages take where they are stored."""


def fetch_pages(zone: PagedZone, page_ids: Tensor, device: torch.device) -> ReadablePages:
    """Make pages readable from `device`.

    page_ids: [B, Hkv, M] arena ids on the host, -1 for none.
    """
    if device.type == "cpu":
        return ReadablePages(zone.arena.chunks, page_ids, zone.arena.layout.codec)
    wanted = page_ids.reshape(-1)
    present = (wanted >= 0).nonzero().squeeze(1)
    local = torch.full_like(wanted, -1)
    local[present] = torch.arange(len(present))
    # one row at least: kernels take no chunk of none
    pages = _staging(zone, max(1, len(present)))
    zone.arena.gather(wanted[present], out=pages[: len(present)])
    chunk = zone.arena.layout.decode(pages.to(device))
    return ReadablePages([chunk], local.reshape(page_ids.shape).to(device), None)


def stream_pages(zone: PagedZone, device: torch.device) -> Iterator[Block]:
    """All pages of the zone in dense blocks. A block is valid until the next is asked for."""
    # [N]; pages that are full in every sequence need no mask
    is_full = (zone.counts.view == zone.arena.layout.page_size).all(0).all(0)
    groups = [(is_full.nonzero().squeeze(1), False), ((~is_full).nonzero().squeeze(1), True)]
    B, H, _ = zone.page_ids.view.shape
    step = max(1, BLOCK_BYTES // (B * H * zone.arena.layout.page_bytes))
    blocks = [(part, masked) for pages, masked in groups for part in pages.split(step) if len(part)]
    if device.type == "cuda" and blocks:
        yield from _streamed_blocks(zone, blocks, device)
        return
    for index, masked in blocks:
        yield _dense(zone, zone.arena.read(_ids(zone, index)), index, masked)


class _Side:
    """One of two pairs of buffers, each page's way from the arena to the device."""

    def __init__(self, zone: PagedZone, num_pages: int, device: torch.device) -> None:
        """Made on the copy stream, which owns the device buffer."""
        self.staging = _staging(zone, num_pages)
        self.pages = torch.empty_like(self.staging, device=device)
        self.copied, self.used = torch.cuda.Event(), torch.cuda.Event()


def _streamed_blocks(
    zone: PagedZone, blocks: list[tuple[Tensor, bool]], device: torch.device
) -> Iterator[Block]:
    """Copy block i + 1 while the caller's stream works on block i.

    Two sides and no more, however far the host runs ahead of the device: a copy waits for the
    attention that used its side before.
    """
    compute, copy = torch.cuda.current_stream(device), _copy_stream(device)
    longest = max(len(_ids(zone, index)) for index, _ in blocks)
    with torch.cuda.stream(copy):
        sides = [_Side(zone, longest, device) for _ in blocks[:2]]
    for side in sides:
        # also when the caller stops early, the memory is not given away while it is read
        side.pages.record_stream(compute)

    def start(number: int) -> None:
        ids, side = _ids(zone, blocks[number][0]), sides[number % 2]
        side.copied.synchronize()
        zone.arena.gather(ids, out=side.staging[: len(ids)])
        with torch.cuda.stream(copy):
            copy.wait_event(side.used)
            side.pages[: len(ids)].copy_(side.staging[: len(ids)], non_blocking=True)
            side.copied.record(copy)

    start(0)
    for number, (index, masked) in enumerate(blocks):
        if number + 1 < len(blocks):
            start(number + 1)
        side = sides[number % 2]
        compute.wait_event(side.copied)
        pages = zone.arena.layout.decode(side.pages[: len(_ids(zone, index))])
        yield _dense(zone, pages, index, masked)
        side.used.record(compute)


@cache
def _copy_stream(device: torch.device) -> torch.cuda.Stream:
    """One for all: every stream keeps freed device memory to itself."""
    return torch.cuda.Stream(device)


def _ids(zone: PagedZone, index: Tensor) -> Tensor:
    return zone.page_ids.view[:, :, index].reshape(-1)


def _dense(zone: PagedZone, pages: Tensor, index: Tensor, masked: bool) -> Block:
    B, H, _ = zone.page_ids.view.shape
    n, (_, P, D) = len(index), zone.arena.layout.page_shape
    pages = pages.reshape(B, H, n, 2, P, D)
    keys, values = (pages[:, :, :, half].reshape(B, H, n * P, D) for half in range(2))
    stored_bytes = B * H * n * zone.arena.layout.page_bytes
    if not masked:
        return Block(keys, values, None, stored_bytes)
    counts = zone.counts.view[:, :, index, None].to(pages.device)
    valid = torch.arange(P, device=pages.device) < counts
    return Block(keys, values, valid.reshape(B, H, n * P), stored_bytes)


def _staging(zone: PagedZone, num_pages: int) -> Tensor:
    layout = zone.arena.layout
    size = num_pages, *layout.stored_shape
    return torch.empty(size, dtype=layout.stored_dtype, pin_memory=True)
