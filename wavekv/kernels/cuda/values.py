"""Values of blocks and of refined pages, in few bits: their weighted sums."""

from functools import lru_cache

import torch
import triton
import triton.language as tl
from torch import Tensor

from wavekv.kernels.cuda.integers import nibble_floats
from wavekv.kernels.cuda.moments import step_of
from wavekv.kernels.mixing import mixing


@triton.jit
def scaled_values(codes, step, weights, DTYPE: tl.constexpr, HARDWARE: tl.constexpr):
    """Weights [GP, n] and the two halves of values [n, HALF_P], in steps less half the levels, as
    the operands of a product."""
    low, high = nibble_floats(codes, DTYPE, HARDWARE)
    if tl.float16 == DTYPE:
        # which has no room for small weights times small steps
        weights = weights.to(DTYPE)
        low *= step.to(DTYPE)[:, None]
        high *= step.to(DTYPE)[:, None]
    else:
        weights = (weights * step[None, :]).to(DTYPE)
    return weights, low, high


@triton.jit
def own_values(
    listed,
    num_listed,
    log_mass,
    value,
    value_step,
    largest,
    at_head,
    is_head,
    GP: tl.constexpr,
    HALF: tl.constexpr,
    HALF_P: tl.constexpr,
    TILE: tl.constexpr,
    DTYPE: tl.constexpr,
    PRECISION: tl.constexpr,
    HARDWARE: tl.constexpr,
):
    """The sums [GP, HALF_P] of weights times mixed residuals of the listed pages' values."""
    d = tl.arange(0, HALF_P)
    low = tl.zeros([GP, HALF_P], tl.float32)
    high = tl.zeros([GP, HALF_P], tl.float32)
    weight = tl.zeros([GP], tl.float32)
    start = 0
    while start < num_listed:
        i = start + tl.arange(0, TILE)
        is_held = i < num_listed
        # just written by other threads
        n = tl.load(listed + i, mask=is_held, other=0, cache_modifier=".cg")
        at, keep = at_head[:, None] + n[None, :], is_head[:, None] & is_held[None, :]
        mass = tl.load(log_mass + at, mask=keep, other=float("-inf"))
        here = value + n[:, None] * HALF + d[None, :]
        codes = tl.load(here, mask=is_held[:, None] & (d < HALF)[None, :], other=0)
        step = step_of(tl.load(value_step + n, mask=is_held, other=0), HARDWARE)
        weights = tl.exp2((mass - largest[:, None]) * 1.4426950408889634)
        some, first, second = scaled_values(codes, step, weights, DTYPE, HARDWARE)
        low = tl.dot(some, first, low, input_precision=PRECISION)
        high = tl.dot(some, second, high, input_precision=PRECISION)
        if tl.float16 == DTYPE:
            weight += tl.sum(some.to(tl.float32) * step[None, :], 1)
        else:
            weight += tl.sum(some.to(tl.float32), 1)
        start += TILE
    # what codes stand for lies half a step higher
    return low + 0.5 * weight[:, None], high + 0.5 * weight[:, None]


@triton.jit
def unmix(low, high, unmixing, HALF: tl.constexpr, HALF_P: tl.constexpr, D, DTYPE, PRECISION):
    """Halves [GP, HALF_P] of mixed rows, times the square root of the size of a mixing block, from
    unmixed ones."""
    i, d = tl.arange(0, HALF_P)[:, None], tl.arange(0, HALF_P)[None, :]
    inside = (i < HALF) & (d < HALF)
    at = unmixing + i * D + d
    low, high = low.to(DTYPE), high.to(DTYPE)
    first = tl.dot(low, tl.load(at, mask=inside, other=0.0), input_precision=PRECISION)
    rows = tl.load(at + HALF * D, mask=inside, other=0.0)
    first = tl.dot(high, rows, first, input_precision=PRECISION)
    rows = tl.load(at + HALF, mask=inside, other=0.0)
    second = tl.dot(low, rows, input_precision=PRECISION)
    rows = tl.load(at + HALF * D + HALF, mask=inside, other=0.0)
    second = tl.dot(high, rows, second, input_precision=PRECISION)
    return first, second


def mixed_at_once(dim: int) -> int:
    """The size of a block of the mixing matrix."""
    return dim & -dim


@lru_cache
def unmixing_on(device: torch.device, dtype: torch.dtype, dim: int) -> Tensor:
    """The matrix [D, D] that undoes the mixing, times the root of its block size: small whole
    numbers, exact in every dtype. Made once, not to be changed."""
    with torch.inference_mode(False):
        whole = (mixing(dim).mT * mixed_at_once(dim) ** 0.5).round()
        unmixing: Tensor = whole.to(dtype).contiguous().to(device)
        return unmixing
