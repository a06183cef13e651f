"""The host arena: pages by id across chunks, shared by references, inside a budget."""

from collections import Counter

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, precondition, rule

from wavekv.errors import CapacityError, LayoutError
from wavekv.kvstore import HostArena, KVLayout, MemoryBudget

LAYOUT = KVLayout(page_size=4, head_dim=3, dtype=torch.float32)
PAGE = LAYOUT.page_bytes


def make_arena(chunk_pages: int = 5, budget_pages: int = 1000, *, pin: bool = False) -> HostArena:
    budget = MemoryBudget(budget_pages * PAGE)
    return HostArena(LAYOUT, budget, pin=pin, chunk_bytes=chunk_pages * PAGE)


class ArenaMachine(RuleBasedStateMachine):
    """Pages that are allocated, shared, written and read, against a dict of what they hold."""

    @initialize(chunk_pages=st.integers(1, 6))
    def start(self, chunk_pages: int) -> None:
        self.arena = make_arena(chunk_pages)
        self.references: Counter[int] = Counter()
        self.content: dict[int, torch.Tensor] = {}

    @rule(count=st.integers(0, 12), seed=st.integers(0, 999))
    def allocate_and_write(self, count: int, seed: int) -> None:
        free = self.arena.capacity - self.arena.num_pages
        before = len(self.arena.chunks)
        ids = self.arena.allocate(count)
        assert len(set(ids.tolist())) == count
        assert not set(ids.tolist()) & set(self.references)
        assert len(self.arena.chunks) == before or count > free
        pages = torch.randn(count, *LAYOUT.page_shape, generator=torch.manual_seed(seed))
        order = torch.randperm(count)
        self.arena.write(ids[order], pages)
        self.references.update(ids.tolist())
        self.content |= dict(zip(ids[order].tolist(), pages, strict=True))

    @precondition(lambda self: self.references)
    @rule(data=st.data(), twice=st.booleans())
    def retain(self, data: st.DataObject, twice: bool) -> None:
        ids = self.some(data) * (1 + twice)
        self.arena.retain(torch.tensor(ids).reshape(1, -1))
        self.references.update(ids)

    @precondition(lambda self: self.references)
    @rule(data=st.data(), everything=st.booleans(), later=st.booleans())
    def release(self, data: st.DataObject, everything: bool, later: bool) -> None:
        ids = self.some(data)
        if everything:  # all references at once: ids recur
            ids = [page for page in ids for _ in range(self.references[page])]
        (self.arena.drop if later else self.arena.release)(torch.tensor(ids))
        self.references.subtract(ids)
        self.references = +self.references

    @precondition(lambda self: self.references)
    @rule(data=st.data(), into=st.booleans())
    def read(self, data: st.DataObject, into: bool) -> None:
        ids = self.some(data)
        out = torch.full((len(ids), *LAYOUT.page_shape), torch.nan) if into else None
        pages = self.arena.gather(torch.tensor(ids), out)
        assert out is None or pages is out
        assert torch.equal(self.arena.read(torch.tensor(ids)), pages)
        assert torch.equal(pages, torch.stack([self.content[page] for page in ids]))

    def some(self, data: st.DataObject) -> list[int]:
        pages = st.sampled_from(sorted(self.references))
        return data.draw(st.lists(pages, min_size=1, max_size=8, unique=True))

    def teardown(self) -> None:
        if not hasattr(self, "arena"):
            return
        self.check()
        budget = self.arena.budget
        del self.arena
        assert budget.used == 0

    def check(self) -> None:
        arena = self.arena
        assert arena.num_pages == len(self.references)
        assert arena.nbytes == arena.num_pages * PAGE
        assert arena.budget.used == len(arena.chunks) * arena.pages_per_chunk * PAGE
        arena.check_integrity()


TestArena = ArenaMachine.TestCase


