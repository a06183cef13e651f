"""What an index holds, and how it grows and shrinks."""

from __future__ import annotations

import torch
from torch import Tensor

from wavekv.growing import GrowingTensor
from wavekv.index.codec import KeyCodec, clustering_map, train_codec
from wavekv.index.pages import (
    PageStore,
    Parts,
    cluster,
    empty_codes,
    empty_pages,
    encode,
    in_order,
    rows_of,
)
from wavekv.index.params import BLOCK_PAGES, IndexParams
from wavekv.index.scatter import SpanScatter, add_rounded, pages_of_span
from wavekv.index.segments import cut_segments
from wavekv.index.units import scatter_of, summary_of, units_of
from wavekv.kernels import SearchParts, checked
from wavekv.kernels.page_index import PageIndex

Expected = dict[str, tuple[torch.dtype, list[int]]]
"""Type and shape of tensors by name."""

_MAPS = "centre", "forward", "backward"


class IndexState:
    """Pages, their codes, and the tail that is in no page yet: a function of the keys alone.

    How many keys there are fixes the segments, and which of them the codec is trained on: the first
    1, 2, 4, 8, ... full ones. When that number doubles, all codes are made anew, which costs little
    beside the clustering.
    """

    def __init__(
        self,
        like: Tensor,
        params: IndexParams,
        *,
        is_flat: bool,
        has_values: bool,
        metric: Tensor | None,
    ) -> None:
        """Empty. like: [H, 0, D] fixes heads, dimensions, dtype and device. is_flat: for users, the
        keys of the one head are [N, D]. metric: [H, D, D] as from `query_metric`, or None.

        Raises:
            ConfigError: more `code_dims` than D, or pages too large for values.
        """
        H, _, D = like.shape
        params.expect_dim(D)
        if has_values:
            params.expect_values()
        self.params, self.metric = params, metric
        self.is_flat, self.has_values = is_flat, has_values
        self.pages = PageStore(empty_pages(like, params.page_size, has_values=has_values))
        self.codes = PageStore(empty_codes(like, params.page_size, 8))
        self.tail = like.new_empty(H, 1 + has_values, 0, D)
        """[H, 1 or 2, T, D] keys, then values, of the last ids."""
        self.codec: KeyCodec | None = None
        """None while there is no page."""
        self.scatter = SpanScatter(like[None], self.span_pages) if has_values else None
        self.units = like.new_ones(H, 2, dtype=torch.float32)
        """[H, 2] of keys and of values, in which statistics for attention are kept."""
        self._search_parts: SearchParts | None = None

    @property
    def span_pages(self) -> int:
        """Pages of a span."""
        P, D = self.params.page_size, self.tail.shape[3]
        return pages_of_span(self.params.segment, P, D, BLOCK_PAGES)

    @property
    def num_keys(self) -> int:
        """Keys N of each head."""
        return self.pages.num_pages * self.params.page_size + self.tail.shape[2]

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
        units = self.units if kept else self._units_of(rest, after)
        clustered = self._cluster(rest, after[kept:], start, units)
        tail = rest[:, :, sum(after[kept:]) :].clone()
        codec = self.codec
        if kept < self._num_trained(after) or self._num_trained(before) != self._num_trained(after):
            codec = self._train(after, kept, clustered)
        codes = self.codes if codec is self.codec else self._encode_kept(first, codec)
        coded = [] if codec is None else [encode(s["pages"][:, :, 0], codec) for s in clustered]
        scatters, cut = self._scatters(first, clustered, units), self._scatter_before(after[:kept])
        # the last that can fail for want of memory
        self.pages.reserve(first, clustered)
        codes.reserve(first, coded)
        if self.scatter is not None:
            self.scatter.reserve(sum(after) // self.params.page_size)
        self.pages.replace(first, clustered)
        codes.replace(first, coded)
        if self.scatter is not None:
            self.scatter.truncate(first, cut)
            for page, scatter in scatters:
                self.scatter.add(page, scatter)
        self.tail, self.codec, self.codes, self.units = tail, codec, codes, units
        self._search_parts = None

    @property
    def search_parts(self) -> SearchParts:
        """What a search reads: views, valid until the next change."""
        if self._search_parts is None:
            names = "mean_codes", "mean_scale", "spread", "codes", "code_scale", "page_scale"
            mean_codes, mean_scale, spread, codes, code_scale, page_scale = (
                self.codes[name] for name in names
            )
            parts = SearchParts(
                mean_codes,
                mean_scale,
                spread,
                codes,
                code_scale,
                page_scale,
                keys=self.pages["pages"][:, :, 0],
                ids=self.pages["ids"],
                tail=self.tail[:, 0],
            )
            self._search_parts = checked(parts)
        return self._search_parts

    @property
    def page_index(self) -> PageIndex:
        """[H, N, ...] what attention ranks and estimates pages by, in `units`: views, valid until
        the next change. Only with values."""
        return PageIndex._make(self.pages[name] for name in PageIndex._fields)

    @property
    def code_dims(self) -> int:
        """Directions that keys have codes of."""
        return 8 * self.codes["codes"].shape[2]

    def tensors(self) -> Parts:
        """All that is held, by name: what a file has to keep."""
        held = {**self.pages.views(), **self.codes.views(), "tail": self.tail}
        if self.metric is not None:
            held["metric"] = self.metric
        if self.codec is not None:
            held |= {name: getattr(self.codec, name) for name in _MAPS}
        if self.scatter is not None:
            held |= {"scatter": self.scatter.spans.view, "units": self.units}
        return held

    def expected_parts(self, num_keys: int, code_dims: int) -> Expected:
        """Type and shape that each of `tensors` has with so many keys; of an empty index."""
        H, V, _, D = self.tail.shape
        sealed = sum(self.segments_of(num_keys))
        num_pages = sealed // self.params.page_size
        expected = {}
        for name, part in {**self.pages.views(), **self.codes.views()}.items():
            expected[name] = part.dtype, [H, rows_of(name, num_pages), *part.shape[2:]]
        expected["codes"][1][2] = code_dims // 8
        expected["tail"] = self.tail.dtype, [H, V, num_keys - sealed, D]
        if self.metric is not None:
            expected["metric"] = torch.float32, [H, D, D]
        if num_pages:
            expected["centre"] = torch.float32, [H, D]
            expected["forward"] = expected["backward"] = torch.float32, [H, D, D]
        if self.scatter is not None:
            spans = -(-num_pages // self.span_pages)
            expected["scatter"] = torch.bfloat16, [1, H, spans, 2, D, D]
            expected["units"] = torch.float32, [H, 2]
        return expected

    def restore(self, tensors: Parts) -> None:
        """Hold what `tensors` returned. Only of an empty index."""
        self.pages = PageStore({name: tensors[name] for name in self.pages.views()})
        self.codes = PageStore({name: tensors[name] for name in self.codes.views()})
        self.tail, self.metric = tensors["tail"], tensors.get("metric")
        if "centre" in tensors:
            centre, forward, backward = (tensors[name] for name in _MAPS)
            self.codec = KeyCodec(centre, forward, backward, self.code_dims)
        if self.scatter is not None:
            self.scatter.spans = GrowingTensor.holding(tensors["scatter"], dim=2)
            self.units = tensors["units"]

    def _num_trained(self, lengths: list[int]) -> int:
        """How many of these segments a codec is trained on: of the full ones the largest power of
        two, without one the first."""
        full = lengths.count(self.params.segment)
        return 1 << full.bit_length() - 1 if full else min(1, len(lengths))

    def _units_of(self, tokens: Tensor, lengths: list[int]) -> Tensor:
        """The units of an index of such tokens [H, 1 or 2, S, D]."""
        if not lengths or not self.has_values:
            return torch.ones_like(self.units)
        return units_of(tokens[:, :, : lengths[0]])

    def _cluster(
        self, tokens: Tensor, lengths: list[int], start: int, units: Tensor
    ) -> list[Parts]:
        """The segments of so many of the keys and values [H, 1 or 2, S, D], with ids from
        `start`."""
        turn = None if self.metric is None else clustering_map(self.metric)
        segments, done = [], 0
        for length in lengths:
            keys, *values = tokens[:, :, done : done + length].unbind(1)
            given = values[0] if values else None
            size, refine = self.params.page_size, self.params.refine
            pages = cluster(keys, given, turn, size, refine=refine, start=start + done)
            if self.has_values:
                pages |= summary_of(pages["pages"], units)
            segments.append(pages)
            done += length
        return segments

    def _train(self, lengths: list[int], kept: int, clustered: list[Parts]) -> KeyCodec | None:
        """The codec for an index of such segments, of which the first `kept` are held."""
        segments, end = [], 0
        for index in range(self._num_trained(lengths)):
            begin, end = end, end + lengths[index] // self.params.page_size
            if index < kept:
                segments.append(self.pages["pages"][:, begin:end, 0])
            else:
                segments.append(clustered[index - kept]["pages"][:, :, 0])
        return train_codec(segments, self.metric, self.params.code_dims) if segments else None

    def _encode_kept(self, num_pages: int, codec: KeyCodec | None) -> PageStore:
        """New codes of the first pages."""
        like, P = self.tail[:, 0, :0], self.params.page_size
        if codec is None:
            return PageStore(empty_codes(like, P, 8))
        codes = PageStore(empty_codes(like, P, codec.code_dims))
        pages = self.pages["pages"][:, :num_pages, 0]
        if num_pages:
            codes.replace(0, [encode(part, codec) for part in pages.split(self.span_pages, 1)])
        return codes

    def _held_from(self, first: int) -> Tensor:
        """Keys and values [H, 1 or 2, S, D] from page `first` on, the tail included, by id."""
        pages, ids = self.pages["pages"][:, first:], self.pages["ids"][:, first:]
        if pages.shape[1] == 0:
            return self.tail
        held = in_order(pages, ids, first * self.params.page_size).transpose(0, 1)
        return torch.cat([held, self.tail], 2)

    def _scatter_before(self, kept: list[int]) -> Tensor | None:
        """The scatter [1, H, 2, D, D] bfloat16 of the span in which the segments `kept` end, up to
        there; None if they end with a span, or are all."""
        first = sum(kept) // self.params.page_size
        begin = first - first % self.span_pages
        if self.scatter is None or first in (begin, self.pages.num_pages):
            return None
        # segment by segment, as it was summed at first: the same order, the same rounding
        total, page = torch.zeros_like(self.scatter.spans.view[:, :, 0]), 0
        for length in kept:
            after = page + length // self.params.page_size
            if after > begin:
                pages = self.pages["pages"][:, max(page, begin) : after]
                add_rounded(total, scatter_of(pages, self.units, 0, self.span_pages)[:, :, 0])
            page = after
        return total

    def _scatters(
        self, first: int, segments: list[Parts], units: Tensor
    ) -> list[tuple[int, Tensor]]:
        """Of each segment its first page and the scatter [1, H, m, 2, D, D] of spans it touches."""
        if self.scatter is None:
            return []
        scatters = []
        for segment in segments:
            of_segment = scatter_of(segment["pages"], units, first, self.span_pages)
            scatters.append((first, of_segment))
            first += segment["ids"].shape[1]
        return scatters
