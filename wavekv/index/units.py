"""Statistics for attention, in units: powers of two that bring keys and values of any size into the
range of step bytes, which reaches from 1e-6 to 3757 (`wavekv.kernels.planes`)."""

from __future__ import annotations

import torch
from torch import Tensor

from wavekv.index.levels import index_of_pages
from wavekv.index.params import BLOCK_PAGES
from wavekv.index.scatter import scatter_by_span
from wavekv.kernels.means import two_to

_LARGEST = 4
"""The largest component of a first segment is below 2^4 units, and at least half of that: what
comes later has room above it, and small residuals have room below."""


def units_of(tokens: Tensor) -> Tensor:
    """[H, 2] float32: the units of the keys and of the values [H, 2, S, D] of a first segment."""
    _, exponent = torch.frexp(tokens.float().abs().amax((2, 3)))
    return two_to(exponent - _LARGEST)


def summary_of(pages: Tensor, units: Tensor) -> dict[str, Tensor]:
    """The parts of the `PageIndex` of full pages [H, n, 2, P, D], whole blocks."""
    keys, values, counts = _in_units(pages, units)
    return index_of_pages(keys, values, counts, BLOCK_PAGES)._asdict()


def scatter_of(pages: Tensor, units: Tensor, first_page: int, span_pages: int) -> Tensor:
    """The scatter [1, H, m, 2, D, D] of full pages [H, n, 2, P, D], for each span they touch."""
    paged = _in_units(pages, units)
    return scatter_by_span(*paged, first_page=first_page, span_pages=span_pages)[None]


def _in_units(pages: Tensor, units: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Keys and values [H, n, P, D] float32 of full pages [H, n, 2, P, D], and counts [H, n]."""
    keys, values = (pages.float() / units[:, None, :, None, None]).unbind(2)
    counts = torch.full(keys.shape[:2], keys.shape[2], dtype=torch.int32, device=keys.device)
    return keys, values, counts
