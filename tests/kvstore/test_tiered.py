"""Pages in two tiers: whatever is done, each holds what was written, in memory or in the file."""

from __future__ import annotations

import os
import time
from collections import Counter
from concurrent.futures import Future
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
import pytest
import torch
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, precondition, rule

from wavekv.errors import CapacityError, ContextFormatError
from wavekv.kernels.crc32 import crc32_rows
from wavekv.kvstore import KVLayout, MemoryBudget, SavedPages, TieredArena
from wavekv.kvstore.page_file import PageFile

LAYOUTS = {
    "whole blocks of the disk": KVLayout(8, 64, torch.float32),
    "bytes of no such size": KVLayout(8, 64, torch.bfloat16, "int8"),
    "tiny": KVLayout(4, 3, torch.float32),
}


def make_arena(
    folder: str | None, layout: KVLayout, host: int, disk: int, chunk: int = 4, **options: object
) -> TieredArena:
    size = layout.page_bytes
    disk_budget = MemoryBudget(disk * size, "disk_budget", "disk")
    return TieredArena(
        layout,
        MemoryBudget(host * size),
        disk_budget,
        folder,
        pin=False,
        chunk_bytes=chunk * size,
        **options,
    )


def random_pages(layout: KVLayout, count: int, seed: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    pages = torch.randn(count, *layout.page_shape, generator=generator).to(layout.dtype)
    return layout.encode(pages)


def add(arena: TieredArena, pages: torch.Tensor) -> torch.Tensor:
    ids = arena.allocate(len(pages))
    arena.put(ids, pages)
    arena.seal(ids)
    return ids


def saved_pages(folder: Path, pages: torch.Tensor, rows: int = 32) -> SavedPages:
    """Pages in files of `rows` each."""
    names = [folder / f"{number}" for number in range(-(-len(pages) // rows))]
    for name, part in zip(names, pages.split(rows), strict=True):
        name.write_bytes(part.numpy().tobytes())
    descriptors = [os.open(name, os.O_RDONLY) for name in names]
    crc32 = crc32_rows(pages.flatten(1).view(torch.uint8)).numpy()
    return SavedPages([str(name) for name in names], descriptors, [], crc32, rows_per_file=rows)


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


def test_pages_over_the_host_budget_are_read_back(tmp_path: Path) -> None:
    layout = LAYOUTS["whole blocks of the disk"]
    arena = make_arena(str(tmp_path), layout, host=64, disk=1000)
    pages = random_pages(layout, 500, 0)
    ids = torch.cat([add(arena, part) for part in pages.split(20)])
    assert arena.num_on_host <= 64
    assert torch.equal(arena.gather(ids), pages)
    for part in ids.view(25, 20).flip(0):
        brought = arena.bring(part)
        assert torch.equal(arena.host.gather(brought.slots), pages[part])
    # the last is there still
    assert arena.bring(part).num_read == 0
    assert arena.disk.bytes_read >= 436 * layout.page_bytes
    arena.check_integrity()


def test_what_is_used_again_and_again_stays_in_memory(tmp_path: Path) -> None:
    layout = LAYOUTS["whole blocks of the disk"]
    arena = make_arena(str(tmp_path), layout, host=64, disk=1000)
    ids = torch.cat([add(arena, part) for part in random_pages(layout, 400, 0).split(20)])
    often, others = ids[:10], ids[10:].view(-1, 10)
    arena.bring(often)
    read = []
    for part in others:
        arena.bring(part)
        read.append(arena.bring(often).num_read)
    # the hand goes round once before it knows
    assert sum(read) <= 10
    assert sum(read[20:]) == 0


def test_a_pass_over_everything_displaces_nothing(tmp_path: Path) -> None:
    layout = LAYOUTS["tiny"]
    arena = make_arena(str(tmp_path), layout, host=64, disk=1000)
    ids = torch.cat([add(arena, part) for part in random_pages(layout, 400, 0).split(20)])
    arena.bring(ids[:30])
    arena.gather(ids)
    assert arena.bring(ids[:30]).num_read == 0


def test_neither_tier_has_room(tmp_path: Path) -> None:
    layout = LAYOUTS["tiny"]
    arena = make_arena(str(tmp_path), layout, host=32, disk=100)
    ids = torch.cat([add(arena, part) for part in random_pages(layout, 96, 0).split(8)])
    with pytest.raises(CapacityError, match=r"disk_budget is .* raise disk_budget"):
        arena.reserve(8)
    arena.check_integrity()
    assert torch.equal(arena.gather(ids), random_pages(layout, 96, 0))


def test_more_than_memory_holds_at_once_is_refused(tmp_path: Path) -> None:
    layout = LAYOUTS["tiny"]
    arena = make_arena(str(tmp_path), layout, host=32, disk=1000)
    with pytest.raises(CapacityError, match=r"at once, but cpu_budget .* raise cpu_budget"):
        arena.allocate(40)
    ids = torch.cat([add(arena, part) for part in random_pages(layout, 80, 0).split(8)])
    with pytest.raises(CapacityError, match="at once"):
        arena.bring(ids)
    arena.check_integrity()
    assert torch.equal(arena.gather(ids), random_pages(layout, 80, 0))


def test_without_a_folder_memory_is_the_limit() -> None:
    arena = make_arena(None, LAYOUTS["tiny"], host=32, disk=0)
    add(arena, random_pages(LAYOUTS["tiny"], 30, 0))
    with pytest.raises(CapacityError, match="set disk= to a folder"):
        arena.allocate(8)


def test_a_full_disk_is_an_error_before_anything_changed(tmp_path: Path, monkeypatch) -> None:
    layout = LAYOUTS["tiny"]
    arena = make_arena(str(tmp_path), layout, host=32, disk=1000)

    def refuse(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.posix_fallocate", refuse)
    ids = add(arena, random_pages(layout, 30, 0))
    with pytest.raises(CapacityError, match=f"{tmp_path}.*No space left on device"):
        arena.allocate(8)
    assert arena.disk.budget.used == 0
    monkeypatch.undo()
    arena.check_integrity()
    more = add(arena, random_pages(layout, 8, 1))
    assert torch.equal(arena.gather(ids), random_pages(layout, 30, 0))
    assert torch.equal(arena.gather(more), random_pages(layout, 8, 1))


def test_pages_that_cannot_be_written_stay_in_memory(tmp_path: Path, monkeypatch) -> None:
    layout = LAYOUTS["tiny"]
    arena = make_arena(str(tmp_path), layout, host=32, disk=1000)
    ids = [add(arena, random_pages(layout, 8, seed)) for seed in range(3)]

    def refuse(self: PageFile, *_: object) -> None:
        raise OSError(5, "Input/output error")

    monkeypatch.setattr(PageFile, "write", refuse)

    def add_more() -> None:
        for seed in range(3, 9):
            ids.append(add(arena, random_pages(layout, 8, seed)))

    with pytest.raises(CapacityError, match="pages could not be written to disk"):
        add_more()
    monkeypatch.undo()
    arena.check_integrity()
    for seed, part in enumerate(ids):
        assert torch.equal(arena.gather(part), random_pages(layout, 8, seed))
    for seed in range(len(ids), 20):
        ids.append(add(arena, random_pages(layout, 8, seed)))
    for seed, part in enumerate(ids):
        assert torch.equal(arena.gather(part), random_pages(layout, 8, seed))


@pytest.mark.parametrize("kind", LAYOUTS)
def test_a_page_that_changed_on_the_disk_is_named(tmp_path: Path, kind: str) -> None:
    layout = LAYOUTS[kind]
    arena = make_arena(str(tmp_path), layout, host=32, disk=1000)
    ids = torch.cat([add(arena, part) for part in random_pages(layout, 200, 0).split(8)])
    on_disk = ids[arena.slots_of(ids) < 0]
    page = int(on_disk[5])
    other = random_pages(layout, 1, 1).contiguous()
    row = np.array([arena.disk._place[page]])
    memory = torch.empty(3 * 4096, dtype=torch.uint8)
    start = -memory.data_ptr() % 4096
    memory[start : start + layout.page_bytes] = other.view(torch.uint8).flatten()
    arena.disk._scratch.write(row, np.array([memory.data_ptr() + start]))
    for read in arena.gather, arena.bring:
        with pytest.raises(ContextFormatError, match=rf"page {row[0]} of {tmp_path}.*crc32=.*got"):
            read(on_disk[:8])
    arena.check_integrity()
    arena.bring(on_disk[8:16])


def test_the_pages_of_a_saved_context_are_read_and_never_written(tmp_path: Path) -> None:
    layout = LAYOUTS["bytes of no such size"]
    saved = random_pages(layout, 96, 0)
    scratch = tmp_path / "scratch"
    scratch.mkdir()
    base = saved_pages(tmp_path, saved)
    before = {path: path.read_bytes() for path in tmp_path.iterdir() if path.is_file()}
    arena = make_arena(str(scratch), layout, host=48, disk=1000, base=base)
    assert arena.num_pages == 96
    assert arena.num_own == arena.num_on_host == 0
    own = torch.cat([add(arena, part) for part in random_pages(layout, 160, 1).split(8)])
    assert not set(own.tolist()) & set(range(96))
    for ids in torch.arange(96).flip(0).split(16):
        assert torch.equal(arena.host.gather(arena.bring(ids).slots), saved[ids])
    assert torch.equal(arena.gather(own), random_pages(layout, 160, 1))
    arena.check_integrity()
    del arena
    assert before == {path: path.read_bytes() for path in tmp_path.iterdir() if path.is_file()}


def test_orders_of_several_layers_take_no_more_memory_than_there_is() -> None:
    layout = LAYOUTS["tiny"]
    with TemporaryDirectory() as folder:
        arena = make_arena(folder, layout, host=16, disk=64)
        ids = add(arena, random_pages(layout, 16, seed=0))
        arena.release(ids[:8])
        # the free pages are promised to the first; what the others want goes to the disk
        for _ in range(3):
            arena.order(12)
        for seed in range(3):
            add(arena, random_pages(layout, 12, seed=seed))
        arena.cancel_orders()
        assert arena.num_pages == 8 + 36
        arena.check_integrity()


@pytest.mark.parametrize("host", [48, 160])
def test_pages_that_nobody_asked_for_come_if_there_is_room(tmp_path: Path, host: int) -> None:
    layout = LAYOUTS["whole blocks of the disk"]
    saved = random_pages(layout, 96, 0)
    arena = make_arena(str(tmp_path), layout, host, 1000, base=saved_pages(tmp_path, saved))
    own = add(arena, random_pages(layout, 20, 1))
    asked = torch.tensor([5, 80, 41])
    for _ in range(100):
        # asked for while they may be on their way
        arena.read_ahead()
        assert torch.equal(arena.host.gather(arena.bring(asked).slots), saved[asked])
        asked = (asked + 7) % 96
        arena.check_integrity()
        if arena.num_on_host == 116:
            break
    assert (arena.num_on_host == 116) == (host == 160)
    arena.check_integrity()
    everything = arena.bring(torch.arange(96) if host == 160 else torch.arange(20))
    assert (everything.num_read == 0) == (host == 160)
    assert torch.equal(arena.host.gather(everything.slots), saved[: len(everything.slots)])
    assert torch.equal(arena.gather(own), random_pages(layout, 20, 1))


def test_a_damaged_page_that_nobody_asked_for_is_named(tmp_path: Path) -> None:
    layout = LAYOUTS["tiny"]
    base = saved_pages(tmp_path, random_pages(layout, 96, 0))
    base.crc32[70] ^= 1
    arena = make_arena(None, layout, 400, 0, base=base)
    with pytest.raises(ContextFormatError, match=r"page 70 of .*2 with crc32="):
        _read_all_ahead(arena)
    arena.check_integrity()
    arena.bring(torch.arange(64))


def _read_all_ahead(arena: TieredArena) -> None:
    for _ in range(1000):
        arena.read_ahead()
        time.sleep(0.001)


def test_a_deadline_is_kept_however_much_is_asked_for(tmp_path: Path) -> None:
    layout = LAYOUTS["whole blocks of the disk"]
    arena = make_arena(str(tmp_path), layout, host=600, disk=6000, chunk=40)
    pages = random_pages(layout, 4000, 0)
    ids = torch.cat([add(arena, part) for part in pages.split(200)])
    slow = arena.disk.read

    def read(*arguments: object) -> None:
        time.sleep(0.02)
        slow(*arguments)

    arena.disk.read = read
    worst = 0.0
    for part in ids.split(300):
        began = time.monotonic()
        brought = arena.bring(part, deadline=0.001)
        worst = max(worst, time.monotonic() - began)
        there = brought.slots >= 0
        assert torch.equal(arena.host.gather(brought.slots[there]), pages[part[there]])
    # one part is read in a twentieth of a second, and all of them in more than one
    assert worst < 0.5
    arena.check_integrity()
    part = ids[:300]
    assert torch.equal(arena.host.gather(arena.bring(part).slots), pages[part])


def test_what_arrives_while_room_is_made_is_there_in_the_end(tmp_path: Path) -> None:
    """Pages on their way may give way to others that are wanted with them."""
    layout = LAYOUTS["tiny"]
    arena = make_arena(str(tmp_path), layout, host=64, disk=1000)
    pages = random_pages(layout, 400, 0)
    ids = torch.cat([add(arena, part) for part in pages.split(20)])
    random = torch.Generator().manual_seed(0)
    for _ in range(60):
        arena.bring(ids[torch.randperm(400, generator=random)[:40]], deadline=0.0)
        wanted = ids[torch.randperm(400, generator=random)[:40]]
        slots = arena.bring(wanted).slots
        assert (slots >= 0).all()
        assert torch.equal(arena.host.gather(slots), pages[wanted])
    arena.check_integrity()
