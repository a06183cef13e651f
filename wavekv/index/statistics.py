"""Page statistics: what the device keeps of every page, enough to rank it and to estimate it."""

from typing import NamedTuple

import torch
from torch import Tensor


class PageStatistics(NamedTuple):
    """First and second moments of the pages of R rows; zeros for an empty page."""

    mean: Tensor
    """[R, N, D] mean key."""
    variance: Tensor
    """[R, N, D] population variance of the keys, per dimension; never negative."""
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
        dtype: of the result.

    Raises:
        ValueError: shapes that do not fit each other, or counts that are not integers.
    """
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
    P = keys.shape[2]
    # [R, N, P, 1]
    live = (torch.arange(P, device=keys.device) < counts.unsqueeze(-1)).unsqueeze(-1)
    num = counts.clamp(1, P).unsqueeze(-1)

    def mean_over_page(x: Tensor) -> Tensor:
        return torch.where(live, x, 0).sum(2, dtype=torch.float32) / num

    mean = mean_over_page(keys)
    variance = mean_over_page((keys.float() - mean.unsqueeze(2)).square())
    return PageStatistics(mean.to(dtype), variance.to(dtype), mean_over_page(values).to(dtype))
