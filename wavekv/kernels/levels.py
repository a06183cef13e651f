"""The public kernels over an index of two levels: validate, then numba for CPU tensors, torch
elsewhere.

They know no configuration and keep no state; `wavekv.kernels.reference_levels` is their definition.
Results carry no gradient. A wrong shape, dtype or device is a ValueError.
"""

from __future__ import annotations

from types import ModuleType
from typing import NamedTuple

import torch
from torch import Tensor

from wavekv.kernels import checks, reference_levels
from wavekv.kernels.backend import uses_numba
from wavekv.kernels.page_index import DTYPES, HIGH_BITS, LOW_BITS, MEAN_BITS, PageIndex
from wavekv.kernels.planes import num_words


class Scores(NamedTuple):
    """What `score_levels` knows of all pages, and what the other kernels need of the query."""

    log_mass: Tensor
    """[B, Hq, N] float32"""
    shift: Tensor
    """[B, Hq, N] float32"""
    mixed: tuple[Tensor, Tensor]
    """The mixed query: codes [B, Hq, W] int8, W a multiple of 32, and [B, Hq] float32, the logit
    that a step of them is worth."""
    mean_logits: Tensor
    """[B, Hq, N] float32 of the mean keys of pages, before a soft cap."""


def score_levels(
    query: Tensor,
    index: PageIndex,
    *,
    scale: float,
    softcap: float | None = None,
    use_variance: bool = True,
) -> Scores:
    """Estimate each page's softmax mass from its statistics: log of the sum of exp(logit).

    A page of n keys has log mass log n + x + c. x is the logit of the mean key, soft-capped where
    the model does so; c is the log of the mean of exp(logit - x). The variance of the logits is
    s = |q|^2 * variance, q scaled, as if keys varied alike in all directions (by the delta method
    under a soft cap). Gaussian keys have c = s / 2. But n samples cannot realise that mean once s >
    2 log n: there the largest of them carries the sum and c = sqrt(2 log n * s) - log n, the
    freezing of the random energy model (Derrida, Phys. Rev. B 24, 2613, 1981). The branches meet
    with one slope, and a page of one key has c = 0. Without variance c = 0, which is the estimate
    of RetroInfer (VLDB 19(5), section 4.2).

    The shift of a page is how far the mean logit of its keys rises when they are weighted by their
    mass: s for Gaussian keys, sqrt(2 log n * s) where c is frozen (the derivative of c by the
    query's length), 0 without variance. Under a soft cap it is that of the logits before the cap:
    the above over the cap's derivative. `estimate_levels` needs it for the values.

    The mean key of a page is that of its block plus its own mixed residual. For residuals, here and
    in `refine_levels`, the mixed query is rounded to int8: an error of at most 1/254 of its largest
    component. query: [B, Hq, D] floats. index: of R = [B, Hkv] rows, each part contiguous but for
    these. scale multiplies the logits, then softcap bends them to softcap * tanh(logit / softcap).
    Where counts is 0, log mass and shift are -inf and 0, whatever the rest.
    """
    _check_index(index)
    B, Hkv, _, D = index.block_mean.shape
    checks.expect_heads("query", query, B, Hkv, D)
    checks.expect_softcap(softcap)
    run = _backend(query, index.counts).score_levels
    return Scores(*run(query, index, scale=scale, softcap=softcap, use_variance=use_variance))


def refine_levels(
    scores: Scores,
    index: PageIndex,
    candidates: Tensor,
    *,
    use_low: bool,
    softcap: float | None = None,
) -> Scores:
    """Replace mass and shift of candidate pages by what the codes of their keys give: the high
    plane, or with use_low both.

    A mean hides a single key that fits the query among others that do not; codes of each key show
    it. The shift is the mean logit of the keys, before the cap, weighted by their mass, less the
    plain mean. index: the one that was scored. candidates: [B, Hkv, C] int64 pages in any order,
    none twice, -1 for nothing.
    Returns new log masses and shifts; only those of candidates differ.
    """
    B, Hkv, N = index.counts.shape
    checks.expect_heads("log_mass", scores.log_mass, B, Hkv, N)
    checks.expect_shift(scores.shift, scores.log_mass)
    expected = (B, Hkv, candidates.shape[-1])
    checks.expect("candidates", candidates, expected, torch.int64, like=index.counts)
    checks.expect_softcap(softcap)
    run = _backend(scores.log_mass, candidates, index.counts).refine_levels
    log_mass, shift = run(
        scores.mixed,
        scores.mean_logits,
        index,
        scores.log_mass,
        scores.shift,
        candidates,
        use_low=use_low,
        softcap=softcap,
    )
    return scores._replace(log_mass=log_mass, shift=shift)


