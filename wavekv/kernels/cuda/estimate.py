"""The pages that are not attended to, through their statistics: see
`wavekv.kernels.levels.estimate_levels`."""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from wavekv.kernels.cuda.in_use import pages_in_use
from wavekv.kernels.cuda.launch import launch, power_of_two, uses_hardware
from wavekv.kernels.cuda.moments import log_of, reach_of, root_of
from wavekv.kernels.cuda.values import (
    mixed_at_once,
    own_values,
    scaled_values,
    unmix,
    unmixing_on,
)
from wavekv.kernels.step import ATTENDED, REFINED, StepPages, StepScratch, StepShape

_DTYPES = {
    torch.float32: tl.float32,
    torch.bfloat16: tl.bfloat16,
    torch.float16: tl.float16,
}
_REGISTERS = 64
"""Of a thread at most, where a value is narrow: more of them leave too few warps to hide loads."""
_TILE = 32
"""Refined pages that are added at once."""
_NARROW = 128
"""Bytes of floats that half a value makes, up to which four warps hold a tile."""
_LEAST_BLOCKS = 16
"""Blocks of pages in a product."""


@triton.jit
def _shifts(
    n,
    at,
    is_page,
    keep,
    is_refined,
    counts,
    variance,
    shift,
    square,
    SOFTCAP: tl.constexpr,
    HARDWARE: tl.constexpr,
):
    """The shifts [GP, n] of pages; those of pages that are not refined follow from statistics,
    without a cap."""
    if SOFTCAP:
        out = tl.load(shift + at, mask=keep, other=0.0)
    else:
        log_count = log_of(tl.load(counts + n, mask=is_page, other=0), HARDWARE)
        root = root_of(tl.load(variance + n, mask=is_page, other=0), HARDWARE)
        deviation = tl.sqrt(square)[:, None] * root[None, :]
        by_moments = deviation * reach_of(deviation, log_count[None, :])
        # what is not refined holds anything: a mask would make each number a load by itself
        of_codes = tl.load(shift + at, mask=keep, other=0.0)
        out = tl.where(is_refined[None, :], of_codes, by_moments)
    return out


