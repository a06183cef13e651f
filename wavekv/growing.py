"""A tensor that grows along one dimension without being copied at each append."""

from __future__ import annotations

import math

import torch
from torch import Tensor

SHRINK_AT = 8
"""Capacity over length at which dropping rows also frees memory."""


class GrowingTensor:
    """Rows appended along `dim` into a buffer whose capacity doubles: amortised O(1) an element."""

    def __init__(self, empty: Tensor, dim: int) -> None:
        """`empty` fixes shape, dtype and device; its size along `dim` is 0."""
        self.dim = dim
        self._buffer = empty
        self._length = 0

    @classmethod
    def holding(cls, rows: Tensor, dim: int) -> GrowingTensor:
        """One that holds `rows`, in place."""
        held = cls(rows, dim)
        held._length = rows.shape[dim]
        return held

    def __len__(self) -> int:
        return self._length

    @property
    def view(self) -> Tensor:
        """The rows held: a view, valid until the next change."""
        return self._buffer.narrow(self.dim, 0, self._length)

    @property
    def buffer(self) -> Tensor:
        """The rows held and, behind them, room for more: valid until the next change."""
        return self._buffer

    @property
    def nbytes(self) -> int:
        """Bytes of the rows held."""
        return self.view.numel() * self._buffer.element_size()

    @property
    def row_nbytes(self) -> int:
        """Bytes of one row: of all that has the same place along `dim`."""
        sizes = (size for at, size in enumerate(self._buffer.shape) if at != self.dim)
        return math.prod(sizes) * self._buffer.element_size()

    def reserve(self, length: int) -> None:
        """Make room for so many rows: until there are as many, `append` cannot fail."""
        if length > self._buffer.shape[self.dim]:
            self._grow(max(length, 2 * self._length))

    def append(self, rows: Tensor) -> None:
        """Copy `rows` behind the last."""
        end = self._length + rows.shape[self.dim]
        if end > self._buffer.shape[self.dim]:
            self.reserve(end)
        self._buffer.narrow(self.dim, self._length, end - self._length).copy_(rows)
        self._length = end

    def fit(self, capacity: int) -> None:
        """Give the buffer exactly this capacity, which is at least the length."""
        if self._buffer.shape[self.dim] != capacity:
            self._grow(capacity)

    def claim(self, count: int) -> None:
        """Take in `count` rows that were written into the buffer behind the last."""
        assert self._length + count <= self._buffer.shape[self.dim]
        self._length += count

    def insert_front(self, count: int) -> None:
        """Put `count` rows of zeros before the first."""
        kept = self.view
        shape = list(kept.shape)
        shape[self.dim] = count
        self._buffer = torch.cat([kept.new_zeros(shape), kept], self.dim)
        self._length = self._buffer.shape[self.dim]

    def truncate(self, length: int) -> None:
        """Forget all rows from `length` on."""
        self._length = min(self._length, length)

    def drop(self, start: int, count: int) -> None:
        """Forget `count` rows from `start` on; later rows move up."""
        kept = self.view.narrow(self.dim, start + count, self._length - start - count).clone()
        length = self._length - count
        if self._buffer.shape[self.dim] > SHRINK_AT * length:
            self._buffer = torch.cat([self.view.narrow(self.dim, 0, start), kept], self.dim)
        else:
            self._buffer.narrow(self.dim, start, length - start).copy_(kept)
        self._length = length

    def select(self, index: Tensor) -> None:
        """Keep the sequences `index` [B'] of the first dimension (not `dim`), in that order."""
        self._buffer = self.view.index_select(0, index.to(self._buffer.device))

    def clone(self) -> GrowingTensor:
        """An independent copy."""
        copy = GrowingTensor(self.view.clone(), self.dim)
        copy._length = self._length
        return copy

    def _grow(self, capacity: int) -> None:
        shape = list(self._buffer.shape)
        shape[self.dim] = capacity
        grown = torch.empty(shape, dtype=self._buffer.dtype, device=self._buffer.device)
        grown.narrow(self.dim, 0, self._length).copy_(self.view)
        self._buffer = grown
