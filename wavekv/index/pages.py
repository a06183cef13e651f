"""The pages of an index: what it keeps of every key, and building them for one segment."""

from __future__ import annotations

import torch
from torch import Tensor

from wavekv.growing import GrowingTensor
from wavekv.index.clustering import balanced_pages
from wavekv.index.codec import KeyCodec
from wavekv.index.codes import decode_means, encode_keys, encode_means
from wavekv.index.params import BLOCK_PAGES
from wavekv.kernels.page_index import PageIndex, empty_index, pages_of_parts

Parts = dict[str, Tensor]
"""Tensors [H, N, ...] by name, all of the same pages."""


def empty_pages(like: Tensor, page_size: int, *, has_values: bool) -> Parts:
    """Of no page what `cluster` returns. like: [H, 0, D] keys, for device and dtype."""
    H, _, D = like.shape
    parts = {
        # keys, then values, as they came
        "pages": like.new_empty(H, 0, 1 + has_values, page_size, D),
        "ids": like.new_empty(H, 0, page_size, dtype=torch.int32),
    }
    if has_values:
        parts |= empty_index(like, page_size, BLOCK_PAGES)._asdict()
    return parts


def cluster(
    keys: Tensor,
    values: Tensor | None,
    turn: Tensor | None,
    page_size: int,
    *,
    refine: bool,
    start: int,
) -> Parts:
    """The pages of one segment: keys [H, S, D] with ids from `start` on, and their values.

    turn: [H, D, D], the map to the space to cluster in, or None. Cost: see `balanced_pages`.
    """
    H, _, D = keys.shape
    near = keys if turn is None else torch.bmm(keys.float(), turn)
    order = balanced_pages(near, page_size, refine=refine)
    rows = order[..., None].expand(-1, -1, D)
    given = [keys] if values is None else [keys, values]
    pages = torch.stack([x.gather(1, rows).view(H, -1, page_size, D) for x in given], 2)
    return {"pages": pages, "ids": (order + start).to(torch.int32).view(H, -1, page_size)}


def empty_codes(like: Tensor, page_size: int, code_dims: int) -> Parts:
    """Of no page what `encode` returns. like: [H, 0, D] keys."""
    H, _, D = like.shape

    def empty(*shape: int, dtype: torch.dtype) -> Tensor:
        return like.new_empty(H, 0, *shape, dtype=dtype)

    return {
        # of z, see `MeanCodes`: a row is a block of pages
        "mean_codes": empty(-(-D // 8) * 2, BLOCK_PAGES, 4, dtype=torch.uint8),
        "mean_scale": empty(dtype=torch.float32),
        # deviation of z from its page's mean, in any one direction
        "spread": empty(dtype=torch.float32),
        # of z, see `KeyCodes`
        "codes": empty(code_dims // 8, page_size, 4, dtype=torch.uint8),
        "code_scale": empty(page_size, dtype=torch.uint8),
        "page_scale": empty(dtype=torch.float32),
    }


def encode(pages: Tensor, codec: KeyCodec) -> Parts:
    """The codes of pages of keys [H, n, P, D]. Cost: O(n P D^2) a head."""
    H, n, P, D = pages.shape
    z = codec.keys(pages)
    mean = z.mean(2)
    mean_codes = encode_means(mean)
    W = min(codec.code_dims, D)
    counts = torch.full((H, n), P, device=pages.device)
    codes = encode_keys(z[..., :W], decode_means(mean_codes)[..., :W], counts)
    return {
        "mean_codes": mean_codes.codes,
        "mean_scale": mean_codes.scale,
        "spread": (z - mean.unsqueeze(2)).square().mean((2, 3)).sqrt(),
        "codes": codes.codes,
        "code_scale": codes.scale,
        "page_scale": codes.page_scale,
    }


def in_order(pages: Tensor, ids: Tensor, start: int) -> Tensor:
    """The tokens of pages [H, n, V, P, D] by id: [V, H, n * P, D]. ids: [H, n, P], a permutation of
    start .. start + n * P - 1 in each head."""
    H, n, V, P, D = pages.shape
    place = (ids.flatten(1).long() - start).argsort(1)
    rows = place[None, ..., None].expand(V, -1, -1, D)
    return pages.permute(2, 0, 1, 3, 4).reshape(V, H, n * P, D).gather(2, rows)


_OF_BLOCKS = {
    "mean_codes",
    *(
        name
        for name, every in zip(PageIndex._fields, pages_of_parts(BLOCK_PAGES), strict=True)
        if every > 1
    ),
}
"""Parts with a row for each block of pages."""


class PageStore:
    """Growing parts, all of the same pages."""

    def __init__(self, parts: Parts) -> None:
        self._parts = {name: GrowingTensor.holding(x, dim=1) for name, x in parts.items()}
        self._views = self._make_views()

    def __getitem__(self, name: str) -> Tensor:
        """[H, N, ...] a part: a view, valid until the next change."""
        return self._views[name]

    def views(self) -> Parts:
        """All parts."""
        return dict(self._views)

    def buffer(self, name: str) -> Tensor:
        """[H, capacity, ...] a part and the room behind it."""
        return self._parts[name].buffer

    @property
    def num_pages(self) -> int:
        """Pages N of each head."""
        return next(x for name, x in self._views.items() if name not in _OF_BLOCKS).shape[1]

    def reserve(self, first: int, segments: list[Parts]) -> None:
        """Make room for `replace`, which then cannot fail."""
        for name, part in self._parts.items():
            rows = sum(segment[name].shape[1] for segment in segments)
            part.reserve(rows_of(name, first) + rows)

    def replace(self, first: int, segments: list[Parts]) -> None:
        """Put the pages of `segments` where those from `first` on were."""
        self.reserve(first, segments)
        for name, part in self._parts.items():
            part.truncate(rows_of(name, first))
            for segment in segments:
                part.append(segment[name])
        self._views = self._make_views()

    def _make_views(self) -> Parts:
        # made once: for a single query they would cost as much as a part of the search
        return {name: part.view for name, part in self._parts.items()}


def rows_of(name: str, num_pages: int) -> int:
    """Rows of a part for so many pages."""
    return num_pages // BLOCK_PAGES if name in _OF_BLOCKS else num_pages
