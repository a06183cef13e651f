"""The kernels over an index of two levels in plain torch: the definition of correct.

Letters as in `wavekv.kernels.reference` and `wavekv.kernels.page_index`. The contracts are the
docstrings of `wavekv.kernels.levels`.
"""

from __future__ import annotations

import torch
from torch import Tensor

from wavekv.kernels.mixing import mixing_on
from wavekv.kernels.page_index import (
    HIGH_BITS,
    LOW_BITS,
    PageIndex,
    block_values,
    mean_codes,
    value_codes,
)
from wavekv.kernels.planes import centred, num_words, steps_of, unpack_plane
from wavekv.kernels.reference import by_group, by_moments, softmax_weights

Mixed = tuple[Tensor, Tensor]


def mix_query(query: Tensor, scale: float) -> Mixed:
    """Scaled queries [B, Hq, D], mixed and rounded to int8: codes [B, Hq, W] int8, W the dimensions
    rounded up to a multiple of 32 and zeros there, and the float32 [B, Hq] that a step of them is
    worth."""
    D = query.shape[-1]
    rows = (query.float() * scale) @ mixing_on(query.device, D)
    largest = rows.abs().amax(-1)
    safe = largest.masked_fill(largest == 0, 1.0)
    codes = (rows / safe.unsqueeze(-1) * 127).round().to(torch.int8)
    width = 32 * num_words(D, 1)
    return torch.nn.functional.pad(codes, (0, width - D)), largest / 127


def block_logits(query: Tensor, index: PageIndex, scale: float) -> Tensor:
    """[B, Hq, N / K] float32 logits, before a soft cap, of the mean keys of blocks."""
    q = by_group(query, index.counts.shape[1]) * scale
    # the scale goes last, so that the sums are of the integers
    logits: Tensor = q @ index.block_mean.float().mT * index.block_mean_scale.unsqueeze(2)
    return logits.flatten(1, 2)


def mean_logits(mixed: Mixed, at_blocks: Tensor, index: PageIndex) -> Tensor:
    """[B, Hq, N] float32 logits, before a soft cap, of the mean keys of pages."""
    codes, step = _by_head(mixed, index)
    D = index.block_mean.shape[-1]
    residual = codes[..., :D] @ mean_codes(index, D).mT * step.unsqueeze(-1)
    own = by_group(at_blocks, index.counts.shape[1]).repeat_interleave(index.block_pages, -1)
    return (own + residual * steps_of(index.mean_step).unsqueeze(2)).flatten(1, 2)


def score_levels(
    query: Tensor,
    index: PageIndex,
    *,
    scale: float,
    softcap: float | None = None,
    use_variance: bool = True,
) -> tuple[Tensor, Tensor, Mixed, Tensor]:
    mixed, at_blocks = mix_query(query, scale), block_logits(query, index, scale)
    x = mean_logits(mixed, at_blocks, index)
    square = (by_group(query, index.counts.shape[1]) * scale).square().sum(-1)
    scored = moments(x, square, index, softcap, use_variance=use_variance)
    return *scored, mixed, x


def moments(
    x: Tensor,
    query_square: Tensor,
    index: PageIndex,
    softcap: float | None,
    *,
    use_variance: bool,
) -> tuple[Tensor, Tensor]:
    """Log mass and shift [B, Hq, N] by moments. x: [B, Hq, N] logits of mean keys; query_square:
    [B, Hkv, G]."""
    variance = steps_of(index.variance) if use_variance else None
    x = by_group(x, index.counts.shape[1])
    return by_moments(x, query_square, variance, index.counts, softcap)


