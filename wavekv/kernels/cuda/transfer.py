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

_PROGRAMS = 48
"""Enough to keep the bus busy, few enough to leave the processors to other kernels."""
_ROWS = 4
"""Pages that one program has on the way at once."""


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
    TILE: tl.constexpr,
    PROGRAMS: tl.constexpr,
):
    # item i is miss i // ROWS of row i % ROWS
    rows = tl.arange(0, ROWS_P)
    missing = tl.load(num_misses + rows, mask=rows < ROWS, other=0)
    num_items = tl.max(missing, 0) * ROWS
    w = tl.arange(0, WORDS_P)
    start = tl.program_id(0) * TILE
    while start < num_items:
        i = start + tl.arange(0, TILE)
        row, miss = (i % ROWS).to(tl.int64), i // ROWS
        is_item = (i < num_items) & (miss < tl.load(num_misses + row))
        arena = tl.load(wanted + row * X + miss, mask=is_item, other=0)
        slot = tl.load(victims + row * X + miss, mask=is_item, other=0)
        chunk = tl.load(chunks + arena // per_chunk, mask=is_item, other=0)
        source = chunk.to(tl.pointer_type(tl.int32)) + (arena % per_chunk) * WORDS
        inside = is_item[:, None] & (w < WORDS)[None, :]
        words = tl.load(source[:, None] + w[None, :], mask=inside, other=0)
        target = pages + (row * S + slot) * WORDS
        tl.store(target[:, None] + w[None, :], words, mask=inside)
        start += PROGRAMS * TILE


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
        "TILE": _ROWS,
        "PROGRAMS": _PROGRAMS,
        "num_warps": 8,
    }
    launch(
        _fetch,
        (_PROGRAMS,),
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
