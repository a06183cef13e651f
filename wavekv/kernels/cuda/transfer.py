"""Pages between pinned host memory and the device, by kernels that address the host directly
(unified virtual addressing): what to move is known on the device only, and nothing waits for the
CPU."""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from wavekv.kernels.cuda.launch import launch, power_of_two
from wavekv.kernels.step import StepArena, StepPool, StepScratch, StepShape

_FETCHERS = 48
"""Programs with a page on the way each: enough to keep the bus busy, and small ones, to leave room
to other kernels."""
_PROGRAMS, _ROWS = 48, 4
"""Of a store: programs, and pages that each has on the way at once."""


@triton.jit
def _locate(
    i,
    missing,
    behind,
    num_items,
    victims,
    wanted,
    chunks,
    per_chunk,
    S,
    X,
    WORDS: tl.constexpr,
):
    """Where page i of all that are missing is on the host, as an address, and where it goes, as an
    offset in words."""
    is_item = i < num_items
    is_before = behind <= i
    row = tl.sum(is_before.to(tl.int32), 0).to(tl.int64)
    miss = i - tl.sum(tl.where(is_before, missing, 0), 0)
    arena = tl.load(wanted + row * X + miss, mask=is_item, other=0)
    slot = tl.load(victims + row * X + miss, mask=is_item, other=0)
    chunk = tl.load(chunks + arena // per_chunk, mask=is_item, other=0)
    return chunk + (arena % per_chunk) * (4 * WORDS), (row * S + slot) * WORDS


@triton.jit
def _fetch(
    victims,
    wanted,
    num_misses,
    chunks,
    pages,
    per_chunk,
    S,
    X,
    ROWS: tl.constexpr,
    ROWS_P: tl.constexpr,
    WORDS: tl.constexpr,
    WORDS_P: tl.constexpr,
    PROGRAMS: tl.constexpr,
):
    # the misses of all rows in a row: as many for each program, whichever rows they are of
    rows = tl.arange(0, ROWS_P)
    missing = tl.load(num_misses + rows, mask=rows < ROWS, other=0)
    behind = tl.cumsum(missing, 0)
    num = tl.sum(missing, 0)
    w = tl.arange(0, WORDS_P)
    i = tl.program_id(0)
    source, target = _locate(
        i, missing, behind, num, victims, wanted, chunks, per_chunk, S, X, WORDS
    )
    while i < num:
        page = source.to(tl.pointer_type(tl.int32))
        if WORDS % 4 == 0:
            # chunks begin at whole memory pages: four words a load
            page = tl.multiple_of(page, 16)
        words = tl.load(page + w, mask=w < WORDS, other=0)
        here = target
        i += PROGRAMS
        # found while the page is on its way
        source, target = _locate(
            i, missing, behind, num, victims, wanted, chunks, per_chunk, S, X, WORDS
        )
        tl.store(pages + here + w, words, mask=w < WORDS)


@triton.jit
def _store(
    pages,
    arena_ids,
    chunks,
    per_chunk,
    num_pages,
    WORDS: tl.constexpr,
    WORDS_P: tl.constexpr,
    TILE: tl.constexpr,
    PROGRAMS: tl.constexpr,
):
    w = tl.arange(0, WORDS_P)
    start = tl.program_id(0) * TILE
    while start < num_pages:
        i = (start + tl.arange(0, TILE)).to(tl.int64)
        arena = tl.load(arena_ids + i, mask=i < num_pages, other=0)
        chunk = tl.load(chunks + arena // per_chunk, mask=i < num_pages, other=0)
        target = chunk.to(tl.pointer_type(tl.int32)) + (arena % per_chunk) * WORDS
        if WORDS % 4 == 0:
            target = tl.multiple_of(target, 16)
        inside = (i < num_pages)[:, None] & (w < WORDS)[None, :]
        words = tl.load(pages + i[:, None] * WORDS + w[None, :], mask=inside, other=0)
        tl.store(target[:, None] + w[None, :], words, mask=inside)
        start += PROGRAMS * TILE


def fetch(arena: StepArena, pool: StepPool, scratch: StepScratch, shape: StepShape) -> None:
    """Bring the pages that `resolve` found missing into their slots."""
    words = _as_words(pool.pages)
    num_words = words.shape[3]
    options: dict[str, Any] = {
        "ROWS": shape.rows,
        "ROWS_P": power_of_two(shape.rows),
        "WORDS": num_words,
        "WORDS_P": power_of_two(num_words),
        "PROGRAMS": _FETCHERS,
        "num_warps": 8,
    }
    launch(
        _fetch,
        (_FETCHERS,),
        *(scratch.victims, scratch.wanted, scratch.num_misses, arena.chunks, words),
        *(arena.pages_per_chunk, shape.slots, scratch.victims.shape[2]),
        **options,
    )


def store(pages: Tensor, arena_ids: Tensor, arena: StepArena) -> None:
    """Write pages [n, 2, P, D] to the host arena under arena_ids [n] int64."""
    words = pages.flatten(1).view(torch.int32)
    num_words = words.shape[1]
    options: dict[str, Any] = {
        "WORDS": num_words,
        "WORDS_P": power_of_two(num_words),
        "TILE": _ROWS,
        "PROGRAMS": _PROGRAMS,
        "num_warps": 8,
    }
    launch(
        _store,
        (_PROGRAMS,),
        *(words, arena_ids, arena.chunks, arena.pages_per_chunk, len(pages)),
        **options,
    )


def _as_words(pages: Tensor) -> Tensor:
    """[B, Hkv, S, words] int32 of pages [B, Hkv, S, 2, P, D]."""
    return pages.flatten(3).view(torch.int32)
