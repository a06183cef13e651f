"""Means of blocks as small integers times a power of two: keys in eight bits, values in four.

Seven bits and a power of two are exact in every float type, so what is unpacked is packed again
without loss, and a product with the integers is one with the floats. Rows must be finite: what is
not would be zeros.
"""

from __future__ import annotations

import torch
from torch import Tensor

KEY_BITS, VALUE_BITS = 8, 4


def pack_rows(rows: Tensor, bits: int) -> tuple[Tensor, Tensor]:
    """Integers and scale of rows [..., D], each rounded to the nearest of its levels.

    Returns int8 [..., D] for eight bits, or uint8 [..., H] for four, H being half of D rounded up:
    byte i holds dimension i in its low and H + i in its high four bits, each plus 8; and the scale
    [...] float32.
    """
    levels, scale = _levels(rows, bits)
    if bits == KEY_BITS:
        return levels.to(torch.int8), scale
    half = -(-rows.shape[-1] // 2)
    offset = torch.nn.functional.pad(levels, (0, 2 * half - rows.shape[-1])).to(torch.int16) + 8
    return (offset[..., :half] + 16 * offset[..., half:]).to(torch.uint8), scale


def unpack_rows(codes: Tensor, scale: Tensor, dim: int, dtype: torch.dtype) -> Tensor:
    """The rows [..., dim] that integers and scales stand for."""
    if codes.dtype == torch.uint8:
        codes = (torch.cat([codes & 15, codes >> 4], -1).to(torch.int8) - 8)[..., :dim]
    # in place: the rows of a layer may be most of the memory that is left
    return codes.float().mul_(scale.unsqueeze(-1)).to(dtype)


def _levels(rows: Tensor, bits: int) -> tuple[Tensor, Tensor]:
    """Whole numbers [..., D] float32, at most 2^(bits - 1) - 1, and their scale [...] float32: the
    least power of two, from 2^-120 on, that they fit."""
    rows = rows.float()
    mantissa, exponent = torch.frexp(rows.abs().amax(-1))
    # no quotient and no power: devices round these in their own ways
    most = (2 ** (bits - 1) - 1) / 2 ** (bits - 1)
    scale = two_to(exponent - (bits - 1) + (mantissa > most).int())
    return (rows / scale.unsqueeze(-1)).round(), scale


def two_to(exponent: Tensor) -> Tensor:
    """2^exponent [...] float32, of int32; from 2^-120 to 2^127."""
    return ((exponent.clamp(-120, 127) + 127) << 23).to(torch.int32).view(torch.float32)
