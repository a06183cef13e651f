"""Searching the pages of an index, in the order of the work: means, codes, keys."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from wavekv.index.inputs import expect_count, expect_positive, expect_share, pages_in_budget
from wavekv.index.state import IndexState
from wavekv.kernels import SearchParts, score_means, search_pages, select

DEFAULT_BUDGET = 0.08
_SCORES_AT_ONCE = 1 << 25


@dataclass(frozen=True, slots=True)
class SearchOptions:
    """How far a search looks; see `WaveIndex.search`."""

    k: int
    budget: float | int = DEFAULT_BUDGET
    top_p: float | None = None
    group: int = 1
    rerank: float = 2.0
    scale: float = 1.0
    num_threads: int | None = None

    def __post_init__(self) -> None:
        # numbers of numpy become plain ones: kernels and shifts of bits want those
        for name in ("k", "group"):
            object.__setattr__(self, name, expect_count(name, getattr(self, name)))
        pages_in_budget(self.budget, 1, 1)
        if self.top_p is not None:
            expect_share("top_p", self.top_p)
        expect_positive("rerank", self.rerank, least=1.0)
        expect_positive("scale", self.scale)
        if self.num_threads is not None:
            object.__setattr__(self, "num_threads", expect_count("num_threads", self.num_threads))

    def max_pages(self, num_pages: int, page_size: int) -> int:
        """The most pages to scan, of so many: enough for k keys."""
        pages = pages_in_budget(self.budget, num_pages, page_size)
        return min(num_pages, max(pages, -(-self.k // page_size)))


def search_state(
    queries: Tensor, state: IndexState, options: SearchOptions
) -> tuple[Tensor, Tensor, Tensor]:
    """Search with queries [H, Q, D] float32 among the pages and the tail of an index: scores and
    ids [H, Q, k], work [4, H, Q] (see `search_pages`)."""
    per_query = queries.shape[0] * max(1, state.pages.num_pages)
    step = max(1, _SCORES_AT_ONCE // per_query // options.group) * options.group
    if queries.shape[1] <= step:
        return _search(queries, state, options)
    parts = [_search(part, state, options) for part in queries.split(step, 1)]
    scores, ids, work = zip(*parts, strict=True)
    return torch.cat(scores, 1), torch.cat(ids, 1), torch.cat(work, 2)


def _search(
    queries: Tensor, state: IndexState, options: SearchOptions
) -> tuple[Tensor, Tensor, Tensor]:
    parts, P = state.search_parts, state.params.page_size
    pages = parts.mean_scale.shape[1]
    most = options.max_pages(pages, P)
    # all pages: every key is compared, and no code is read
    is_exact = state.codec is None or (most >= pages and options.top_p is None)
    if state.codec is None:
        turned = queries.new_zeros(*queries.shape[:2], 4 * parts.mean_codes.shape[2])
    else:
        turned = state.codec.queries(queries)
    given = None
    if not is_exact and (options.group > 1 or options.top_p is not None):
        given = _choose_by_mass(turned, parts, most, options)
    return search_pages(
        queries,
        turned,
        given,
        parts,
        k=options.k,
        max_pages=most,
        num_candidates=math.ceil(min(float(options.rerank) * options.k, pages * P)),
        # the largest of P normal numbers lies about so many deviations above their mean
        optimism=math.sqrt(2 * math.log(P)),
        num_threads=options.num_threads,
    )


def _choose_by_mass(
    turned: Tensor, parts: SearchParts, most: int, options: SearchOptions
) -> Tensor:
    """Pages [H, Q, M] to scan, then -1: those of most softmax mass for each group of queries."""
    H, Q, _ = turned.shape
    P, group = parts.ids.shape[2], options.group
    means = score_means(turned, parts.mean_codes, parts.mean_scale, num_threads=options.num_threads)
    # [H, Q, N]: deviation of a page's products, were its keys spread alike in all directions
    deviation = turned.norm(dim=2, keepdim=True) * parts.spread.unsqueeze(1)
    log_mass = _log_mass(means, deviation, P, options.scale)
    # queries that share a choice are heads of one group, and groups a batch
    by_group = log_mass.unflatten(1, (Q // group, group)).transpose(0, 1).flatten(1, 2)
    least = min(most, -(-options.k // P))
    chosen = select(by_group, H, max_pages=most, min_pages=least, top_p=options.top_p)
    return chosen.transpose(0, 1).repeat_interleave(group, 1)


def _log_mass(means: Tensor, deviation: Tensor, page_size: int, scale: float) -> Tensor:
    """`score_levels` for full pages whose keys are spread alike in all directions."""
    log_size = math.log(page_size)
    spread = scale * deviation
    frozen = math.sqrt(2 * log_size) * spread - log_size
    rise = torch.where(spread.square() > 2 * log_size, frozen, 0.5 * spread.square())
    return log_size + scale * means + rise
