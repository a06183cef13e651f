"""The pages that are not attended to, through their statistics: see `wavekv.kernels.estimate`."""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from wavekv.kernels.cuda.integers import nibble_floats
from wavekv.kernels.cuda.launch import launch, power_of_two, uses_hardware
from wavekv.kernels.reference import VALUE_RIDGE
from wavekv.kernels.step import SLOPE_ROWS, StepPages, StepScratch, StepShape

_DTYPES = {
    torch.float32: tl.float32,
    torch.bfloat16: tl.bfloat16,
    torch.float16: tl.float16,
}
_TILE = 64
_SMALL_TILE = 128
"""Bytes of floats that half a mean value makes, up to which two warps are enough for a tile."""
_REGISTERS = 128
"""With more, too few of these programs share a multiprocessor to hide how long memory takes."""


@triton.jit
def _value_slope(
    query,
    counters,
    scatter,
    slope,
    slope_spread,
    spans,
    scale,
    ridge,
    SPAN_PAGES: tl.constexpr,
    G: tl.constexpr,
    D: tl.constexpr,
    DP: tl.constexpr,
    ROWS: tl.constexpr,
    PARTS: tl.constexpr,
    SPANS: tl.constexpr,
):
    part, row = tl.program_id(0), tl.program_id(1).to(tl.int64)
    span, block = part // PARTS, part % PARTS
    if span * SPAN_PAGES < tl.load(counters + 2):
        d, r = tl.arange(0, DP), block * ROWS + tl.arange(0, ROWS)
        at = scatter + (row * spans + span) * (2 * D * D) + r[:, None] * D + d[None, :]
        inside = (r < D)[:, None] & (d < D)[None, :]
        keys = tl.load(at, mask=inside, other=0.0)
        values = tl.load(at + D * D, mask=inside, other=0.0)
        diagonal = tl.sum(tl.where(d[None, :] == r[:, None], keys, 0.0), 1)
        for head in tl.static_range(G):
            here = query + (row * G + head) * D
            q = tl.load(here + d, mask=d < D, other=0.0).to(tl.float32) * scale
            qr = tl.load(here + r, mask=r < D, other=0.0).to(tl.float32) * scale
            spread = tl.sum(tl.sum(keys * q[None, :], 1) * qr + ridge * diagonal * qr * qr, 0)
            to = (row * G + head) * SPANS + span
            tl.store(slope_spread + to * PARTS + block, spread)
            tl.store(slope + to * D + r, tl.sum(values * q[None, :], 1), mask=r < D)


def value_slope(
    query: Tensor, pages: StepPages, counters: Tensor, scratch: StepScratch, shape: StepShape
) -> None:
    """How values go with logits in each span: see `wavekv.kernels.value_slope`. The quotient is
    left to `estimate`."""
    spans, parts = scratch.slope_spread.shape[2:]
    options: dict[str, Any] = {
        "SPAN_PAGES": shape.span_pages,
        "G": shape.group,
        "D": shape.head_dim,
        "DP": power_of_two(shape.head_dim),
        "ROWS": SLOPE_ROWS,
        "PARTS": parts,
        "SPANS": spans,
        "num_warps": 4,
    }
    launch(
        _value_slope,
        (spans * parts, shape.rows),
        *(query, counters, pages.scatter, scratch.slope, scratch.slope_spread),
        *(pages.scatter.shape[2], shape.scale, VALUE_RIDGE),
        **options,
    )


