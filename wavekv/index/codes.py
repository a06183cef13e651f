"""Codes: four bits a dimension of every key, eight of every page's mean, laid out for fast scans.

Both lie as the kernels read them: four dimensions of one key (or page), then the same of the next,
so that a vector register holds four dimensions of several keys. See `wavekv.kernels.cpu_codes`.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from wavekv.index.params import BLOCK_PAGES

_LEVELS = 7
"""Key codes run from -7 to 7, stored with 8 added."""
_SCALE_LEVELS = 255
_MEAN_LEVELS = 127
"""Mean codes run from -127 to 127, stored with 128 added."""


class KeyCodes(NamedTuple):
    """Quantised residuals of the keys of R rows to the means of their pages.

    Key p of a page is its mean plus `page_scale * scale[p] / 255 * (code - 8)`.
    """

    codes: Tensor
    """[R, N, W / 8, P, 4] uint8: byte [g, p, i] holds dimension 4 g + i in its low and dimension
    W / 2 + 4 g + i in its high four bits, W the dimensions D rounded up to a multiple of 8."""
    scale: Tensor
    """[R, N, P] uint8: what one step of a code is worth for each key, as a share of 255."""
    page_scale: Tensor
    """[R, N] float32: the largest step of a page."""


class MeanCodes(NamedTuple):
    """Quantised page means of R rows: `scale * (code - 128)`."""

    codes: Tensor
    """[R, N / 16, W / 4, 16, 4] uint8: byte [g, n, i] holds dimension 4 g + i of page n of a block
    of 16, W the dimensions D rounded up to a multiple of 8."""
    scale: Tensor
    """[R, N] float32, of each page."""


def encode_keys(keys: Tensor, mean: Tensor, counts: Tensor) -> KeyCodes:
    """Quantise keys to their page's mean plus a four-bit residual; a key's largest residual sets
    its scale. Training-free. The error of a component is at most half a step, 1/14 of the key's
    largest residual, plus 1/510 of the largest of its page.

    Args:
        keys: [R, N, P, D] any floating dtype; slots beyond the count may hold anything.
        mean: [R, N, D] as from `page_statistics`, in the dtype it is stored in.
        counts: [R, N] valid tokens of each page.
    """
    R, N, P, D = keys.shape
    live = torch.arange(P, device=keys.device) < counts.unsqueeze(-1)
    residual = torch.where(live.unsqueeze(-1), keys.float() - mean.float().unsqueeze(2), 0.0)
    residual = torch.nn.functional.pad(residual, (0, -D % 8))
    step = residual.abs().amax(-1) / _LEVELS
    page_scale = step.amax(-1)
    # rounded up: a scale that shrank would push codes beyond the last level
    tiny = torch.finfo(torch.float32).tiny
    share = (step * _SCALE_LEVELS / page_scale.clamp_min(tiny).unsqueeze(-1)).ceil()
    scale = share.clamp(0, _SCALE_LEVELS).to(torch.uint8)
    step = page_scale.unsqueeze(-1) * scale / _SCALE_LEVELS
    levels = (residual / step.clamp_min(tiny).unsqueeze(-1)).round().clamp(-_LEVELS, _LEVELS)
    codes = (levels + 8).to(torch.uint8)
    # [R, N, P, 2, W / 8, 4] -> [R, N, 2, W / 8, P, 4]
    halves = codes.view(R, N, P, 2, -1, 4).permute(0, 1, 3, 4, 2, 5)
    packed = halves[:, :, 0] | (halves[:, :, 1] << 4)
    return KeyCodes(packed.contiguous(), scale, page_scale)


def decode_keys(codes: KeyCodes) -> Tensor:
    """[R, N, P, W] float32: the residuals that the codes stand for."""
    halves = torch.stack([codes.codes & 15, codes.codes >> 4], 2).float() - 8
    # [R, N, 2, W / 8, P, 4] -> [R, N, P, 2, W / 8, 4]
    levels = halves.permute(0, 1, 4, 2, 3, 5).flatten(3)
    step = codes.page_scale.unsqueeze(-1) * codes.scale / _SCALE_LEVELS
    return levels * step.unsqueeze(-1)


def encode_means(mean: Tensor) -> MeanCodes:
    """Quantise page means, each by its largest component: an error of at most 1/254 of that.

    Args:
        mean: [R, N, D] finite floats, N a multiple of 16.
    """
    R, N, D = mean.shape
    mean = torch.nn.functional.pad(mean.float(), (0, -D % 8))
    scale = mean.abs().amax(-1) / _MEAN_LEVELS
    step = scale.clamp_min(torch.finfo(torch.float32).tiny).unsqueeze(-1)
    codes = ((mean / step).round().clamp(-_MEAN_LEVELS, _MEAN_LEVELS) + 128).to(torch.uint8)
    blocks = codes.view(R, N // BLOCK_PAGES, BLOCK_PAGES, -1, 4).transpose(2, 3)
    return MeanCodes(blocks.contiguous(), scale)


def decode_means(codes: MeanCodes) -> Tensor:
    """[R, N, W] float32: the means that the codes stand for."""
    levels = codes.codes.transpose(2, 3).flatten(3).flatten(1, 2).float() - 128
    return levels * codes.scale.unsqueeze(-1)
