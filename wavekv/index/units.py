"""Units: powers of two that bring keys and values of any size into the range of step bytes.

Statistics for attention are kept in units of the first segment of each head, since a step byte
reaches from 1e-6 to 3757 (`wavekv.kernels.planes`).
"""

from __future__ import annotations

import torch
from torch import Tensor

from wavekv.kernels.means import two_to

_LARGEST = 4
"""The largest component of the first segment is below 2^4 units, and at least half of that: what
comes later has room above it, and small residuals have room below."""


def units_of(tokens: Tensor) -> Tensor:
    """[H, 2] float32: the units of the keys and of the values [H, 2, S, D] of a first segment."""
    _, exponent = torch.frexp(tokens.float().abs().amax((2, 3)))
    return two_to(exponent - _LARGEST)


def in_units(pages: Tensor, units: Tensor) -> tuple[Tensor, Tensor]:
    """Keys and values [H, n, P, D] float32 of pages [H, n, 2, P, D], in units."""
    keys, values = (pages.float() / units[:, None, :, None, None]).unbind(2)
    return keys, values