@triton.jit
def _estimate(
    counters,
    log_mass,
    shift,
    value_mean,
    value_scale,
    attended,
    slope,
    slope_spread,
    part_out,
    part_lse,
    N,
    G: tl.constexpr,
    GP: tl.constexpr,
    D: tl.constexpr,
    HALF: tl.constexpr,
    HALF_P: tl.constexpr,
    DTYPE: tl.constexpr,
    FIRST: tl.constexpr,
    PARTS: tl.constexpr,
    SPANS: tl.constexpr,
    SPAN_PAGES: tl.constexpr,
    SPREADS: tl.constexpr,
    SPREADS_P: tl.constexpr,
    BLOCK: tl.constexpr,
    TILE: tl.constexpr,
    USE_SLOPE: tl.constexpr,
    PRECISION: tl.constexpr,
    HARDWARE: tl.constexpr,
):
    block, row = tl.program_id(0), tl.program_id(1).to(tl.int64)
    num_pages = tl.load(counters + 2)
    if block * BLOCK < num_pages:
        # a byte holds dimension d in its low and HALF + d in its high four bits
        g, d = tl.arange(0, GP), tl.arange(0, HALF_P)
        is_head, is_low, is_high = g < G, d < HALF, HALF + d < D
        largest = tl.full([GP], float("-inf"), tl.float32)
        total = tl.zeros([GP], tl.float32)
        lean = tl.zeros([GP], tl.float32)
        low = tl.zeros([GP, HALF_P], tl.float32)
        high = tl.zeros([GP, HALF_P], tl.float32)
        for start in range(0, BLOCK, TILE):
            n = block * BLOCK + start + tl.arange(0, TILE)
            is_page = (n < num_pages) & (n < (block + 1) * BLOCK)
            is_read = tl.load(attended + row * N + n, mask=is_page, other=1)
            at = (row * G + g)[:, None] * N + n[None, :]
            keep = is_head[:, None] & is_page[None, :]
            # no load waits for another
            mass = tl.load(log_mass + at, mask=keep, other=float("-inf"))
            mass = tl.where((is_read == 0)[None, :], mass, float("-inf"))
            codes = tl.load(
                value_mean + (row * N + n)[:, None] * HALF + d[None, :],
                mask=is_page[:, None] & is_low[None, :],
                other=0,
            )
            step = tl.load(value_scale + row * N + n, mask=is_page, other=0.0)
            new = tl.maximum(largest, tl.max(mass, 1))
            safe = tl.where(new == float("-inf"), 0.0, new)
            fade = tl.exp(largest - safe)
            weights = tl.exp(mass - safe[:, None])
            total = total * fade + tl.sum(weights, 1)
            first, second = nibble_floats(codes, DTYPE, HARDWARE)
            if tl.float16 == DTYPE:
                # which has no room for small weights times small steps
                some = weights.to(DTYPE)
                first *= step.to(DTYPE)[:, None]
                second *= step.to(DTYPE)[:, None]
            else:
                some = (weights * step[None, :]).to(DTYPE)
            low = low * fade[:, None] + tl.dot(some, first, input_precision=PRECISION)
            high = high * fade[:, None] + tl.dot(some, second, input_precision=PRECISION)
            if USE_SLOPE:
                leans = tl.load(shift + at, mask=keep, other=0.0)
                lean = lean * fade + tl.sum(weights * leans, 1)
            largest = new
        in_low, in_high = is_head[:, None] & is_low[None, :], is_head[:, None] & is_high[None, :]
        if USE_SLOPE:
            span = (block * BLOCK) // SPAN_PAGES
            at = ((row * G + g) * SPANS + span)[:, None] * D + d[None, :]
            s = tl.arange(0, SPREADS_P)
            spread = tl.load(
                slope_spread + ((row * G + g) * SPANS + span)[:, None] * SPREADS + s[None, :],
                mask=is_head[:, None] & (s < SPREADS)[None, :],
                other=0.0,
            )
            lean = lean / tl.maximum(tl.sum(spread, 1), 1.1754943508222875e-38)
            low += lean[:, None] * tl.load(slope + at, mask=in_low, other=0.0)
            high += lean[:, None] * tl.load(slope + at + HALF, mask=in_high, other=0.0)
        sure = tl.maximum(total, 1e-30)[:, None]
        lse = tl.where(total > 0.0, largest + tl.log(tl.maximum(total, 1e-30)), float("-inf"))
        to = (row * G + g) * PARTS + FIRST + block
        tl.store(part_lse + to, lse, mask=is_head)
        at = part_out + to[:, None] * D + d[None, :]
        tl.store(at, low / sure, mask=in_low)
        tl.store(at + HALF, high / sure, mask=in_high)


def estimate(pages: StepPages, counters: Tensor, scratch: StepScratch, shape: StepShape) -> None:
    """The states of all pages but the attended ones, as parts of `scratch.part_out`."""
    dtype, half = scratch.out.dtype, pages.value_mean.shape[3]
    half_p = max(16, power_of_two(half))
    is_small = half_p * dtype.itemsize <= _SMALL_TILE
    options: dict[str, Any] = {
        "G": shape.group,
        "GP": max(16, power_of_two(shape.group)),
        "D": shape.head_dim,
        "HALF": half,
        "HALF_P": half_p,
        "DTYPE": _DTYPES[dtype],
        "FIRST": shape.attend_parts,
        "PARTS": scratch.part_lse.shape[2],
        "SPANS": scratch.slope.shape[2],
        "SPAN_PAGES": shape.span_pages,
        "SPREADS": scratch.slope_spread.shape[3],
        "SPREADS_P": power_of_two(scratch.slope_spread.shape[3]),
        "BLOCK": shape.estimate_block,
        "TILE": min(max(16, shape.estimate_block), _TILE),
        "USE_SLOPE": shape.tail == "second",
        "PRECISION": "ieee" if dtype == torch.float32 else "tf32",
        "HARDWARE": uses_hardware(scratch.out),
        "num_warps": 2 if is_small else 4,
        "num_stages": 1,
        "maxnreg": _REGISTERS if is_small else None,
    }
    launch(
        _estimate,
        (shape.estimate_parts, shape.rows),
        *(counters, scratch.log_mass, scratch.shift),
        *(pages.value_mean, pages.value_scale, scratch.attended),
        *(scratch.slope, scratch.slope_spread, scratch.part_out, scratch.part_lse, shape.capacity),
        **options,
    )
