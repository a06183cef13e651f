"""Attention of many queries over one block of dense keys: the step of a streamed prefill.

The fused operators of torch run where they fit (they return the log-sum-exp that merging needs);
`attend_block_reference` defines what is correct and serves the rest (soft caps, odd head sizes).
"""

from __future__ import annotations

import torch
from torch import Tensor

from wavekv.kernels.dispatch import merge_state_
from wavekv.kernels.fused import fused_operator, run_fused

State = tuple[Tensor, Tensor]

_REFERENCE_LOGITS = 1 << 26
"""Logits that the reference holds at once (256 MiB); longer blocks of queries are cut."""


def attend_block(
    query: Tensor,
    keys: Tensor,
    values: Tensor,
    *,
    scale: float,
    valid: Tensor | None = None,
    causal: bool = False,
    softcap: float | None = None,
) -> State:
    """Attend with every query to a block of keys.

    query: [B, Hq, T, D]. keys, values: [B, Hkv, S, D]; T and S may be 0. valid: [B, S] or
    [B, Hkv, S] bool, or None; what it masks must be finite, or may come through as NaN. causal:
    query t sees keys 0..t; needs S = T.
    Returns out [B, Hq, T, D] and lse [B, Hq, T], float32; 0 and -inf for a query that sees no key.

    Raises:
        ValueError: causal with S != T.
    """
    out, lse = _attend(query, keys, values, scale, valid, causal, softcap)
    return out.float(), lse


def attend_into(
    state: State | None,
    query: Tensor,
    keys: Tensor,
    values: Tensor,
    *,
    scale: float,
    valid: Tensor | None = None,
    causal: bool = False,
    softcap: float | None = None,
) -> State:
    """`merge_state` of `state` (None for the empty one) with `attend_block`, in the memory of
    `state` where the device allows it; use only what is returned.

    The output of a block is read in the dtype that its operator gives, and never copied to float32.
    """
    out, lse = _attend(query, keys, values, scale, valid, causal, softcap)
    if state is None:
        return out.float().contiguous(), lse.contiguous()
    return merge_state_(*state, out, lse)


def attend_block_reference(
    query: Tensor,
    keys: Tensor,
    values: Tensor,
    *,
    scale: float,
    valid: Tensor | None = None,
    causal: bool = False,
    softcap: float | None = None,
) -> State:
    """`attend_block` by its definition, in float32."""
    B, Hq, T, D = query.shape
    Hkv, S = keys.shape[1:3]
    k, v = keys.float(), values.float()
    allowed = torch.ones(1, 1, 1, 1, S, dtype=torch.bool, device=query.device)
    if valid is not None:
        # [B, 1 or Hkv, S]
        seen = valid[:, None] if valid.ndim == 2 else valid
        allowed = seen[:, :, None, None]
        v = torch.where(seen[..., None], v, 0.0)
    outs, lses = [], []
    rows = max(1, _REFERENCE_LOGITS // (B * Hq * S))
    for start in range(0, T, rows):
        stop = min(start + rows, T)
        q = query[:, :, start:stop].float().reshape(B, Hkv, Hq // Hkv, stop - start, D)
        logits = torch.einsum("bhgtd,bhsd->bhgts", q, k) * scale
        if softcap is not None:
            logits = softcap * torch.tanh(logits / softcap)
        visible = allowed
        if causal:
            steps = torch.arange(S, device=query.device)
            visible = allowed & (steps <= torch.arange(start, stop, device=query.device)[:, None])
        logits = logits.masked_fill(~visible, -torch.inf)
        lse = logits.logsumexp(-1)
        weights = (logits - lse.nan_to_num(neginf=0.0)[..., None]).exp()
        outs.append(torch.einsum("bhgts,bhsd->bhgtd", weights, v).flatten(1, 2))
        lses.append(lse.flatten(1, 2))
    return torch.cat(outs, 2), torch.cat(lses, 2)


def _empty(query: Tensor) -> State:
    out = torch.zeros_like(query, dtype=torch.float32)
    return out, out.new_full(out.shape[:-1], -torch.inf)


def _attend(
    query: Tensor,
    keys: Tensor,
    values: Tensor,
    scale: float,
    valid: Tensor | None,
    causal: bool,
    softcap: float | None,
) -> State:
    """`attend_block`, but out may have the dtype of the query."""
    if causal and keys.shape[2] != query.shape[2]:
        raise ValueError(
            f"a causal block needs as many keys as queries, got {keys.shape[2]} keys and "
            f"{query.shape[2]} queries"
        )
    if keys.shape[2] == 0 or query.shape[2] == 0:
        return _empty(query)
    state = None
    if softcap is None and query.dtype == keys.dtype == values.dtype:
        state = _grouped(query, keys, values, scale, valid, causal)
    if state is None:
        return attend_block_reference(
            query, keys, values, scale=scale, valid=valid, causal=causal, softcap=softcap
        )
    return _without_blind_queries(*state, valid, causal)


def _grouped(
    query: Tensor, keys: Tensor, values: Tensor, scale: float, valid: Tensor | None, causal: bool
) -> State | None:
    """Run a fused operator, which wants as many key heads as query heads; None if none serves."""
    B, Hq, T, D = query.shape
    Hkv = keys.shape[1]
    group = Hq // Hkv
    if causal and group > 1:
        keys, values = (x.repeat_interleave(group, 1) for x in (keys, values))
        if valid is not None and valid.ndim == 3:
            valid = valid.repeat_interleave(group, 1)
    elif group > 1:
        # queries of a group share keys: more rows instead of copies of the keys
        query = query.reshape(B, Hkv, group * T, D)
    operator = fused_operator(query, keys, values, valid, causal)
    if operator is None:
        return None
    out, lse = run_fused(operator, query, keys, values, scale, valid, causal)
    return out.reshape(B, Hq, T, D), lse.reshape(B, Hq, T)


def _without_blind_queries(out: Tensor, lse: Tensor, valid: Tensor | None, causal: bool) -> State:
    """Fused operators leave NaN where a query sees no key: make that the empty state."""
    if valid is None:
        return out, lse
    sees = valid.cumsum(-1) > 0 if causal else valid.any(-1, keepdim=True)
    if sees.ndim == 2:
        sees = sees[:, None]
    else:
        sees = sees.repeat_interleave(out.shape[1] // sees.shape[1], 1)
    return torch.where(sees[..., None], out, 0.0), torch.where(sees, lse, -torch.inf)
