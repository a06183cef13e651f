"""A decode step in plain torch: the definition of what `wavekv.kernels.cuda` computes, and what
runs where there is no CUDA device. Same names, same arguments; counters are read on the host here.
"""

from __future__ import annotations

import torch
from torch import Tensor

from wavekv.kernels.page_codec import decode_pages
from wavekv.kernels.reference_levels import (
    block_logits,
    mix_query,
    refine_levels,
)
from wavekv.kernels.step import (
    AHEAD,
    ATTENDED,
    BIN_SHIFT,
    CANDIDATES,
    CHOSEN,
    CLOCK,
    END,
    ESTIMATED,
    FINAL,
    FINALISTS,
    FIRST,
    LEAST,
    LIKELY,
    MOST,
    NUM_BINS,
    PAGES,
    REFINED,
    SECOND,
    WIDE,
    StepArena,
    StepPages,
    StepPool,
    StepScratch,
    StepShape,
    StepSteady,
    StepTotals,
    bin_base,
    is_sampled,
    sampled_every,
)
from wavekv.kernels.step_reference_shift import (
    by_moments,
    logits_of_means,
    mixed_query,
    shift_of_pages,
)
from wavekv.kernels.step_reference_states import attend, estimate, merge, value_slope

__all__ = [
    "attend",
    "estimate",
    "fetch",
    "list_likely",
    "merge",
    "pick",
    "rank_pages",
    "refine",
    "resolve",
    "score",
    "select",
    "settle",
    "store",
    "value_slope",
]

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
    """Log mass of all pages by moments; put the new token (if there is one) into the ring.

    query: [B, Hq, D]; new_keys, new_values: [B, Hkv, D]; new_valid: [B] bool.
    Reads the counts, variances and mean keys of pages, and the mean keys of blocks.
    Writes `query_words`, `query_step`, `query_square`; for pages in use `block_logits`, `log_mass`,
    under a soft cap `shift`, and `status`: estimated. A kernel also leaves the softmax statistics
    of log mass + shift of groups of `SCORE_BLOCK` pages, and clears histograms and arrivals.
    """
    n = int(counters[PAGES])
    if new_keys is not None and new_values is not None and new_valid is not None:
        slot = shape.sinks + int(counters[END]) % shape.ring
        steady.keys[:, :, slot] = new_keys
        steady.values[:, :, slot] = new_values
        steady.valid[:, slot] = new_valid
    index = pages.summary.in_pages(0, n)
    words, step = mix_query(query, shape.scale)
    scratch.query_words.copy_(words.view(torch.int32))
    scratch.query_step[..., 0], scratch.query_step[..., 1] = step, words.sum(-1)
    scratch.query_square.copy_((query.float() * shape.scale).square().sum(-1))
    at_blocks = block_logits(query, index, shape.scale)
    scratch.block_logits[..., : at_blocks.shape[-1]] = at_blocks
    log_mass, shift = by_moments(index, scratch, shape)
    scratch.log_mass[..., :n] = log_mass
    if shape.softcap is not None:
        scratch.shift[..., :n] = shift
    scratch.status[..., :n] = ESTIMATED


