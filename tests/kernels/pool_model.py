"""A page pool on a device beside a model of it in dicts and lists."""

from __future__ import annotations

from types import ModuleType
from typing import NamedTuple

import torch
from step_cases import make_case
from torch import Tensor

from wavekv.kernels.step import (
    AHEAD,
    ATTENDED,
    CHOSEN,
    CLOCK,
    ESTIMATED,
    LATER,
    PAGES,
    StepScratch,
)

LAST = 2**31 - 2
"""The last step but one that a clock can count."""
UNWRITTEN = -7


class Resolved(NamedTuple):
    """What becomes of the pages that a KV head chose."""

    slots: list[int]
    """The slot of each, -1 for none."""
    filled: list[tuple[int, int]]
    """(slot, page) that are to be fetched."""


class HeadModel:
    """What the pool holds for one KV head."""

    def __init__(self, num_slots: int) -> None:
        self.table: dict[int, int] = {}
        self.owner = [-1] * num_slots
        self.age = [-1] * num_slots
        self.ahead = [-1] * num_slots
        self.paging = [0] * 5

    def num_unused(self, now: int, chosen: list[int]) -> int:
        """Slots that hold nothing of this step once these pages are chosen."""
        found = {self.table[page] for page in chosen if page in self.table}
        return sum(age != now and slot not in found for slot, age in enumerate(self.age))

    def resolve(
        self,
        chosen: list[int],
        counts: list[int],
        ranks: list[int],
        now: int,
        misses: int,
        purpose: int,
    ) -> Resolved:
        found = [self.table[page] for page in chosen if page in self.table]
        num_new = sum(self.ahead[slot] == now for slot in found)
        for page in chosen:
            if page in self.table:
                self.age[self.table[page]] = now
        missing = [page for page in chosen if page not in self.table]
        unused = [slot for slot, age in enumerate(self.age) if age != now]
        unused.sort(key=lambda slot: (self.age[slot], slot))
        taken = min(len(missing), misses, len(unused))
        best = sorted(missing, key=lambda page: (-ranks[page], page))[:taken]
        filled = list(zip(unused[:taken], sorted(best), strict=True))
        for slot, _ in filled:
            self.table.pop(self.owner[slot], None)
        for slot, page in filled:
            self.table[page], self.owner[slot], self.age[slot] = slot, page, now
            if purpose == AHEAD:
                self.ahead[slot] = now
        slots = [self.table.get(page, -1) for page in chosen]
        if purpose != CHOSEN:
            self.paging[4] += taken
        else:
            tokens = sum(counts[page] for page in chosen if page in self.table)
            left = len(missing) - taken
            news = len(found) - num_new, taken + num_new, left, tokens, -num_new
            for place, new in enumerate(news):
                self.paging[place] += new
        return Resolved(slots, filled)


