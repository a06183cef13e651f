"""From a query to pages over an index of two levels: which to read, and what the others contribute.
Pure; shared by the offload engine and `WaveIndex`."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from wavekv.index.params import BLOCK_PAGES
from wavekv.index.statistics import page_statistics
from wavekv.kernels import select, value_slope
from wavekv.kernels.levels import estimate_levels, refine_levels, score_levels
from wavekv.kernels.page_index import PageIndex, encode_index

FINALISTS = 4
"""Both planes of the codes are read for one in so many of the candidates."""


class Logits(NamedTuple):
    """How a model makes logits of inner products."""

    scale: float
    softcap: float | None = None


class LevelPages(NamedTuple):
    """What ranks and estimates the pages of B sequences and Hkv heads; on the device."""

    summary: PageIndex
    scatter: Tensor
    """[B, Hkv, S, 2, D, D] bfloat16 within-page scatter of each span."""
    span_pages: int


class LevelChoice(NamedTuple):
    """Pages to read, and what is known of all of them."""

    log_mass: Tensor
    """[B, Hq, N]"""
    shift: Tensor
    """[B, Hq, N]"""
    pages: Tensor
    """[B, Hkv, M] int64, ascending, then -1."""
    refined: Tensor
    """[B, Hkv, any] int64 pages whose codes were read, some twice, -1 for nothing."""


def block_pages(smallest_segment: int, page_size: int) -> int:
    """Pages of a block: as many as every segment has a multiple of, so that blocks never change.
    smallest_segment: tokens, `page_size` times a power of two."""
    return min(BLOCK_PAGES, smallest_segment // page_size)


def index_of_pages(keys: Tensor, values: Tensor, counts: Tensor, block_pages: int) -> PageIndex:
    """The index of pages of R rows: keys, values [R, N, P, D]; counts [R, N] int32, N a multiple of
    `block_pages`. Slots beyond the count have no influence. Cost: O(N P D^2) a row."""
    exact = page_statistics(keys, values, counts)
    return encode_index(keys, counts, exact.mean, exact.variance, exact.value_mean, block_pages)


def choose_of_levels(
    query: Tensor,
    pages: LevelPages,
    logits: Logits,
    *,
    least: int,
    most: int,
    top_p: float | None = None,
    refine: int = 1,
    use_variance: bool = True,
) -> LevelChoice:
    """Rank all pages by their statistics, the best `refine` budgets of them again by the high plane
    of their keys' codes, the best fourth of so many by both planes, and choose from `least` to
    `most`. refine=1: no codes are read.

    query: [B, Hq, D]. A budget is `most` pages.
    """
    index, (scale, softcap) = pages.summary, logits
    heads, num_pages = index.counts.shape[1:]
    scores = score_levels(query, index, scale=scale, softcap=softcap, use_variance=use_variance)
    refined = [torch.empty(*index.counts.shape[:2], 0, dtype=torch.int64, device=query.device)]
    if refine > 1 and most < num_pages:
        # a mean hides the key that stands out: pages whose keys lie far apart deserve a look first
        first = select(scores.log_mass + scores.shift, heads, max_pages=most * refine)
        scores = refine_levels(scores, index, first, use_low=False, softcap=softcap)
        second = select(scores.log_mass, heads, max_pages=most * num_finalists(refine))
        scores = refine_levels(scores, index, second, use_low=True, softcap=softcap)
        refined += [first, second]
    chosen = select(scores.log_mass, heads, max_pages=most, min_pages=least, top_p=top_p)
    return LevelChoice(scores.log_mass, scores.shift, chosen, torch.cat(refined, 2))


def num_finalists(refine: int) -> int:
    """Budgets of pages of which both planes are read, where the high one is of `refine`."""
    return max(1, refine // FINALISTS)


def estimate_of_levels(
    query: Tensor, choice: LevelChoice, pages: LevelPages, scale: float, *, use_slope: bool = True
) -> tuple[Tensor, Tensor]:
    """The attention state (out [B, Hq, D], lse [B, Hq]) of the pages that were not chosen."""
    slope = value_slope(query, pages.scatter, scale=scale) if use_slope else None
    return estimate_levels(
        choice.log_mass,
        pages.summary,
        choice.pages,
        choice.refined,
        choice.shift,
        slope,
        span_pages=pages.span_pages,
    )