def rank_pages(
    pages: StepPages,
    counters: Tensor,
    limits: Tensor,
    scratch: StepScratch,
    shape: StepShape,
    *,
    stage: int,
) -> None:
    """The rank of each page, and the least rank of the bin that holds the last one wanted; in the
    first two stages also of the bin that holds the last one likely to be chosen.

    Reads `log_mass`; in the `FIRST` stage also the shift, by moments (see `StepScratch.shift`).
    Writes `rank` and `threshold[stage]`; in the first two stages the latter is above all ranks if
    `limits[CANDIDATES]` is 0 or all pages are chosen: none is ranked again then. There it also
    writes `likely[stage]`, above all ranks if `limits[LIKELY + stage]` is 0 or the bin the lowest.
    """
    n = int(counters[PAGES])
    mass = scratch.log_mass[..., :n]
    if stage == FIRST:
        mass = mass + shift_of_pages(pages.summary.in_pages(0, n), scratch, shape)
    grouped = mass.unflatten(1, (shape.kv_heads, shape.group))
    share = grouped.softmax(-1).nan_to_num(nan=0.0).sum(2)
    is_alive = (grouped > -torch.inf).any(2)
    bits = share.contiguous().view(torch.int32).masked_fill(~is_alive, -1)
    scratch.rank[..., :n] = bits
    base = bin_base(shape.group)
    bins = ((bits >> BIN_SHIFT) - base).clamp(0, NUM_BINS - 1).long()
    histogram = torch.zeros(*bits.shape[:2], NUM_BINS, dtype=torch.int32, device=bits.device)
    wanted = limits[(CANDIDATES, FINALISTS, WIDE)[stage]]
    every = sampled_every(int(wanted), stage)
    is_counted = is_alive & is_sampled(torch.arange(n, device=bits.device), every)
    histogram.scatter_add_(2, bins, is_counted.int())
    above = histogram.flip(2).cumsum(2).flip(2)

    def least_of(wanted: Tensor) -> Tensor:
        is_enough = above >= (wanted // every).clamp(min=1)
        last = torch.where(is_enough, torch.arange(NUM_BINS, device=bits.device), 0).amax(2)
        return torch.where(last == 0, 0, (last + base) << BIN_SHIFT).int()

    least = least_of(wanted)
    if stage != FINAL:
        if int(limits[CANDIDATES]) == 0 or int(limits[MOST]) >= n:
            least.fill_(_NEVER)
        likely = least_of(limits[LIKELY + stage])
        is_idle = (likely == 0) | (limits[LIKELY + stage] == 0)
        scratch.likely[stage] = likely.masked_fill(is_idle, _NEVER)
    scratch.threshold[stage] = least


def list_likely(counters: Tensor, scratch: StepScratch, shape: StepShape, *, stage: int) -> None:
    """The pages whose rank reaches `likely[stage]`, ascending, as many as `chosen` has room for;
    then -1.

    Reads `rank` and `likely[stage]`; writes `chosen`, which may be of another size than that of the
    step."""
    n = int(counters[PAGES])
    is_likely = scratch.rank[..., :n] >= scratch.likely[stage].unsqueeze(-1)
    numbers = torch.arange(n, device=is_likely.device).masked_fill(~is_likely, n)
    first = numbers.sort(-1).values[..., : scratch.chosen.shape[2]]
    scratch.chosen.fill_(-1)
    scratch.chosen[..., : first.shape[-1]] = first.masked_fill(first == n, -1).int()


def refine(
    pages: StepPages, counters: Tensor, scratch: StepScratch, shape: StepShape, *, stage: int
) -> None:
    """Log mass and shift of the pages whose rank reaches `threshold[stage]`, by the high plane of
    the codes of their keys in the `FIRST` stage, by both planes in the `SECOND`.

    Reads `rank`, `threshold[stage]`, `query_words`, `query_step`, `block_logits`; of these pages
    the count, the mean key, the codes and steps of the keys.
    Writes `log_mass`, `shift` and `status` of these pages: refined. A kernel also leaves the
    softmax statistics of all log masses, of groups of `COUNT_BLOCK` pages.
    """
    n = int(counters[PAGES])
    index = pages.summary.in_pages(0, n)
    is_candidate = scratch.rank[..., :n] >= scratch.threshold[stage].unsqueeze(-1)
    numbers = torch.arange(n, device=is_candidate.device)
    scratch.log_mass[..., :n], scratch.shift[..., :n] = refine_levels(
        mixed_query(scratch),
        logits_of_means(index, scratch, shape),
        index,
        scratch.log_mass[..., :n],
        scratch.shift[..., :n],
        torch.where(is_candidate, numbers, -1),
        use_low=stage == SECOND,
        softcap=shape.softcap,
    )
    scratch.status[..., :n].masked_fill_(is_candidate, REFINED)


def select(counters: Tensor, limits: Tensor, scratch: StepScratch, shape: StepShape) -> None:
    """The chosen pages, ascending: the best by `rank`, as `limits` and `shape.top_p` say.

    Reads `rank` and `threshold[FINAL]`; writes `chosen`."""
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
    purpose: int = CHOSEN,
) -> None:
    now = int(counters[CLOCK])
    for b in range(shape.batch):
        for h in range(shape.kv_heads):
            _resolve_head(pages, pool, now, scratch, totals, b, h, purpose)


def _resolve_head(
    pages: StepPages,
    pool: StepPool,
    now: int,
    scratch: StepScratch,
    totals: StepTotals,
    b: int,
    h: int,
    purpose: int,
) -> None:
    chosen, age, owner = scratch.chosen[b, h], pool.age[b, h], pool.owner[b, h]
    table, totalled = pool.table[b, h], totals.paging[b, h]
    ids = chosen[chosen >= 0].long()
    slots = table[ids]
    hits = slots[slots >= 0].long()
    age[hits] = now
    # what was fetched ahead for this step was not found
    num_new = int((pool.ahead[b, h, hits] == now).sum())
    missing = ids[slots < 0]
    num_missing, places = len(missing), pages.arena_ids[b, h]
    if pages.host_slots is not None:
        # what is on the disk only is not to be had now
        places = pages.host_slots[places]
        missing = missing[places[missing] >= 0]
    order = pool.order[b, h].long()
    free = order[age[order] != now]
    taken = min(len(missing), scratch.victims.shape[2], len(free))
    victims = free[:taken]
    displaced = owner[victims]
    table[displaced[displaced >= 0].long()] = -1
    # of equal ranks the lower page first
    best = scratch.rank[b, h, missing].sort(descending=True, stable=True).indices[:taken]
    fetched = missing[best].sort().values
    table[fetched], owner[victims], age[victims] = victims.int(), fetched.int(), now
    scratch.victims[b, h, :taken] = victims.int()
    scratch.wanted[b, h, :taken] = places[fetched]
    scratch.num_misses[b, h] = taken
    if purpose == AHEAD:
        pool.ahead[b, h, victims] = now
    if purpose != CHOSEN:
        totalled[4] += taken
        return
    here = torch.where(chosen >= 0, table[chosen.clamp(min=0).long()], -1)
    counts = torch.where(here >= 0, pages.summary.counts[b, h, chosen.clamp(min=0).long()].int(), 0)
    scratch.slots[b, h], scratch.tokens[b, h] = here, counts
    scratch.status[b, h, chosen[here >= 0].long()] = ATTENDED
    totalled[0] += len(hits) - num_new
    totalled[1] += taken + num_new
    totalled[2] += num_missing - taken
    totalled[3] += counts.sum()
    totalled[4] -= num_new


def settle(pool: StepPool, counters: Tensor, shape: StepShape) -> None:
    now = int(counters[CLOCK])
    order = pool.order.long()
    is_of_step = pool.age.gather(2, order) == now
    # those of this step by their number, behind the others as these were
    place = torch.arange(shape.slots, device=order.device) - shape.slots
    keys = torch.where(is_of_step, order, place)
    pool.order.copy_(order.gather(2, keys.argsort(-1)))


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
