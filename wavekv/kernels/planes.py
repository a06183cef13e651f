"""Rows of few bits a dimension, in planes: the high bits of all dimensions, then the low ones.

A row has one step, kept as a byte. A code `c` of n bits stands for `(c - (2^n - 1) / 2) step`; its
high bits alone, `h`, for `(h - (2^nh - 1) / 2) 2^nl step`, the middle of what they leave open.

A plane of b bits is made of 32-bit words of 32 / b dimensions each: `(word >> b k) & mask` leaves
one dimension in each byte, four dimensions for every k. The words of several rows lie side by side:
the first of every row, then the second. So integer dot products of four (`vpdpbusd`, int8 tensor
cores) read a plane in its order, with a query whose int8 components lie in their natural order.
"""

from __future__ import annotations

from functools import lru_cache

import torch
from torch import Tensor

from wavekv.kernels.mixing import constant_on

STEP_BIAS = 160
"""A step byte b > 0 is 2^((b - 160) / 8), from 1e-6 to 3757; 0 is 0."""
_CLIPS = (0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 1.0)
"""Shares of a row's largest component that are tried as the end of its levels."""
_ALL_BITS_FIRST = 4.0
"""Weight of the error of all bits beside that of the high plane, in the choice of a step."""
_AT_ONCE = {"cpu": 1 << 18}
_AT_ONCE_ON_DEVICES = 1 << 24
"""Components that are quantised at once: what fits a cache, or keeps a GPU busy."""


def step_bytes(x: Tensor) -> Tensor:
    """Numbers [...] >= 0 as bytes, to within a sixteenth of an octave inside their range."""
    exponent = (8 * x.float().log2()).round() + STEP_BIAS
    # what vanishes has no logarithm
    return exponent.clamp(1, 255).masked_fill(x <= 0, 0).to(torch.uint8)


def steps_of(codes: Tensor) -> Tensor:
    """The numbers [...] float32 that bytes stand for."""
    steps: Tensor = step_table(codes.device)[codes.int()]
    return steps


@lru_cache
def step_table(device: torch.device) -> Tensor:
    """The numbers [256] float32 that the bytes stand for: made once, not to be changed."""
    with torch.inference_mode(False):
        steps = 2 ** ((torch.arange(256, dtype=torch.float64) - STEP_BIAS) / 8)
        steps[0] = 0
    return constant_on(device, steps.float())


def quantise(rows: Tensor, *bits: int) -> tuple[Tensor, Tensor]:
    """Codes [..., D] uint8 of rows [..., D], and the bytes [...] of their steps.

    bits: of each plane, one or two planes. Of a few steps each row takes the one with the least
    squared error, of all bits and of the high plane alone. Cost: O(D) a row, some passes.
    """
    flat = rows.reshape(-1, rows.shape[-1])
    at_once = _AT_ONCE.get(rows.device.type, _AT_ONCE_ON_DEVICES)
    parts = [_quantise(part, bits) for part in flat.split(max(1, at_once // rows.shape[-1]))]
    codes, steps = (torch.cat(part) for part in zip(*parts, strict=True))
    return codes.view(rows.shape), steps.view(rows.shape[:-1])


def _quantise(rows: Tensor, bits: tuple[int, ...]) -> tuple[Tensor, Tensor]:
    half = 2 ** (sum(bits) - 1)
    rows = rows.float()
    largest = rows.abs().amax(-1, keepdim=True)
    least = torch.full_like(largest, torch.inf)
    best = torch.zeros_like(largest, dtype=torch.uint8)
    for clip in _CLIPS:
        byte = step_bytes(clip / half * largest)
        step = steps_of(byte)
        scaled = rows / step.clamp_min(torch.finfo(torch.float32).tiny)
        level = scaled.floor().clamp_(-half, half - 1)
        error = (level + 0.5).sub_(scaled).square_().sum(-1, keepdim=True)
        if len(bits) > 1:
            width = 2 ** bits[1]
            coarse = (level / width).floor_().add_(0.5).mul_(width)
            high = coarse.sub_(scaled).square_().sum(-1, keepdim=True)
            error = _ALL_BITS_FIRST * error + high
        error *= step.square()
        best = torch.where(error < least, byte, best)
        least = torch.minimum(error, least)
    step = steps_of(best)
    scaled = rows / step.clamp_min(torch.finfo(torch.float32).tiny)
    level = scaled.floor_().clamp_(-half, half - 1)
    return (level + half).to(torch.uint8), best.squeeze(-1)


def centred(codes: Tensor, bits: int) -> Tensor:
    """What codes [...] of so many bits stand for, in steps: float32."""
    levels: Tensor = codes.float() - (2**bits - 1) / 2
    return levels


def num_words(dim: int, bits: int) -> int:
    """Words of a row of `dim` dimensions in a plane."""
    return -(-dim * bits // 32)


def pack_plane(codes: Tensor, bits: int) -> Tensor:
    """Codes [..., M, D] below 2^bits of M rows as a plane [..., words, M, 4] uint8: bits
    b k .. b k + b - 1 of byte [w, m, i] are dimension (32 / b) w + 4 k + i of row m."""
    *outer, M, D = codes.shape
    words = num_words(D, bits)
    padded = torch.nn.functional.pad(codes, (0, words * 32 // bits - D))
    parts = padded.reshape(*outer, M, words, 8 // bits, 4)
    packed = parts[..., 0, :].clone()
    for k in range(1, 8 // bits):
        packed |= parts[..., k, :] << (bits * k)
    return packed.transpose(-2, -3).contiguous()


def unpack_plane(plane: Tensor, bits: int, dim: int) -> Tensor:
    """The codes [..., M, dim] uint8 that `pack_plane` was given."""
    rows = plane.transpose(-2, -3)
    parts = [(rows >> (bits * k)) & (2**bits - 1) for k in range(8 // bits)]
    codes = torch.stack(parts, -2)
    return codes.flatten(-3)[..., :dim]


def pack_nibbles(codes: Tensor) -> Tensor:
    """Codes [..., D] below 16 as [..., H] uint8, H being half of D rounded up: byte i holds
    dimension i in its low and H + i in its high four bits."""
    low, high = torch.nn.functional.pad(codes, (0, codes.shape[-1] % 2)).chunk(2, -1)
    return low | (high << 4)


def unpack_nibbles(packed: Tensor, dim: int) -> Tensor:
    """The codes [..., dim] uint8 that `pack_nibbles` was given."""
    return torch.cat([packed & 15, packed >> 4], -1)[..., :dim]
