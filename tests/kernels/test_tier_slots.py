"""Slots of the page pool where some pages are on a disk: those wait for it, other misses do not."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from implementations import implementation
from step_cases import Case, make_case
from torch import Tensor

from wavekv.kernels import step_reference
from wavekv.kernels.step import AHEAD, CHOSEN, CLOCK

pytestmark = pytest.mark.usefixtures("_one_thread")


def with_tiers(case: Case, share: float, seed: int) -> Case:
    """Pages by ids of their own, of which host memory has so many."""
    random = torch.Generator().manual_seed(seed)
    places = case.pages.arena_ids.cpu()
    renamed = torch.randperm(places.numel(), generator=random)
    slots = torch.full((places.numel() + 3,), -1, dtype=torch.int64)
    here = torch.rand(places.numel(), generator=random) < share
    slots[renamed] = torch.where(here, torch.arange(places.numel()), -1)
    device = case.pages.arena_ids.device
    pages = case.pages._replace(arena_ids=renamed[places].to(device), host_slots=slots.to(device))
    return replace(case, pages=pages)


def outcome(case: Case) -> dict[str, Tensor]:
    scratch, pool = case.scratch, case.pool
    taken = torch.arange(scratch.wanted.shape[2]) < scratch.num_misses.cpu().unsqueeze(-1)
    found = {
        "wanted": scratch.wanted.cpu().masked_fill(~taken, -1),
        "victims": scratch.victims.cpu().masked_fill(~taken, -1),
        "num_misses": scratch.num_misses,
        "slots": scratch.slots,
        "tokens": scratch.tokens,
        "status": scratch.status,
        "paging": case.totals.paging,
        **{name: getattr(pool, name) for name in ("table", "owner", "age", "ahead", "order")},
    }
    return {name: part.cpu().clone() for name, part in found.items()}


@pytest.mark.parametrize("share", [0.0, 0.4, 1.0])
@pytest.mark.parametrize(("misses", "seed"), [(3, 0), (14, 1)])
def test_pages_on_the_disk_are_left_out(share: float, misses: int, seed: int) -> None:
    kernels, device = implementation("triton")
    ours, twin = (
        with_tiers(make_case(seed, misses=misses, device=place), share, seed)
        for place in (device, "cpu")
    )
    shape, random = twin.shape, torch.Generator().manual_seed(seed)
    late = 0
    for step, purpose in enumerate((CHOSEN, AHEAD, CHOSEN, CHOSEN)):
        size = shape.batch, shape.kv_heads, shape.capacity
        ranks = torch.randint(0, 1 << 30, size, generator=random, dtype=torch.int32)
        # the last step chooses as the one before
        if step < 3:
            chosen = (
                torch.rand(size, generator=random).argsort(-1)[..., : shape.most].sort(-1).values
            )
            chosen[..., -2:] = -1
        for case, ops in ((ours, kernels), (twin, step_reference)):
            case.scratch.chosen.copy_(chosen)
            case.scratch.rank.copy_(ranks)
            case.scratch.status.zero_()
            case.scratch.slots.fill_(-1)
            case.scratch.tokens.fill_(0)
            case.counters[CLOCK] = 8 + step
            places = case.pages, case.pool, case.counters, case.scratch, case.totals, shape
            ops.resolve(*places, purpose=purpose)
            ops.settle(case.pool, case.counters, shape)
        mine, theirs = outcome(ours), outcome(twin)
        for name, part in mine.items():
            assert torch.equal(part, theirs[name]), (step, name)
        wanted = theirs["wanted"]
        here = set(twin.pages.host_slots.tolist())
        assert set(wanted.flatten().tolist()) <= here | {-1}
        late = int(theirs["paging"][..., 2].sum())
    assert (late == 0) == (share == 1.0 and misses == 14)


@pytest.mark.parametrize("name", ["torch", "triton"])
def test_what_came_from_the_disk_is_fetched(name: str) -> None:
    kernels, device = implementation(name)
    case = with_tiers(make_case(1, kv_heads=1, batch=1, device=device), 0.0, 1)
    chosen = torch.full_like(case.scratch.chosen, -1)
    chosen[..., :4] = torch.tensor([3, 8, 20, 40], dtype=torch.int32)
    case.scratch.chosen.copy_(chosen)
    case.scratch.rank.fill_(1)
    places = case.pages, case.pool, case.counters, case.scratch, case.totals, case.shape
    kernels.resolve(*places)
    assert case.totals.paging[0, 0, :3].tolist() == [0, 0, 4]
    # two of them come
    ids = case.pages.arena_ids[0, 0, [3, 20]]
    renamed = case.pages.arena_ids.cpu().flatten()
    original = make_case(1, kv_heads=1, batch=1).pages.arena_ids.flatten()
    slots = dict(zip(renamed.tolist(), original.tolist(), strict=True))
    for id in ids.tolist():
        case.pages.host_slots[id] = slots[id]
    case.counters[CLOCK] += 1
    kernels.resolve(*places)
    kernels.fetch(case.arena, case.pool, case.scratch, case.shape)
    assert case.totals.paging[0, 0, :3].tolist() == [0, 2, 6]
    here = case.scratch.slots[0, 0, :4].tolist()
    assert [slot >= 0 for slot in here] == [True, False, True, False]
    memory = torch.cat([chunk.cpu() for chunk in case.arena.memory])
    for slot, page in ((here[0], 3), (here[2], 20)):
        expected = memory[slots[int(case.pages.arena_ids[0, 0, page])]]
        torch.testing.assert_close(
            case.pool.pages[0, 0, slot].cpu(), expected, rtol=0, atol=0, equal_nan=True
        )
