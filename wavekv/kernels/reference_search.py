"""The search kernels in plain torch, any device; the contracts are in `wavekv.kernels.search`."""

import torch
from torch import Tensor

from wavekv.kernels.reference import rounded_to_int8

_FLOATS_AT_ONCE = 1 << 26
"""Components of keys that are decoded at once."""


def score_means(
    query: Tensor, codes: Tensor, scale: Tensor, *, num_threads: int | None = None
) -> Tensor:
    # [H, N / 16, 16, W / 4, 4] -> [H, N, W]
    levels = codes.transpose(2, 3).flatten(3).flatten(1, 2).float() - 128
    return rounded_to_int8(query) @ levels.mT * scale.unsqueeze(1)


def top_pages(rank: Tensor, count: int, *, num_threads: int | None = None) -> Tensor:
    order = rank.sort(dim=-1, descending=True, stable=True).indices
    return order[..., :count].sort(dim=-1).values


def search_pages(
    query: Tensor,
    code_query: Tensor,
    means: Tensor,
    chosen: Tensor,
    codes: Tensor,
    code_scale: Tensor,
    page_scale: Tensor,
    keys: Tensor,
    ids: Tensor,
    tail: Tensor,
    *,
    k: int,
    num_candidates: int,
    num_threads: int | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    H, Q, D = query.shape
    per_query = max(1, H * (chosen.shape[2] * keys.shape[2] + tail.shape[1]) * D)
    step = max(1, _FLOATS_AT_ONCE // per_query)
    parts = []
    for start in range(0, max(1, Q), step):
        asked = slice(start, start + step)
        parts.append(
            _search(
                query[:, asked],
                code_query[:, asked],
                means[:, asked],
                chosen[:, asked],
                codes,
                code_scale,
                page_scale,
                keys,
                ids,
                tail,
                k=k,
                num_candidates=num_candidates,
            )
        )
    scores, found, counts = (torch.cat(part, 1) for part in zip(*parts, strict=True))
    return scores, found, counts


def _search(
    query: Tensor,
    code_query: Tensor,
    means: Tensor,
    chosen: Tensor,
    codes: Tensor,
    code_scale: Tensor,
    page_scale: Tensor,
    keys: Tensor,
    ids: Tensor,
    tail: Tensor,
    *,
    k: int,
    num_candidates: int,
) -> tuple[Tensor, Tensor, Tensor]:
    H, Q = query.shape[:2]
    N, P = keys.shape[1:3]
    pages = chosen.clamp_min(0)
    head = torch.arange(H, device=query.device)[:, None, None]
    # [H, Q, M * P]: the keys of the chosen pages by place, n * P + p
    place = (pages.unsqueeze(-1) * P + torch.arange(P, device=query.device)).flatten(2)
    held = (chosen >= 0).unsqueeze(-1).expand(*chosen.shape, P).flatten(2)
    if place.shape[2] > num_candidates:
        packed = codes[head, pages]
        halves = torch.stack([packed & 15, packed >> 4], 3).float() - 8
        # [H, Q, M, 2, W / 8, P, 4] -> [H, Q, M, P, W]
        levels = halves.movedim(5, 3).flatten(4)
        step = page_scale[head, pages].unsqueeze(-1) * code_scale[head, pages] / 255
        offset = torch.einsum("hqd,hqmpd->hqmp", rounded_to_int8(code_query), levels) * step
        estimate = (means.gather(2, pages).unsqueeze(-1) + offset).flatten(2)
        estimate = estimate.masked_fill(~held, -torch.inf)
        best = estimate.sort(dim=-1, descending=True, stable=True).indices[..., :num_candidates]
        place, held = place.gather(2, best), held.gather(2, best)
    candidates = keys[head, place // P, place % P].float()
    scores = torch.einsum("hqd,hqcd->hqc", query, candidates).masked_fill(~held, -torch.inf)
    who = ids.flatten(1)[head, place].long().masked_fill(~held, N * P + tail.shape[1])
    tail_ids = torch.arange(N * P, N * P + tail.shape[1], device=query.device)
    scores = torch.cat([scores, query @ tail.float().mT], 2)
    who = torch.cat([who, tail_ids.expand(H, Q, -1)], 2)
    by_id = who.sort(dim=-1)
    order = scores.gather(2, by_id.indices).sort(dim=-1, descending=True, stable=True)
    who = by_id.values.gather(2, order.indices)[..., :k]
    scores = order.values[..., :k]
    who = who.masked_fill(scores == -torch.inf, -1)
    missing = (0, k - who.shape[2])
    padded = torch.nn.functional.pad(scores, missing, value=-torch.inf)
    return padded, torch.nn.functional.pad(who, missing, value=-1), (who >= 0).sum(2)
