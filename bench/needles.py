"""Needles: keys planted at known depths of a context, and whether a query that fits one finds it.

A needle is the key of one token of every layer and KV head, drawn at random with the norm of the
others. A query in its direction, as long as other queries, must choose the page that holds it.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

DEPTHS = 11


@dataclass(frozen=True, slots=True)
class Needles:
    """One needle at each depth."""

    positions: list[int]
    """Of the tokens."""
    keys: Tensor
    """[layers, Hkv, depths, D]"""

    def plant(self, layer: int, start: int, keys: Tensor) -> None:
        """Replace keys [.., Hkv, T, D], those of the tokens from `start` on, by the needles among
        them."""
        for depth, position in enumerate(self.positions):
            if start <= position < start + keys.shape[-2]:
                keys[..., position - start, :] = self.keys[layer, :, depth].to(keys)

    def queries(self, depth: int, group: int, length: float) -> Tensor:
        """[layers, 1, Hq, D]: for every head the needle at a depth, of another length."""
        found = torch.nn.functional.normalize(self.keys[:, :, depth], dim=-1) * length
        return found.repeat_interleave(group, 1).unsqueeze(1)


def draw_needles(
    first: int, last: int, layers: int, kv_heads: int, dim: int, *, length: float, seed: int
) -> Needles:
    """Needles of such a length at depths from token `first` to token `last`, evenly."""
    generator = torch.Generator().manual_seed(seed)
    keys = torch.randn(layers, kv_heads, DEPTHS, dim, generator=generator)
    keys = torch.nn.functional.normalize(keys, dim=-1) * length
    step = (last - first) / (DEPTHS - 1)
    return Needles([round(first + i * step) for i in range(DEPTHS)], keys)


def page_of(token_ids: Tensor, position: int) -> Tensor:
    """[Hkv] the page of each KV head that holds a token. token_ids: [1, Hkv, N, P]."""
    is_here = (token_ids[0] == position).any(-1)
    assert bool((is_here.sum(-1) == 1).all()), f"token {position} is not in one page of every head"
    return is_here.int().argmax(-1)


def figures(found: list[Tensor], errors: Tensor) -> dict[str, Any]:
    """How many needles were found, [heads] bool of each layer and depth, and how far outputs were
    off, relative L2 of any number of heads."""
    return {
        "needles": sum(len(heads) for heads in found),
        "needles_found": int(torch.stack(found).sum()),
        "depths": DEPTHS,
        "output_error_mean": float(errors.mean()),
        "output_error_p95": float(errors.quantile(0.95)),
        "error_samples": errors.numel(),
    }