class PoolPair:
    """A pool, and its model for each KV head. Rows are the heads of all sequences: b * Hkv + h."""

    def __init__(
        self,
        ops: ModuleType,
        device: str,
        *,
        seed: int = 0,
        batch: int = 1,
        kv_heads: int = 1,
        page_size: int = 2,
        num_pages: int = 20,
        capacity: int = 27,
        slots: int = 7,
        most: int = 5,
        misses: int = 5,
        clock: int = 7,
        dtype: torch.dtype = torch.float32,
    ) -> None:
        self.ops, self.most, self.misses = ops, most, misses
        self.case = case = make_case(
            seed,
            batch=batch,
            kv_heads=kv_heads,
            group=1,
            head_dim=8,
            page_size=page_size,
            num_pages=num_pages,
            capacity=capacity,
            most=most,
            slots=slots,
            misses=misses,
            sinks=1,
            ring=8,
            start=8,
            end=12,
            span_pages=16,
            block_pages=1,
            dtype=dtype,
            device=device,
        )
        random = torch.Generator().manual_seed(seed)
        rows = batch * kv_heads
        self.counts = torch.randint(0, page_size + 1, (rows, capacity), generator=random).int()
        case.pages.summary.counts.copy_(self.counts.view_as(case.pages.summary.counts))
        # no two pages of the arena have a word in common
        memory, first = case.arena.memory, 1 << 20
        for chunk in memory:
            words = torch.arange(first, first + chunk.numel() * chunk.element_size() // 4)
            chunk.view(torch.int32).copy_(words.int().view_as(chunk.view(torch.int32)))
            first += len(words)
        words = torch.cat([chunk.view(torch.int32).flatten(1) for chunk in memory])
        # [rows, N, words]
        self.words = words[case.pages.arena_ids.cpu()].flatten(0, 1)
        self.arena_ids = case.pages.arena_ids.flatten(0, 1).tolist()
        self.heads = [HeadModel(slots) for _ in range(rows)]
        self.scratch = case.scratch
        self.early = StepScratch(*(part.clone() for part in self.scratch))
        self.left_out = self._scratch_of_misses(most)
        wide = self._scratch_of_misses(int(1.5 * most))
        self.runners_up = wide._replace(chosen=wide.victims.clone())
        for scratch in (self.scratch, self.early):
            for name in ("slots", "tokens"):
                getattr(scratch, name).fill_(UNWRITTEN)
        self.attended: list[dict[int, int]] | None = None
        """The slots of the pages that the last step chose and found or fetched, while nothing may
        evict them."""
        self.chosen: list[list[int]] = []
        self.used: set[tuple[int, int, int]] = set()
        """(row, slot, page) that the steps and prefetches of this moment used."""
        self.set_clock(clock)

    def _scratch_of_misses(self, count: int) -> StepScratch:
        """For a prefetch that goes on while the rest of the working memory is used again."""
        size = *self.scratch.num_misses.shape, count
        return self.scratch._replace(
            victims=self.scratch.victims.new_empty(size),
            wanted=self.scratch.wanted.new_empty(size),
            num_misses=torch.empty_like(self.scratch.num_misses),
        )

    @property
    def num_pages(self) -> int:
        return int(self.case.counters[PAGES])

    @property
    def now(self) -> int:
        return int(self.case.counters[CLOCK])

    def set_clock(self, to: int) -> None:
        """The end of a step, and the number of the next."""
        self.ops.settle(self.case.pool, self.case.counters, self.case.shape)
        self.case.counters[CLOCK] = to
        self.attended = None
        self.used.clear()

    def grow(self, count: int) -> None:
        self.case.counters[PAGES] += count

    def rank(self, ranks: list[list[int]]) -> None:
        """Say how pages [rows, n] rank: the bits of a float32 that is not negative."""
        for scratch in (self.scratch, self.early):
            bits = torch.tensor(ranks, dtype=torch.int32).view(*self.scratch.rank.shape[:2], -1)
            scratch.rank[..., : bits.shape[2]] = bits

    def step(self, *chosen: list[int]) -> None:
        """Attend to the pages chosen for each row, ascending."""
        self.scratch.status.zero_()
        self._resolve(self.scratch, chosen, CHOSEN)
        self.chosen = list(chosen)
        self.attended = [
            {page: head.table[page] for page in pages if page in head.table}
            for head, pages in zip(self.heads, chosen, strict=True)
        ]
        self.check()

    def prefetch(self, *chosen: list[int], wide: bool = False, purpose: int = LATER) -> None:
        """Make pages resident; a wide choice is larger and has no cap."""
        self._resolve(self.runners_up if wide else self.early, chosen, purpose)
        self.check()

    def fetch_left_out(self) -> None:
        """Make resident what the last step chose and did not wait for."""
        self._resolve(self.left_out, tuple(self.chosen), LATER)
        self.check()

    def _resolve(self, scratch: StepScratch, chosen: tuple[list[int], ...], purpose: int) -> None:
        case, rows = self.case, len(self.heads)
        assert len(chosen) == rows
        padded = torch.full((rows, scratch.chosen.shape[2]), -1, dtype=torch.int32)
        for row, pages in enumerate(chosen):
            assert sorted(set(pages)) == pages
            padded[row, : len(pages)] = torch.tensor(pages, dtype=torch.int32)
        scratch.chosen.copy_(padded.view_as(scratch.chosen))
        # a victim that is not written must not lead out of the pool
        scratch.victims.zero_()
        for part in (scratch.wanted, scratch.num_misses):
            part.fill_(UNWRITTEN)
        self.ops.resolve(
            case.pages,
            case.pool,
            case.counters,
            scratch,
            case.totals,
            case.shape,
            purpose=purpose,
        )
        self.ops.fetch(case.arena, case.pool, scratch, case.shape)
        misses = scratch.victims.shape[2]
        num_misses, every_rank = (
            scratch.num_misses.flatten().tolist(),
            scratch.rank.flatten(0, 1).tolist(),
        )
        victims, wanted = (x.flatten(0, 1).tolist() for x in (scratch.victims, scratch.wanted))
        for row, (head, pages) in enumerate(zip(self.heads, chosen, strict=True)):
            counts, ranks = self.counts[row].tolist(), every_rank[row]
            done = head.resolve(pages, counts, ranks, self.now, misses, purpose)
            self.used |= {
                (row, slot, page) for slot, page in zip(done.slots, pages, strict=True) if slot >= 0
            }
            taken = num_misses[row]
            assert taken <= misses
            assert victims[row][:taken] == [slot for slot, _ in done.filled]
            assert wanted[row][:taken] == [self.arena_ids[row][page] for _, page in done.filled]

    def check(self) -> None:
        """The pool is what its model says, and holds what it must."""
        pool = self.case.pool
        table, owner, age, ahead, order = (x.flatten(0, 1).tolist() for x in pool[1:])
        for row, head in enumerate(self.heads):
            resident = {page: slot for page, slot in enumerate(table[row]) if slot >= 0}
            owned = {page: slot for slot, page in enumerate(owner[row]) if page >= 0}
            assert resident == owned == head.table
            assert len(owned) == sum(page >= 0 for page in owner[row])
            assert (owner[row], age[row], ahead[row]) == (head.owner, head.age, head.ahead)
            assert sorted(order[row]) == list(range(len(order[row])))
        assert self.case.totals.paging.flatten(0, 1).tolist() == [x.paging for x in self.heads]
        for row, slot, page in self.used:
            assert owner[row][slot] == page
        # every slot, not only those of this step; one that was never filled is as it was
        held = words_of(pool.pages)
        pages = torch.tensor(owner)
        index = pages.clamp(min=0).unsqueeze(-1).expand_as(held)
        expected = self.words.gather(1, index).masked_fill(pages.unsqueeze(-1) < 0, 0)
        assert torch.equal(held, expected)
        if self.attended is not None:
            self._check_step(self.attended, held)

    def _check_step(self, expected: list[dict[int, int]], held: Tensor) -> None:
        slots, tokens, attended = (
            x.flatten(0, 1).tolist()
            for x in (self.scratch.slots, self.scratch.tokens, self.scratch.status)
        )
        for row, pages in enumerate(self.chosen):
            here = {}
            for j in range(self.most):
                slot = slots[row][j]
                if j >= len(pages) or slot < 0:
                    assert (slot, tokens[row][j]) == (-1, 0)
                    continue
                assert torch.equal(held[row, slot], self.words[row, pages[j]])
                assert tokens[row][j] == self.counts[row, pages[j]]
                here[pages[j]] = slot
            marks = [page for page, mark in enumerate(attended[row]) if mark]
            assert marks == sorted(here)
            assert set(attended[row]) <= {ESTIMATED, ATTENDED}
            assert len(set(here.values())) == len(here)
            assert here == expected[row]

    def paging(self, row: int = 0) -> list[int]:
        """Pages found, fetched, left to the estimate; tokens retrieved; pages prefetched."""
        paging: list[int] = self.case.totals.paging.flatten(0, 1)[row].tolist()
        return paging

    def slots(self, row: int = 0) -> list[int]:
        """The slots of the last step's pages."""
        slots: list[int] = self.scratch.slots.flatten(0, 1)[row].tolist()
        return slots


def words_of(pages: Tensor) -> Tensor:
    """[rows, S, words] of pages [B, Hkv, S, 2, P, D]: bits, so that NaN equals itself."""
    return pages.cpu().flatten(0, 1).flatten(2).contiguous().view(torch.int32)
