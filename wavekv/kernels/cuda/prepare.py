"""What the other kernels of a step need of a query, and what has to be done once in it."""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from wavekv.kernels.cuda.integers import signed_floats
from wavekv.kernels.cuda.launch import launch, power_of_two, uses_hardware
from wavekv.kernels.mixing import mixing_on
from wavekv.kernels.step import NUM_BINS, StepPages, StepScratch, StepShape, StepSteady

_HEADS = 8
"""The least number of query heads in a product."""
_BLOCKS = 64
"""Blocks of one program."""
_ROWS = 16
"""Rows of the mixing matrix that are read at once."""


@triton.jit
def _mix(
    query,
    mix,
    query_bytes,
    query_step,
    query_square,
    head,
    scale,
    D: tl.constexpr,
    DP: tl.constexpr,
    WIDTH: tl.constexpr,
    ROWS: tl.constexpr,
):
    """Mix one head's query, and round it to int8."""
    i, j = tl.arange(0, ROWS), tl.arange(0, DP)
    products = tl.zeros([ROWS, DP], tl.float32)
    squares = tl.zeros([ROWS], tl.float32)
    for first in tl.static_range(0, D, ROWS):
        d = first + i
        part = tl.load(query + head * D + d, mask=d < D, other=0.0).to(tl.float32) * scale
        inside = (d < D)[:, None] & (j < D)[None, :]
        rows = tl.load(mix + d[:, None] * D + j[None, :], mask=inside, other=0.0)
        products += part[:, None] * rows
        squares += part * part
    mixed = tl.sum(products, 0)
    largest = tl.max(tl.abs(mixed), 0)
    safe = tl.where(largest == 0.0, 1.0, largest)
    codes = tl.floor(mixed / safe * 127.0 + 0.5)
    tl.store(query_bytes + head * WIDTH + j, codes.to(tl.int8), mask=j < WIDTH)
    tl.store(query_step + head * 2, largest / 127.0)
    tl.store(query_step + head * 2 + 1, tl.sum(codes, 0))
    tl.store(query_square + head, tl.sum(squares, 0))


