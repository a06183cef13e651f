"""A dense copy, on the device, of pages of one layer while a prompt is prefilled: later chunks
attend to it in one pass instead of bringing the pages back from the host."""

from __future__ import annotations

from torch import Tensor


class ResidentPages:
    """Keys and values of full pages, in the order in which they came. Written by a page builder,
    segment by segment, behind what attention reads; `claim` makes it visible."""

    def __init__(self, like: Tensor, num_tokens: int) -> None:
        """Room for `num_tokens` of each KV head. like: [B, Hkv, 0, D]."""
        B, H, _, D = like.shape
        self._states = like.new_empty(2, B, H, num_tokens, D)
        self._length = self._written = 0
        self._pages: dict[int, int] = {}

    @property
    def num_tokens(self) -> int:
        """Tokens that attention may read."""
        return self._length

    @property
    def keys(self) -> Tensor:
        """[B, Hkv, num_tokens, D], a view."""
        return self._states[0, :, :, : self._length]

    @property
    def values(self) -> Tensor:
        """[B, Hkv, num_tokens, D], a view."""
        return self._states[1, :, :, : self._length]

    def pages_from(self, first_page: int) -> int:
        """How many pages are here of the segment that begins at `first_page`: its first ones."""
        return self._pages.get(first_page, 0)

    def put(self, keys: Tensor, values: Tensor) -> int:
        """Write as many pages as there is room for. keys, values: [B, Hkv, n, P, D] exactly as they
        are stored, every slot a token. Returns how many."""
        P = keys.shape[3]
        count = min(keys.shape[2], (self._states.shape[3] - self._written) // P)
        room = self._states[:, :, :, self._written : self._written + count * P]
        for half, x in zip(room, (keys, values), strict=True):
            half.copy_(x[:, :, :count].flatten(2, 3))
        self._written += count * P
        return count

    def claim(self, first_page: int, num_pages: int, page_size: int) -> None:
        """Let attention read pages that were put first; they begin the segment at `first_page`."""
        self._pages[first_page] = num_pages
        self._length += num_pages * page_size

    def withdraw(self) -> None:
        """Forget what was put and not claimed."""
        self._written = self._length
