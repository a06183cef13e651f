"""Four-bit key codes: enough of every key to find the pages whose means hide a good one."""

from typing import NamedTuple

import torch
from torch import Tensor

_LEVELS = 7
"""Codes run from -7 to 7, stored with 8 added."""


class KeyCodes(NamedTuple):
    """Quantised residuals of the keys of R rows to the means of their pages."""

    codes: Tensor
    """[R, N, P, D / 2] uint8: dimension d in the low, d + D / 2 in the high four bits."""
    scale: Tensor
    """[R, N, P] what one step of a code is worth, for each key."""


def encode_keys(keys: Tensor, mean: Tensor, counts: Tensor, *, dtype: torch.dtype) -> KeyCodes:
    """Quantise keys to their page's mean plus a four-bit residual; a key's largest residual sets
    its scale. Training-free. The error of a component is at most half a step: 1/14 of the largest.

    Args:
        keys: [R, N, P, D] any floating dtype, D even; slots beyond the count may hold anything.
        mean: [R, N, D] as from `page_statistics`, in the dtype it is stored in.
        counts: [R, N] valid tokens of each page.
        dtype: of the scales.

    Raises:
        ValueError: an odd D.
    """
    D, P = keys.shape[-1], keys.shape[2]
    if D % 2:
        raise ValueError(f"key codes need an even head_dim, got {D}")
    live = torch.arange(P, device=keys.device) < counts.unsqueeze(-1)
    residual = torch.where(live.unsqueeze(-1), keys.float() - mean.float().unsqueeze(2), 0.0)
    scale = (residual.abs().amax(-1) / _LEVELS).to(dtype)
    # a scale that rounded down must not push a code beyond the last level
    step = scale.float().clamp_min(torch.finfo(torch.float32).tiny).unsqueeze(-1)
    codes = ((residual / step).round().clamp(-_LEVELS, _LEVELS) + 8).to(torch.uint8)
    return KeyCodes(codes[..., : D // 2] | (codes[..., D // 2 :] << 4), scale)
