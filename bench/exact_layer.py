"""Exact attention of one layer that an engine has, over every page on the host: what a step of the
engine is compared with."""

from __future__ import annotations

import torch
from torch import Tensor

from wavekv.index.levels import Logits
from wavekv.kernels import merge_state
from wavekv.kernels.block import attend_block
from wavekv.kernels.step import END, START
from wavekv.offload.engine import DecodeEngine

BLOCK_PAGES = 1 << 14
"""Pages of each KV head that are brought to the device at once."""


def exact_layer(engine: DecodeEngine, number: int, query: Tensor, logits: Logits) -> Tensor:
    """[B, Hq, D] attention of query [B, Hq, D] to all tokens that layer `number` holds, the newest
    included. For contexts without padding."""
    shape, layer = engine.shape, engine.layers[number]
    query = query.unsqueeze(2)
    keys, values = (x[:, :, _live(engine)] for x in layer.steady[:2])
    options = {"scale": logits.scale, "softcap": logits.softcap}
    state = attend_block(query, keys, values, **options)
    arena, n = layer.context.paged.arena, engine.num_pages
    assert bool((layer.pages.summary.counts[:, :, :n] == shape.page_size).all())
    ids = layer.pages.arena_ids[:, :, :n].cpu()
    for some in ids.split(BLOCK_PAGES, dim=2):
        stored = arena.gather(some.flatten()).to(engine.device)
        pages = arena.layout.decode(stored).unflatten(0, some.shape)
        keys, values = (pages[:, :, :, half].flatten(2, 3) for half in range(2))
        state = merge_state(*state, *attend_block(query, keys, values, **options))
    return state[0][:, :, 0]


def _live(engine: DecodeEngine) -> Tensor:
    """The slots of the steady zone that hold tokens."""
    shape = engine.shape
    start, end = int(engine.counters[START]), int(engine.counters[END])
    local = shape.sinks + torch.arange(start, end, device=engine.device) % shape.ring
    return torch.cat([torch.arange(shape.sinks, device=engine.device), local])
