"""What an index holds, and how it grows and shrinks."""

from __future__ import annotations

import torch
from torch import Tensor

from wavekv.growing import GrowingTensor
from wavekv.index.clustering import balanced_pages
from wavekv.index.codec import KeyCodec, metric_codec, spread_codec
from wavekv.index.pages import PageStore, Parts, build_parts, empty_parts, in_order
from wavekv.index.params import BLOCK_PAGES, IndexParams
from wavekv.index.scatter import SpanScatter, scatter_by_span
from wavekv.index.segments import cut_segments
from wavekv.kernels import SearchParts, check_parts

_MAPS = "centre", "forward", "backward"


class IndexState:
    """Pages, the tail that is in no page yet, and the codec: a function of the keys alone."""

    def __init__(
        self, like: Tensor, params: IndexParams, *, has_values: bool, metric: Tensor | None
    ) -> None:
        """Empty. like: [H, 0, D] fixes heads, dimensions, dtype and device. metric: [H, D, D] as
        from `query_metric`, or None.

        Raises:
            ConfigError: more `code_dims` than D.
        """
        H, _, D = like.shape
        self.params, self.metric, self.has_values = params, metric, has_values
        self.code_width = params.code_width(D, metric is not None)
        self.store = PageStore(
            empty_parts(like, params, code_width=self.code_width, has_values=has_values)
        )
        self.tail = like.new_empty(H, 1 + has_values, 0, D)
        """[H, 1 or 2, T, D] keys, then values, of the last ids."""
        self.codec: KeyCodec | None = None
        """None while there is no page."""
        self.scatter = SpanScatter(like[None], self.span_pages) if has_values else None
        self._search_parts: SearchParts | None = None

    @property
    def span_pages(self) -> int:
        """Pages of a span: a full segment."""
        return self.params.segment // self.params.page_size

    @property
    def num_keys(self) -> int:
        """Keys N of each head."""
        return self.store.num_pages * self.params.page_size + self.tail.shape[2]

    def segments_of(self, num_keys: int) -> list[int]:
        """The segments that so many keys fall into."""
        return cut_segments(num_keys, segment=self.params.segment, smallest=self.params.block)

    def resize(self, num_keys: int, new: Tensor) -> None:
        """Have `num_keys` keys: the first of those held, then `new` [H, 1 or 2, S, D]. All or
        nothing.

        Segments that stay the same are kept; the keys behind them are clustered again.
        """
        before, after = self.segments_of(self.num_keys), self.segments_of(num_keys)
        kept = 0
        while kept < min(len(before), len(after)) and before[kept] == after[kept]:
            kept += 1
        start = sum(after[:kept])
        first = start // self.params.page_size
        rest = torch.cat([self._held_from(first), new], 2)[:, :, : num_keys - start]
        codec = self.codec
        if kept == 0:
            # the first segment is new, so everything behind it is too
            codec = self._train(rest[:, 0, : after[0]]) if after else None
        segments: list[Parts] = []
        done = 0
        for length in after[kept:]:
            assert codec is not None
            keys, *values = rest[:, :, done : done + length].unbind(1)
            given = values[0] if values else None
            segments.append(build_parts(keys, given, codec, self.params, start=start + done))
            done += length
        cut = self._scatter_before(first)
        scatters = self._scatters(first, segments)
        # from here on only memory can run out, and nothing is lost if it does
        tail = rest[:, :, done:].clone()
        self.store.replace(first, segments)
        if self.scatter is not None:
            self.scatter.truncate(first, cut)
            for page, scatter in scatters:
                self.scatter.add(page, scatter)
        self.tail, self.codec = tail, codec
        self._search_parts = None

    @property
    def search_parts(self) -> SearchParts:
        """What a search reads: views, valid until the next change."""
        if self._search_parts is None:
            store = self.store
            parts = SearchParts(
                store["mean_codes"],
                store["mean_scale"],
                store["spread"],
                store["codes"],
                store["code_scale"],
                store["page_scale"],
                store["pages"][:, :, 0],
                store["ids"],
                self.tail[:, 0],
            )
            check_parts(parts)
            self._search_parts = parts
        return self._search_parts

    @property
    def nbytes(self) -> int:
        """Bytes of everything that is held."""
        return sum(x.nbytes for x in self.tensors().values())

    def tensors(self) -> Parts:
        """All that is held, by name: what a file has to keep."""
        held = {**self.store.views(), "tail": self.tail}
        if self.metric is not None:
            held["metric"] = self.metric
        if self.codec is not None:
            held |= {name: getattr(self.codec, name) for name in _MAPS}
        if self.scatter is not None:
            held["scatter"] = self.scatter.spans.view
        return held

    def expected_parts(self, num_keys: int) -> dict[str, tuple[torch.dtype, list[int]]]:
        """Type and shape of each of `tensors` with so many keys; of an empty index."""
        H, V, _, D = self.tail.shape
        sealed = sum(self.segments_of(num_keys))
        num_pages = sealed // self.params.page_size
        expected = {}
        for name, part in self.store.views().items():
            rows = num_pages // BLOCK_PAGES if name == "mean_codes" else num_pages
            expected[name] = part.dtype, [H, rows, *part.shape[2:]]
        expected["tail"] = self.tail.dtype, [H, V, num_keys - sealed, D]
        if self.metric is not None:
            expected["metric"] = torch.float32, [H, D, D]
        if num_pages:
            expected["centre"] = torch.float32, [H, D]
            expected["forward"] = expected["backward"] = torch.float32, [H, D, D]
        if self.scatter is not None:
            spans = -(-num_pages // self.span_pages)
            expected["scatter"] = torch.float32, [1, H, spans, 2, D, D]
        return expected

    def restore(self, tensors: Parts) -> None:
        """Hold what `tensors` returned. Only of an empty index."""
        self.store = PageStore({name: tensors[name] for name in self.store.views()})
        self.tail, self.metric = tensors["tail"], tensors.get("metric")
        if "centre" in tensors:
            centre, forward, backward = (tensors[name] for name in _MAPS)
            self.codec = KeyCodec(centre, forward, backward, self.code_width)
        if self.scatter is not None:
            self.scatter.spans = GrowingTensor.holding(tensors["scatter"], dim=2)
        self._search_parts = None

    def _train(self, keys: Tensor) -> KeyCodec:
        """The codec for an index whose first segment is `keys` [H, S, D]."""
        H, S, D = keys.shape
        codec = metric_codec(keys, self.metric, self.code_width)
        z = codec.keys(keys)
        order = balanced_pages(z, self.params.page_size)
        pages = z.gather(1, order[..., None].expand(-1, -1, D)).view(
            H, -1, self.params.page_size, D
        )
        residual = (pages - pages.mean(2, keepdim=True)).view(H, S, D)
        return spread_codec(codec, residual.mT @ residual)

    def _held_from(self, first: int) -> Tensor:
        """Keys and values [H, 1 or 2, S, D] from page `first` on, the tail included, by id."""
        pages, ids = self.store["pages"][:, first:], self.store["ids"][:, first:]
        if pages.shape[1] == 0:
            return self.tail
        held = in_order(pages, ids, first * self.params.page_size).transpose(0, 1)
        return torch.cat([held, self.tail], 2)

    def _scatter_before(self, first: int) -> Tensor | None:
        """The scatter [1, H, 2, D, D] of a span that page `first` cuts, up to there."""
        begin = first - first % self.span_pages
        if self.scatter is None or first in (begin, self.store.num_pages):
            return None
        return self._scatter_of(self.store["pages"][:, begin:first], 0)[:, :, 0]

    def _scatters(self, first: int, segments: list[Parts]) -> list[tuple[int, Tensor]]:
        """Of each segment its first page and the scatter [1, H, m, 2, D, D] of spans it touches."""
        if self.scatter is None:
            return []
        scatters = []
        for segment in segments:
            scatters.append((first, self._scatter_of(segment["pages"], first)))
            first += segment["ids"].shape[1]
        return scatters

    def _scatter_of(self, pages: Tensor, first: int) -> Tensor:
        counts = torch.full(pages.shape[:2], pages.shape[3], device=pages.device)
        keys, values = pages.unbind(2)
        scatter = scatter_by_span(
            keys, values, counts, first_page=first, span_pages=self.span_pages
        )
        return scatter[None]
