"""Page statistics: what the device keeps of every page, enough to rank it and to estimate it, and
of many pages together, enough to say how values go with keys."""

from typing import NamedTuple

import torch
from torch import Tensor


class PageStatistics(NamedTuple):
    """First and second moments of the pages of R rows; zeros for an empty page."""

    mean: Tensor
    """[R, N, D] mean key."""
    variance: Tensor
    """[R, N] float32 population variance of the keys, mean over the dimensions; never negative."""
    value_mean: Tensor
    """[R, N, D] mean value."""


def page_statistics(
    keys: Tensor, values: Tensor, counts: Tensor, *, dtype: torch.dtype = torch.float32
) -> PageStatistics:
    """Statistics over the first `counts` tokens of each page.

    The arithmetic is float32 and the variance takes two passes, so a mean far larger than the
    spread costs no precision. Slots beyond the count have no influence, whatever they hold (NaN
    included). Nothing waits for the device.

    Args:
        keys: [R, N, P, D] any floating dtype.
        values: [R, N, P, D] any floating dtype.
        counts: [R, N] int32 or int64 valid tokens of each page, in [0, P]; values outside are
            clamped, since looking would wait for the device.
        dtype: of the means; the variance is float32, since float16 may not hold squares.

    Raises:
        ValueError: shapes that do not fit each other, or counts that are not integers.
    """
    _check(keys, values, counts)
    mean = _mean_over_page(keys, counts)
    variance = _mean_over_page((keys.float() - mean.unsqueeze(2)).square(), counts).mean(-1)
    value_mean = _mean_over_page(values, counts)
    return PageStatistics(mean.to(dtype), variance, value_mean.to(dtype))


def page_scatter(keys: Tensor, values: Tensor, counts: Tensor) -> Tensor:
    """Within-page scatter: how keys and values vary together inside pages, summed over pages.

    With k' and v' a token's key and value less the means of its page, the scatter is the sum over
    all tokens of k' k'^T (the within-class scatter of discriminant analysis) and of v' k'^T. It is
    what a least-squares fit of values to keys needs; scatters of disjoint pages add up.

    Args:
        keys, values, counts: as for `page_statistics`; slots beyond the count have no influence.

    Returns:
        [R, 2, D, D] float32: the scatter of the keys, and of values (rows) with keys (columns).

    Raises:
        ValueError: as `page_statistics`.

    Cost: O(N P D^2) a row.
    """
    _check(keys, values, counts)
    R, _, _, D = keys.shape
    live = _is_live(keys, counts)

    def residual(x: Tensor) -> Tensor:
        centred = x.float() - _mean_over_page(x, counts).unsqueeze(2)
        return torch.where(live, centred, 0).reshape(R, -1, D)

    k = residual(keys)
    return torch.stack([k.mT @ k, residual(values).mT @ k], dim=1)


def _is_live(x: Tensor, counts: Tensor) -> Tensor:
    """[R, N, P, 1] bool: slots of x [R, N, P, D] that hold a token."""
    return (torch.arange(x.shape[2], device=x.device) < counts.unsqueeze(-1)).unsqueeze(-1)


def _mean_over_page(x: Tensor, counts: Tensor) -> Tensor:
    """[R, N, D] float32 mean of x [R, N, P, D] over the tokens of each page; 0 for an empty one."""
    total = torch.where(_is_live(x, counts), x, 0).sum(2, dtype=torch.float32)
    return total / counts.clamp(1, x.shape[2]).unsqueeze(-1)


def _check(keys: Tensor, values: Tensor, counts: Tensor) -> None:
    if keys.ndim != 4 or values.shape != keys.shape:
        raise ValueError(
            "keys and values must both be [R, N, P, D], "
            f"got {tuple(keys.shape)} and {tuple(values.shape)}"
        )
    if counts.shape != keys.shape[:2] or counts.dtype not in (torch.int32, torch.int64):
        raise ValueError(
            f"counts must be int32 or int64 {tuple(keys.shape[:2])}, "
            f"got {counts.dtype} {tuple(counts.shape)}"
        )
