"""Rows of means that grow: given and shown as floats, kept as small integers."""

from __future__ import annotations

from torch import Tensor

from wavekv.growing import GrowingTensor
from wavekv.kernels.means import pack_rows, unpack_rows


class PackedRows:
    """What `GrowingTensor` is for rows [B, Hkv, N, D], grown along N. Rows come from
    `wavekv.kernels.means.round_rows`, and are the same when they are shown."""

    def __init__(self, like: Tensor, bits: int) -> None:
        """like: [B, Hkv, 0, D] fixes shape, dtype and device."""
        self._dim, self._dtype, self._bits = like.shape[-1], like.dtype, bits
        codes, scale = pack_rows(like, bits)
        self.parts = GrowingTensor(codes, dim=2), GrowingTensor(scale, dim=2)
        """Integers and scales, as `pack_rows` gives them."""

    def __len__(self) -> int:
        return len(self.parts[1])

    @property
    def view(self) -> Tensor:
        """The rows held: a copy. Cost: O(B Hkv N D)."""
        codes, scale = (part.view for part in self.parts)
        return unpack_rows(codes, scale, self._dim, self._dtype)

    @property
    def nbytes(self) -> int:
        """Bytes of the rows held."""
        return sum(part.nbytes for part in self.parts)

    def append(self, rows: Tensor) -> None:
        """Put `rows` behind the last."""
        for part, packed in zip(self.parts, pack_rows(rows, self._bits), strict=True):
            part.append(packed)

    def truncate(self, length: int) -> None:
        """Forget all rows from `length` on."""
        for part in self.parts:
            part.truncate(length)

    def select(self, index: Tensor) -> None:
        """Keep the sequences `index` [B'] of the first dimension, in that order."""
        for part in self.parts:
            part.select(index)

    def clone(self) -> PackedRows:
        """An independent copy."""
        copy = object.__new__(PackedRows)
        copy._dim, copy._dtype, copy._bits = self._dim, self._dtype, self._bits
        codes, scale = self.parts
        copy.parts = codes.clone(), scale.clone()
        return copy


def growing_rows(like: Tensor, bits: int, *, is_packed: bool) -> GrowingTensor | PackedRows:
    """Rows that are packed, or plain ones."""
    return PackedRows(like, bits) if is_packed else GrowingTensor(like, dim=2)