@triton.jit
def _append(
    new_keys,
    new_values,
    new_valid,
    counters,
    steady_keys,
    steady_values,
    steady_valid,
    row,
    SINKS: tl.constexpr,
    RING: tl.constexpr,
    H: tl.constexpr,
    D: tl.constexpr,
    DP: tl.constexpr,
):
    """Put the new token of a KV head into the ring."""
    d = tl.arange(0, DP)
    place = SINKS + tl.load(counters) % RING
    slot = row * (SINKS + RING) + place
    key = tl.load(new_keys + row * D + d, mask=d < D, other=0.0)
    value = tl.load(new_values + row * D + d, mask=d < D, other=0.0)
    tl.store(steady_keys + slot * D + d, key, mask=d < D)
    tl.store(steady_values + slot * D + d, value, mask=d < D)
    if row % H == 0:
        is_valid = tl.load(new_valid + row // H)
        tl.store(steady_valid + (row // H) * (SINKS + RING) + place, is_valid)


@triton.jit
def _prepare(
    query,
    mix,
    new_keys,
    new_values,
    new_valid,
    counters,
    block_mean,
    block_mean_scale,
    steady_keys,
    steady_values,
    steady_valid,
    query_bytes,
    query_step,
    query_square,
    block_logits,
    histogram,
    arrived,
    N,
    scale,
    SINKS: tl.constexpr,
    RING: tl.constexpr,
    H: tl.constexpr,
    G: tl.constexpr,
    GP: tl.constexpr,
    D: tl.constexpr,
    DP: tl.constexpr,
    WIDTH: tl.constexpr,
    MIX_ROWS: tl.constexpr,
    K: tl.constexpr,
    BLOCKS: tl.constexpr,
    ROWS: tl.constexpr,
    STAGES: tl.constexpr,
    BINS: tl.constexpr,
    PRECISION: tl.constexpr,
    HARDWARE: tl.constexpr,
    APPEND: tl.constexpr,
):
    part, row = tl.program_id(0), tl.program_id(1).to(tl.int64)
    if part < G:
        # the first programs of each row take a head each
        head = row * G + part
        _mix(query, mix, query_bytes, query_step, query_square, head, scale, D, DP, WIDTH, MIX_ROWS)
        if part == 0:
            for stage in tl.static_range(STAGES):
                here = histogram + (stage * ROWS + row) * BINS
                tl.store(here + tl.arange(0, BINS), tl.zeros([BINS], tl.int32))
                tl.store(arrived + stage * ROWS + row, 0)
            if APPEND:
                _append(
                    new_keys,
                    new_values,
                    new_valid,
                    counters,
                    steady_keys,
                    steady_values,
                    steady_valid,
                    row,
                    SINKS,
                    RING,
                    H,
                    D,
                    DP,
                )
    else:
        b = (part - G) * BLOCKS + tl.arange(0, BLOCKS)
        is_block = b * K < tl.load(counters + 2)
        g, d = tl.arange(0, GP), tl.arange(0, DP)
        at = (row * G + g)[:, None] * D + d[None, :]
        q = tl.load(query + at, mask=(g < G)[:, None] & (d < D)[None, :], other=0.0)
        blocks = N // K
        means = tl.load(
            block_mean + row * blocks * D + b[:, None] * D + d[None, :],
            mask=is_block[:, None] & (d < D)[None, :],
            other=0,
        )
        step = tl.load(block_mean_scale + row * blocks + b, mask=is_block, other=0.0) * scale
        x = tl.dot(signed_floats(means, q.dtype, HARDWARE), tl.trans(q), input_precision=PRECISION)
        tl.store(
            block_logits + (row * G + g)[None, :] * blocks + b[:, None],
            x * step[:, None],
            mask=is_block[:, None] & (g < G)[None, :],
        )


def prepare(
    query: Tensor,
    new_keys: Tensor | None,
    new_values: Tensor | None,
    new_valid: Tensor | None,
    steady: StepSteady,
    pages: StepPages,
    counters: Tensor,
    scratch: StepScratch,
    shape: StepShape,
) -> None:
    """Mix the query and round it, and multiply it with the mean keys of blocks; put the new token
    into the ring, and clear histograms and arrivals."""
    index, K, D = pages.summary, shape.block_pages, shape.head_dim
    stages, words = scratch.histogram.shape[0], scratch.query_words
    options: dict[str, Any] = {
        "SINKS": shape.sinks,
        "RING": shape.ring,
        "H": shape.kv_heads,
        "G": shape.group,
        "GP": max(_HEADS, power_of_two(shape.group)),
        "D": D,
        "DP": power_of_two(4 * words.shape[2]),
        "WIDTH": 4 * words.shape[2],
        "MIX_ROWS": _ROWS,
        "K": K,
        "BLOCKS": _BLOCKS,
        "ROWS": shape.rows,
        "STAGES": stages,
        "BINS": NUM_BINS,
        "PRECISION": "ieee" if query.dtype == torch.float32 else "tf32",
        "HARDWARE": uses_hardware(query),
        "APPEND": new_keys is not None,
        "num_warps": 4,
    }
    launch(
        _prepare,
        (shape.group + triton.cdiv(shape.capacity // K, _BLOCKS), shape.rows),
        *(query, mixing_on(query.device, D), new_keys, new_values, new_valid, counters),
        *(index.block_mean, index.block_mean_scale),
        *(steady.keys, steady.values, steady.valid),
        *(words.view(torch.int8), scratch.query_step, scratch.query_square),
        *(scratch.block_logits, scratch.histogram, scratch.arrived),
        *(shape.capacity, shape.scale),
        **options,
    )