@triton.jit
def _estimate(
    counters,
    counts,
    variance,
    query_square,
    log_mass,
    shift,
    status,
    value,
    value_step,
    block_value,
    block_value_scale,
    unmixing,
    listed,
    slope,
    slope_spread,
    part_out,
    part_lse,
    N,
    root_of_mixing,
    G: tl.constexpr,
    GP: tl.constexpr,
    D: tl.constexpr,
    HALF: tl.constexpr,
    HALF_P: tl.constexpr,
    DTYPE: tl.constexpr,
    K: tl.constexpr,
    BLOCKS: tl.constexpr,
    FIRST: tl.constexpr,
    PARTS: tl.constexpr,
    SPANS: tl.constexpr,
    SPAN_PAGES: tl.constexpr,
    SPREADS: tl.constexpr,
    SPREADS_P: tl.constexpr,
    PART_PAGES: tl.constexpr,
    TILE: tl.constexpr,
    ATTENDED: tl.constexpr,
    REFINED: tl.constexpr,
    USE_SLOPE: tl.constexpr,
    SOFTCAP: tl.constexpr,
    PRECISION: tl.constexpr,
    HARDWARE: tl.constexpr,
):
    part, row = tl.program_id(0), tl.program_id(1).to(tl.int64)
    num_pages = pages_in_use(counters, K)
    if part * PART_PAGES < num_pages:
        g, d, i = tl.arange(0, GP), tl.arange(0, HALF_P), tl.arange(0, BLOCKS * K)
        is_head = g < G
        n = part * PART_PAGES + i
        is_page = (n < num_pages) & (i < PART_PAGES)
        mark = tl.load(status + row * N + n, mask=is_page, other=ATTENDED)
        at = g[:, None] * N + n[None, :]
        masses, keep = log_mass + row * G * N, is_head[:, None] & is_page[None, :]
        # no load waits for another
        mass = tl.load(masses + at, mask=keep, other=float("-inf"))
        mass = tl.where((mark == ATTENDED)[None, :], float("-inf"), mass)
        is_refined = mark == REFINED
        # where one program's refined pages follow each other
        here = listed + row * N + part * PART_PAGES
        order = tl.cumsum(is_refined.to(tl.int32), 0) - 1
        tl.store(here + order, n, mask=is_refined)
        largest = tl.max(mass, 1)
        safe = tl.where(largest == float("-inf"), 0.0, largest)
        weights = tl.exp2((mass - safe[:, None]) * 1.4426950408889634)
        total = tl.sum(weights, 1)
        sure = tl.maximum(total, 1e-30)
        lean = total * 0.0
        if USE_SLOPE:
            square = tl.load(query_square + row * G + g, mask=is_head, other=0.0)
            shifts = _shifts(
                n,
                at,
                is_page,
                keep,
                is_refined,
                counts + row * N,
                variance + row * N,
                shift + row * G * N,
                square,
                SOFTCAP,
                HARDWARE,
            )
            lean = tl.sum(tl.where(weights > 0.0, weights * shifts, 0.0), 1) / sure
        # the values of blocks
        b = part * (PART_PAGES // K) + tl.arange(0, BLOCKS)
        is_block = (b * K < num_pages) & (tl.arange(0, BLOCKS) * K < PART_PAGES)
        codes = tl.load(
            block_value + row * (N // K) * HALF + b[:, None] * HALF + d[None, :],
            mask=is_block[:, None] & (d < HALF)[None, :],
            other=0,
        )
        scale = tl.load(block_value_scale + row * (N // K) + b, mask=is_block, other=0.0)
        of_blocks = tl.sum(tl.reshape(weights, [GP, BLOCKS, K]), 2)
        some, first, second = scaled_values(codes, scale, of_blocks, DTYPE, HARDWARE)
        low = tl.dot(some, first, input_precision=PRECISION) / sure[:, None]
        high = tl.dot(some, second, input_precision=PRECISION) / sure[:, None]
        num_refined = tl.sum(is_refined.to(tl.int32), 0)
        if num_refined > 0:
            # the list is read by other threads than wrote it
            tl.debug_barrier()
            own_low, own_high = own_values(
                here,
                num_refined,
                masses,
                value + row * N * HALF,
                value_step + row * N,
                safe,
                g * N,
                is_head,
                GP,
                HALF,
                HALF_P,
                TILE,
                DTYPE,
                PRECISION,
                HARDWARE,
            )
            share = (1.0 / (sure * root_of_mixing))[:, None]
            own_low, own_high = unmix(
                own_low * share, own_high * share, unmixing, HALF, HALF_P, D, DTYPE, PRECISION
            )
            low += own_low
            high += own_high
        in_half = is_head[:, None] & (d < HALF)[None, :]
        if USE_SLOPE:
            of_span = (row * G + g) * SPANS + (part * PART_PAGES) // SPAN_PAGES
            s = tl.arange(0, SPREADS_P)
            spread = tl.load(
                slope_spread + of_span[:, None] * SPREADS + s[None, :],
                mask=is_head[:, None] & (s < SPREADS)[None, :],
                other=0.0,
            )
            lean = lean / tl.maximum(tl.sum(spread, 1), 1.1754943508222875e-38)
            slopes = slope + of_span[:, None] * D + d[None, :]
            low += lean[:, None] * tl.load(slopes, mask=in_half, other=0.0)
            high += lean[:, None] * tl.load(slopes + HALF, mask=in_half, other=0.0)
        lse = tl.where(total > 0.0, safe + tl.log(sure), float("-inf"))
        to = (row * G + g) * PARTS + FIRST + part
        tl.store(part_lse + to, lse, mask=is_head)
        tl.store(part_out + to[:, None] * D + d[None, :], low, mask=in_half)
        tl.store(part_out + to[:, None] * D + HALF + d[None, :], high, mask=in_half)


def estimate(pages: StepPages, counters: Tensor, scratch: StepScratch, shape: StepShape) -> None:
    """The states of all pages but the attended ones, as parts of `scratch.part_out`. The lists of
    `scratch.listed` are overwritten."""
    dtype, D, K = scratch.out.dtype, shape.head_dim, shape.block_pages
    index, half_p = pages.summary, max(16, power_of_two(D // 2))
    options: dict[str, Any] = {
        "G": shape.group,
        "GP": power_of_two(shape.group),
        "D": D,
        "HALF": D // 2,
        "HALF_P": half_p,
        "DTYPE": _DTYPES[dtype],
        "K": K,
        "BLOCKS": max(_LEAST_BLOCKS, shape.estimate_block // K),
        "FIRST": shape.attend_parts,
        "PARTS": scratch.part_lse.shape[2],
        "SPANS": scratch.slope.shape[2],
        "SPAN_PAGES": shape.span_pages,
        "SPREADS": scratch.slope_spread.shape[3],
        "SPREADS_P": power_of_two(scratch.slope_spread.shape[3]),
        "PART_PAGES": shape.estimate_block,
        "TILE": _TILE,
        "ATTENDED": ATTENDED,
        "REFINED": REFINED,
        "USE_SLOPE": shape.tail == "second",
        "SOFTCAP": shape.softcap is not None,
        "PRECISION": "ieee" if dtype == torch.float32 else "tf32",
        "HARDWARE": uses_hardware(scratch.out),
        "num_warps": 4 if half_p * dtype.itemsize <= _NARROW else 8,
        **({"maxnreg": _REGISTERS} if half_p * dtype.itemsize <= _NARROW else {}),
    }
    launch(
        _estimate,
        (shape.estimate_parts, shape.rows),
        *(counters, index.counts, index.variance, scratch.query_square),
        *(scratch.log_mass, scratch.shift, scratch.status),
        *(index.value, index.value_step, index.block_value, index.block_value_scale),
        *(unmixing_on(scratch.out.device, dtype, D), scratch.listed),
        *(scratch.slope, scratch.slope_spread, scratch.part_out, scratch.part_lse),
        *(shape.capacity, mixed_at_once(D) ** 0.5),
        **options,
    )
