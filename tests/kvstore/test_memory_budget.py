"""The memory budget, what it counts as available, and the layout of a page."""

from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from wavekv.errors import CapacityError
from wavekv.kvstore import KVLayout, MemoryBudget, available_memory, budget

GIB = 1 << 30


@pytest.fixture
def cgroup(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """A machine with 100 GiB available, in a control group described by files here."""
    monkeypatch.setattr(budget, "_CGROUP", tmp_path)
    machine = SimpleNamespace(available=100 * GIB)
    monkeypatch.setattr(budget.psutil, "virtual_memory", lambda: machine)
    return tmp_path


@pytest.mark.parametrize(
    ("limit", "used", "stat", "expected"),
    [
        (None, None, None, 100),
        ("max", 5 * GIB, None, 100),
        (30 * GIB, None, None, 100),
        (30 * GIB, 10 * GIB, None, 20),
        (300 * GIB, 10 * GIB, None, 100),
        (30 * GIB, 31 * GIB, None, 0),
        (30 * GIB, 28 * GIB, f"anon 5\nactive_file 7\ninactive_file {12 * GIB}\nslab 1\n", 14),
        ("gibberish", 1, None, 100),
    ],
)
def test_available_memory_heeds_the_control_group(cgroup, limit, used, stat, expected) -> None:
    files = {"memory.max": limit, "memory.current": used, "memory.stat": stat}
    for name, content in files.items():
        if content is not None:
            (cgroup / name).write_text(f"{content}\n")
    assert available_memory() == expected * GIB


def test_a_share_is_of_what_is_available(cgroup: Path) -> None:
    assert MemoryBudget.of_host(0.25).limit == 25 * GIB
    assert MemoryBudget.of_host(1.0).limit == 100 * GIB
    assert MemoryBudget.of_host(1).limit == 1


@given(limit=st.integers(0, 100), amounts=st.lists(st.integers(-60, 60)))
def test_takes_what_fits_and_counts_nothing_else(limit: int, amounts: list[int]) -> None:
    memory, used = MemoryBudget(limit), 0
    for amount in amounts:
        if amount < 0:
            amount = min(-amount, used)
            memory.give(amount)
            used -= amount
        elif used + amount <= limit:
            memory.check(amount)
            memory.take(amount)
            used += amount
        else:
            with pytest.raises(CapacityError):
                memory.take(amount)
        assert (memory.used, memory.free) == (used, limit - used)


def test_layout_gives_shape_and_bytes() -> None:
    layout = KVLayout(16, 128, torch.bfloat16)
    assert layout.page_shape == (2, 16, 128)
    assert layout.page_bytes == torch.empty(layout.page_shape, dtype=layout.dtype).nbytes