def estimate_levels(
    log_mass: Tensor,
    index: PageIndex,
    selected: Tensor,
    refined: Tensor,
    shift: Tensor | None = None,
    slope: Tensor | None = None,
    *,
    span_pages: int = 1,
) -> tuple[Tensor, Tensor]:
    """Estimate the attention over the pages that were not selected, from their statistics.

    A page stands for its tokens with a mean value, weighted by its estimated mass: the estimation
    zone of RetroInfer (VLDB 19(5), section 4.2). It is its own mean value where the page was
    refined, else that of its block. With shift and slope the value is the mean plus shift * slope:
    attention leans towards the keys of a page that fit the query, and their values differ from the
    mean as values go with keys.

    index: the one that was scored. selected, refined: [B, Hkv, any] int64 pages in any
    order, -1 for nothing, twice allowed. shift: [B, Hq, N] as from `score_levels`. slope: [B, Hq,
    S, D] as from `value_slope`; page n belongs to span n // span_pages, of whole blocks.
    Returns the state: out [B, Hq, D], lse [B, Hq], float32.
    """
    B, Hkv, N = index.counts.shape
    checks.expect_heads("log_mass", log_mass, B, Hkv, N)
    for name, pages in (("selected", selected), ("refined", refined)):
        expected = (B, Hkv, pages.shape[-1])
        checks.expect(name, pages, expected, torch.int64, like=index.counts)
    if slope is not None:
        if shift is None or span_pages < 1 or span_pages % index.block_pages:
            raise ValueError(
                "a slope needs the shift of each page and span_pages a multiple of "
                f"{index.block_pages}, got {span_pages} and {'no' if shift is None else 'a'} shift"
            )
        checks.expect_shift(shift, log_mass)
        wanted = (B, log_mass.shape[1], -(-N // span_pages), index.block_mean.shape[-1])
        checks.expect("slope", slope, wanted, torch.float32, like=index.counts)
    run = _backend(log_mass, selected, index.counts).estimate_levels
    state: tuple[Tensor, Tensor] = run(
        log_mass, index, selected, refined, shift, slope, span_pages=span_pages
    )
    return state


def _backend(*tensors: Tensor) -> ModuleType:
    """The module whose functions run for these tensors. numba loads on first use."""
    if not uses_numba(*tensors):
        return reference_levels
    from wavekv.kernels import cpu_levels

    return cpu_levels


def _check_index(index: PageIndex) -> None:
    """The parts fit each other."""
    B, Hkv, N = index.counts.shape
    K, D, P = index.block_pages, index.block_mean.shape[-1], index.key_step.shape[-1]
    blocks, high, low = N // K, num_words(D, HIGH_BITS), num_words(D, LOW_BITS)
    page, block = (N,), (blocks,)
    shapes: dict[str, tuple[int, ...]] = {
        "counts": page,
        "variance": page,
        "mean": (blocks, num_words(D, MEAN_BITS), K, 4),
        "mean_step": page,
        "value": (N, -(-D // 2)),
        "value_step": page,
        "high": (N, high, P, 4),
        "low": (N, low, P, 4),
        "key_step": (N, P),
        "block_mean": (blocks, D),
        "block_mean_scale": block,
        "block_value": (blocks, -(-D // 2)),
        "block_value_scale": block,
    }
    for (name, shape), part, dtype in zip(shapes.items(), index, DTYPES, strict=True):
        checks.expect_part_of_rows(name, part, (B, Hkv, *shape), dtype, like=index.counts)
