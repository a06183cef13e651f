"""Pages in two tiers: what goes where, what is refused, and what is kept when a disk fails."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from tiered_cases import LAYOUTS, add, make_arena, random_pages

from wavekv.errors import CapacityError
from wavekv.kvstore.page_file import PageFile


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
