"""A decode step in plain torch: the definition of what `wavekv.kernels.cuda` computes, and what
runs where there is no CUDA device. Same names, same arguments; counters are read on the host here.
"""

from __future__ import annotations

import torch
from torch import Tensor

from wavekv.kernels import reference
from wavekv.kernels.means import unpack_rows
from wavekv.kernels.page_codec import decode_pages
from wavekv.kernels.step import (
    AGES,
    ATTEND_TOKENS,
    BIN_SHIFT,
    CANDIDATES,
    CLOCK,
    END,
    LEAST,
    MOST,
    NUM_BINS,
    PAGES,
    SAMPLE,
    SAMPLED_PAGES,
    START,
    WIDE,
    StepArena,
    StepPages,
    StepPool,
    StepScratch,
    StepShape,
    StepSteady,
    StepTotals,
    bin_base,
)

_NEVER = 0x7FFFFFFF


def score(
    query: Tensor,
    new_keys: Tensor | None,
    new_values: Tensor | None,
    new_valid: Tensor | None,
    steady: StepSteady,
    pages: StepPages,
    counters: Tensor,
    scratch: StepScratch,
    shape: StepShape,
) -> None:
    n = int(counters[PAGES])
    if new_keys is not None and new_values is not None and new_valid is not None:
        slot = shape.sinks + int(counters[END]) % shape.ring
        steady.keys[:, :, slot] = new_keys
        steady.values[:, :, slot] = new_values
        steady.valid[:, slot] = new_valid
    scratch.log_mass[..., :n], scratch.shift[..., :n] = reference.score(
        query,
        _mean_keys(pages, n),
        pages.variance[:, :, :n] if shape.tail == "second" else None,
        pages.counts[:, :, :n],
        scale=shape.scale,
        softcap=shape.softcap,
    )


