"""The search kernels in plain torch, any device; the contracts are in `wavekv.kernels.search`."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

if TYPE_CHECKING:
    from wavekv.kernels.search import SearchParts

_FLOATS_AT_ONCE = 1 << 26
"""Components of keys that are decoded at once."""


def score_means(
    query: Tensor, codes: Tensor, scale: Tensor, *, num_threads: int | None = None
) -> Tensor:
    # [H, N / 16, 16, W / 4, 4] -> [H, N, W]
    levels = codes.transpose(2, 3).flatten(3).flatten(1, 2).float() - 128
    return rounded_to_int8(query) @ levels.mT * scale.unsqueeze(1)


def search_pages(
    query: Tensor,
    turned: Tensor,
    given: Tensor | None,
    parts: SearchParts,
    *,
    k: int,
    max_pages: int,
    num_candidates: int,
    optimism: float,
    num_threads: int | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    keys, ids, tail = parts.keys, parts.ids, parts.tail
    H, Q, D = query.shape
    N, P = keys.shape[1:3]
    most = min(N, max_pages) if given is None else given.shape[2]
    step = max(1, _FLOATS_AT_ONCE // max(1, H * (N + most * P * D)))
    found = []
    for start in range(0, max(1, Q), step):
        asked = slice(start, start + step)
        y = turned[:, asked]
        if given is not None or most < N:
            means = score_means(y, parts.mean_codes, parts.mean_scale)
        else:
            means = y.new_zeros(*y.shape[:2], N)
        if given is not None:
            chosen = given[:, asked]
        elif most < N:
            rank = means + optimism * y.norm(dim=2, keepdim=True) * parts.spread.unsqueeze(1)
            chosen = rank.sort(dim=-1, descending=True, stable=True).indices[..., :most]
        else:
            chosen = torch.arange(N, device=query.device).expand(*y.shape[:2], N)
            num_candidates = N * P
        place, held = _candidates(y, means, chosen, parts, num_candidates)
        scores, who, counts = _best(query[:, asked], place, held, keys, ids, tail, k)
        scored = torch.full_like(counts, N if given is not None or most < N else 0)
        scanned = (chosen >= 0).sum(2) * P + tail.shape[1]
        work = torch.stack([counts, scored, scanned, held.sum(2) + tail.shape[1]], 2)
        found.append((scores, who, work))
    scores, who, work = (torch.cat(part, 1) for part in zip(*found, strict=True))
    return scores, who, work.movedim(2, 0)


def _candidates(
    turned: Tensor, means: Tensor, chosen: Tensor, parts: SearchParts, num_candidates: int
) -> tuple[Tensor, Tensor]:
    """Places [H, Q, C] (page * P + slot) of the best keys of the chosen pages by their codes, and
    whether there is one."""
    pages, page_size = chosen.clamp_min(0), parts.ids.shape[2]
    head = torch.arange(len(chosen), device=chosen.device)[:, None, None]
    slot = torch.arange(page_size, device=chosen.device)
    place = (pages.unsqueeze(-1) * page_size + slot).flatten(2)
    held = (chosen >= 0).repeat_interleave(page_size, 2)
    if place.shape[2] <= num_candidates:
        return place, held
    packed = parts.codes[head, pages]
    halves = torch.stack([packed & 15, packed >> 4], 3).float() - 8
    # [H, Q, M, 2, W / 8, P, 4] -> [H, Q, M, P, W]
    levels = halves.movedim(5, 3).flatten(4)
    step = parts.page_scale[head, pages].unsqueeze(-1) * parts.code_scale[head, pages] / 255
    code_query = rounded_to_int8(turned[..., : levels.shape[-1]])
    offset = torch.einsum("hqd,hqmpd->hqmp", code_query, levels) * step
    estimate = (means.gather(2, pages).unsqueeze(-1) + offset).flatten(2)
    estimate = estimate.masked_fill(~held, -torch.inf)
    best = estimate.sort(dim=-1, descending=True, stable=True).indices[..., :num_candidates]
    return place.gather(2, best), held.gather(2, best)


def _best(
    query: Tensor, place: Tensor, held: Tensor, keys: Tensor, ids: Tensor, tail: Tensor, k: int
) -> tuple[Tensor, Tensor, Tensor]:
    """Scores, ids and counts of the best of the candidates and the tail, padded to k."""
    H, N, P, _ = keys.shape
    T = tail.shape[1]
    head = torch.arange(H, device=query.device)[:, None, None]
    candidates = keys[head, place // P, place % P].float()
    scores = torch.einsum("hqd,hqcd->hqc", query, candidates).masked_fill(~held, -torch.inf)
    who = ids.flatten(1)[head, place].long().masked_fill(~held, N * P + T)
    tail_ids = torch.arange(N * P, N * P + T, device=query.device)
    scores = torch.cat([scores, query @ tail.float().mT], 2)
    who = torch.cat([who, tail_ids.expand(*query.shape[:2], -1)], 2)
    by_id = who.sort(dim=-1)
    order = scores.gather(2, by_id.indices).sort(dim=-1, descending=True, stable=True)
    scores, who = order.values[..., :k], by_id.values.gather(2, order.indices)[..., :k]
    who = who.masked_fill(scores == -torch.inf, -1)
    missing = (0, k - who.shape[2])
    padded = torch.nn.functional.pad(scores, missing, value=-torch.inf)
    return padded, torch.nn.functional.pad(who, missing, value=-1), (who >= 0).sum(2)


def rounded_to_int8(query: Tensor) -> Tensor:
    """query [..., D] as integers from -127 to 127 times a scale for each query."""
    largest = query.abs().amax(-1, keepdim=True)
    safe = largest.masked_fill(largest == 0, 1.0)
    return (query / safe * 127).round() * (largest / 127)
