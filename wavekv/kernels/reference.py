"""The kernels in plain torch: float32 maths, any device, nothing tuned. The definition of correct.

Letters: B sequences, Hq query heads, Hkv KV heads, G = Hq // Hkv, D head_dim, N pages, P page size,
M selected pages, S tokens. The query heads of KV head h are h*G .. h*G+G-1. An attention state is
(out [B, Hq, D], lse [B, Hq]), both float32; the empty state is out = 0, lse = -inf. The contracts
are the docstrings of `wavekv.kernels.dispatch`.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from wavekv.kernels.page_codec import PageCodec, decode_pages

_MAX_STRIP = 256

VALUE_RIDGE = 1e-2
"""Ridge of the fit of values to logits, as a share of the spread that logits would have were the
dimensions of the keys independent: it bounds the slope where keys hardly vary along a query."""


def by_moments(
    x: Tensor,
    query_square: Tensor,
    variance: Tensor | None,
    counts: Tensor,
    softcap: float | None,
) -> tuple[Tensor, Tensor]:
    """Log mass and shift [B, Hq, N] from logits x [B, Hkv, G, N] of mean keys; query_square [B,
    Hkv, G] of the scaled queries, variance and counts [B, Hkv, N]."""
    # the derivative of the cap
    bend = torch.ones_like(x)
    if softcap is not None:
        capped = torch.tanh(x / softcap)
        x = softcap * capped
        bend = 1 - capped.square()
    # [B, Hkv, 1, N]
    log_count = counts.clamp(min=1).float().log().unsqueeze(2)
    log_mass, shift = log_count + x, torch.zeros_like(x)
    if variance is not None:
        uncapped = query_square.unsqueeze(-1) * variance.unsqueeze(2)
        spread = uncapped * bend.square()
        is_frozen = spread > 2 * log_count
        frozen = (2 * log_count * spread).sqrt() - log_count
        log_mass = log_mass + torch.where(is_frozen, frozen, 0.5 * spread)
        shift = uncapped * bend * torch.where(is_frozen, (2 * log_count / spread).sqrt(), 1.0)
    empty = (counts <= 0).unsqueeze(2)
    return (
        log_mass.masked_fill(empty, -torch.inf).flatten(1, 2),
        shift.masked_fill(empty, 0.0).flatten(1, 2),
    )


def select(
    log_mass: Tensor,
    num_kv_heads: int,
    *,
    max_pages: int,
    min_pages: int = 0,
    top_p: float | None = None,
) -> Tensor:
    pages = log_mass.shape[-1]
    # [B, Hkv, G, N]
    grouped = by_group(log_mass, num_kv_heads)
    # A head whose pages are all empty has no softmax, and ranks nothing.
    rank = grouped.softmax(dim=-1).nan_to_num(nan=0.0).sum(dim=2)
    rank = rank.masked_fill((grouped == -torch.inf).all(dim=2), -1.0)
    rank, order = rank.sort(dim=-1, descending=True, stable=True)
    wanted = rank >= 0
    if top_p is not None:
        reached = rank.clamp(min=0).cumsum(dim=-1)
        before = torch.cat([torch.zeros_like(reached[..., :1]), reached[..., :-1]], dim=-1)
        position = torch.arange(pages, device=log_mass.device)
        wanted &= (before < top_p * reached[..., -1:]) | (position < min_pages)
    # Unwanted pages sort behind every index, and become the padding.
    order = order.masked_fill(~wanted, pages)[..., :max_pages].sort(dim=-1).values
    return order.masked_fill(order == pages, -1)


def attend_pages(
    query: Tensor,
    chunks: Sequence[Tensor],
    page_ids: Tensor,
    counts: Tensor,
    *,
    scale: float,
    softcap: float | None = None,
    codec: PageCodec | None = None,
) -> tuple[Tensor, Tensor]:
    chunk_pages, width = len(chunks[0]), query.shape[-1]
    page_size = chunks[0].shape[2] if codec is None else codec.page_size
    # [B, Hkv, M, 2, P, D]
    pages = query.new_zeros(*page_ids.shape, 2, page_size, width, dtype=torch.float32)
    for i, chunk in enumerate(chunks):
        here = (page_ids >= i * chunk_pages) & (page_ids < (i + 1) * chunk_pages)
        held = chunk[page_ids[here] - i * chunk_pages]
        pages[here] = held.float() if codec is None else decode_pages(held, codec, torch.float32)
    slot = torch.arange(page_size, device=query.device)
    live = (slot < counts.unsqueeze(-1)) & (page_ids >= 0).unsqueeze(-1)
    keys, values = pages[:, :, :, 0].flatten(2, 3), pages[:, :, :, 1].flatten(2, 3)
    return _attend(query, keys, values, live.flatten(2), scale, softcap)


def attend_dense(
    query: Tensor,
    keys: Tensor,
    values: Tensor,
    valid: Tensor | None,
    *,
    scale: float,
    softcap: float | None = None,
) -> tuple[Tensor, Tensor]:
    if valid is None:
        valid = torch.ones(keys.shape[0], keys.shape[2], dtype=torch.bool, device=keys.device)
    live = valid.unsqueeze(1).expand(keys.shape[:3])
    return _attend(query, keys.float(), values.float(), live, scale, softcap)


def value_slope(query: Tensor, scatter: Tensor, *, scale: float) -> Tensor:
    B, Hkv, S, _, D, _ = scatter.shape
    # [B, Hkv, D, G]
    q = by_group(query, Hkv).mT * scale
    scatter = scatter.float()
    # one product for all spans; [B, Hkv, S, D, G]
    key_part, value_part = (scatter.flatten(2, 4) @ q).unflatten(2, (S, 2, D)).unbind(3)
    spread = (key_part * q.unsqueeze(2)).sum(3)
    variances = scatter[:, :, :, 0].diagonal(dim1=-2, dim2=-1)
    # [B, Hkv, S, G]
    ridged = spread.clamp_min(0) + VALUE_RIDGE * (variances @ q.square())
    # a span of equal keys has no slope: 0 / tiny
    slope: Tensor = value_part / ridged.clamp_min(torch.finfo(torch.float32).tiny).unsqueeze(3)
    return slope.permute(0, 1, 4, 2, 3).reshape(B, query.shape[1], S, D)


def project(x: Tensor, weight: Tensor) -> Tensor:
    b, n, D = x.shape
    # long blocks in strips: more parallel, and a sum does not depend on how many rows come along
    num_strips = 1
    while n // num_strips > _MAX_STRIP and n % (2 * num_strips) == 0:
        num_strips *= 2
    strips = x.reshape(b * num_strips, n // num_strips, D)
    direction = torch.bmm(weight.reshape(b * num_strips, 1, n // num_strips), strips)
    direction = direction.view(b, num_strips, D).sum(1)
    direction = direction / direction.abs().amax(1, keepdim=True).clamp_min(1e-30)
    direction = direction.unsqueeze(1).expand(b, num_strips, D).reshape(-1, D, 1)
    return torch.bmm(strips, direction).view(b, n)


def merge_state(
    out_a: Tensor, lse_a: Tensor, out_b: Tensor, lse_b: Tensor
) -> tuple[Tensor, Tensor]:
    # [..., 2]
    masses = torch.stack([lse_a.float(), lse_b.float()], dim=-1)
    lse = masses.logsumexp(dim=-1)
    # Where both are empty the softmax is NaN.
    weights = masses.softmax(dim=-1).masked_fill((lse == -torch.inf).unsqueeze(-1), 0.0)
    return out_a.float() * weights[..., :1] + out_b.float() * weights[..., 1:], lse


def by_group(tensor: Tensor, kv_heads: int) -> Tensor:
    """[B, Hq, X] -> float32 [B, Hkv, G, X]."""
    batch, heads, last = tensor.shape
    return tensor.float().reshape(batch, kv_heads, heads // kv_heads, last)


def _attend(
    query: Tensor, keys: Tensor, values: Tensor, live: Tensor, scale: float, softcap: float | None
) -> tuple[Tensor, Tensor]:
    """The state over keys, values [B, Hkv, S, D] where live [B, Hkv, S]; the rest may be NaN."""
    # [B, Hkv, G, S]
    logits = by_group(query, keys.shape[1]) @ keys.mT * scale
    if softcap is not None:
        logits = softcap * torch.tanh(logits / softcap)
    weights, lse = softmax_weights(logits.masked_fill(~live.unsqueeze(2), -torch.inf))
    return _weigh(weights, values), lse


def softmax_weights(logits: Tensor) -> tuple[Tensor, Tensor]:
    """Weights [B, Hkv, G, S] of logits, zero where all are -inf, and their lse [B, Hq]."""
    lse = logits.logsumexp(dim=-1)
    weights = logits.softmax(dim=-1).masked_fill((lse == -torch.inf).unsqueeze(-1), 0.0)
    return weights, lse.flatten(1, 2)


def _weigh(weights: Tensor, values: Tensor) -> Tensor:
    """[B, Hq, D]: values [B, Hkv, S, D] by weights [B, Hkv, G, S]. What weighs nothing is not read:
    it may be NaN."""
    dead = (weights == 0).all(dim=2).unsqueeze(-1)
    out: Tensor = weights @ values.masked_fill(dead, 0.0)
    return out.flatten(1, 2)
