"""Searching the pages of an index, in the order of the work: means, codes, keys."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from wavekv.errors import InputError
from wavekv.index.inputs import expect_count, expect_share
from wavekv.index.result import SearchResult
from wavekv.index.state import IndexState
from wavekv.kernels import score_means, search_pages, select, top_pages

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
    scale: float | None = None
    num_threads: int | None = None

    def __post_init__(self) -> None:
        expect_count("k", self.k)
        expect_count("group", self.group)
        if isinstance(self.budget, float):
            expect_share("budget", self.budget)
        else:
            expect_count("budget", self.budget)
        if self.top_p is not None:
            expect_share("top_p", self.top_p)
        if not isinstance(self.rerank, (int, float)) or not 1 <= self.rerank < math.inf:
            raise InputError(f"rerank must be a number of at least 1, got {self.rerank!r}")
        if self.scale is not None and not 0 < self.scale < math.inf:
            raise InputError(f"scale must be positive, got {self.scale!r}")
        if self.num_threads is not None:
            expect_count("num_threads", self.num_threads)

    def max_pages(self, num_pages: int, page_size: int) -> int:
        """The most pages to scan, of so many: enough for k keys."""
        if isinstance(self.budget, float):
            pages = math.ceil(self.budget * num_pages)
        else:
            pages = -(-self.budget // page_size)
        return min(num_pages, max(pages, -(-self.k // page_size)))


def search_state(queries: Tensor, state: IndexState, options: SearchOptions) -> SearchResult:
    """Search with queries [H, Q, D] float32 among the pages and the tail of an index."""
    per_query = queries.shape[0] * max(1, state.store.num_pages)
    step = max(1, _SCORES_AT_ONCE // per_query // options.group) * options.group
    parts = [
        _search(queries[:, start : start + step], state, options)
        for start in range(0, max(1, queries.shape[1]), step)
    ]
    return SearchResult(*(torch.cat(part, 1) for part in zip(*parts, strict=True)))


def _search(queries: Tensor, state: IndexState, options: SearchOptions) -> tuple[Tensor, ...]:
    """The fields of a SearchResult."""
    H, Q, _ = queries.shape
    store, tail, width = state.store, state.tail[:, 0], state.code_width
    N, P, T = store.num_pages, state.params.page_size, tail.shape[1]
    most = options.max_pages(N, P)
    is_exact = most >= N and options.top_p is None
    if is_exact or state.codec is None:
        turned, means = queries.new_zeros(H, Q, width), queries.new_zeros(H, Q, N)
        chosen = torch.arange(N, device=queries.device).expand(H, Q, N)
    else:
        turned = state.codec.queries(queries)
        means = score_means(
            turned, store["mean_codes"], store["mean_scale"], num_threads=options.num_threads
        )
        chosen = _choose(turned, means, store["spread"], most, P, options)
    num_candidates = N * P if is_exact else math.ceil(options.rerank * options.k)
    scores, ids, counts = search_pages(
        queries,
        turned[..., :width].contiguous(),
        means,
        chosen,
        store["codes"],
        store["code_scale"],
        store["page_scale"],
        store["pages"][:, :, 0],
        store["ids"],
        tail,
        k=options.k,
        num_candidates=num_candidates,
        num_threads=options.num_threads,
    )
    scanned = (chosen >= 0).sum(2) * P
    scored = torch.full_like(counts, 0 if is_exact else N)
    return scores, ids, counts, scored, scanned + T, scanned.clamp(max=num_candidates) + T


def _choose(
    turned: Tensor, means: Tensor, spread: Tensor, most: int, page_size: int, options: SearchOptions
) -> Tensor:
    """Pages [H, Q, M] to scan: those whose best key may be the best, or those of most mass."""
    H, Q, N = means.shape
    # [H, Q, N]: deviation of a page's products, were its keys spread alike in all directions
    deviation = turned.norm(dim=2, keepdim=True) * spread.unsqueeze(1)
    if options.group == 1 and options.top_p is None:
        # the largest of P normal numbers lies about so many deviations above their mean
        reach = math.sqrt(2 * math.log(page_size)) if page_size > 1 else 0.0
        return top_pages(means + reach * deviation, most, num_threads=options.num_threads)
    log_mass = _log_mass(means, deviation, page_size, options.scale or 1.0)
    # queries that share a choice are heads of one group, and groups a batch
    group = options.group
    by_group = log_mass.view(H, Q // group, group, N).transpose(0, 1).flatten(1, 2)
    least = min(most, -(-options.k // page_size))
    chosen = select(by_group, H, max_pages=most, min_pages=least, top_p=options.top_p)
    return chosen.transpose(0, 1).repeat_interleave(group, 1)


def _log_mass(means: Tensor, deviation: Tensor, page_size: int, scale: float) -> Tensor:
    """`wavekv.kernels.score` for full pages whose keys are spread alike in all directions."""
    log_size = math.log(page_size)
    spread = scale * deviation
    frozen = math.sqrt(2 * log_size) * spread - log_size
    rise = torch.where(spread.square() > 2 * log_size, frozen, 0.5 * spread.square())
    return log_size + scale * means + rise
