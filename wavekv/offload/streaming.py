"""All pages of a layer passing by, in dense blocks for attention of many queries.

On a CPU the arena is where the queries are. On CUDA pages that are not resident cross the bus on a
copy stream, a block ahead of the attention that uses them: straight from the pinned chunks where
their ids are consecutive, which a segment's are, else gathered on the host first.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import cache
from itertools import pairwise
from typing import NamedTuple

import torch
from torch import Tensor

from wavekv.kvstore import HostArena, KVLayout
from wavekv.kvstore.arena import LEAST_RUN
from wavekv.offload.paged import PagedZone

BLOCK_BYTES = 128 << 20
"""Bytes of keys and values in a block on CUDA: long blocks are merged seldom. Two are on their way,
as they are stored, and one is laid out for attention."""
MEMORY_BLOCKS = {True: 7, False: 3}
"""Blocks of device memory that streaming takes, by whether pages are coded: what decodes them has
copies, some in float32."""
_CPU_BLOCK_BYTES = 32 << 20


class Block(NamedTuple):
    """Dense keys and values of some pages, on the device."""

    keys: Tensor
    """[B, Hkv, S, D]."""
    values: Tensor
    """[B, Hkv, S, D]."""
    valid: Tensor | None
    """[B, Hkv, S] bool; None if all slots hold a token."""
    moved: int
    """Bytes that were brought for it."""


class _Piece(NamedTuple):
    """Pages [first, last) of a zone, all of one segment."""

    first: int
    last: int


class StreamBuffers:
    """Device memory that blocks pass through: three blocks, kept from one layer to the next, so
    that it does not grow with how far the host runs ahead."""

    def __init__(self) -> None:
        self._held: dict[tuple[torch.device, KVLayout], _Buffers] = {}

    def of(self, layout: KVLayout, num_pages: int, device: torch.device) -> _Buffers:
        """Buffers for blocks of at most `num_pages`."""
        key = device, layout
        if key not in self._held or len(self._held[key].sides[0].pages) < num_pages:
            self._held.pop(key, None)
            self._held[key] = _Buffers(layout, num_pages, device)
        return self._held[key]

    def clear(self) -> None:
        """Give the memory back. What still reads it was launched before what gets it next."""
        self._held.clear()


class _Buffers:
    def __init__(self, layout: KVLayout, num_pages: int, device: torch.device) -> None:
        self.sides = [_Side(layout, num_pages, device) for _ in range(2)]
        shape = num_pages, *layout.page_shape
        self.dense = torch.empty(shape, dtype=layout.dtype, device=device).flatten()
        # others may still use what this memory was before
        _copy_stream(device).wait_stream(torch.cuda.current_stream(device))


class _Side:
    """One of two buffers that pages are copied to, as the arena stores them."""

    def __init__(self, layout: KVLayout, num_pages: int, device: torch.device) -> None:
        shape = num_pages, *layout.stored_shape
        self.pages = torch.empty(shape, dtype=layout.stored_dtype, device=device)
        self.copied, self.used = torch.cuda.Event(), torch.cuda.Event()
        self._staging: Tensor | None = None

    def copy(self, zone: PagedZone, ids: Tensor, stream: torch.cuda.Stream) -> None:
        """Begin to bring the pages `ids` [n] on `stream`, once the last block is out of the way."""
        pages = self.pages[: len(ids)]
        sources = zone.arena.runs(ids) if isinstance(zone.arena, HostArena) else None
        if sources is None or len(sources) * LEAST_RUN > len(ids):
            # also what is in memory of pages in tiers: others may take its place meanwhile
            sources = [(0, self._gathered(zone, ids))]
        with torch.cuda.stream(stream):
            stream.wait_event(self.used)
            for start, source in sources:
                pages[start : start + len(source)].copy_(source, non_blocking=True)
            self.copied.record(stream)

    def _gathered(self, zone: PagedZone, ids: Tensor) -> Tensor:
        if self._staging is None:
            self._staging = torch.empty(self.pages.shape, dtype=self.pages.dtype, pin_memory=True)
        # the copy from it must be over before it is written again
        self.copied.synchronize()
        return zone.arena.gather(ids, out=self._staging[: len(ids)])


def stream_pages(
    zone: PagedZone, device: torch.device, buffers: StreamBuffers | None = None
) -> Iterator[Block]:
    """All pages of the zone in dense blocks, those that are resident first and in one block. A
    block is valid until the next is asked for."""
    if zone.resident is not None and zone.resident.num_tokens:
        yield Block(zone.resident.keys, zone.resident.values, None, 0)
    blocks = _blocks(zone, device)
    if not blocks:
        return
    if device.type == "cuda":
        yield from _streamed_blocks(zone, blocks, device, buffers or StreamBuffers())
        return
    for pieces, masked in blocks:
        pages, layout = zone.arena.gather(_ids(zone, pieces)), zone.arena.layout
        memory = torch.empty(len(pages), *layout.page_shape, dtype=layout.dtype).flatten()
        yield _dense(zone, pages, memory, pieces, masked)


def _blocks(zone: PagedZone, device: torch.device) -> list[tuple[list[_Piece], bool]]:
    """The pages that are not resident, cut into blocks: pages that are full in every sequence,
    which need no mask, and others by themselves."""
    B, H, _ = zone.page_ids.view.shape
    size = BLOCK_BYTES if device.type == "cuda" else min(BLOCK_BYTES, _CPU_BLOCK_BYTES)
    most = max(1, size // (B * H * zone.arena.layout.dense_bytes))
    pieces: dict[bool, list[_Piece]] = {False: [], True: []}
    first = 0
    for _, last in zone.segments:
        start = first + (0 if zone.resident is None else zone.resident.pages_from(first))
        for piece, is_full in _pieces(zone, start, last):
            pieces[not is_full].append(piece)
        first = last
    return [(part, masked) for masked in pieces for part in _packed(pieces[masked], most)]


def _pieces(zone: PagedZone, start: int, stop: int) -> Iterator[tuple[_Piece, bool]]:
    """Pages [start, stop) cut where fullness changes."""
    if start == stop:
        return
    is_full = zone.counts.view[:, :, start:stop] == zone.arena.layout.page_size
    everywhere = is_full.all(0).all(0)
    changes = (everywhere[1:] != everywhere[:-1]).nonzero().squeeze(1) + 1
    for a, b in pairwise([0, *changes.tolist(), stop - start]):
        yield _Piece(start + a, start + b), bool(everywhere[a])


def _packed(pieces: list[_Piece], most: int) -> Iterator[list[_Piece]]:
    """Blocks of `most` pages, the last one shorter."""
    block: list[_Piece] = []
    room = most
    for first, last in pieces:
        while first < last:
            stop = min(last, first + room)
            block.append(_Piece(first, stop))
            room -= stop - first
            first = stop
            if room == 0:
                yield block
                block, room = [], most
    if block:
        yield block


def _streamed_blocks(
    zone: PagedZone,
    blocks: list[tuple[list[_Piece], bool]],
    device: torch.device,
    buffers: StreamBuffers,
) -> Iterator[Block]:
    """Copy block i + 1 while the caller's stream works on block i.

    Two sides and no more, however far the host runs ahead of the device: a copy waits until the
    block that had its side before is laid out.
    """
    compute, copy = torch.cuda.current_stream(device), _copy_stream(device)
    ids = [_ids(zone, pieces) for pieces, _ in blocks]
    held = buffers.of(zone.arena.layout, max(map(len, ids)), device)
    try:
        held.sides[0].copy(zone, ids[0], copy)
        for number, (pieces, masked) in enumerate(blocks):
            if number + 1 < len(blocks):
                held.sides[(number + 1) % 2].copy(zone, ids[number + 1], copy)
            side = held.sides[number % 2]
            compute.wait_event(side.copied)
            block = _dense(zone, side.pages[: len(ids[number])], held.dense, pieces, masked)
            side.used.record(compute)
            yield block
    finally:
        # also when the caller stops early: neither buffers nor pages are changed under a copy
        compute.wait_stream(copy)


@cache
def _copy_stream(device: torch.device) -> torch.cuda.Stream:
    """One for all: every stream keeps freed device memory to itself."""
    return torch.cuda.Stream(device)


def _ids(zone: PagedZone, pieces: list[_Piece]) -> Tensor:
    """Arena ids, piece by piece: those of a segment lie in a row."""
    return torch.cat([zone.page_ids.view[:, :, a:b].reshape(-1) for a, b in pieces])


def _dense(
    zone: PagedZone, pages: Tensor, memory: Tensor, pieces: list[_Piece], masked: bool
) -> Block:
    """Lay out pages [n, *stored_shape] for attention, in `memory` of at least their size."""
    B, H, _ = zone.page_ids.view.shape
    layout = zone.arena.layout
    _, P, D = layout.page_shape
    num_pages = sum(b - a for a, b in pieces)
    dense = memory[: 2 * B * H * num_pages * P * D].view(2, B, H, num_pages, P, D)
    at = start = 0
    for a, b in pieces:
        n = b - a
        piece = layout.decode(pages[start : start + B * H * n]).view(B, H, n, 2, P, D)
        for half in range(2):
            dense[half, :, :, at : at + n].copy_(piece[:, :, :, half])
        at, start = at + n, start + B * H * n
    keys, values = dense.flatten(3, 4)
    valid = None
    if masked:
        held_counts = zone.index.view.counts
        counts = torch.cat([held_counts[:, :, a:b] for a, b in pieces], 2)
        held = torch.arange(P, device=counts.device) < counts.unsqueeze(-1)
        valid = held.flatten(2)
    return Block(keys, values, valid, pages.nbytes)