def rank_pages(
    counters: Tensor,
    limits: Tensor,
    scratch: StepScratch,
    shape: StepShape,
    *,
    is_final: bool,
) -> None:
    n = int(counters[PAGES])
    mass = scratch.log_mass[..., :n]
    if not is_final:
        mass = mass + scratch.shift[..., :n]
    grouped = mass.unflatten(1, (shape.kv_heads, shape.group))
    share = grouped.softmax(-1).nan_to_num(nan=0.0).sum(2)
    is_alive = (grouped > -torch.inf).any(2)
    bits = share.contiguous().view(torch.int32).masked_fill(~is_alive, -1)
    scratch.rank[..., :n] = bits
    base = bin_base(shape.group)
    bins = ((bits >> BIN_SHIFT) - base).clamp(0, NUM_BINS - 1).long()
    histogram = torch.zeros(*bits.shape[:2], NUM_BINS, dtype=torch.int32, device=bits.device)
    every = SAMPLE if n >= SAMPLED_PAGES and not is_final else 1
    is_counted = is_alive & (torch.arange(n, device=bits.device) % every == 0)
    histogram.scatter_add_(2, bins, is_counted.int())
    above = histogram.flip(2).cumsum(2).flip(2)
    wanted = (limits[WIDE if is_final else CANDIDATES] // every).clamp(min=1)
    last = torch.where(above >= wanted, torch.arange(NUM_BINS, device=bits.device), 0).amax(2)
    least = torch.where(last == 0, 0, (last + base) << BIN_SHIFT).int()
    if not is_final and (int(limits[CANDIDATES]) == 0 or int(limits[MOST]) >= n):
        least.fill_(_NEVER)
    scratch.threshold[int(is_final)] = least


def refine(
    query: Tensor,
    pages: StepPages,
    counters: Tensor,
    scratch: StepScratch,
    shape: StepShape,
) -> None:
    n = int(counters[PAGES])
    is_candidate = scratch.rank[..., :n] >= scratch.threshold[0].unsqueeze(-1)
    candidates = torch.where(is_candidate, torch.arange(n, device=query.device), -1)
    scratch.log_mass[..., :n], scratch.shift[..., :n] = reference.refine(
        query,
        query,
        scratch.log_mass[..., :n],
        scratch.shift[..., :n],
        _mean_keys(pages, n),
        pages.codes[:, :, :n],
        pages.code_scale[:, :, :n],
        pages.page_scale[:, :, :n],
        pages.counts[:, :, :n],
        candidates,
        scale=shape.scale,
        softcap=shape.softcap,
    )


def select(counters: Tensor, limits: Tensor, scratch: StepScratch, shape: StepShape) -> None:
    n = int(counters[PAGES])
    scratch.attended[..., :n] = 0
    pick(counters, limits, scratch, scratch.chosen, shape)


def pick(
    counters: Tensor,
    limits: Tensor,
    scratch: StepScratch,
    chosen: Tensor,
    shape: StepShape,
    *,
    wide: bool = False,
) -> None:
    n, most = int(counters[PAGES]), int(limits[WIDE if wide else MOST])
    chosen.fill_(-1)
    bits, order = scratch.rank[..., :n].sort(dim=-1, descending=True, stable=True)
    wanted = bits >= 0
    if shape.top_p is not None and not wide:
        share = bits.clamp(min=0).contiguous().view(torch.float32)
        before = share.cumsum(-1) - share
        position = torch.arange(n, device=bits.device)
        wanted &= (before < shape.top_p * shape.group) | (position < int(limits[LEAST]))
    best = order.masked_fill(~wanted, n)[..., :most].sort(dim=-1).values
    chosen[..., : best.shape[-1]] = best.masked_fill(best == n, -1).int()


def resolve(
    pages: StepPages,
    pool: StepPool,
    counters: Tensor,
    scratch: StepScratch,
    totals: StepTotals,
    shape: StepShape,
    *,
    is_prefetch: bool = False,
) -> None:
    now = int(counters[CLOCK])
    for b in range(shape.batch):
        for h in range(shape.kv_heads):
            _resolve_head(pages, pool, now, scratch, totals, shape, b, h, is_prefetch)


def _resolve_head(
    pages: StepPages,
    pool: StepPool,
    now: int,
    scratch: StepScratch,
    totals: StepTotals,
    shape: StepShape,
    b: int,
    h: int,
    is_prefetch: bool,
) -> None:
    chosen, age, owner = scratch.chosen[b, h], pool.age[b, h], pool.owner[b, h]
    table, totalled = pool.table[b, h], totals.paging[b, h]
    ids = chosen[chosen >= 0].long()
    slots = table[ids]
    hits = slots[slots >= 0].long()
    age[hits] = now
    missing = ids[slots < 0]
    free = (age != now).nonzero().squeeze(1)
    # least recently used first, of equal ages the lower slot
    rest = (now - age[free]).clamp(1, AGES - 1)
    free = free[rest.sort(descending=True, stable=True).indices]
    taken = min(len(missing), scratch.victims.shape[2], len(free))
    victims = free[:taken].sort().values
    displaced = owner[victims]
    table[displaced[displaced >= 0].long()] = -1
    # of equal ranks the lower page first
    best = scratch.rank[b, h, missing].sort(descending=True, stable=True).indices[:taken]
    fetched = missing[best].sort().values
    table[fetched], owner[victims], age[victims] = victims.int(), fetched.int(), now
    scratch.victims[b, h, :taken] = victims.int()
    scratch.wanted[b, h, :taken] = pages.arena_ids[b, h, fetched]
    scratch.num_misses[b, h] = taken
    if is_prefetch:
        totalled[4] += taken
        return
    here = torch.where(chosen >= 0, table[chosen.clamp(min=0).long()], -1)
    counts = torch.where(here >= 0, pages.counts[b, h, chosen.clamp(min=0).long()], 0)
    scratch.slots[b, h], scratch.tokens[b, h] = here, counts
    scratch.attended[b, h, chosen[here >= 0].long()] = 1
    totalled[0] += len(hits)
    totalled[1] += taken
    totalled[2] += len(missing) - taken
    totalled[3] += counts.sum()


def fetch(arena: StepArena, pool: StepPool, scratch: StepScratch, shape: StepShape) -> None:
    for b in range(shape.batch):
        for h in range(shape.kv_heads):
            for i in range(int(scratch.num_misses[b, h])):
                chunk, slot = divmod(int(scratch.wanted[b, h, i]), arena.pages_per_chunk)
                page = arena.memory[chunk][slot]
                if shape.codec is not None:
                    page = decode_pages(page[None], shape.codec, pool.pages.dtype)[0]
                pool.pages[b, h, int(scratch.victims[b, h, i])] = page


def store(pages: Tensor, arena_ids: Tensor, arena: StepArena) -> None:
    for page, arena_id in zip(pages, arena_ids.tolist(), strict=True):
        chunk, slot = divmod(arena_id, arena.pages_per_chunk)
        arena.memory[chunk][slot] = page


def attend(
    query: Tensor,
    steady: StepSteady,
    pool: StepPool,
    counters: Tensor,
    scratch: StepScratch,
    shape: StepShape,
    *,
    pages: bool,
) -> None:
    page_parts = shape.page_parts
    if pages:
        for part in range(page_parts):
            j = slice(part * shape.attend_pages, (part + 1) * shape.attend_pages)
            slots, tokens = scratch.slots[:, :, j].long(), scratch.tokens[:, :, j]
            index = slots.clamp(min=0)[..., None, None, None]
            held = pool.pages.gather(2, index.expand(*slots.shape, *pool.pages.shape[3:]))
            position = torch.arange(shape.page_size, device=query.device)
            live = (position < tokens.unsqueeze(-1)) & (slots >= 0).unsqueeze(-1)
            keys, values = held[:, :, :, 0].flatten(2, 3), held[:, :, :, 1].flatten(2, 3)
            _put_state(query, keys, values, live.flatten(2), part, scratch, shape)
        return
    start, end = int(counters[START]), int(counters[END])
    slot = torch.arange(shape.sinks + shape.ring, device=query.device)
    position = start + (slot - shape.sinks - start) % shape.ring
    live = ((slot < shape.sinks) | (position <= end)) & steady.valid
    for part in range(page_parts, shape.attend_parts):
        first = (part - page_parts) * ATTEND_TOKENS
        t = slice(first, first + ATTEND_TOKENS)
        here = live[:, None, t].expand(-1, shape.kv_heads, -1)
        _put_state(query, steady.keys[:, :, t], steady.values[:, :, t], here, part, scratch, shape)


def value_slope(
    query: Tensor, pages: StepPages, counters: Tensor, scratch: StepScratch, shape: StepShape
) -> None:
    spans = -(-int(counters[PAGES]) // shape.span_pages)
    scatter = pages.scatter[:, :, :spans]
    scratch.slope[:, :, :spans] = reference.value_slope(query, scatter, scale=shape.scale)
    scratch.slope_spread[:, :, :spans] = 1 / scratch.slope_spread.shape[3]


def estimate(pages: StepPages, counters: Tensor, scratch: StepScratch, shape: StepShape) -> None:
    n, block = int(counters[PAGES]), shape.estimate_block
    width = scratch.part_out.shape[3]
    means = unpack_rows(
        pages.value_mean[:, :, :n], pages.value_scale[:, :, :n], width, torch.float32
    )
    for part in range(-(-n // block)):
        c = slice(part * block, min(n, (part + 1) * block))
        is_read = scratch.attended[:, :, c] != 0
        position = torch.arange(is_read.shape[2], device=is_read.device)
        use_slope = shape.tail == "second"
        span = part * block // shape.span_pages
        out, lse = reference.estimate(
            scratch.log_mass[:, :, c],
            means[:, :, c],
            torch.where(is_read, position, -1),
            scratch.shift[:, :, c] if use_slope else None,
            scratch.slope[:, :, span : span + 1] if use_slope else None,
            span_pages=block,
        )
        scratch.part_out[:, :, shape.attend_parts + part] = out
        scratch.part_lse[:, :, shape.attend_parts + part] = lse


def merge(
    counters: Tensor,
    scratch: StepScratch,
    totals: StepTotals,
    sinks: Tensor | None,
    shape: StepShape,
) -> None:
    parts = shape.attend_parts + -(-int(counters[PAGES]) // shape.estimate_block)
    lse, out = scratch.part_lse[:, :, :parts], scratch.part_out[:, :, :parts]
    everything, tail = lse.logsumexp(-1), lse[..., shape.attend_parts :].logsumexp(-1)
    totals.tail_mass.add_(torch.exp(tail - everything).nan_to_num(nan=0.0))
    if shape.tail == "none":
        lse, out = lse[..., : shape.attend_parts], out[..., : shape.attend_parts, :]
    if sinks is not None:
        lse = torch.cat([lse, sinks.float().reshape(1, -1, 1).expand(*lse.shape[:2], 1)], -1)
        out = torch.nn.functional.pad(out, (0, 0, 0, 1))
    weights = lse.softmax(-1).nan_to_num(nan=0.0)
    scratch.out.copy_((weights.unsqueeze(2) @ out).squeeze(2))


def _mean_keys(pages: StepPages, n: int) -> Tensor:
    """Of the first n pages, [B, Hkv, n, D] float32."""
    codes, scale = pages.mean[:, :, :n], pages.mean_scale[:, :, :n]
    return unpack_rows(codes, scale, codes.shape[3], torch.float32)


def _put_state(
    query: Tensor,
    keys: Tensor,
    values: Tensor,
    live: Tensor,
    part: int,
    scratch: StepScratch,
    shape: StepShape,
) -> None:
    keys, values = keys.float(), values.float()
    out, lse = reference._attend(query, keys, values, live, shape.scale, shape.softcap)
    scratch.part_out[:, :, part], scratch.part_lse[:, :, part] = out, lse
