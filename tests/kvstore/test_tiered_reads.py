"""Reads of pages in two tiers: checked, ahead of time, within a deadline, from a saved context."""

from __future__ import annotations

import time
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
import pytest
import torch
from tiered_cases import LAYOUTS, add, make_arena, random_pages, saved_pages

from wavekv.errors import ContextFormatError
from wavekv.kvstore import TieredArena


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
