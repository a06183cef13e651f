"""The within-page scatter of an index: how values go with keys, for stretches of its pages."""

from __future__ import annotations

from itertools import pairwise

import torch
from torch import Tensor

from wavekv.growing import GrowingTensor
from wavekv.index.statistics import page_scatter

_TOKENS_PER_DIM = 16
"""The least tokens of a span for each dimension: more than the fit needs, and a bound on memory."""


def pages_of_span(segment: int, page_size: int, head_dim: int, block_pages: int) -> int:
    """Pages of a span, whole blocks: a segment's, so that the scatter follows where the text goes,
    but never so few that its 4 D^2 bytes exceed a sixteenth of those of bfloat16 pages."""
    block = block_pages * page_size
    return -(-max(segment, _TOKENS_PER_DIM * head_dim) // block) * block_pages


class SpanScatter:
    """Scatter [B, Hkv, S, 2, D, D] bfloat16, summed over each span of `span_pages` pages in a row.

    The last span may be short; it grows until it is full. Sums are made in float32 and rounded when
    they are kept (`add_rounded`).
    """

    def __init__(self, like: Tensor, span_pages: int) -> None:
        """like: [B, Hkv, 0, D] fixes shape and device."""
        B, H, _, D = like.shape
        self.span_pages = span_pages
        self.spans = GrowingTensor(like.new_empty(B, H, 0, 2, D, D, dtype=torch.bfloat16), dim=2)

    def add(self, first_page: int, scatter: Tensor) -> None:
        """Add pages from `first_page` on: their scatter as from `scatter_by_span`. All or nothing.

        Pages come in order: there are spans for all pages before `first_page`.
        """
        shared = len(self.spans) - first_page // self.span_pages
        assert shared in (0, 1)
        self.spans.append(scatter[:, :, shared:])
        if shared:
            add_rounded(self.spans.view[:, :, first_page // self.span_pages], scatter[:, :, 0])

    def reserve(self, num_pages: int) -> None:
        """Make room for the spans of so many pages: up to there, `add` cannot fail."""
        self.spans.reserve(-(-num_pages // self.span_pages))

    def truncate(self, num_pages: int, last: Tensor | None) -> None:
        """Keep the spans of the first `num_pages` pages; `last` [B, Hkv, 2, D, D] is the new
        scatter of a span that is cut, None if none is."""
        self.spans.truncate(-(-num_pages // self.span_pages))
        if last is not None:
            self.spans.view[:, :, -1] = last

    def select(self, index: Tensor) -> None:
        """Keep the sequences `index` [B'], in that order."""
        self.spans.select(index)

    def clone(self) -> SpanScatter:
        """An independent copy."""
        copy = object.__new__(SpanScatter)
        copy.span_pages, copy.spans = self.span_pages, self.spans.clone()
        return copy


def add_rounded(kept: Tensor, scatter: Tensor) -> None:
    """Add scatter, float32, in place to what is kept, bfloat16: a sum in float32, rounded once."""
    # torch computes mixed types in the wider one; no copy of `kept` is needed for it
    kept += scatter


def scatter_by_span(
    keys: Tensor, values: Tensor, counts: Tensor, *, first_page: int, span_pages: int
) -> Tensor:
    """The scatter of pages that begin at page `first_page` of an index, for each span they touch.

    keys, values: [R, N, P, D]; counts: [R, N]. Returns [R, m, 2, D, D] float32.
    """
    N = keys.shape[1]
    edges = [0, *range(span_pages - first_page % span_pages, N, span_pages), N]
    return torch.stack(
        [page_scatter(keys[:, a:b], values[:, a:b], counts[:, a:b]) for a, b in pairwise(edges)], 1
    )
