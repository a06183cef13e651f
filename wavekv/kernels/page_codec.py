"""Pages as small integers: what host memory holds, and the bus carries, instead of floats.

The tokens of a page are alike, so in each channel their numbers lie in a narrow range of its own:
a channel of a page has an offset and a step, and each token a code of a few bits. A range for
each channel is how KIVI (arXiv:2402.02750) quantises keys over groups of tokens that follow each
other; in pages that cluster them it serves values as well (docs/adr/0008).

A page [2, P, D] is `page_bytes` bytes: four float32 (units of offsets and of steps, of keys and of
values); then for keys, and then for values, R rows of D codes, D offsets (int8) and D steps
(uint8). A byte of row r holds the codes of the tokens r, r + R, r + 2 R, .. from its low bits on.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

UNIT_BYTES = 16
"""Bytes before the keys."""
_ALIGNMENT = 16


@dataclass(frozen=True, slots=True)
class PageCodec:
    """The form of pages [2, P, D] whose keys and values have so many bits a number: 2, 4 or 8."""

    page_size: int
    head_dim: int
    key_bits: int
    value_bits: int

    @property
    def bits(self) -> tuple[int, int]:
        """Of keys and of values."""
        return self.key_bits, self.value_bits

    def rows(self, half: int) -> int:
        """R, rows of codes of keys (0) or values (1)."""
        return -(-self.page_size * self.bits[half] // 8)

    def start(self, half: int) -> int:
        """The byte where keys (0) or values (1) begin; of 2, where they end."""
        return UNIT_BYTES + sum((self.rows(i) + 2) * self.head_dim for i in range(half))

    @property
    def page_bytes(self) -> int:
        """Bytes of a page: whole words of 16."""
        return -(-self.start(2) // _ALIGNMENT) * _ALIGNMENT


def encode_pages(pages: Tensor, counts: Tensor | None, codec: PageCodec) -> Tensor:
    """The bytes [n, page_bytes] uint8 of pages [n, 2, P, D].

    counts: [n] tokens that each page holds, or None if all are full; slots behind them may hold
    anything and come back as something finite. A number x is off by at most half a step; a step is
    the range of its channel, and what its offset is rounded by, over the largest code, rounded up
    to a multiple of 1/255 of the largest step of the page. Waits for no device.
    """
    n, _, P, D = pages.shape
    held = torch.ones(n, P, 1, dtype=torch.bool, device=pages.device)
    if counts is not None:
        slots = torch.arange(P, device=pages.device)
        held = (slots < counts[:, None])[..., None]
    data = torch.zeros(n, codec.page_bytes, dtype=torch.uint8, device=pages.device)
    units = []
    for half, bits in enumerate(codec.bits):
        codes, offset, step, unit = _quantised(pages[:, half].float(), held, bits)
        units.append(unit)
        rows = codec.rows(half)
        parts = (*_packed(codes, rows, bits), offset.view(torch.uint8), step)
        start = codec.start(half)
        data[:, start : start + (rows + 2) * D] = torch.cat(parts, 1)
    data[:, :UNIT_BYTES] = torch.cat(units, 1).view(torch.uint8)
    return data


def decode_pages(data: Tensor, codec: PageCodec, dtype: torch.dtype) -> Tensor:
    """The pages [n, 2, P, D] of bytes [n, page_bytes] uint8."""
    P, D = codec.page_size, codec.head_dim
    units = data[:, :UNIT_BYTES].contiguous().view(torch.float32)
    pages = torch.empty(len(data), 2, P, D, dtype=dtype, device=data.device)
    for half, bits in enumerate(codec.bits):
        rows, start = codec.rows(half), codec.start(half)
        part = data[:, start : start + (rows + 2) * D].unflatten(1, (rows + 2, D))
        offset = part[:, rows].contiguous().view(torch.int8).float() * units[:, 2 * half, None]
        step = part[:, rows + 1].float() * units[:, 2 * half + 1, None]
        for first in range(0, P, rows):
            place = slice(first, min(first + rows, P))
            codes = part[:, : place.stop - first] >> (first // rows * bits) & (1 << bits) - 1
            pages[:, half, place] = codes.float().mul_(step[:, None]).add_(offset[:, None])
    return pages


def _quantised(x: Tensor, held: Tensor, bits: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Codes [n, P, D], offsets and steps [n, D] and their units [n, 2] of numbers x [n, P, D]."""
    most = (1 << bits) - 1
    least = torch.where(held, x, torch.inf).amin(1)
    largest = torch.where(held, x, -torch.inf).amax(1)
    is_empty = ~held.any(1)
    least, largest = least.masked_fill(is_empty, 0.0), largest.masked_fill(is_empty, 0.0)
    # products, not quotients by a number, which a GPU rounds in its own way: bytes are the same
    # wherever they are made
    unit = _unit(least.abs().amax(1, keepdim=True) * (1 / 127))
    offset = (least / unit).floor().clamp(-128, 127)
    least = offset * unit
    step = (largest - least) * (1 / most)
    step_unit = _unit(step.amax(1, keepdim=True) * (1 / 255))
    steps = (step / step_unit).ceil().clamp(0, 255)
    step = (steps * step_unit).unsqueeze(1)
    # a channel of equal numbers may have no range at all
    codes = ((x - least.unsqueeze(1)) / step.masked_fill(step == 0, 1.0)).round().clamp(0, most)
    codes = torch.where(held, codes, 0.0)
    units = torch.cat([unit, step_unit], 1)
    return codes.to(torch.uint8), offset.to(torch.int8), steps.to(torch.uint8), units


def _unit(x: Tensor) -> Tensor:
    return x.masked_fill(x == 0, 1.0)


def _packed(codes: Tensor, rows: int, bits: int) -> list[Tensor]:
    """Rows [n, D] of bytes."""
    n, P, D = codes.shape
    packed = codes.new_zeros(n, rows, D)
    for first in range(0, P, rows):
        part = codes[:, first : first + rows]
        packed[:, : part.shape[1]] |= part << (first // rows * bits)
    return list(packed.unbind(1))
