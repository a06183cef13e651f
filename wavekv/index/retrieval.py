"""From a query to pages: which to read, and what the others contribute. Pure; shared by the
offload engine and `WaveIndex`."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor

from wavekv.kernels import estimate, refine, score, select, value_slope


class PageSummary(NamedTuple):
    """What ranks and estimates the pages of B sequences and Hkv heads; on the device."""

    counts: Tensor
    """[B, Hkv, N] int32 tokens of each page."""
    mean: Tensor
    """[B, Hkv, N, D] mean key."""
    variance: Tensor
    """[B, Hkv, N] float32 variance of the keys, mean over the dimensions."""
    value_mean: Tensor
    """[B, Hkv, N, D] mean value."""
    codes: Tensor
    """[B, Hkv, N, W / 8, P, 4], see `KeyCodes`, as the next two."""
    code_scale: Tensor
    page_scale: Tensor
    scatter: Tensor
    """[B, Hkv, S, 2, D, D] bfloat16 within-page scatter of each span."""
    span_pages: int


class Logits(NamedTuple):
    """How a model makes logits of inner products."""

    scale: float
    softcap: float | None = None


class Choice(NamedTuple):
    """Pages to read, and what is known of all of them."""

    log_mass: Tensor
    """[B, Hq, N]"""
    shift: Tensor
    """[B, Hq, N]"""
    pages: Tensor
    """[B, Hkv, M] int64, ascending, then -1."""


def choose_pages(
    query: Tensor,
    code_query: Tensor,
    pages: PageSummary,
    logits: Logits,
    *,
    least: int,
    most: int,
    top_p: float | None = None,
    num_candidates: int = 0,
    use_variance: bool = True,
) -> Choice:
    """Rank all pages by their statistics, the best `num_candidates` of them again by the codes of
    their keys, and choose from `least` to `most` of them.

    query: [B, Hq, D]; code_query: [B, Hq, W], the same in the space of the codes.
    """
    scale, softcap = logits
    heads = pages.counts.shape[1]
    variance = pages.variance if use_variance else None
    scored = score(query, pages.mean, variance, pages.counts, scale=scale, softcap=softcap)
    log_mass, shift = scored
    if num_candidates > most and most < pages.counts.shape[2]:
        # a mean hides the key that stands out: pages whose keys lie far apart deserve a look first
        candidates = select(log_mass + shift, heads, max_pages=num_candidates)
        log_mass, shift = refine(
            query,
            code_query,
            log_mass,
            shift,
            *(pages.mean, pages.codes, pages.code_scale, pages.page_scale, pages.counts),
            candidates,
            scale=scale,
            softcap=softcap,
        )
    chosen = select(log_mass, heads, max_pages=most, min_pages=least, top_p=top_p)
    return Choice(log_mass, shift, chosen)


def estimate_others(
    query: Tensor, choice: Choice, pages: PageSummary, scale: float, *, use_slope: bool = True
) -> tuple[Tensor, Tensor]:
    """The attention state (out [B, Hq, D], lse [B, Hq]) of the pages that were not chosen."""
    slope = value_slope(query, pages.scatter, scale=scale) if use_slope else None
    return estimate(
        choice.log_mass,
        pages.value_mean,
        choice.pages,
        choice.shift,
        slope,
        span_pages=pages.span_pages,
    )
