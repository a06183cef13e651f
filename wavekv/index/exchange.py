"""Refining balanced clusters: tokens change places between pages that stay full.

Two steps, each with a fixed number of rounds, batched and without a wait for the device:

1. Deal: pages keep their means and give up their tokens; tokens go to the nearest mean, a page
   takes its `page_size` nearest (a few rounds of proposals).
2. Exchange: pairs of pages that would both become tighter swap tokens (Hartigan's criterion, 1975,
   which counts that a token pulls the mean of its page).
"""

import torch
from torch import Tensor

_MAX_SCOPE = 512
"""Pages among which tokens change places: keeps the cost of refinement linear in S."""
_MAX_SCORES = 1 << 22
"""Scores of tokens by pages in memory at a time; more rows take turns."""
_DEALS = 2
_PROPOSALS = 3
_EXCHANGES = 16
_RIVALS = 16
_RIVALS_LAST = 4
"""Exchanges for which a list of rivals serves."""
_HANDSHAKES = 4


def refine_pages(x: Tensor, num_valid: Tensor, page_size: int) -> Tensor:
    """Make pages tighter: [R, S] int64, a permutation of the tokens of x [R, S, D], which stand in
    the order of their pages, the first `num_valid` [R, 1] of each row valid."""
    R, S, D = x.shape
    # the bisection put near pages next to each other, so that a block of them is a region
    block = min(S, _MAX_SCOPE * page_size)
    pages = block // page_size
    # distances need keys near zero: any key will do as the origin (a mean would depend on how the
    # sum is split); what is not finite must not spread through means
    x = x.nan_to_num(0.0, 0.0, 0.0)
    x = (x - x[:, :1]).view(-1, block, D)
    ends = page_size * torch.arange(1, S // page_size + 1, device=x.device)
    full = (ends <= num_valid).view(-1, pages)
    rows = max(1, _MAX_SCORES // (block * pages))
    parts = zip(x.split(rows), full.split(rows), strict=True)
    order = torch.cat([_refine_block(x, full, page_size) for x, full in parts])
    starts = torch.arange(0, S, block, device=x.device).repeat(R).unsqueeze(1)
    return (order + starts).view(R, S)


def _refine_block(x: Tensor, full: Tensor, page_size: int) -> Tensor:
    """[b, S] int64, a permutation of x [b, S, D]; only tokens of `full` [b, C] pages move."""
    b, S, D = x.shape
    order = torch.arange(S, device=x.device).expand(b, S)

    def move(where: Tensor) -> None:
        nonlocal x, order
        x, order = take_rows(x, where).view(b, S, D), order.gather(1, where)

    for _ in range(_DEALS):
        move(_deal(x, full, page_size))
    rivals = None
    for i in range(_EXCHANGES):
        if i % _RIVALS_LAST == 0:
            rivals = None
        where, rivals = _exchange(x.view(b, -1, page_size, D), full, rivals)
        move(where)
    return order


def _deal(x: Tensor, full: Tensor, page_size: int) -> Tensor:
    """Deal the tokens of full pages to the means of these pages, the nearest first.

    Tokens propose to the nearest mean that has room, and pages take the nearest of those who
    propose. Who is left when the rounds are over fills the free slots, in the order of pages.

    Args:
        x: [b, S, D] float32 in the order of pages.
        full: [b, C] bool.

    Returns:
        [b, S] int64, a permutation of the tokens of each row.
    """
    b, S, D = x.shape
    C = S // page_size
    slot = torch.arange(S, device=x.device)
    mean = x.view(b, C, page_size, D).mean(2)
    norm = mean.square().sum(-1)
    # page C stands for none
    page = torch.where(full, C, slot[:C]).repeat_interleave(page_size, 1)
    room = torch.nn.functional.pad(full * page_size, (0, 1))
    for _ in range(_PROPOSALS):
        bias = norm.masked_fill(room[:, :C] == 0, torch.inf)
        # distance less the square of the key
        nearest = torch.baddbmm(bias.unsqueeze(1), x, mean.mT, alpha=-2).min(2)
        wish = nearest.indices.masked_fill(page < C, C)
        rank, asked = _rank(wish, nearest.values + x.square().sum(-1), C + 1)
        page = torch.where(rank < room.gather(1, wish), wish, page)
        room = (room - asked).clamp_min(0)
    # those left, by the page they wished last, and the free slots, by page
    is_left = page == C
    left = nearest.indices.masked_fill(~is_left, C).sort(dim=1, stable=True).indices
    taken = slot[:page_size] >= room[:, :C].unsqueeze(2)
    free = taken.view(b, S).to(torch.uint8).sort(dim=1, stable=True).indices // page_size
    dealt = torch.where(slot < is_left.sum(1, keepdim=True), free, page.gather(1, left))
    return page.scatter(1, left, dealt).sort(dim=1, stable=True).indices


def _rank(group: Tensor, distance: Tensor, num_groups: int) -> tuple[Tensor, Tensor]:
    """Each token's rank by distance within its group, and the sizes of the groups.

    Args:
        group: [b, S] int64 in 0..num_groups-1.
        distance: [b, S].

    Returns:
        [b, S] and [b, num_groups] int64.
    """
    order = distance.sort(dim=1, stable=True).indices
    order = order.gather(1, group.gather(1, order).sort(dim=1, stable=True).indices)
    size = torch.zeros(len(group), num_groups, dtype=torch.int64, device=group.device)
    size = size.scatter_add(1, group, torch.ones_like(group))
    start = (size.cumsum(1) - size).gather(1, group.gather(1, order))
    place = torch.arange(group.shape[1], device=group.device) - start
    return torch.empty_like(group).scatter_(1, order, place), size


def _exchange(x: Tensor, full: Tensor, rivals: Tensor | None) -> tuple[Tensor, Tensor]:
    """One round in which disjoint pairs of pages swap the tokens that make both tighter.

    A token that leaves its page of P for another lowers the sum of squares by
    `P / (P - 1) * distance to its mean - P / (P + 1) * distance to the other`: its gain. Every page
    looks for the partner with whom its best swap gains most, and a pair then swaps best token for
    best token, second for second, as long as that gains.

    Args:
        x: [b, C, P, D] float32 pages.
        full: [b, C] bool pages that take part.
        rivals: [b, C, K] int64 pages to look at, or None to look at all.

    Returns:
        [b, C * P] int64, a permutation of the tokens of each row, and [b, C, K] the pages with
        which swaps gain most, to look at next time.
    """
    b, C, P, D = x.shape
    ids = torch.arange(C, device=x.device).expand(b, C)
    mean = x.mean(2)
    leave, join = P / (P - 1), P / (P + 1)
    # the gain of moving to a page is stay + 2 join x.mean - join |mean|^2
    stay = leave * (x - mean.unsqueeze(2)).square().sum(-1) - join * x.square().sum(-1)
    norm = join * mean.square().sum(-1)
    mean = 2 * join * mean

    def of_pages(values: Tensor, index: Tensor) -> Tensor:
        # values: [b, C, ...] of the pages index: [b, ...]
        return take_rows(values.reshape(b, C, -1), index.reshape(b, -1)).view(
            *index.shape, *values.shape[2:]
        )

    if rivals is None:
        tokens = torch.cat([x, stay.unsqueeze(3)], -1).view(b, C * P, D + 1)
        gain = tokens @ torch.nn.functional.pad(mean, (0, 1), value=1.0).mT
        best = gain.view(b, C, P, C).amax(2) - norm.unsqueeze(1)
        both = (best + best.mT).masked_fill(torch.eye(C, dtype=torch.bool, device=x.device), -1.0)
        both, rivals = both.nan_to_num(-1.0).topk(min(_RIVALS, C), dim=2)
    else:
        gain = x @ of_pages(mean, rivals).mT + stay.unsqueeze(3)
        best = gain.amax(2) - of_pages(norm, rivals)
        # pages that are not rivals of each other do not meet
        table = best.new_full((b, C, C), -torch.inf).scatter_(2, rivals, best)
        both = (best + table.mT.gather(2, rivals)).masked_fill(rivals == ids.unsqueeze(2), -1.0)

    # who is whose best partner, among those who have none yet
    partner = ids
    alone = full
    for _ in range(_HANDSHAKES):
        choice = both.masked_fill(~(alone.unsqueeze(2) & of_pages(alone, rivals)), -1.0).max(2)
        wish = rivals.gather(2, choice.indices.unsqueeze(2)).squeeze(2)
        wish = torch.where(choice.values > 0, wish, ids)
        partner = torch.where(alone & (wish.gather(1, wish) == ids), wish, partner)
        alone = full & (partner == ids)

    paired = (partner != ids).unsqueeze(2)
    pull = stay + (x @ of_pages(mean, partner).unsqueeze(3)).squeeze(3)
    pull = pull - of_pages(norm, partner).unsqueeze(2)
    # in a page that stays alone no token moves, padding least of all
    pull = torch.where(paired, pull, 0)
    offers = pull.sort(dim=2, descending=True, stable=True)
    mine = offers.indices + P * ids.unsqueeze(2)
    swap = paired & (offers.values + of_pages(offers.values, partner) > 0)
    return torch.where(swap, of_pages(mine, partner), mine).view(b, C * P), rivals


def take_rows(x: Tensor, order: Tensor) -> Tensor:
    """x: [R, S, D], order: [R, n] in 0..S-1 -> [R * n, D] rows in that order.

    A flat `index_select`: on a CPU several times faster than `gather`.
    """
    R, S, D = x.shape
    offset = torch.arange(R, device=x.device).unsqueeze(1) * S
    return x.reshape(R * S, D).index_select(0, (order + offset).view(-1))