@given(limit=st.integers(1, 40), chunk=st.integers(1, 12), asked=st.integers(1, 60))
def test_what_does_not_fit_is_an_error_before_anything_is_allocated(limit, chunk, asked) -> None:
    arena = make_arena(chunk, limit)
    chunks = -(-asked // arena.pages_per_chunk)
    if chunks * arena.pages_per_chunk <= limit:
        assert len(arena.allocate(asked)) == asked
        return
    with pytest.raises(CapacityError):
        arena.allocate(asked)
    assert (arena.chunks, arena.capacity, arena.num_pages, arena.budget.used) == ([], 0, 0, 0)
    arena.check_integrity()


def test_the_capacity_error_says_expected_got_and_what_to_do() -> None:
    arena = HostArena(LAYOUT, MemoryBudget(8 << 20), pin=False, chunk_bytes=1 << 20)
    arena.allocate(1)
    pattern = (
        r"need 8\.0 MiB more, but cpu_budget is 8\.0 MiB of host RAM and 1\.0 MiB are in use; "
        "raise cpu_budget"
    )
    with pytest.raises(CapacityError, match=pattern):
        arena.reserve(9 * arena.pages_per_chunk - 1)


def test_a_budget_below_one_page_is_a_capacity_error() -> None:
    arena = HostArena(LAYOUT, MemoryBudget(PAGE - 1), pin=False)
    with pytest.raises(CapacityError):
        arena.allocate(1)


def test_a_chunk_that_the_system_refuses_gives_its_budget_back(monkeypatch) -> None:
    arena = make_arena()

    def refuse(self: HostArena) -> torch.Tensor:
        raise MemoryError

    monkeypatch.setattr(HostArena, "_new_chunk", refuse)
    with pytest.raises(MemoryError):
        arena.allocate(7)
    assert arena.budget.used == arena.capacity == 0
    monkeypatch.undo()
    assert len(arena.allocate(7)) == 7


def test_two_arenas_share_a_budget_and_deletion_gives_it_back() -> None:
    budget = MemoryBudget(10 * PAGE)
    first, second = (HostArena(LAYOUT, budget, pin=False, chunk_bytes=5 * PAGE) for _ in range(2))
    first.allocate(10)
    with pytest.raises(CapacityError):
        second.allocate(1)
    del first
    assert budget.used == 0
    second.allocate(6)
    assert budget.used == 6 * PAGE


def test_freed_pages_are_reused_before_a_new_chunk() -> None:
    arena = make_arena(chunk_pages=4)
    ids = arena.allocate(8)
    arena.release(ids[2:5])
    assert set(arena.allocate(3).tolist()) == set(ids[2:5].tolist())
    assert len(arena.chunks) == 2


@pytest.mark.parametrize(
    ("pages", "message"),
    [
        (
            torch.zeros(2, 2, 4, 3),
            r"pages must be \(3, 2, 4, 3\) torch.float32, got \(2, 2, 4, 3\)",
        ),
        (torch.zeros(3, 2, 3, 4), r"got \(3, 2, 3, 4\)"),
        (torch.zeros(3, 2, 4, 3, dtype=torch.bfloat16), "got .* torch.bfloat16"),
    ],
)
def test_pages_of_another_layout_are_an_error(pages: torch.Tensor, message: str) -> None:
    arena = make_arena()
    with pytest.raises(LayoutError, match=message):
        arena.write(arena.allocate(3), pages)


def test_integrity_check_notices_a_page_released_twice() -> None:
    arena = make_arena()
    ids = arena.allocate(2)
    arena.release(ids)
    arena.release(ids[:1])
    with pytest.raises(RuntimeError, match="arena integrity"):
        arena.check_integrity()


def test_an_arena_made_in_inference_mode_works_outside_it() -> None:
    with torch.inference_mode():
        arena = make_arena()
        ids = arena.allocate(7)
    pages = torch.randn(7, *LAYOUT.page_shape)
    arena.write(ids, pages)
    arena.retain(ids)
    assert torch.equal(arena.read(ids), pages)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("shuffled", [False, True])
def test_pages_come_from_and_go_to_a_device(device, dtype: torch.dtype, shuffled: bool) -> None:
    layout = KVLayout(4, 3, dtype)
    arena = HostArena(
        layout,
        MemoryBudget(1 << 20),
        pin=device.type == "cuda",
        chunk_bytes=5 * layout.page_bytes,
    )
    pages = torch.randn(13, *layout.page_shape, device=device).to(dtype)
    ids = arena.allocate(13)
    ids = ids[torch.randperm(13)] if shuffled else ids
    arena.write(ids, pages)
    if device.type == "cuda":
        torch.cuda.synchronize()
        assert all(chunk.is_pinned() for chunk in arena.chunks)
    assert torch.equal(arena.read(ids), pages.cpu())
    staging = torch.empty(13, *layout.page_shape, dtype=dtype)
    assert torch.equal(arena.gather(ids.flip(0), out=staging), pages.flip(0).cpu())


@pytest.mark.parametrize("host_dtype", ["int8", "int4", "int4-int2"])
@pytest.mark.parametrize("shuffled", [False, True])
def test_pages_are_stored_as_small_integers(device, host_dtype: str, shuffled: bool) -> None:
    layout = KVLayout(4, 64, torch.bfloat16, host_dtype)
    assert layout.page_bytes < layout.dense_bytes == 1024
    budget = MemoryBudget(1 << 20)
    chunk_bytes = 5 * layout.page_bytes
    arena = HostArena(layout, budget, pin=device.type == "cuda", chunk_bytes=chunk_bytes)
    pages = torch.randn(13, *layout.page_shape, device=device).bfloat16()
    counts = torch.full((13,), 4, device=device)
    counts[3] = 1
    ids = arena.allocate(13)
    assert arena.nbytes == 13 * layout.page_bytes
    ids = ids[torch.randperm(13)] if shuffled else ids
    arena.write(ids, pages, counts)
    if device.type == "cuda":
        torch.cuda.synchronize()
    expected = layout.decode(layout.encode(pages.cpu(), counts.cpu()))
    assert torch.equal(arena.read(ids), expected)
    assert torch.equal(layout.decode(arena.gather(ids.flip(0)).to(device)).cpu(), expected.flip(0))
    error = (expected - pages.cpu()).float()[counts.cpu() == 4].abs().mean(dim=(0, 2, 3))
    largest = {"int8": (0.02, 0.02), "int4": (0.2, 0.2), "int4-int2": (0.2, 0.7)}[host_dtype]
    assert all(found < most for found, most in zip(error.tolist(), largest, strict=True))


@given(
    chunk=st.integers(1, 6), ids=st.lists(st.integers(0, 23), max_size=24), ordered=st.booleans()
)
def test_runs_are_the_pages_in_order(chunk: int, ids: list[int], ordered: bool) -> None:
    arena = make_arena(chunk)
    all_ids = arena.allocate(24)
    pages = torch.randn(24, *LAYOUT.page_shape)
    arena.write(all_ids, pages)
    wanted = torch.tensor(sorted(set(ids)) if ordered else ids, dtype=torch.int64)
    position = 0
    for start, run in arena.runs(wanted):
        assert start == position
        assert torch.equal(run, pages[wanted[start : start + len(run)]])
        position += len(run)
    assert position == len(wanted)


def test_pages_allocated_at_once_are_a_run_in_each_chunk() -> None:
    arena = make_arena(chunk_pages=5)
    arena.allocate(3)
    runs = arena.runs(arena.allocate(12))
    assert [(start, len(run)) for start, run in runs] == [(0, 2), (2, 5), (7, 5)]
