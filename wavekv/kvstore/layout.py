"""The shape of a page and the bytes it takes."""

from dataclasses import dataclass

import torch


@dataclass(frozen=True, slots=True)
class KVLayout:
    """A page holds the keys and values of `page_size` tokens of one KV head: [2, P, D]."""

    page_size: int
    head_dim: int
    dtype: torch.dtype

    @property
    def page_shape(self) -> tuple[int, int, int]:
        """(2, P, D): keys at 0, values at 1."""
        return 2, self.page_size, self.head_dim

    @property
    def page_bytes(self) -> int:
        """Bytes of one page."""
        return 2 * self.page_size * self.head_dim * self.dtype.itemsize
