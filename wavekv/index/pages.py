"""The pages of an index: what it keeps of every key, and building them for one segment."""

from __future__ import annotations

import torch
from torch import Tensor

from wavekv.growing import GrowingTensor
from wavekv.index.clustering import balanced_pages
from wavekv.index.codec import KeyCodec
from wavekv.index.codes import decode_means, encode_keys, encode_means
from wavekv.index.params import BLOCK_PAGES, IndexParams
from wavekv.index.statistics import page_statistics

Parts = dict[str, Tensor]
"""Tensors [H, N, ...] by name."""

STATISTICS = ("mean", "variance", "value_mean")


def empty_parts(like: Tensor, params: IndexParams, *, code_width: int, has_values: bool) -> Parts:
    """Parts of no page. like: [H, 0, D] keys, for device and dtype."""
    H, _, D = like.shape
    P = params.page_size
    parts = {
        # [H, N, 1 or 2, P, D]: keys, then values, as they came
        "pages": like.new_empty(H, 0, 1 + has_values, P, D),
        "ids": like.new_empty(H, 0, P, dtype=torch.int32),
        # [H, N / 16, W' / 4, 16, 4] and [H, N]: see `MeanCodes`; of z
        "mean_codes": like.new_empty(H, 0, -(-D // 8) * 2, BLOCK_PAGES, 4, dtype=torch.uint8),
        "mean_scale": like.new_empty(H, 0, dtype=torch.float32),
        # [H, N]: deviation of z from the mean, in any one direction
        "spread": like.new_empty(H, 0, dtype=torch.float32),
        # see `KeyCodes`; of z
        "codes": like.new_empty(H, 0, code_width // 8, P, 4, dtype=torch.uint8),
        "code_scale": like.new_empty(H, 0, P, dtype=torch.uint8),
        "page_scale": like.new_empty(H, 0, dtype=torch.float32),
    }
    if has_values:
        parts |= {name: like.new_empty(H, 0, D) for name in STATISTICS}
    return parts


def build_parts(
    keys: Tensor, values: Tensor | None, codec: KeyCodec, params: IndexParams, *, start: int
) -> Parts:
    """Cluster one segment of keys [H, S, D] with ids from `start` on, and code its pages.

    Cost: O(S log(S / P) D + S D^2) a head: see `balanced_pages`, and two products with the codec.
    """
    H, S, D = keys.shape
    P = params.page_size
    z = codec.keys(keys)
    order = balanced_pages(z, P)
    rows = order[..., None].expand(-1, -1, D)
    given = [keys] if values is None else [keys, values]
    pages = torch.stack([x.gather(1, rows).view(H, S // P, P, D) for x in given], 2)
    z = z.gather(1, rows).view(H, S // P, P, D)
    mean = z.mean(2)
    mean_codes = encode_means(mean)
    W = min(codec.code_dims, D)
    counts = torch.full((H, S // P), P, device=keys.device)
    codes = encode_keys(z[..., :W], decode_means(mean_codes)[..., :W], counts)
    parts = {
        "pages": pages,
        "ids": (order + start).to(torch.int32).view(H, S // P, P),
        "mean_codes": mean_codes.codes,
        "mean_scale": mean_codes.scale,
        "spread": (z - mean.unsqueeze(2)).square().mean((2, 3)).sqrt(),
        "codes": codes.codes,
        "code_scale": codes.scale,
        "page_scale": codes.page_scale,
    }
    if values is not None:
        statistics = page_statistics(pages[:, :, 0], pages[:, :, 1], counts, dtype=keys.dtype)
        parts |= dict(zip(STATISTICS, statistics, strict=True))
    return parts


def in_order(pages: Tensor, ids: Tensor, start: int) -> Tensor:
    """The tokens of pages [H, n, V, P, D] by id: [V, H, n * P, D]. ids: [H, n, P], a permutation of
    start .. start + n * P - 1 in each head."""
    H, n, V, P, D = pages.shape
    place = (ids.flatten(1).long() - start).argsort(1)
    rows = place[None, ..., None].expand(V, -1, -1, D)
    return pages.permute(2, 0, 1, 3, 4).reshape(V, H, n * P, D).gather(2, rows)


class PageStore:
    """Growing parts, all of the same pages."""

    def __init__(self, parts: Parts) -> None:
        self._parts = {name: GrowingTensor.holding(x, dim=1) for name, x in parts.items()}
        self._views = self._make_views()

    def __getitem__(self, name: str) -> Tensor:
        """[H, N, ...] a part: a view, valid until the next change."""
        return self._views[name]

    def __contains__(self, name: str) -> bool:
        return name in self._parts

    def views(self) -> Parts:
        """All parts."""
        return dict(self._views)

    def buffer(self, name: str) -> Tensor:
        """[H, capacity, ...] a part and the room behind it."""
        return self._parts[name].buffer

    def nbytes(self, *names: str) -> int:
        """Bytes of the named parts."""
        return sum(self._parts[name].nbytes for name in names if name in self._parts)

    @property
    def num_pages(self) -> int:
        """Pages N of each head."""
        return self._views["ids"].shape[1]

    def replace(self, first: int, segments: list[Parts]) -> None:
        """Put the pages of `segments` where those from `first` on were. All or nothing."""
        kept = {name: self._kept(name, first) for name in self._parts}
        for name, part in self._parts.items():
            part.reserve(kept[name] + sum(segment[name].shape[1] for segment in segments))
        for name, part in self._parts.items():
            part.truncate(kept[name])
            for segment in segments:
                part.append(segment[name])
        self._views = self._make_views()

    def _make_views(self) -> Parts:
        # made once: for a single query they would cost as much as a part of the search
        return {name: part.view for name, part in self._parts.items()}

    def _kept(self, name: str, first: int) -> int:
        # a row of mean codes is a block of pages
        return first // BLOCK_PAGES if name == "mean_codes" else first
