"""The shape of a page and the bytes it takes."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from wavekv.kernels.page_codec import PageCodec, decode_pages, encode_pages

CODEC_BITS = {"int8": (8, 8), "int4": (4, 4), "int4-int2": (4, 2)}
"""Bits of keys and of values, for each `host_dtype` other than "model"."""


@dataclass(frozen=True, slots=True)
class KVLayout:
    """A page holds the keys and values of `page_size` tokens of one KV head: [2, P, D]."""

    page_size: int
    head_dim: int
    dtype: torch.dtype
    """Of the model."""
    host_dtype: str = "model"
    """How pages are stored: as they are ("model"), or as one of `CODEC_BITS`."""

    @property
    def codec(self) -> PageCodec | None:
        """The form of stored pages, if it is not that of the model."""
        if self.host_dtype == "model":
            return None
        return PageCodec(self.page_size, self.head_dim, *CODEC_BITS[self.host_dtype])

    @property
    def page_shape(self) -> tuple[int, int, int]:
        """(2, P, D): keys at 0, values at 1."""
        return 2, self.page_size, self.head_dim

    @property
    def dense_bytes(self) -> int:
        """Bytes of one page in the model's dtype."""
        return 2 * self.page_size * self.head_dim * self.dtype.itemsize

    @property
    def page_bytes(self) -> int:
        """Bytes of one page as it is stored."""
        return self.dense_bytes if self.codec is None else self.codec.page_bytes

    @property
    def stored_shape(self) -> tuple[int, ...]:
        """Of one page in memory."""
        return self.page_shape if self.codec is None else (self.codec.page_bytes,)

    @property
    def stored_dtype(self) -> torch.dtype:
        """Of `stored_shape`."""
        return self.dtype if self.codec is None else torch.uint8

    def encode(self, pages: Tensor, counts: Tensor | None = None) -> Tensor:
        """Pages [n, 2, P, D] as they are stored. counts: [n] tokens of each, None for full ones."""
        return pages if self.codec is None else encode_pages(pages, counts, self.codec)

    def decode(self, stored: Tensor) -> Tensor:
        """The pages [n, 2, P, D] that are stored so."""
        return stored if self.codec is None else decode_pages(stored, self.codec, self.dtype)
