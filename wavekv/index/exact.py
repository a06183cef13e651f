"""The exact answer, by brute force: what approximate searches are measured against."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from wavekv.errors import InputError
from wavekv.index.inputs import Array, as_heads, expect_count, expect_finite, expect_like
from wavekv.index.result import SearchResult, as_given

_SCORES_AT_ONCE = 1 << 25


def exact_search(keys: Array, queries: Array, k: int) -> SearchResult:
    """The `k` keys of the highest inner product with each query.

    keys: [H, N, D] or [N, D]; queries: [H, Q, D] or [Q, D]; numpy or torch, float32, bfloat16 or
    float16, computed in float32. ids are positions; of equal products the lower comes first.

    Raises:
        InputError: shapes that do not fit, numbers that are not finite, k < 1.
        DtypeError: another type.

    Cost: O(H N Q D) operations; scores of 128 MiB at a time.
    """
    keyed, is_flat = as_heads("keys", keys)
    asked, _ = as_heads("queries", queries, is_flat=is_flat)
    H, N, D = keyed.shape
    k = expect_count("k", k)
    expect_like("queries", asked, heads=H, dim=D, device=keyed.device)
    expect_finite("keys", keyed)
    expect_finite("queries", asked)
    step = max(1, _SCORES_AT_ONCE // max(1, H * N))
    keyed = keyed.float()
    parts = [
        _best(torch.bmm(asked[:, i : i + step].float(), keyed.mT), k)
        for i in range(0, max(1, asked.shape[1]), step)
    ]
    scores, ids = (torch.cat(part, 1) for part in zip(*parts, strict=True))
    counts = (ids >= 0).sum(2)
    work = torch.full_like(counts, N)
    found = scores, ids, counts, torch.zeros_like(counts), work, work.clone()
    return SearchResult(*as_given(found, queries, is_flat=is_flat))


def _best(scores: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """The `k` largest of scores [H, Q, N] and their positions, sorted and padded."""
    best = min(k, scores.shape[2])
    if best == 0:
        empty = scores.new_full((*scores.shape[:2], k), -torch.inf)
        return empty, torch.full_like(empty, -1, dtype=torch.int64)
    values, ids = _top_with_low_ids(scores, best)
    missing = (0, k - best)
    pad = torch.nn.functional.pad
    return pad(values, missing, value=-torch.inf), pad(ids, missing, value=-1)


def _top_with_low_ids(scores: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """`topk` that prefers lower positions among equals, at the border too."""
    border = scores.topk(k, dim=-1).values[..., -1:]
    above, level = scores > border, scores == border
    room = k - above.sum(-1, keepdim=True)
    taken = above | (level & (level.cumsum(-1) <= room))
    ids = taken.nonzero()[:, 2].view(*scores.shape[:2], k)
    order = scores.gather(2, ids).sort(dim=-1, descending=True, stable=True)
    return order.values, ids.gather(2, order.indices)


def recall_at_k(ids: Array, true_ids: Array) -> Array:
    """The share of the true ids that were found.

    ids: [..., K] and true_ids: [..., k] integers, -1 for none; numpy or torch.
    Returns [...]: 1 where there is nothing to find. float64 for numpy, float32 for torch.

    Raises:
        InputError: shapes that differ before the last dimension.
    """
    is_numpy = not isinstance(ids, Tensor)
    found, true = (torch.as_tensor(np.asarray(x) if is_numpy else x) for x in (ids, true_ids))
    if found.shape[:-1] != true.shape[:-1]:
        raise InputError(
            f"ids and true_ids must be [..., K] and [..., k] of the same shape before, got "
            f"{tuple(found.shape)} and {tuple(true.shape)}"
        )
    wanted = true >= 0
    hits = ((true.unsqueeze(-1) == found.unsqueeze(-2)).any(-1) & wanted).sum(-1)
    total = wanted.sum(-1)
    share = torch.where(total > 0, hits.double() / total.clamp(min=1), 1.0)
    return share.numpy() if is_numpy else share.float()
