"""Pages between pinned host memory and the device, by kernels that address the host directly
(unified virtual addressing): what to move is known on the device only, and nothing waits for the
CPU."""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from wavekv.kernels.cuda.launch import launch, power_of_two
from wavekv.kernels.page_codec import PageCodec
from wavekv.kernels.step import StepArena, StepPool, StepScratch, StepShape

_FETCHERS = 48
"""Programs with a page on the way each: enough to keep the bus busy, and small ones, to leave room
to other kernels."""
_PROGRAMS, _ROWS = 48, 4
"""Of a store: programs, and pages that each has on the way at once."""
_CODED_PROGRAMS = 112
"""Of a fetch of pages of small integers, which are smaller."""


@triton.jit
def locate(
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
    PAGE_BYTES: tl.constexpr,
    SLOT_SIZE: tl.constexpr,
):
    """Where page i of all that are missing is on the host, as an address, and where it goes, as an
    offset in units of which a slot has `SLOT_SIZE`."""
    is_item = i < num_items
    is_before = behind <= i
    row = tl.sum(is_before.to(tl.int32), 0).to(tl.int64)
    miss = i - tl.sum(tl.where(is_before, missing, 0), 0)
    arena = tl.load(wanted + row * X + miss, mask=is_item, other=0)
    slot = tl.load(victims + row * X + miss, mask=is_item, other=0)
    chunk = tl.load(chunks + arena // per_chunk, mask=is_item, other=0)
    return chunk + (arena % per_chunk) * PAGE_BYTES, (row * S + slot) * SLOT_SIZE


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
    source, target = locate(
        i, missing, behind, num, victims, wanted, chunks, per_chunk, S, X, 4 * WORDS, WORDS
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
        source, target = locate(
            i, missing, behind, num, victims, wanted, chunks, per_chunk, S, X, 4 * WORDS, WORDS
        )
        tl.store(pages + here + w, words, mask=w < WORDS)


@triton.jit
def _load_half(
    page,
    unit,
    START: tl.constexpr,
    R: tl.constexpr,
    RP: tl.constexpr,
    D: tl.constexpr,
    DP: tl.constexpr,
):
    """Codes [RP, DP], offsets and steps [DP] of the keys or values that begin at byte START."""
    r, d = tl.arange(0, RP), tl.arange(0, DP)
    codes = page + START + r[:, None] * D + d[None, :]
    codes = tl.load(codes, mask=(r < R)[:, None] & (d < D)[None, :], other=0)
    behind = page + START + R * D
    offset = tl.load(behind.to(tl.pointer_type(tl.int8)) + d, mask=d < D, other=0)
    step = tl.load(behind + D + d, mask=d < D, other=0)
    units = page.to(tl.pointer_type(tl.float32)) + unit
    return codes, offset, step, tl.load(units), tl.load(units + 1)


@triton.jit
def _store_half(
    codes,
    offset,
    step,
    offset_unit,
    step_unit,
    slot,
    R: tl.constexpr,
    RP: tl.constexpr,
    D: tl.constexpr,
    DP: tl.constexpr,
    P: tl.constexpr,
    BITS: tl.constexpr,
):
    """Write them as numbers to a slot."""
    r, d = tl.arange(0, RP), tl.arange(0, DP)
    offset = offset.to(tl.float32) * offset_unit
    step = step.to(tl.float32) * step_unit
    for k in tl.static_range(8 // BITS):
        token = r + k * R
        numbers = ((codes >> (k * BITS)) & ((1 << BITS) - 1)).to(tl.float32)
        numbers = numbers * step[None, :] + offset[None, :]
        is_number = ((r < R) & (token < P))[:, None] & (d < D)[None, :]
        to = slot + token[:, None] * D + d[None, :]
        tl.store(to, numbers.to(slot.dtype.element_ty), mask=is_number)


@triton.jit
def _fetch_coded(
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
    PAGE_BYTES: tl.constexpr,
    KEYS: tl.constexpr,
    VALUES: tl.constexpr,
    KEY_ROWS: tl.constexpr,
    KEY_ROWS_P: tl.constexpr,
    VALUE_ROWS: tl.constexpr,
    VALUE_ROWS_P: tl.constexpr,
    KEY_BITS: tl.constexpr,
    VALUE_BITS: tl.constexpr,
    P: tl.constexpr,
    D: tl.constexpr,
    DP: tl.constexpr,
    PROGRAMS: tl.constexpr,
):
    rows = tl.arange(0, ROWS_P)
    missing = tl.load(num_misses + rows, mask=rows < ROWS, other=0)
    behind = tl.cumsum(missing, 0)
    num = tl.sum(missing, 0)
    i = tl.program_id(0)
    while i < num:
        source, target = locate(
            i, missing, behind, num, victims, wanted, chunks, per_chunk, S, X, PAGE_BYTES, 2 * P * D
        )
        page = tl.multiple_of(source.to(tl.pointer_type(tl.uint8)), 16)
        slot = pages + tl.multiple_of(target, 2 * P * D)
        # all is on its way before anything is waited for
        codes, offset, step, offset_unit, step_unit = _load_half(
            page, 0, KEYS, KEY_ROWS, KEY_ROWS_P, D, DP
        )
        v_codes, v_offset, v_step, v_offset_unit, v_step_unit = _load_half(
            page, 2, VALUES, VALUE_ROWS, VALUE_ROWS_P, D, DP
        )
        # fmt: off
        _store_half(codes, offset, step, offset_unit, step_unit, slot,
                    KEY_ROWS, KEY_ROWS_P, D, DP, P, KEY_BITS)
        _store_half(v_codes, v_offset, v_step, v_offset_unit, v_step_unit, slot + P * D,
                    VALUE_ROWS, VALUE_ROWS_P, D, DP, P, VALUE_BITS)
        # fmt: on
        i += PROGRAMS


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
    if shape.codec is not None:
        fetch_coded(arena, pool, scratch, shape, shape.codec)
        return
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


def fetch_coded(
    arena: StepArena, pool: StepPool, scratch: StepScratch, shape: StepShape, codec: PageCodec
) -> None:
    """`fetch` of pages that are stored as small integers."""
    options: dict[str, Any] = {
        "ROWS": shape.rows,
        "ROWS_P": power_of_two(shape.rows),
        "PAGE_BYTES": codec.page_bytes,
        "KEYS": codec.start(0),
        "VALUES": codec.start(1),
        "KEY_ROWS": codec.rows(0),
        "KEY_ROWS_P": power_of_two(codec.rows(0)),
        "VALUE_ROWS": codec.rows(1),
        "VALUE_ROWS_P": power_of_two(codec.rows(1)),
        "KEY_BITS": codec.key_bits,
        "VALUE_BITS": codec.value_bits,
        "P": codec.page_size,
        "D": codec.head_dim,
        "DP": power_of_two(codec.head_dim),
        "PROGRAMS": _CODED_PROGRAMS,
        "num_warps": 2,
    }
    launch(
        _fetch_coded,
        (_CODED_PROGRAMS,),
        *(scratch.victims, scratch.wanted, scratch.num_misses, arena.chunks, pool.pages),
        *(arena.pages_per_chunk, shape.slots, scratch.victims.shape[2]),
        **options,
    )


def store(pages: Tensor, arena_ids: Tensor, arena: StepArena) -> None:
    """Write pages [n, *stored shape] to the host arena under arena_ids [n] int64."""
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
