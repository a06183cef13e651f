"""What the tests of the zones share: small settings, contexts of random tokens, plain attention."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from wavekv.config import OffloadConfig
from wavekv.kernels.page_index import PageIndex
from wavekv.offload import LayerContext, Logits, OffloadRuntime

D = 8
SMALL: dict[str, Any] = {
    "page_size": 4,
    "append_segment": 16,
    "segment": 64,
    "window": 8,
    "num_sink_tokens": 2,
    "min_budget": 0,
    "cpu_budget": 1 << 20,
}
"""Settings under which a hundred tokens fill several segments."""


def plain_attention(
    query: Tensor,
    keys: Tensor,
    values: Tensor,
    valid: Tensor,
    *,
    scale: float,
    softcap: float | None = None,
    sink_logits: Tensor | None = None,
) -> Tensor:
    """Causal attention of the last T tokens by its definition, in float64 on the CPU.

    query: [B, Hq, T, D]; keys, values: [B, Hkv, S, D]; valid: [B, S]. Returns [B, Hq, T, D], zeros
    for a query that sees nothing.
    """
    query, keys, values, valid = (x.detach().cpu() for x in (query, keys, values, valid))
    T, S, group = query.shape[2], keys.shape[2], query.shape[1] // keys.shape[1]
    k, v = (x.double().repeat_interleave(group, 1) for x in (keys, values))
    logits = query.double() @ k.mT * scale
    if softcap is not None:
        logits = softcap * torch.tanh(logits / softcap)
    sees = (torch.arange(S) <= torch.arange(S - T, S)[:, None]) & valid[:, None, None]
    weights = logits.masked_fill(~sees, -torch.inf).exp()
    total = weights.sum(-1, keepdim=True)
    if sink_logits is not None:
        total = total + sink_logits.detach().cpu().double().exp()[:, None, None]
    return (weights @ v / total).nan_to_num(0.0).float()


@dataclass
class Tokens:
    """All that a context was given: keys, values [B, Hkv, T, D] and valid [B, T], on the CPU."""

    keys: Tensor
    values: Tensor
    valid: Tensor

    @classmethod
    def random(cls, batch: int, heads: int, count: int, width: int = D) -> Tokens:
        keys, values = torch.randn(2, batch, heads, count, width)
        return cls(keys, values, torch.ones(batch, count, dtype=torch.bool))

    def __len__(self) -> int:
        return self.keys.shape[2]

    def between(self, start: int, stop: int) -> Tokens:
        return Tokens(
            self.keys[:, :, start:stop], self.values[:, :, start:stop], self.valid[:, start:stop]
        )

    def then(self, other: Tokens) -> Tokens:
        return Tokens(
            torch.cat([self.keys, other.keys], 2),
            torch.cat([self.values, other.values], 2),
            torch.cat([self.valid, other.valid], 1),
        )

    def select(self, index: Tensor) -> Tokens:
        return Tokens(self.keys[index], self.values[index], self.valid[index])


def new_context(
    tokens: Tokens,
    device: torch.device | str = "cpu",
    dtype: torch.dtype = torch.float32,
    **settings: Any,
) -> LayerContext:
    """An empty context for tokens of this shape; settings change `SMALL`."""
    runtime = OffloadRuntime(OffloadConfig(**SMALL | settings))
    keys = tokens.keys[:, :, :0].to(device, dtype)
    return LayerContext(runtime, keys, keys)


def feed(
    context: LayerContext,
    tokens: Tokens,
    *,
    group: int = 2,
    logits: Logits | None = None,
    sink_logits: Tensor | None = None,
    masked: bool | None = None,
) -> tuple[Tensor, Tensor]:
    """Give tokens to a context as one forward. Returns (query, out), out on the CPU.

    masked: pass the mask also where nothing is padding (the default: only where something is).
    """
    like = context.steady.keys.view
    batch, heads, count, width = tokens.keys.shape
    query = torch.randn(batch, heads * group, count, width).to(like)
    masked = not bool(tokens.valid.all()) if masked is None else masked
    out = context.attend(
        query,
        tokens.keys.to(like),
        tokens.values.to(like),
        tokens.valid.to(like.device) if masked else None,
        logits or Logits(width**-0.5),
        sink_logits,
    )
    return query, out.cpu()


def prefill(context: LayerContext, tokens: Tokens, chunk: int = 10**9, **options: Any) -> None:
    """Give tokens in chunks and page out, as `OffloadedKV.prefill` does."""
    context.runtime.is_prefilling = True
    for start in range(0, len(tokens), chunk):
        feed(context, tokens.between(start, start + chunk), **options)
    context.runtime.is_prefilling = False
    context.page_out()
    context.settle()


def same_index(one: PageIndex, other: PageIndex) -> None:
    """Two indexes of the same pages, built in other company: a sum that is rounded another way may
    change a code here and there."""
    for name, mine, theirs in zip(one._fields, one, other, strict=True):
        differ = mine.cpu() != theirs.cpu()
        assert int(differ.sum()) <= 0.01 * differ.numel(), name
