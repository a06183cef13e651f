"""The index of the pages of a layer, which grows by whole blocks."""

from __future__ import annotations

from torch import Tensor

from wavekv.growing import GrowingTensor
from wavekv.kernels.page_index import PageIndex, empty_index, pages_of_parts


class GrowingIndex:
    """What `GrowingTensor` is for a `PageIndex` of [B, Hkv] rows, grown along N."""

    def __init__(self, like: Tensor, page_size: int, block_pages: int) -> None:
        """like: [B, Hkv, 0, D] fixes shape and device."""
        self.block_pages = block_pages
        """K"""
        empty = empty_index(like, page_size, block_pages)
        self.parts = tuple(GrowingTensor(part, dim=2) for part in empty)
        """In the order of `PageIndex`."""

    def __len__(self) -> int:
        """Pages N."""
        return len(self.parts[0])

    @property
    def view(self) -> PageIndex:
        """The pages held: views, valid until the next change."""
        return PageIndex._make(part.view for part in self.parts)

    @property
    def buffer(self) -> PageIndex:
        """The pages held and, behind them, room for more: valid until the next change."""
        return PageIndex._make(part.buffer for part in self.parts)

    @property
    def nbytes(self) -> int:
        """Bytes of the pages held."""
        return sum(part.nbytes for part in self.parts)

    def nbytes_of(self, *names: str) -> int:
        """Bytes of some parts, by their names in `PageIndex`."""
        named = zip(PageIndex._fields, self.parts, strict=True)
        return sum(part.nbytes for name, part in named if name in names)

    def append(self, pages: PageIndex) -> None:
        """Put pages, whole blocks, behind the last."""
        for part, rows in zip(self.parts, pages, strict=True):
            part.append(rows)

    def reserve(self, num_pages: int) -> None:
        """Give the buffers room for exactly so many pages, or what they have if that is more."""
        for part, every in self._with_every():
            part.fit(max(num_pages // every, part.buffer.shape[2]))

    def fit(self, capacity: int) -> None:
        """Give the buffers room for exactly so many pages, whole blocks and at least those held."""
        for part, every in self._with_every():
            part.fit(capacity // every)

    def claim(self, count: int) -> None:
        """Take in `count` pages, whole blocks, that were written into the buffers."""
        for part, every in self._with_every():
            part.claim(count // every)

    def truncate(self, num_pages: int) -> None:
        """Forget all pages from `num_pages`, where a block begins, on."""
        for part, every in self._with_every():
            part.truncate(num_pages // every)

    def select(self, index: Tensor) -> None:
        """Keep the sequences `index` [B'] of the first dimension, in that order."""
        for part in self.parts:
            part.select(index)

    def clone(self) -> GrowingIndex:
        """An independent copy."""
        copy = object.__new__(GrowingIndex)
        copy.block_pages = self.block_pages
        copy.parts = tuple(part.clone() for part in self.parts)
        return copy

    def _with_every(self) -> zip[tuple[GrowingTensor, int]]:
        return zip(self.parts, pages_of_parts(self.block_pages), strict=True)
