"""Pages in two tiers: whatever is done, each holds what was written, in memory or in the file."""

from __future__ import annotations

from collections import Counter
from concurrent.futures import Future
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, precondition, rule
from tiered_cases import LAYOUTS, make_arena, random_pages

from wavekv.errors import CapacityError


class TieredMachine(RuleBasedStateMachine):
    """Pages that are made, shared, brought and read, against a dict of what they hold."""

    @initialize(
        kind=st.sampled_from(sorted(LAYOUTS)), chunk=st.integers(1, 5), host=st.integers(16, 40)
    )
    def start(self, kind: str, chunk: int, host: int) -> None:
        self.folder = TemporaryDirectory()
        self.layout = LAYOUTS[kind]
        self.arena = make_arena(self.folder.name, self.layout, host, 150, chunk)
        self.references: Counter[int] = Counter()
        self.content: dict[int, torch.Tensor] = {}
        self.open: list[tuple[torch.Tensor, Future[None]]] = []

    @rule(count=st.integers(0, 6), seed=st.integers(0, 999), later=st.booleans())
    def make(self, count: int, seed: int, later: bool) -> None:
        pages = random_pages(self.layout, count, seed)
        if sum(len(ids) for ids, _ in self.open) > 6:
            self.finish()
        try:
            ids = self.arena.allocate(count)
        except CapacityError:
            # neither tier has room: the disk has 150
            assert len(self.references) + count > 140
            return
        assert not set(ids.tolist()) & set(self.references)
        self.arena.put(ids, pages)
        if later:
            self.open.append((ids, Future()))
            self.arena.seal(ids, after=self.open[-1][1])
        else:
            self.arena.seal(ids)
        self.references.update(ids.tolist())
        self.content |= dict(zip(ids.tolist(), pages, strict=True))

    @rule()
    def finish(self) -> None:
        while self.open:
            self.open.pop()[1].set_result(None)

    @precondition(lambda self: self.references)
    @rule(data=st.data())
    def retain(self, data: st.DataObject) -> None:
        ids = self.some(data)
        self.arena.retain(torch.tensor(ids))
        self.references.update(ids)

    @precondition(lambda self: self.references)
    @rule(data=st.data(), everything=st.booleans(), later=st.booleans())
    def release(self, data: st.DataObject, everything: bool, later: bool) -> None:
        self.finish()
        ids = self.some(data)
        if everything:
            ids = [page for page in ids for _ in range(self.references[page])]
        (self.arena.drop if later else self.arena.release)(torch.tensor(ids))
        self.references.subtract(ids)
        self.references = +self.references

    @precondition(lambda self: self.references)
    @rule(data=st.data(), none=st.integers(0, 2))
    def bring(self, data: st.DataObject, none: int) -> None:
        ids = torch.tensor([-1] * none + self.some(data))
        slots = self.arena.bring(ids).slots
        assert torch.equal(slots < 0, ids < 0)
        held = self.arena.host.gather(slots[ids >= 0])
        assert torch.equal(held, self.expected(ids[ids >= 0].tolist()))

    @precondition(lambda self: self.references)
    @rule(data=st.data())
    def gather(self, data: st.DataObject) -> None:
        ids = self.some(data)
        before = self.arena.num_on_host
        assert torch.equal(self.arena.gather(torch.tensor(ids)), self.expected(ids))
        assert self.arena.num_on_host <= before

    def expected(self, ids: list[int]) -> torch.Tensor:
        return torch.stack([self.content[page] for page in ids])

    def some(self, data: st.DataObject) -> list[int]:
        pages = st.sampled_from(sorted(self.references))
        return data.draw(st.lists(pages, min_size=1, max_size=6, unique=True))

    def teardown(self) -> None:
        if not hasattr(self, "arena"):
            return
        self.finish()
        arena = self.arena
        assert arena.num_pages == len(self.references)
        arena.check_integrity()
        everything = sorted(self.references)
        if everything:
            assert torch.equal(arena.gather(torch.tensor(everything)), self.expected(everything))
        assert arena.host.budget.used <= arena.host.budget.limit
        budgets = arena.host.budget, arena.disk.budget
        del arena, self.arena
        assert [budget.used for budget in budgets] == [0, 0]
        assert not list(Path(self.folder.name).iterdir())
        self.folder.cleanup()


TestTiered = TieredMachine.TestCase
