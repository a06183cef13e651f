"""The fused attention operators of torch, which also return the log-sum-exp: which can serve a
block, and how each is called."""

from __future__ import annotations

from functools import cache

import torch
from torch import Tensor

State = tuple[Tensor, Tensor]

CUDNN_LEAST = 1024
"""Queries and keys from which cuDNN is asked: it makes a plan for every new shape, which costs more
than it saves in small blocks."""

_WIDEST = 256
_PROBE_TOKENS = 192


def fused_operator(
    query: Tensor, keys: Tensor, values: Tensor, valid: Tensor | None, causal: bool
) -> str | None:
    """The operator that can serve this block, if any: "cpu", "cudnn", "flash" or "efficient".

    query: [B, H, T, D]; keys, values: [B, H, S, D], as `run_fused` takes them.
    """
    D = query.shape[-1]
    if query.device.type == "cpu":
        return "cpu"
    if query.device.type != "cuda" or D % 8 or D > _WIDEST:
        return None
    if valid is not None or query.dtype not in (torch.float16, torch.bfloat16):
        return "efficient"
    is_large = min(query.shape[2], keys.shape[2]) >= CUDNN_LEAST
    is_aligned = all(_is_aligned(x) for x in (query, keys, values))
    if is_large and is_aligned and torch.backends.cuda.cudnn_sdp_enabled():
        return "cudnn" if cudnn_agrees(query.device, query.dtype, D, causal) else "flash"
    return "flash"


def run_fused(
    operator: str,
    query: Tensor,
    keys: Tensor,
    values: Tensor,
    scale: float,
    valid: Tensor | None,
    causal: bool,
) -> State:
    """Attend: out [B, H, T, D] in the dtype of the query, lse [B, H, T] float32.

    query: [B, H, T, D]; keys, values: [B, H, S, D]; valid: [B, S] or [B, H, S] bool, or None.
    """
    ops = torch.ops.aten
    if operator == "cudnn":
        out, lse = ops._scaled_dot_product_cudnn_attention(
            query,
            keys,
            values,
            attn_bias=None,
            compute_log_sumexp=True,
            dropout_p=0.0,
            is_causal=causal,
            scale=scale,
        )[:2]
        # some versions have a last dimension of one
        return out, lse.reshape(query.shape[:3])
    if operator == "flash":
        out, lse = ops._scaled_dot_product_flash_attention(
            query, keys, values, 0.0, causal, scale=scale
        )[:2]
        return out, lse
    bias = _bias(query, keys, valid)
    if operator == "cpu":
        if bias is not None and causal:
            bias, causal = bias + _causal_bias(query), False
        out, lse = ops._scaled_dot_product_flash_attention_for_cpu(
            query, keys, values, 0.0, causal, attn_mask=bias, scale=scale
        )
        return out, lse
    # its bias must have rows aligned to 16 bytes, and its lse is padded
    if bias is not None:
        padded = bias.new_zeros(*bias.shape[:-1], -(-bias.shape[-1] // 16) * 16)
        padded[..., : bias.shape[-1]] = bias
        bias = padded[..., : bias.shape[-1]].expand(-1, query.shape[1], query.shape[2], -1)
    out, lse = ops._scaled_dot_product_efficient_attention(
        query, keys, values, bias, True, 0.0, causal, scale=scale
    )[:2]
    return out, lse[..., : query.shape[2]]


@cache
def cudnn_agrees(device: torch.device, dtype: torch.dtype, width: int, causal: bool) -> bool:
    """Whether cuDNN takes heads of this width and dtype, and gives what the definition gives: its
    log-sum-exp is documented by no version. Tried once in a process, on small input."""
    generator = torch.Generator(device).manual_seed(0)
    shape = 3, 1, 2, _PROBE_TOKENS, width
    query, keys, values = torch.randn(shape, generator=generator, device=device).to(dtype)
    scale = width**-0.5
    try:
        out, lse = run_fused("cudnn", query, keys, values, scale, None, causal)
    except (RuntimeError, TypeError):
        # refused, or a version whose operator is another
        return False
    logits = query.float() @ keys.float().mT * scale
    if causal:
        hidden = torch.ones(_PROBE_TOKENS, _PROBE_TOKENS, dtype=torch.bool, device=device).triu(1)
        logits = logits.masked_fill(hidden, -torch.inf)
    expected = logits.softmax(-1) @ values.float()
    return torch.allclose(out.float(), expected, atol=2e-2, rtol=2e-2) and torch.allclose(
        lse.float(), logits.logsumexp(-1), atol=2e-2, rtol=1e-3
    )


def _is_aligned(x: Tensor) -> bool:
    """Rows without gaps that begin at multiples of 16 bytes."""
    starts = (x.data_ptr(), *(stride * x.element_size() for stride in x.stride()[:-1]))
    return x.stride(-1) == 1 and not any(start % 16 for start in starts)


def _bias(query: Tensor, keys: Tensor, valid: Tensor | None) -> Tensor | None:
    """[B, 1 or H, 1, S]: 0 where a key may be seen, else -inf."""
    if valid is None:
        return None
    seen = valid[:, None] if valid.ndim == 2 else valid
    bias = torch.zeros(seen.shape, dtype=query.dtype, device=query.device)
    return bias.masked_fill_(~seen, -torch.inf)[:, :, None]


def _causal_bias(query: Tensor) -> Tensor:
    T = query.shape[2]
    return query.new_full((T, T), -torch.inf).triu_(1)
