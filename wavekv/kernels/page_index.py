"""The index of pages in two levels: blocks of pages in a row, and pages as residuals to them.

A block has a mean key and a mean value. A page keeps what its own differ by, its keys what they
differ by from the page's mean key *as stored*. Residuals are mixed (`wavekv.kernels.mixing`) and
have few bits a dimension (`wavekv.kernels.planes`); whatever is derived from a stored number is
derived from what was stored, so every reader of the index sees the same numbers.

Letters as in `wavekv.kernels.reference`; besides, K pages in a block and R rows (of any outer
dimensions), N a multiple of K.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from wavekv.kernels.means import KEY_BITS, VALUE_BITS, pack_rows, unpack_rows
from wavekv.kernels.mixing import mixing_on
from wavekv.kernels.planes import (
    centred,
    num_words,
    pack_nibbles,
    pack_plane,
    quantise,
    step_bytes,
    steps_of,
    unpack_nibbles,
    unpack_plane,
)

MEAN_BITS = 2
"""Of the residual of a page's mean key."""
PAGE_VALUE_BITS = 4
"""Of the residual of a page's mean value."""
HIGH_BITS, LOW_BITS = 2, 1
"""Of the planes of a key's code."""


class PageIndex(NamedTuple):
    """What ranks and estimates the pages of R rows, but for the scatter of their spans."""

    counts: Tensor
    """[R, N] uint8 tokens of each page."""
    variance: Tensor
    """[R, N] uint8: variance of the keys, mean over the dimensions, as a step byte."""
    mean: Tensor
    """[R, N / K, D / 16, K, 4] uint8: the mean keys of each block's pages, a plane of 2 bits."""
    mean_step: Tensor
    """[R, N] uint8"""
    value: Tensor
    """[R, N, D / 2] uint8: mean values, 4 bits; half an odd D is rounded up."""
    value_step: Tensor
    """[R, N] uint8"""
    high: Tensor
    """[R, N, D / 16, P, 4] uint8: the high plane of the keys of each page, 2 bits."""
    low: Tensor
    """[R, N, D / 32, P, 4] uint8: the low plane, 1 bit."""
    key_step: Tensor
    """[R, N, P] uint8"""
    block_mean: Tensor
    """[R, N / K, D] int8 (`wavekv.kernels.means`)"""
    block_mean_scale: Tensor
    """[R, N / K] float32"""
    block_value: Tensor
    """[R, N / K, D / 2] uint8, 4 bits"""
    block_value_scale: Tensor
    """[R, N / K] float32"""

    def in_pages(self, first: int, last: int) -> PageIndex:
        """The pages from `first` up to `last`, both where a block begins: views."""
        K, dim = self.block_pages, self.counts.dim() - 1
        return PageIndex._make(
            part.narrow(dim, first // every, (last - first) // every)
            for part, every in zip(self, pages_of_parts(K), strict=True)
        )

    @property
    def block_pages(self) -> int:
        """K."""
        return self.mean.shape[-2]


_NOT_BYTES = {
    "block_mean": torch.int8,
    "block_mean_scale": torch.float32,
    "block_value_scale": torch.float32,
}
DTYPES = tuple(_NOT_BYTES.get(name, torch.uint8) for name in PageIndex._fields)
"""Of each part of a `PageIndex`."""


def pages_of_parts(block_pages: int) -> tuple[int, ...]:
    """For each part of a `PageIndex`, how many pages share one entry."""
    of_blocks = {"mean", *(name for name in PageIndex._fields if name.startswith("block_"))}
    return tuple(block_pages if name in of_blocks else 1 for name in PageIndex._fields)


def empty_index(like: Tensor, page_size: int, block_pages: int) -> PageIndex:
    """No pages yet. like: [B, Hkv, 0, D] fixes batch, heads, dimension and device."""
    D, K, P = like.shape[-1], block_pages, page_size

    def new(*size: int, dtype: torch.dtype = torch.uint8) -> Tensor:
        return like.new_empty(*like.shape[:-2], 0, *size, dtype=dtype)

    return PageIndex(
        counts=new(),
        variance=new(),
        mean=new(num_words(D, MEAN_BITS), K, 4),
        mean_step=new(),
        value=new(-(-D // 2)),
        value_step=new(),
        high=new(num_words(D, HIGH_BITS), P, 4),
        low=new(num_words(D, LOW_BITS), P, 4),
        key_step=new(P),
        block_mean=new(D, dtype=torch.int8),
        block_mean_scale=new(dtype=torch.float32),
        block_value=new(-(-D // 2)),
        block_value_scale=new(dtype=torch.float32),
    )


def encode_index(
    keys: Tensor,
    counts: Tensor,
    mean: Tensor,
    variance: Tensor,
    value_mean: Tensor,
    block_pages: int,
) -> PageIndex:
    """The index of pages with these exact statistics. Nothing waits for the device.

    keys: [R, N, P, D], slots beyond the count may hold anything. counts: [R, N] int32. mean,
    value_mean: [R, N, D] float32, finite. variance: [R, N] float32. Cost: O(N P D^2) a row, for the
    mixing.
    """
    P, D = keys.shape[-2:]
    mix = mixing_on(keys.device, D)
    block_mean = pack_rows(_block_means(mean, counts, block_pages), KEY_BITS)
    block_value = pack_rows(_block_means(value_mean, counts, block_pages), VALUE_BITS)
    is_empty = (counts <= 0).unsqueeze(-1)

    def less_block(rows: Tensor, block: tuple[Tensor, Tensor]) -> Tensor:
        own = unpack_rows(*block, D, torch.float32).repeat_interleave(block_pages, 1)
        return (rows - own).masked_fill(is_empty, 0.0) @ mix

    mean_codes, mean_step = quantise(less_block(mean, block_mean), MEAN_BITS)
    value_codes, value_step = quantise(less_block(value_mean, block_value), PAGE_VALUE_BITS)
    stored = centred(mean_codes, MEAN_BITS) * steps_of(mean_step).unsqueeze(-1)
    own = unpack_rows(*block_mean, D, torch.float32).repeat_interleave(block_pages, 1)
    live = torch.arange(P, device=keys.device) < counts.unsqueeze(-1)
    residual = (keys.float() - own.unsqueeze(2)).masked_fill_(~live.unsqueeze(-1), 0.0) @ mix
    residual -= stored.unsqueeze(2)
    residual.masked_fill_(~live.unsqueeze(-1), 0.0)
    key_codes, key_step = quantise(residual, HIGH_BITS, LOW_BITS)
    return PageIndex(
        counts=counts.to(torch.uint8),
        variance=step_bytes(variance),
        mean=pack_plane(mean_codes.unflatten(1, (-1, block_pages)), MEAN_BITS),
        mean_step=mean_step,
        value=pack_nibbles(value_codes),
        value_step=value_step,
        high=pack_plane(key_codes >> LOW_BITS, HIGH_BITS),
        low=pack_plane(key_codes & (2**LOW_BITS - 1), LOW_BITS),
        key_step=key_step,
        block_mean=block_mean[0],
        block_mean_scale=block_mean[1],
        block_value=block_value[0],
        block_value_scale=block_value[1],
    )


def mean_codes(index: PageIndex, dim: int) -> Tensor:
    """[R, N, D] float32: the mixed residuals of the mean keys, in steps of each page."""
    codes = unpack_plane(index.mean, MEAN_BITS, dim).flatten(-3, -2)
    return centred(codes, MEAN_BITS)


def value_codes(index: PageIndex) -> Tensor:
    """[R, N, D] float32: the mixed residuals of the mean values, in steps of each page."""
    dim = index.block_mean.shape[-1]
    return centred(unpack_nibbles(index.value, dim), PAGE_VALUE_BITS)


def block_means(index: PageIndex) -> Tensor:
    """[R, N / K, D] float32 mean keys of blocks."""
    dim = index.block_mean.shape[-1]
    return unpack_rows(index.block_mean, index.block_mean_scale, dim, torch.float32)


def block_values(index: PageIndex) -> Tensor:
    """[R, N / K, D] float32 mean values of blocks."""
    dim = index.block_mean.shape[-1]
    return unpack_rows(index.block_value, index.block_value_scale, dim, torch.float32)


def mean_keys(index: PageIndex) -> Tensor:
    """[R, N, D] float32: the mean keys of pages as stored."""
    own = block_means(index).repeat_interleave(index.block_pages, -2)
    D = own.shape[-1]
    residual = mean_codes(index, D) * steps_of(index.mean_step).unsqueeze(-1)
    return own + residual @ mixing_on(own.device, D).mT


def mean_values(index: PageIndex) -> Tensor:
    """[R, N, D] float32: the mean values of pages as stored."""
    own = block_values(index).repeat_interleave(index.block_pages, -2)
    residual = value_codes(index) * steps_of(index.value_step).unsqueeze(-1)
    return own + residual @ mixing_on(own.device, own.shape[-1]).mT


def _block_means(rows: Tensor, counts: Tensor, block_pages: int) -> Tensor:
    """[R, N / K, D]: the mean over the tokens of each block, of rows [R, N, D] that are means."""
    weights = counts.float().unflatten(1, (-1, block_pages)).unsqueeze(2)
    total = (weights @ rows.float().unflatten(1, (-1, block_pages))).squeeze(2)
    means: Tensor = total / weights.sum(-1).clamp_min(1)
    return means