def refine_levels(
    mixed: Mixed,
    logits_of_means: Tensor,
    index: PageIndex,
    log_mass: Tensor,
    shift: Tensor,
    candidates: Tensor,
    *,
    use_low: bool,
    softcap: float | None = None,
) -> tuple[Tensor, Tensor]:
    Hkv, D = index.counts.shape[1], index.block_mean.shape[-1]
    at = candidates.clamp(min=0)

    def of_candidates(x: Tensor) -> Tensor:
        shape = at.shape + (1,) * (x.dim() - 3)
        return x.gather(2, at.view(shape).expand(*at.shape, *x.shape[3:]))

    # [B, Hkv, C, P, D]
    high = unpack_plane(of_candidates(index.high), HIGH_BITS, D)
    if use_low:
        low = unpack_plane(of_candidates(index.low), LOW_BITS, D)
        residual = centred((high << LOW_BITS) | low, HIGH_BITS + LOW_BITS)
    else:
        residual = centred(high, HIGH_BITS) * 2**LOW_BITS
    residual = residual * steps_of(of_candidates(index.key_step)).unsqueeze(-1)
    codes, step = _by_head(mixed, index)
    # how far each key's logit lies from that of its page's mean as stored
    offset = torch.einsum("bhgd,bhcpd->bhgcp", codes[..., :D], residual)
    offset = offset * step[..., None, None]
    G = step.shape[2]
    x = by_group(logits_of_means, Hkv).gather(3, at.unsqueeze(2).expand(-1, -1, G, -1))
    count = of_candidates(index.counts).unsqueeze(2)
    P = index.key_step.shape[3]
    held = torch.arange(P, device=at.device) < count.unsqueeze(-1)
    plain = offset.masked_fill(~held, 0.0).sum(-1) / count.clamp(min=1)
    logits = offset + x.unsqueeze(-1)
    if softcap is not None:
        logits = softcap * torch.tanh(logits / softcap)
    logits = logits.masked_fill(~held, -torch.inf)
    lean = (logits.softmax(-1) * (offset - plain.unsqueeze(-1))).masked_fill(~held, 0.0).sum(-1)
    refined = logits.logsumexp(-1), lean
    # -1 pads: a spare page takes what belongs to none
    pages = log_mass.shape[-1]
    slots = candidates.masked_fill(candidates < 0, pages).unsqueeze(2).expand_as(lean)

    def replaced(old: Tensor, new: Tensor) -> Tensor:
        target = torch.cat([by_group(old, Hkv), new.new_empty(*new.shape[:3], 1)], -1)
        return target.scatter(3, slots, new)[..., :pages].flatten(1, 2)

    return replaced(log_mass, refined[0]), replaced(shift, refined[1])


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
    size = index.counts.shape
    taken, is_own = (_among(pages, size) for pages in (selected, refined))
    logits = by_group(log_mass, size[1]).masked_fill(taken.unsqueeze(2), -torch.inf)
    weights, lse = softmax_weights(logits)
    of_blocks = weights.unflatten(-1, (-1, index.block_pages)).sum(-1)
    out = of_blocks @ block_values(index)
    own = weights * (steps_of(index.value_step) * is_own).unsqueeze(2)
    out = out + (own @ value_codes(index)) @ mixing_on(out.device, out.shape[-1]).mT
    out = out.flatten(1, 2)
    if shift is not None and slope is not None:
        spans = slope.shape[2]
        shifted = weights.flatten(1, 2) * shift.float()
        shifted = torch.nn.functional.pad(shifted, (0, spans * span_pages - size[2]))
        # [B, Hq, 1, S] of each span, times its slope
        shifted = shifted.unflatten(-1, (spans, span_pages)).sum(-1).unsqueeze(2)
        out = out + (shifted @ slope).squeeze(2)
    return out, lse


def _by_head(mixed: Mixed, index: PageIndex) -> tuple[Tensor, Tensor]:
    """The codes [B, Hkv, G, W] float32 and the worth [B, Hkv, G] of a step of mixed queries."""
    codes, step = mixed
    kv_heads = index.counts.shape[1]
    return by_group(codes, kv_heads), step.unflatten(1, (kv_heads, -1))


def _among(pages: Tensor, size: torch.Size) -> Tensor:
    """[B, Hkv, N] bool: which pages are in a list [B, Hkv, M], -1 for nothing."""
    # the column after the last page takes the -1 padding
    found = torch.zeros(*size[:2], size[2] + 1, dtype=torch.bool, device=pages.device)
    return found.scatter_(2, pages.masked_fill(pages < 0, size[2]), True)[..., :-1]
