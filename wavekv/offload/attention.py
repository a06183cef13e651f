"""Attention over the zones of one layer: a decode step, and a chunk of many queries.

Each zone gives an attention state; states merge exactly (docs/architecture.md).
"""

from __future__ import annotations

from itertools import chain

import torch
from torch import Tensor

from wavekv.config import OffloadConfig
from wavekv.index.levels import Logits, choose_of_levels, estimate_of_levels
from wavekv.kernels import attend_dense, attend_pages, merge_state
from wavekv.kernels.block import attend_into
from wavekv.kvstore import HostArena
from wavekv.offload.budget import page_limits
from wavekv.offload.counters import Counters, StepChoice
from wavekv.offload.paged import PagedZone
from wavekv.offload.steady import SteadyZone
from wavekv.offload.streaming import Block, StreamBuffers, stream_pages
from wavekv.offload.transfer import fetch_pages

State = tuple[Tensor, Tensor]


def attend_step(
    query: Tensor,
    steady: SteadyZone,
    paged: PagedZone,
    logits: Logits,
    config: OffloadConfig,
    counters: Counters,
    buffers: StreamBuffers,
) -> State:
    """One decode step. query: [B, Hq, D]; the steady zone holds the query's own token.

    Reads: the steady zone, all page statistics, and the selected pages; in "exact" mode all pages.
    """
    counters.last_query = query
    scale, softcap = logits.scale, logits.softcap
    keys, values = steady.keys.view, steady.values.view
    state = attend_dense(query, keys, values, steady.mask, scale=scale, softcap=softcap)
    if paged.num_pages == 0:
        return state
    if config.mode == "exact":
        return merge_state(*state, *_attend_all_pages(query, paged, logits, counters, buffers))
    least, most = page_limits(config, steady.end)
    pages, use_second = paged.summary, config.tail_estimate == "second"
    choice = choose_of_levels(
        query,
        pages,
        logits,
        least=least,
        most=most,
        top_p=config.top_p,
        refine=config.refine,
        use_variance=use_second,
    )
    counters.last_choice = StepChoice(choice.log_mass, choice.pages)
    retrieved, num_retrieved = _attend_chosen(query, paged, choice.pages, logits, counters)
    state = merge_state(*state, *retrieved)
    tail = estimate_of_levels(query, choice, pages, scale, use_slope=use_second)
    total = merge_state(*state, *tail)
    counters.record_step(num_retrieved, steady.end, tail[1], total[1])
    return state if config.tail_estimate == "none" else total


def attend_chunk(
    query: Tensor,
    keys: Tensor,
    values: Tensor,
    valid: Tensor | None,
    steady: SteadyZone,
    paged: PagedZone,
    logits: Logits,
    counters: Counters,
    buffers: StreamBuffers,
) -> State:
    """Exact causal attention of T new tokens to all before them and to each other.

    query: [B, Hq, T, D]; keys, values: [B, Hkv, T, D] of the new tokens, not yet in a zone; valid:
    [B, T] or None. Returns out [B, Hq, T, D], lse [B, Hq, T].
    """
    scale, softcap = logits.scale, logits.softcap
    state = attend_into(
        None, query, keys, values, valid=valid, causal=True, scale=scale, softcap=softcap
    )
    local = Block(steady.keys.view, steady.values.view, steady.mask, 0)
    for block in chain([local], stream_pages(paged, query.device, buffers)):
        state = attend_into(
            state,
            query,
            block.keys,
            block.values,
            valid=block.valid,
            scale=scale,
            softcap=softcap,
        )
        counters.bytes_to_device += block.moved
    return state


def _attend_all_pages(
    query: Tensor,
    paged: PagedZone,
    logits: Logits,
    counters: Counters,
    buffers: StreamBuffers,
) -> State:
    if query.device.type == "cpu" and isinstance(paged.arena, HostArena):
        counters.bytes_to_device += paged.page_ids.view.numel() * paged.arena.layout.page_bytes
        return attend_pages(
            query,
            paged.arena.chunks,
            paged.arena.bring(paged.page_ids.view).slots,
            paged.counts.view,
            scale=logits.scale,
            softcap=logits.softcap,
            codec=paged.arena.layout.codec,
        )
    state: State | None = None
    for block in stream_pages(paged, query.device, buffers):
        state = attend_into(
            state,
            query[:, :, None],
            block.keys,
            block.values,
            valid=block.valid,
            scale=logits.scale,
            softcap=logits.softcap,
        )
        counters.bytes_to_device += block.moved
    assert state is not None
    return state[0][:, :, 0], state[1][:, :, 0]


def _attend_chosen(
    query: Tensor, paged: PagedZone, chosen: Tensor, logits: Logits, counters: Counters
) -> tuple[State, Tensor]:
    """The state of the chosen pages [B, Hkv, M] (-1 padded) and the tokens in them [B, Hkv]."""
    on_host = chosen.cpu()
    is_page, index = on_host >= 0, on_host.clamp_min(0)
    ids = paged.page_ids.view.gather(2, index).masked_fill_(~is_page, -1)
    counts = paged.counts.view.gather(2, index).masked_fill_(~is_page, 0)
    pages = fetch_pages(paged, ids, query.device)
    counters.bytes_to_device += int(is_page.sum()) * paged.arena.layout.page_bytes
    counters.host_wanted += int(is_page.sum())
    counters.host_missing += pages.num_from_disk
    state = attend_pages(
        query,
        pages.chunks,
        pages.ids,
        counts.to(query.device),
        scale=logits.scale,
        softcap=logits.softcap,
        codec=pages.codec,
    )
    return state, counts.sum(-1)


def add_attention_sink(state: State, sink_logits: Tensor) -> State:
    """Let learned sinks (gpt-oss) into the denominator: a token of value zero for each head.

    state: out [B, Hq, T, D], lse [B, Hq, T]; sink_logits: [Hq].
    """
    out, lse = state
    sinks = sink_logits.float().reshape(1, -1, 1).expand(lse.shape)
    return merge_state(out, lse, torch.zeros_like(out), sinks)
